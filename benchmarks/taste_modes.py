"""What a second mode of tastes would be worth if true tastes were known; writes a section of preferences.md.

    python benchmarks/taste_modes.py --results docs/results

In three twins a normal and mixtures of four and sixteen normals are fitted to the true tastes of two thirds of the
test world's users, as they are and three times as large. The others answer random items, and each prior's posterior
predicts 100 further ones. As far as mixtures describe the tastes, no model gains more from their modes than they do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from numpy.typing import NDArray
from preference_tasks import PredictionTask, expected_auc, expected_log_loss, item_columns
from torch import Tensor
from worlds import open_worlds, twin_worlds, write_section

from dsrm.belief import BeliefItems
from dsrm.own_level import OwnLevel, OwnScales
from dsrm.preference import LevelPrior, context_size
from dsrm.preference_mixture import MixturePreference, TastePrior
from dsrm.preference_sessions import LoggedPreferences
from hrl_policies.study import single_threaded
from hrl_policies.worlds import WorldPair
from kuaifair_env.data.schema import FloatArray

SHOWS, PARTS, FACTORS = (20, 100, 300), (4, 16), (1, 3)
USERS, ASKED, LEVEL, BASE = 600, 100, 0.8, -1.0


def worlds() -> Iterator[WorldPair]:
    """Yields the twins, the last one with stronger tastes."""
    yield open_worlds("KuaiFair-KuaiRandTwin-v0")
    yield open_worlds("KuaiFair-KuaiRecTwin-v0")
    yield twin_worlds("KuaiRand twin, strong tastes", taste_strength="strong")


def priors(tastes: FloatArray, size: float) -> list[MixturePreference]:
    """Returns priors with one part and with more, fitted to ``(n, d)`` tastes in log-odds."""
    context = context_size(tastes.shape[1]) + 1
    level, slopes = (
        LevelPrior(np.zeros(context, np.float32), 0.0, 0.0),
        np.zeros((context, tastes.shape[1]), np.float32),
    )
    return [MixturePreference(level, TastePrior.fit(slopes, size, tastes / size, parts, 0)) for parts in (1, *PARTS)]


def task_of(tastes: FloatArray, size: float, columns: Tensor, shows: int) -> PredictionTask:
    """Has users of ``(n, d)`` tastes answer random items, and asks for others."""
    rng = np.random.default_rng(shows)
    users = np.arange(len(tastes))
    levels = LEVEL * rng.standard_normal((len(tastes), 1))
    preferences = torch.from_numpy(np.concatenate([levels, tastes], axis=1).astype(np.float32))
    truth = torch.sigmoid(BASE + preferences @ columns.T)
    own = OwnLevel(columns, len(users), OwnScales(LEVEL, size, 0.0))
    base = torch.full_like(truth, BASE)
    items = torch.from_numpy(rng.integers(len(columns), size=(len(users), shows)))
    clicks = torch.from_numpy(rng.random(items.shape)) < truth.gather(1, items)
    own.observe(torch.from_numpy(users), items, clicks, base)
    own.converge(base)
    asked = torch.from_numpy(rng.integers(len(columns), size=(len(users), ASKED)))
    contexts = torch.zeros(len(users), context_size(tastes.shape[1]))
    return PredictionTask.of_level(users, own, contexts, base, asked, truth.gather(1, asked))


def rows_of(pair: WorldPair) -> Iterator[str]:
    """Yields the rows of a world."""
    columns = item_columns(BeliefItems.of_world(pair.test))
    true = LoggedPreferences.of_world(pair.test, pair.scorer).tastes
    order = np.random.default_rng(0).permutation(len(true))
    fitted, asked = np.split(true[order], [len(true) * 2 // 3])
    size = float(np.sqrt((fitted**2).mean()))
    for factor in FACTORS:
        models = priors(factor * fitted, factor * size)
        densities = [model.taste.log_density(asked / size) for model in models]
        for shows in SHOWS:
            task = task_of(factor * asked[:USERS], factor * size, columns, shows)
            predicted = [task.predicted(model.moments(task.evidence), columns) for model in models]
            losses = [expected_log_loss(task, some.probabilities) for some in predicted]
            ranking = [expected_auc(task, some.means) for some in predicted]
            for parts, density, loss, auc in zip(PARTS, densities[1:], losses[1:], ranking[1:], strict=True):
                yield (
                    f"| {pair.name} | {factor} | {shows} | {parts} | {density - densities[0]:+.1f} | "
                    f"{losses[0].mean():.4f} | {_cell(loss - losses[0])} | {np.nanmean(ranking[0]):.4f} | "
                    f"{_cell(auc - ranking[0])} |"
                )


def _cell(differences: NDArray[np.float64]) -> str:
    """Returns a mean over users in thousandths with its 95 % interval."""
    known = 1e3 * differences[np.isfinite(differences)]
    half = 1.96 * known.std(ddof=1) / np.sqrt(len(known))
    return f"{known.mean():+.2f} [{known.mean() - half:+.2f}, {known.mean() + half:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    lines = [
        "# Would a second mode of tastes be of use?",
        "",
        "A normal and mixtures of normals, all fitted to the *true* tastes of other users of the test world, on the",
        "same answers: held-out log density, and log loss and within-user AUC of 100 further items. Differences are",
        "mixture minus normal in thousandths, with 95 % intervals over users.",
        "",
        "| world | tastes times | shows | parts | log density, difference | log loss, normal | difference | AUC, "
        "normal | difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(row for pair in worlds() for row in rows_of(pair)),
        "",
        f"Synthetic worlds; {USERS} users; levels with standard deviation {LEVEL} around log-odds of {BASE}.",
        "",
        "Made by: `python benchmarks/taste_modes.py --results docs/results`.",
    ]
    write_section(arguments.results, "preferences.md", "\n".join(lines))


if __name__ == "__main__":
    main()
