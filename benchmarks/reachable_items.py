"""Which items can be shown in embedding mode, and how well embeddings rank unbiased feedback.

    python benchmarks/reachable_items.py --data ../shared/data --results docs/results

Writes reachable_items.md. Before are the embeddings of a truncated SVD of the click matrix alone,
which are zero where nobody clicked. An item is reachable if its own vector as action ranks it first by 1e-4; long-tail
items are those outside the popular group.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
from partial_data import KUAIRAND_FOLDER, KUAIREC_FOLDER, partial_kuairand, partial_kuairec
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from worlds import write_page

from kuaifair_env.data import InteractionData
from kuaifair_env.data.own import MIN_TEST_EXPOSURES
from kuaifair_env.data.popularity import groups_of
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.embeddings import EMBEDDING_DIM, item_embeddings, unit_rows
from kuaifair_env.pooling import mean_embeddings
from kuaifair_env.response.calibration import WithinUserAUC, within_user_auc
from kuaifair_env.synthetic.config import twin_config
from kuaifair_env.synthetic.twin import load_twin
from kuaifair_env.world import HISTORY_LENGTH, covered_items, initial_history

MARGIN = 1e-4
HEADER = """# Which items can be shown

In `embedding` mode a slate is the top K of the inner products of the action with the item embeddings. *Reachable* are
the candidates whose own vector, as action, ranks them first by 1e-4 (in cosines). *Before* are the embeddings of a
truncated SVD of the click matrix alone: zero where nobody clicked, and equal for items with the same clicks. *AUC* is
that of cos(s, e) on the unbiased rows of the test log, within users, s being the mean embedding of the user's last
clicks in the training log; the gain is paired by user, with a 95 % bootstrap interval.

    python benchmarks/reachable_items.py --data ../shared/data --results docs/results

| world | candidates | reachable before | after | long-tail items | reachable before | after | AUC before | after \
| gain |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def svd_embeddings(data: InteractionData) -> FloatArray:
    """Returns unit factors of the degree-normalised click matrix without its trivial factors; zero without clicks."""
    log, n_items = data.train, len(data.items)
    cells = np.unique(log.users[log.clicks].astype(np.int64) * n_items + log.items[log.clicks])
    rows, columns = np.divmod(cells, n_items)
    user_degrees, item_degrees = np.bincount(rows), np.bincount(columns, minlength=n_items)
    weights = 1.0 / np.sqrt(user_degrees[rows] * item_degrees[columns])
    matrix = sparse.csr_matrix((weights, (rows, columns)), shape=(len(data.users), n_items))
    _, values, factors = randomized_svd(matrix, EMBEDDING_DIM + 8, n_iter=5, random_state=0)
    first = max(1, int((values > 0.999).sum()))
    kept = slice(first, first + EMBEDDING_DIM)
    vectors = np.where(item_degrees[:, None] > 0, factors[kept].T * values[kept], 0.0)
    return unit_rows(vectors).astype(np.float32)


def reachable(embeddings: FloatArray) -> np.ndarray:
    """Marks the items whose own vector, as action, ranks them first by the margin."""
    units = unit_rows(embeddings)
    marks = np.zeros(len(units), np.bool_)
    for start in range(0, len(units), 1000):
        rows = np.arange(start, min(start + 1000, len(units)))
        scores = units[rows] @ units.T
        own = scores[rows - start, rows]
        scores[rows - start, rows] = -np.inf
        marks[rows] = own >= scores.max(axis=1) + MARGIN
    return marks


def unbiased_auc(data: InteractionData, embeddings: FloatArray) -> WithinUserAUC:
    """Returns the within-user AUC of cos(s~, e_i) on the test log."""
    log = data.test
    window = initial_history(data.train, len(data.users), HISTORY_LENGTH)
    states = mean_embeddings(embeddings, window.items, window.clicks.astype(np.float32))
    scores = np.einsum("nd,nd->n", unit_rows(states)[log.users], unit_rows(embeddings)[log.items])
    return within_user_auc(log.users, log.clicks, scores)


def row(name: str, data: InteractionData) -> str:
    """Returns a line of the table."""
    rows = covered_items(data, MIN_TEST_EXPOSURES)
    tail = ~groups_of(data, rows).popular
    cells = [name, f"{len(rows):,}"]
    before, after = svd_embeddings(data), item_embeddings(data.train, len(data.users), data.items)
    marks = [reachable(vectors[rows]) for vectors in (before, after)]
    cells += [f"{mark.sum():,}" for mark in marks]
    cells += [f"{tail.sum():,}", *(f"{(mark & tail).sum():,}" for mark in marks)]
    aucs = [unbiased_auc(data, vectors) for vectors in (before, after)]
    gain, (low, high) = aucs[1].gain_over(aucs[0])
    cells += [*(f"{auc.mean:.4f}" for auc in aucs), f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]"]
    return f"| {' | '.join(cells)} |"


def data_sets(folder: Path | None) -> Iterator[tuple[str, InteractionData]]:
    """Yields the data behind every id, and partial real data where there is a folder of them."""
    for preset in ("Toy", "KuaiRec", "KuaiRand"):
        yield f"{preset} twin" if preset != "Toy" else "toy", load_twin(twin_config(preset)).data
    if folder is not None:
        yield "partial KuaiRand-Pure", partial_kuairand(folder / KUAIRAND_FOLDER)
        yield "partial KuaiRec", partial_kuairec(folder / KUAIREC_FOLDER)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the two partial data sets")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    lines = []
    for name, data in data_sets(arguments.data):
        lines.append(row(name, data))
        print(lines[-1], file=sys.stderr, flush=True)
    write_page(arguments.results, "reachable_items.md", "\n".join([HEADER, *lines]))
