"""Partial real data as worlds: adapters from two folders of partial files to ``InteractionData``.

The folders hold parts of KuaiRand-Pure and KuaiRec (both CC BY-SA 4.0; Gao et al., CIKM 2022), which come with no
release of this project. Whatever is computed from them is a result on *partial KuaiRand-Pure* or *partial KuaiRec*.

    python examples/partial_data.py DATA

Both adapters are also models of how to bring logs of any origin: read them into DataFrames, say where they come from,
and call ``InteractionData.from_frames``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env import DataError
from kuaifair_env.data import InteractionData, Provenance, cached
from kuaifair_env.data.clicks import Positive, kuairand_clicks, kuairec_clicks
from kuaifair_env.files import file_hash
from kuaifair_env.metrics import gini

KUAIRAND_FOLDER, KUAIREC_FOLDER = "kuairand_pure_partial", "kuairec_partial"

RANDOM_RATE_FACTOR = 0.815
"""Click rate of the whole random log over that of its users with at least one click (.176 / .216)."""

KUAIREC_USERS, KUAIREC_ITEMS = 7_176, 10_728
EXPOSURE_POWER = 0.8
"""Items are drawn as negatives in proportion to ``(1 + positives) ** EXPOSURE_POWER``."""

KUAIREC_DISTINCT_VIEWS = 12_530_806 - 965_819
"""Rows of KuaiRec's big matrix without its exact duplicates, as published."""

_KUAIRAND_FILES = (
    "user_features_pure.csv",
    "video_features_basic_pure.csv",
    "video_features_statistic_pure.csv.gz",
    "exposures_standard_to_4_24.csv.gz",
    "log_standard_4_25_to_5_08.csv.gz",
    "exposures_random.csv.gz",
)
_KUAIREC_FILES = (
    "user_features.csv",
    "item_categories.csv",
    "big_matrix_wr_ge2.csv.gz",
    "small_matrix_wr_ge2.npz",
)
_STATISTICS = [
    f"{name}_user_num"
    for name in ("show", "play", "valid_play", "long_time_play", "complete_play", "like", "comment", "follow")
] + ["play_progress"]
_DRAW_BATCH = 256
_KUAIREC_POSITIVE = {"watch_ratio": 2.0}


def partial_kuairand(
    folder: str | Path, seed: int = 0, positive: Positive | None = None, cache: str | Path | None = None
) -> InteractionData:
    """Opens partial KuaiRand-Pure: standard exposures train, uniformly random exposures test.

    Training log: the last 50 exposures at most of each user up to 24 April (their order is known, their time is
    not; ``is_click`` is undercounted for 22 to 24 April), then all standard rows of 25 April to 8 May without
    exact duplicates. Pairs that occur in both parts are repeated exposures and stay. Test log: random exposures of
    users with at least one random click, so its click rate is too high: multiply by 0.815. It has no time, and its
    file is sorted by video; its rows are shuffled within each user.

    Args:
        folder: The folder ``kuairand_pure_partial``, or the one that holds it.
        seed: Seed of the shuffle.
        positive: What counts as a click: ``"is_click"``, the only column that the partial random rows hold.
        cache: The cache folder; None is the default one.
    """
    if kuairand_clicks(positive) != kuairand_clicks("is_click"):
        raise DataError(f"the random rows of partial KuaiRand-Pure hold is_click only, not {positive!r}")
    place, hashes = _files(folder, KUAIRAND_FOLDER, _KUAIRAND_FILES)
    key = {"name": "partial KuaiRand-Pure", "adapter": 2, "files": hashes, "seed": seed}
    return cached(key, lambda: _build_kuairand(place, hashes, seed), cache)


def partial_kuairec(
    folder: str | Path,
    seed: int = 0,
    share: float = 1.0,
    positive: Positive = _KUAIREC_POSITIVE,
    cache: str | Path | None = None,
) -> InteractionData:
    """Opens partial KuaiRec: a click is ``watch_ratio >= 2``, and negatives of the training log are *drawn*.

    Test log: the whole small matrix, 1,411 x 3,327 cells, shuffled within each user (the 0.4 % of cells that were
    never shown count as not clicked).

    Training log: the positives of the big matrix (repeats of a pair dropped: they are as frequent as the big
    matrix's exact duplicate rows), plus negatives drawn by this distribution. Every user gets 1,612 views, the
    published mean without duplicates, so that 7.3 % of the views are positive, as published. A user's negatives are
    drawn without replacement among the items that are not the user's positives, with weights ``(1 + positives of the
    item) ** 0.8``; pairs of the small matrix are never drawn. Positives keep their order in the file, negatives fall at
    random among them.

    Positives alone do not tell popularity from quality (positives = exposures x quality). The exponent says how much of
    their spread is exposure; of 0.5, 0.6, ..., 0.9 the value 0.8 brings the quantiles of the items' positive rates
    closest to the published ones of the small matrix (Gini .49 beside .50). No other property of the test log is used.

    Args:
        folder: The folder ``kuairec_partial``, or the one that holds it.
        seed: Seed of the draws.
        share: Keep this share of the training rows, at random, for a smaller log with the same rates.
        positive: What counts as a click: ``{"watch_ratio": 2.0}``, which is all that the files hold; the default of
            whole KuaiRec, 1, cannot be had from them.
        cache: The cache folder; None is the default one.
    """
    if not 0.0 < share <= 1.0:
        raise DataError(f"share must lie in (0, 1], got {share}")
    if kuairec_clicks(positive) != kuairec_clicks(_KUAIREC_POSITIVE):
        raise DataError(f"the files of partial KuaiRec hold watch_ratio >= 2 only: take {_KUAIREC_POSITIVE}")
    place, hashes = _files(folder, KUAIREC_FOLDER, _KUAIREC_FILES)
    key = {"name": "partial KuaiRec", "adapter": 2, "files": hashes, "seed": seed, "share": share}
    return cached(key, lambda: _build_kuairec(place, hashes, seed, share), cache)


def _build_kuairand(place: Path, hashes: dict[str, str], seed: int) -> InteractionData:
    early = pd.read_csv(place / "exposures_standard_to_4_24.csv.gz").rename(columns={"seq_no": "time"})
    late = pd.read_csv(place / "log_standard_4_25_to_5_08.csv.gz")
    repeated = int(late.duplicated().sum())
    late = late.drop_duplicates().rename(columns={"time_ms": "time"})
    columns = ["user_id", "video_id", "is_click", "time"]
    train = pd.concat([early[columns], late[columns]], ignore_index=True)
    test = pd.read_csv(place / "exposures_random.csv.gz").sample(frac=1.0, random_state=seed)
    names = {"video_id": "item_id", "is_click": "click"}
    settings = {
        "train": f"{len(early):,} exposures up to 24 April (order known, time not) and {len(late):,} rows of 25 April "
        f"to 8 May ({repeated:,} exact duplicates dropped)",
        "test": "random exposures, shuffled within each user",
        "click": kuairand_clicks("is_click").describe(),
        "random_rate_factor": RANDOM_RATE_FACTOR,
        "undercounted": "is_click of training exposures of 22 to 24 April",
        "seed": seed,
    }
    description = (
        "part of KuaiRand-Pure; the random log covers users with at least one random click only, so its click rate "
        f"must be multiplied by {RANDOM_RATE_FACTOR} for the level of the whole log; is_click of 22-24 April is "
        "undercounted in the training log"
    )
    return InteractionData.from_frames(
        train.rename(columns=names),
        test.rename(columns=names),
        items=_kuairand_items(place),
        users=_users(place / "user_features_pure.csv"),
        drop_duplicates=False,
        provenance=Provenance("partial KuaiRand-Pure", "partial", description, hashes, settings),
    )


def _kuairand_items(place: Path) -> pd.DataFrame:
    basic = pd.read_csv(place / "video_features_basic_pure.csv")
    statistic = pd.read_csv(place / "video_features_statistic_pure.csv.gz")
    items = basic[["video_id", "video_type", "upload_type", "video_duration", "server_width", "server_height"]]
    items = items.assign(
        music_type=basic.music_type.astype("category"),
        tags=[[] if pd.isna(text) else [int(tag) for tag in str(text).split(",")] for text in basic.tag],
    )
    items = items.merge(statistic[["video_id", *_STATISTICS]], on="video_id", validate="one_to_one")
    return items.assign(shown=items.show_user_num).rename(columns={"video_id": "item_id"})


def _build_kuairec(place: Path, hashes: dict[str, str], seed: int, share: float) -> InteractionData:
    rng = np.random.default_rng(seed)
    views = pd.read_csv(place / "big_matrix_wr_ge2.csv.gz")
    pairs = views.drop_duplicates()
    with np.load(place / "small_matrix_wr_ge2.npz", allow_pickle=False) as small:
        small_users, small_items, liked = small["user_ids"], small["item_ids"], small["Y"]
    block_users = np.isin(np.arange(KUAIREC_USERS), small_users)
    block_items = np.isin(np.arange(KUAIREC_ITEMS), small_items)
    inside = block_users[pairs.user_id.to_numpy()] & block_items[pairs.video_id.to_numpy()]
    positives = pairs[~inside].to_numpy(np.int64)
    per_user = round(KUAIREC_DISTINCT_VIEWS / KUAIREC_USERS)
    negatives = _draw_negatives(positives, per_user, block_users, block_items, rng)
    train = _interleave(positives, negatives, share, rng)
    cells = np.stack(np.meshgrid(small_users, small_items, indexing="ij"), axis=-1).reshape(-1, 2)
    order = rng.permutation(len(cells))
    test = pd.DataFrame({"user_id": cells[order, 0], "item_id": cells[order, 1], "click": liked.reshape(-1)[order]})
    exposures = np.bincount(train.item_id, minlength=KUAIREC_ITEMS)
    rates = np.bincount(train.item_id, train.click, KUAIREC_ITEMS) / np.maximum(exposures, 1)
    settings: dict[str, Any] = {
        "click": kuairec_clicks(_KUAIREC_POSITIVE).describe(),
        "test": "the whole small matrix, shuffled within each user; its 0.4 % of unobserved cells count as no click",
        "positives": f"{len(pairs):,} distinct pairs of {len(views):,} rows; {int(inside.sum())} within the small "
        "matrix left out",
        "negatives": f"drawn: {per_user:,} views per user (the published mean without exact duplicates) less the "
        "user's positives; without replacement; weight (1 + positives of the item) ** "
        f"{EXPOSURE_POWER}; never a pair of the small matrix",
        "order": "positives in file order, negatives at random among them",
        "train_positive_rate": round(float(train.click.mean()), 5),
        "train_exposure_gini": round(gini(exposures), 3),
        "train_item_rate_gini": round(gini(rates), 3),
        "share": share,
        "seed": seed,
    }
    description = (
        "part of KuaiRec: real positives (watch_ratio >= 2) of the big matrix with DRAWN negatives as training log; "
        "the whole real small matrix as test log"
    )
    return InteractionData.from_frames(
        train,
        test,
        items=_kuairec_items(place),
        users=_users(place / "user_features.csv"),
        provenance=Provenance("partial KuaiRec", "partial", description, hashes, settings),
    )


def _draw_negatives(
    positives: NDArray[np.int64],
    per_user: int,
    block_users: NDArray[np.bool_],
    block_items: NDArray[np.bool_],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Draws each user's negatives without replacement: the smallest exponential arrival times win.

    With rates equal to the weights this is successive sampling (Efraimidis and Spirakis, "Weighted random
    sampling with a reservoir", Information Processing Letters 97, 2006).
    """
    popularity = 1.0 + np.bincount(positives[:, 1], minlength=KUAIREC_ITEMS)
    weights = (popularity**EXPOSURE_POWER).astype(np.float32)
    counts = np.bincount(positives[:, 0], minlength=KUAIREC_USERS)
    by_user = positives[np.argsort(positives[:, 0], kind="stable")]
    ends = np.cumsum(counts)
    drawn = []
    for begin in range(0, KUAIREC_USERS, _DRAW_BATCH):
        users = np.arange(begin, min(begin + _DRAW_BATCH, KUAIREC_USERS))
        arrival = rng.standard_exponential((len(users), KUAIREC_ITEMS), np.float32) / weights
        arrival[np.ix_(block_users[users], block_items)] = np.inf
        mine = by_user[ends[users[0]] - counts[users[0]] : ends[users[-1]]]
        arrival[mine[:, 0] - begin, mine[:, 1]] = np.inf
        wanted = np.maximum(per_user - counts[users], 0)
        order = np.argsort(arrival, axis=1)[:, : int(wanted.max())]
        taken = np.arange(order.shape[1]) < wanted[:, None]
        drawn.append(np.stack([np.repeat(users, wanted), order[taken]], axis=1))
    return np.concatenate(drawn)


def _interleave(
    positives: NDArray[np.int64], negatives: NDArray[np.int64], share: float, rng: np.random.Generator
) -> pd.DataFrame:
    """Puts negatives at random places among a user's positives, which keep their order."""
    positives = positives[np.argsort(positives[:, 0], kind="stable")]
    places = rng.random(len(positives))
    places = places[np.lexsort((places, positives[:, 0]))]
    rows = np.concatenate([positives, negatives])
    clicks = np.arange(len(rows)) < len(positives)
    # By user, then place; two sorts take half the time of np.lexsort.
    order = np.argsort(np.concatenate([places, rng.random(len(negatives))]))
    order = order[np.argsort(rows[order, 0].astype(np.uint16), kind="stable")]
    if share < 1.0:
        order = order[rng.random(len(order)) < share]
    return pd.DataFrame({"user_id": rows[order, 0], "item_id": rows[order, 1], "click": clicks[order]})


def _kuairec_items(place: Path) -> pd.DataFrame:
    categories = pd.read_csv(place / "item_categories.csv")
    return pd.DataFrame({"item_id": categories.video_id, "tags": [json.loads(text) for text in categories.feat]})


def _users(path: Path) -> pd.DataFrame:
    """Reads user features: -124 and UNKNOWN are missing, coded columns are categories, ranges are left out."""
    users = pd.read_csv(path, na_values=["UNKNOWN"])
    users = users.drop(columns=[name for name in users.columns if name.endswith("_range")])
    coded = [name for name in users.columns if name.startswith(("is_", "onehot_feat"))]
    for name in coded:
        users[name] = users[name].where(users[name] != -124).astype("Int64").astype("category")
    return users


def _files(folder: str | Path, name: str, needed: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
    place = Path(folder).expanduser()
    place = place / name if (place / name).is_dir() else place
    missing = [file for file in needed if not (place / file).is_file()]
    if missing:
        raise DataError(f"missing: {', '.join(missing)}", file=place)
    return place, {file: file_hash(place / file) for file in needed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="the folder that holds the two partial folders")
    folder = parser.parse_args().folder
    for data in (partial_kuairand(folder), partial_kuairec(folder)):
        print(f"\n{data.provenance.name}, hash {data.data_hash}\n{data.provenance.description}")
        print(json.dumps({"settings": dict(data.provenance.settings), "report": dict(data.report)}, indent=1))
        print(f"click rate: train {data.train.clicks.mean():.4f}, test {data.test.clicks.mean():.4f}")


if __name__ == "__main__":
    main()
