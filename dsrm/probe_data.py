"""Probe sets: windows of held-out users with labels that do not come from those windows, and figures of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrm.purifier import ConditionBuilder
from dsrm.targets import policy_windows
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.files import save_figure
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import PADDING, HistoryWindow
from kuaifair_env.world import World

KINDS = ("log", "short", "policy")
SHORT = 5

_MIN_POSITIVES = 3
_MIN_OF_A_CLASS = 20
_USERS_AT_ONCE = 256
_MIN_EXPOSURES = 20
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
        max_users: Largest number of users.
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
    """Returns the true clean states: the mean embedding weighted by the true click probability, ``float32 (n, d)``."""
    states = []
    for start in range(0, len(users), _USERS_AT_ONCE):
        rows = users[start : start + _USERS_AT_ONCE]
        history = world.initial_history.take(rows) if world.response.uses_history else None
        appeal = world.response.expected_catalogue(rows, world.n_items, history)
        states.append(appeal @ world.embeddings[: world.n_items] / appeal.sum(axis=1, keepdims=True))
    return np.concatenate(states).astype(np.float32)


def _interest(world: World, log: InteractionLog, users: NDArray[np.int64]) -> NDArray[np.int64]:
    tags = world.data.items.tags
    labels = np.full(len(users), -1, np.int64)
    if tags.shape[1] == 0:
        return labels
    owners = np.searchsorted(users, log.users[log.clicks])
    counts = np.zeros((len(users), tags.shape[1]))
    np.add.at(counts, owners, tags[log.items[log.clicks]].astype(np.float64))
    positives = np.bincount(owners, minlength=len(users))
    known: BoolArray = (positives >= _MIN_POSITIVES) & (counts.max(axis=1) > 0)
    labels[known] = counts[known].argmax(axis=1)
    frequent = np.bincount(labels[known], minlength=tags.shape[1]) >= _MIN_OF_A_CLASS
    labels[known] = np.where(frequent[labels[known]], labels[known], -1)
    return labels


def _level(world: World, builder: ConditionBuilder, users: NDArray[np.int64]) -> NDArray[np.float64]:
    log, n_users = world.data.train, len(world.data.users)
    clickers = log.users[log.clicks]
    total = np.bincount(clickers, builder.popularity[log.items[log.clicks]], n_users)
    count = np.bincount(clickers, minlength=n_users)
    return np.asarray((total / np.maximum(count, 1))[users])


def draw_states(
    path: str | Path,
    probes: ProbeSet,
    states: Mapping[str, FloatArray],
    popularity: str = "mean log-popularity of clicks",
) -> None:
    """Draws states by t-SNE, one row by popularity and one by interest (paper Fig. 4).

    Shades follow the popularity of what was clicked; interests have markers and shades of their own, so that the
    picture reads without colour. Each of the ``states``, ``float32 (n, d)`` by name, has a column; ``popularity`` says
    what the probe set's popularity is.
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(probes), min(_MAX_POINTS, len(probes)), replace=False))
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    figure = Figure((4.2 * len(states), 8.0))
    axes = figure.subplots(2, len(states), squeeze=False)
    for (name, vectors), (upper, lower) in zip(states.items(), axes.T, strict=True):
        centred = vectors[rows] - vectors[rows].mean(axis=0)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(centred)
        shades = upper.scatter(*points.T, c=probes.popularity[rows], cmap="cividis", s=7, linewidths=0)
        upper.set_title(f"{name}: by popularity")
        figure.colorbar(shades, ax=upper, label=popularity)
        _scatter_by_interest(lower, points, probes.interest[rows])
        lower.set_title(f"{name}: by interest")
        for axis in (upper, lower):
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    save_figure(figure, path, "States by t-SNE (the paper's Fig. 4): above by popularity, below by interest.")


def draw_counts_and_rates(path: str | Path, data: InteractionData) -> dict[str, float]:
    """Draws clicks against exposures of items, as counts (paper Fig. 2) and as rates.

    Counts of clicks grow with the counts of exposures that they are part of; rates need not. Returns R^2 of both
    regressions on ``log(1 + exposures)``, of counts in log-log, in the training log.
    """
    from matplotlib.figure import Figure

    exposures = data.train.exposures(len(data.items)).astype(np.float64)
    clicks = data.train.click_counts(len(data.items)).astype(np.float64)
    enough = exposures >= _MIN_EXPOSURES
    x, clicks = np.log1p(exposures[enough]), clicks[enough]
    explained = {}
    figure = Figure((9.0, 4.0))
    for axis, kind, y, label in zip(
        figure.subplots(1, 2),
        ("counts", "rates"),
        (np.log1p(clicks), clicks / exposures[enough]),
        ("log(1 + clicks)", "clicks per exposure"),
        strict=True,
    ):
        explained[kind] = float(np.corrcoef(x, y)[0, 1] ** 2)
        axis.scatter(x, y, s=5, color="0.35", linewidths=0, alpha=0.5)
        axis.plot(x, np.polyval(np.polyfit(x, y, 1), x), color="black", linewidth=1.2)
        axis.set_xlabel("log(1 + exposures)")
        axis.set_ylabel(label)
        axis.set_title(f"{kind}: $R^2$ = {explained[kind]:.2f}")
    title = f"{data.provenance.name} ({data.provenance.origin}), items with {_MIN_EXPOSURES} exposures or more"
    figure.suptitle(title)
    figure.tight_layout()
    caption = "Clicks against exposures of items: counts (the paper's Fig. 2), and rates, with regression lines."
    save_figure(figure, path, f"{caption} Data: {title}, hash {data.data_hash}.")
    return explained


def _scatter_by_interest(axis: Any, points: NDArray[Any], labels: NDArray[np.int64]) -> None:
    """Draws points with a marker for each of the most frequent interests, and small grey dots for the rest."""
    common: NDArray[np.int64] = np.bincount(labels[labels >= 0]).argsort()[::-1][:_MAX_INTERESTS]
    rest = ~np.isin(labels, common)
    axis.scatter(*points[rest].T, s=4, color="0.88", linewidths=0)
    for number, (tag, marker) in enumerate(zip(common, _MARKERS, strict=False)):
        shade = str(0.05 + 0.6 * number / _MAX_INTERESTS)
        axis.scatter(*points[labels == tag].T, s=10, color=shade, marker=marker, linewidths=0.4, label=f"tag {tag}")
    if len(common):
        axis.legend(fontsize=7, markerscale=1.5, loc="best")
