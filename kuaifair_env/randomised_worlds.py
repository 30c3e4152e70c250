"""Randomised training worlds, and how large their deviations should be: how much parts of the training log disagree."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.cache import cache_dir
from kuaifair_env.data.schema import FloatArray, IdArray, IntArray, InteractionLog
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import Family, open_artifact, parse_as, save_artifact
from kuaifair_env.progress import announce_rebuilt
from kuaifair_env.randomisation import Randomisation, RandomisationLike, WorldRandomisation, offset_shape
from kuaifair_env.splits import HALVES, chosen_users, user_hashes
from kuaifair_env.world import World

SCALES = Family("kuaifair-scales", 1, "file of scales", "they have to be measured again")

_KIND = "randomisation"
_VERSION = 1
_PRIOR_ROWS = 20.0
_MIN_INFORMATION = 1.0
_MAX_USERS = 2_000
_MAX_USER_ROWS = 200

Vector = NDArray[np.float64]


def randomised(world: World, randomisation: RandomisationLike = "auto", seed: int = 0) -> World:
    """Returns a training world in whose sessions users also have deviations of their own.

    Args:
        world: The training world.
        randomisation: How large they are; ``"auto"`` takes :func:`estimated_randomisation`, None leaves the world as it
            is.
        seed: Seed of the deviations.

    Raises:
        DataError: If it is the test world.
    """
    if randomisation is None:
        return world
    if world.split != "train":
        raise DataError(
            "only training worlds are randomised: agents are evaluated among users whose tastes are not invented"
        )
    scales = estimated_randomisation(world) if randomisation == "auto" else randomisation
    return replace(world, randomisation=WorldRandomisation(scales, seed))


def estimated_randomisation(world: World, folder: str | Path | None = None) -> Randomisation:
    """Returns scales from a world's training log: those of :func:`log_disagreement`, at least the default ones.

    What the log says is kept in the cache, the defaults are not.

    Args:
        world: The world; its response model and test log are not read.
        folder: The cache folder; None takes the default one.
    """
    directions = world.item_directions
    key = hashlib.sha256(f"{world.data.data_hash} {_VERSION}".encode() + directions.round(4).tobytes())
    path = cache_dir(folder) / "responses" / f"randomisation-{key.hexdigest()[:16]}.safetensors"
    if path.exists():
        try:
            with open_artifact(path, _KIND, SCALES) as (_, _, settings):
                return at_least(parse_as(Randomisation, settings), Randomisation())
        except ArtifactError as error:
            announce_rebuilt(error)
    measured = log_disagreement(world.data.train, world.data.users.ids, directions)
    save_artifact(path, _KIND, {}, asdict(measured), SCALES)
    return at_least(measured, Randomisation())


def at_least(scales: Randomisation, floor: Randomisation) -> Randomisation:
    """Returns the larger of two standard deviations everywhere, and the floor's lengths of blocks."""
    larger = {name: max(value, getattr(scales, name)) for name, value in asdict(floor).items() if "block" not in name}
    return replace(floor, **larger)


def log_disagreement(log: InteractionLog, user_ids: IdArray, directions: FloatArray) -> Randomisation:
    """Measures how far parts of a log disagree, beyond the chance in single clicks.

    Two halves of the users, by a hash of their ids, may disagree about items: item by item, and along the
    embeddings. The earlier and the later half of a user's rows may disagree about the user. Both are moments of
    residuals from what item and user do on average, to first order in the deviations, so that scales above 1 come
    out too small. Noise of single pairs cannot be told from chance and is 0.

    Args:
        log: The training log.
        user_ids: ``(U,)``, raw ids of all users.
        directions: ``float32 (M, d)``, item embeddings of length 1.

    Returns:
        The scales; a scale that the log shows nothing of is 0.
    """
    probabilities = _predicted(log, len(user_ids), len(directions))
    residuals, information = log.clicks - probabilities, probabilities * (1.0 - probabilities)
    offset, vector = _shared_disagreement(log, user_ids, directions, residuals, information)
    level, own_vector = _own_disagreement(log, user_ids, directions, residuals, information)
    return Randomisation(offset=offset, vector=vector, own_level=level, own_vector=own_vector, noise=0.0)


def _predicted(log: InteractionLog, n_users: int, n_items: int) -> Vector:
    """Returns the click probability of each row by the mean log-odds of item and user, each smoothed by 20 rows."""
    overall = float(np.clip(log.clicks.mean(), 1e-3, 1 - 1e-3))

    def log_odds(groups: IntArray, size: int) -> Vector:
        shown = np.bincount(groups, minlength=size)
        clicked = np.bincount(groups, log.clicks, size)
        rate = (clicked + _PRIOR_ROWS * overall) / (shown + _PRIOR_ROWS)
        return np.asarray(np.log(rate / (1.0 - rate)))

    base = np.log(overall / (1.0 - overall))
    logits = log_odds(log.items, n_items)[log.items] + log_odds(log.users, n_users)[log.users] - base
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))


def _shared_disagreement(
    log: InteractionLog, user_ids: IdArray, directions: FloatArray, residuals: Vector, information: Vector
) -> tuple[float, float]:
    """Returns the scales of offsets and of the vector by which two halves of the users differ.

    With ``D_i`` the difference of an item's log-odds between the halves and weights ``w_i``, ``sum w D^2`` and
    ``|sum w D e|^2`` are linear in the squares of both scales, in expectation. Products of a row with itself are left
    out: the variance of a click is ``p (1 - p)`` whatever its log-odds vary by.
    """
    half = (user_hashes(user_ids, HALVES) % np.uint64(2)).astype(np.int64)[log.users]
    n_items = len(directions)
    places = 2 * log.items.astype(np.int64) + half

    def sums(of_rows: Vector) -> Vector:
        return np.asarray(np.bincount(places, of_rows, 2 * n_items).reshape(n_items, 2), np.float64)

    weight = sums(information)
    items = np.flatnonzero((weight >= _MIN_INFORMATION).all(axis=1))
    if not len(items):
        return 0.0, 0.0
    weight = weight[items]
    differences = sums(residuals)[items] / weight
    difference = differences[:, 0] - differences[:, 1]
    of_rows = (sums(residuals**2)[items] / weight**2).sum(axis=1)
    pairs = 2.0 - (sums(information**2)[items] / weight**2).sum(axis=1)
    shape = np.square(offset_shape(log.exposures(n_items)[items]))
    of_items = 1.0 / ((1.0 / weight).sum(axis=1) + 2.0 * shape)
    vectors = directions[items].astype(np.float64)
    gram = vectors.T @ (of_items[:, None] * vectors)
    squares = np.square(vectors).sum(axis=1)
    moments = [
        (of_items * (difference**2 - of_rows)).sum(),
        np.square(vectors.T @ (of_items * difference)).sum() - (of_items**2 * of_rows * squares).sum(),
    ]
    coefficients = [
        [(of_items * shape * pairs).sum(), (of_items * squares * pairs).sum()],
        [
            (of_items**2 * shape * squares * pairs).sum(),
            2.0 * np.square(gram).sum() - (of_items**2 * squares**2 * (2.0 - pairs)).sum(),
        ],
    ]
    offset, vector = np.sqrt(np.maximum(_solved(coefficients, moments), 0.0))
    return float(offset), float(vector)


def _own_disagreement(
    log: InteractionLog, user_ids: IdArray, directions: FloatArray, residuals: Vector, information: Vector
) -> tuple[float, float]:
    """Returns the scales of level and vector by which the earlier and the later rows of a user differ.

    Products of different rows of a half hold what both halves have in common and what they have not, products of rows
    of different halves the former alone.
    """
    users = log.user_rows()
    users = users[chosen_users(user_ids[users], _MAX_USERS, HALVES)]
    offsets = log.offsets(len(user_ids))
    moments, coefficients = np.zeros((2, 2)), np.zeros((2, 2, 2))
    for user in users:
        end = int(offsets[user + 1])
        begin = max(int(offsets[user]), end - _MAX_USER_ROWS)
        middle = (begin + end) // 2
        parts = [
            (residuals[rows], information[rows], directions[log.items[rows]].astype(np.float64))
            for rows in (slice(begin, middle), slice(middle, end))
        ]
        for first, second in ((0, 0), (1, 1), (0, 1), (1, 0)):
            (residual, weight, vectors), (residual_2, weight_2, vectors_2) = parts[first], parts[second]
            similarity = vectors @ vectors_2.T
            products, weights = np.outer(residual, residual_2), np.outer(weight, weight_2)
            if first == second:
                np.fill_diagonal(products, 0.0)
                np.fill_diagonal(weights, 0.0)
            across = (weights * similarity).sum()
            kind = int(first != second)
            moments[kind] += [products.sum(), (products * similarity).sum()]
            coefficients[kind] += [[weights.sum(), across], [across, (weights * similarity**2).sum()]]
    within, common = (_solved(*both) for both in zip(coefficients, moments, strict=True))
    level, vector = np.sqrt(np.maximum(within - common, 0.0))
    return float(level), float(vector)


def _solved(coefficients: object, moments: object) -> Vector:
    """Returns the solution of two equations that may say the same."""
    solution: Vector = np.linalg.lstsq(np.asarray(coefficients), np.asarray(moments), rcond=1e-9)[0]
    return solution
