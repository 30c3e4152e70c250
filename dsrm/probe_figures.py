"""The paper's Fig. 4 and Fig. 2, with what the latter leaves out: rates beside counts. Illustrations, not evidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrm.probe_data import ProbeSet
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import save_figure

_MAX_POINTS = 1_500
_MAX_INTERESTS = 6
_MARKERS = ("o", "s", "^", "v", "D", "P", "x")
_PERPLEXITY = 30.0


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
