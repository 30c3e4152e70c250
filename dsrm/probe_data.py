"""Probe sets: windows of held-out users with labels that do not come from those windows, and figures of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrm.windows import ConditionBuilder, policy_windows, unit_rows
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.files import save_figure
from kuaifair_env.response.base import PADDING, HistoryWindow
from kuaifair_env.spaces import observed_states
from kuaifair_env.world import World

KINDS = ("log", "short", "policy")
SHORT = 5

_MIN_POSITIVES = 3
_MIN_OF_A_CLASS = 20
_USERS_AT_ONCE = 256
_MAX_POINTS = 1_500
_MAX_INTERESTS = 6
_MARKERS = ("o", "s", "^", "v", "D", "P", "x")
_PERPLEXITY = 30.0


@dataclass(frozen=True)
class ProbeSet:
    """One window for each of ``n`` held-out users, with labels from elsewhere.

    Attributes:
        kind: ``"log"`` (the last exposures of the training log), ``"short"`` (the last five of them, as of users whom
            a platform hardly knows) or ``"policy"`` (made by simulated policies).
        users: ``int64 (n,)``, user rows.
        window: The windows.
        states: ``float32 (n, d)``, observed states ``s~``.
        interest: ``int64 (n,)``, the most frequent tag of a user's *unbiased* positives, or -1 where there are too few
            positives or too few users of that tag.
        popularity: ``float64 (n,)``, mean log-popularity of what was clicked in the window.
        level: ``float64 (n,)``, the same over all positives of the user's training log.
        log: Unbiased feedback of these users.
        embeddings: ``float32 (M, d)``, unit item embeddings.
        clean: ``float32 (n, d)``, true clean states ``s*`` where the truth is known (twins), else None.
        taste: ``float32 (n, m)``, true taste vectors of the users, else None.
    """

    kind: str
    users: NDArray[np.int64]
    window: HistoryWindow
    states: FloatArray
    interest: NDArray[np.int64]
    popularity: NDArray[np.float64]
    level: NDArray[np.float64]
    log: InteractionLog
    embeddings: FloatArray
    clean: FloatArray | None
    taste: FloatArray | None

    def __len__(self) -> int:
        return len(self.users)


def probe_set(world: World, kind: str = "log", max_users: int = 3_000, seed: int = 0) -> ProbeSet:
    """Builds a probe set from a test world.

    Args:
        world: The test world; its users are held out from all pretraining.
        kind: ``"log"``, ``"short"`` or ``"policy"``.
        max_users: Take at most so many users.
        seed: Seed of the choice of users and of the policies.

    Raises:
        ValueError: If the world is not a test world, the kind is unknown, or nobody has clicks to build a state from.
    """
    if world.split != "test":
        raise ValueError("purifiers are probed on the users of the test world")
    if kind not in KINDS:
        raise ValueError(f"windows are of one of the kinds {KINDS}, got {kind!r}")
    rng = np.random.default_rng(seed)
    users = world.users
    if len(users) > max_users:
        users = np.sort(rng.choice(users, max_users, replace=False))
    window = policy_windows(world, users, rng) if kind == "policy" else world.initial_history.take(users)
    if kind == "short":
        older = np.arange(window.items.shape[1]) < window.items.shape[1] - SHORT
        window = HistoryWindow(np.where(older, PADDING, window.items), window.clicks & ~older)
    clicked = window.clicks.any(axis=1)
    if not clicked.any():
        raise ValueError("none of the users has a click in the window, so there is no state to probe")
    users, window = users[clicked], window.take(np.flatnonzero(clicked))
    builder = ConditionBuilder.of_world(world)
    log = world.data.test.take(np.isin(world.data.test.users, users))
    truth = world.true_preference
    return ProbeSet(
        kind=kind,
        users=users,
        window=window,
        states=observed_states(world, window),
        interest=_interest(world, log, users),
        popularity=builder.statistics(window)[:, 0].astype(np.float64),
        level=_level(world, builder, users),
        log=log,
        embeddings=unit_rows(world.embeddings),
        clean=None if truth is None else clean_states(world, users),
        taste=None if truth is None else truth[1][users],
    )


def clean_states(world: World, users: IntArray) -> FloatArray:
    """Returns the true clean states: the mean embedding weighted by the true click probability, ``float32 (n, d)``.

    Args:
        world: A world whose response model is the truth.
        users: User rows.
    """
    parts = []
    for low in range(0, len(users), _USERS_AT_ONCE):
        rows = users[low : low + _USERS_AT_ONCE]
        history = world.initial_history.take(rows) if world.response.uses_history else None
        appeal = world.response.expected_catalogue(rows, world.n_items, history)
        parts.append(appeal @ world.embeddings[: world.n_items] / appeal.sum(axis=1, keepdims=True))
    return np.concatenate(parts).astype(np.float32)


def _interest(world: World, log: InteractionLog, users: NDArray[np.int64]) -> NDArray[np.int64]:
    tags = world.data.items.tags
    labels = np.full(len(users), -1, np.int64)
    if tags.shape[1] == 0:
        return labels
    place = np.searchsorted(users, log.users[log.clicks])
    counts = np.zeros((len(users), tags.shape[1]))
    np.add.at(counts, place, tags[log.items[log.clicks]].astype(np.float64))
    positives = np.bincount(place, minlength=len(users))
    known: BoolArray = (positives >= _MIN_POSITIVES) & (counts.max(axis=1) > 0)
    labels[known] = counts[known].argmax(axis=1)
    frequent = np.bincount(labels[known], minlength=tags.shape[1]) >= _MIN_OF_A_CLASS
    labels[known] = np.where(frequent[labels[known]], labels[known], -1)
    return labels


def _level(world: World, builder: ConditionBuilder, users: NDArray[np.int64]) -> NDArray[np.float64]:
    log = world.data.train
    rows = log.clicks
    total = np.bincount(log.users[rows], builder.popularity[log.items[rows]], len(world.data.users))
    count = np.bincount(log.users[rows], minlength=len(world.data.users))
    return np.asarray((total / np.maximum(count, 1))[users])


def draw_states(path: str | Path, probes: ProbeSet, states: Mapping[str, FloatArray], seed: int = 0) -> None:
    """Draws states by t-SNE, one row by popularity and one by interest (paper Fig. 4).

    Shades follow the popularity of what was clicked; interests have markers and shades of their own, so that the
    picture reads without colour.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        probes: Windows and labels.
        states: ``float32 (n, d)`` by name, one column each.
        seed: Seed of the choice of points and of t-SNE.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(probes), min(_MAX_POINTS, len(probes)), replace=False))
    figure, axes = plt.subplots(2, len(states), figsize=(4.2 * len(states), 8.0), squeeze=False)
    for column, (name, vectors) in enumerate(states.items()):
        scaled = vectors[rows] - vectors[rows].mean(axis=0)
        perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(scaled)
        above, below = axes[0, column], axes[1, column]
        drawn = above.scatter(*places.T, c=probes.popularity[rows], cmap="cividis", s=7, linewidths=0)
        above.set_title(f"{name}: by popularity")
        figure.colorbar(drawn, ax=above, label="mean log-popularity of clicks")
        _by_interest(below, places, probes.interest[rows])
        below.set_title(f"{name}: by interest")
        for axis in (above, below):
            axis.set_xticks([])
            axis.set_yticks([])
    _save(figure, path)


def draw_counts_and_rates(path: str | Path, data: InteractionData) -> dict[str, float]:
    """Draws clicks against exposures of items, as counts (paper Fig. 2) and as rates.

    A count of clicks can hardly avoid growing with the count of exposures that it is part of; the rate can.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        data: The data set; its training log is drawn.

    Returns:
        R^2 of both regressions on ``log(1 + exposures)``, in log-log and in rates.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = data.train.exposures(len(data.items)).astype(np.float64)
    clicked = data.train.click_counts(len(data.items)).astype(np.float64)
    seen = shown >= 20
    x, counts, rates = np.log1p(shown[seen]), np.log1p(clicked[seen]), clicked[seen] / shown[seen]
    found = {"counts": _explained(x, counts), "rates": _explained(x, rates)}
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 4.0))
    for axis, y, label, kind in (
        (axes[0], counts, "log(1 + clicks)", "counts"),
        (axes[1], rates, "clicks per exposure", "rates"),
    ):
        axis.scatter(x, y, s=5, color="0.35", linewidths=0, alpha=0.5)
        axis.plot(x, np.polyval(np.polyfit(x, y, 1), x), color="black", linewidth=1.2)
        axis.set_xlabel("log(1 + exposures)")
        axis.set_ylabel(label)
        axis.set_title(f"{kind}: $R^2$ = {found[kind]:.2f}")
    figure.suptitle(f"{data.provenance.name} ({data.provenance.origin}), items with 20 exposures or more")
    _save(figure, path)
    return found


def _by_interest(axis: Any, places: NDArray[Any], labels: NDArray[np.int64]) -> None:
    known = labels[labels >= 0]
    common: NDArray[np.int64] = np.bincount(known).argsort()[::-1][:_MAX_INTERESTS]
    rest = ~np.isin(labels, common)
    axis.scatter(*places[rest].T, s=4, color="0.88", linewidths=0)
    for number, (tag, marker) in enumerate(zip(common, _MARKERS, strict=False)):
        shade = str(0.05 + 0.6 * number / _MAX_INTERESTS)
        axis.scatter(
            *places[labels == tag].T, s=10, color=shade, marker=marker, linewidths=0.4, label=f"tag {tag}"
        )
    if len(common):
        axis.legend(fontsize=7, markerscale=1.5, loc="best")


def _explained(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def _save(figure: Any, path: str | Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)
