"""What a belief costs, and how far Laplace's posterior is from the exact one; writes docs/results/belief_costs.md.

    python benchmarks/belief_costs.py --results docs/results

Processor time of one thread, means over steps, in simulated sessions that never repeat an item (repeats cost less).
Beside each time stands its ratio to a product of two float32 matrices, (256, 64) x (64, 10,728), timed in between: the
ratios carry over to other machines.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from dsrm.own_level import OwnLevel, OwnScales
from dsrm.shared_level import SharedLevel, SharedScales
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine
from kuaifair_env.files import write_text_atomically

SLATE, SESSIONS, SHOWS, ITEMS, DIMENSION = 10, 64, 300, 10_000, 64
CHECKED = 4
"""Sessions of which the exact posterior is computed too."""
STEPS = 34
"""Timed: twice as many as a session's inverse is kept for."""
COUNTS = [(0, 1), (1, 1), (0, 3), (1, 3), (3, 3), (0, 10), (1, 10), (5, 10), (10, 10), (0, 30), (15, 30), (0, 100)]


class Clock:
    """Processor times of calls, and of the matrix product between them."""

    def __init__(self) -> None:
        self._factors = torch.randn(256, 64), torch.randn(64, 10_728)
        self.times: list[float] = []
        self._products: list[float] = []

    def time(self, call: Callable[[], object]) -> None:
        """Times a call and a product."""
        self.times.append(_milliseconds(call))
        self._products.append(_milliseconds(lambda: self._factors[0] @ self._factors[1]))

    def row(self, per: int = 1) -> str:
        """Returns the mean time, over ``per`` steps, and its ratio to the product, as cells of a table."""
        return f"{np.mean(self.times) / per:.2f} | {self.ratio / per:.2f}"

    @property
    def ratio(self) -> float:
        """Ratio of the mean time to that of the product."""
        return float(np.mean(self.times) / np.mean(self._products))

    def product(self) -> float:
        """Returns the mean time of the product."""
        return float(np.mean(self._products))


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def item_features(n_items: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Returns a column of ones and random unit embeddings."""
    units = torch.nn.functional.normalize(torch.randn(n_items, dimension, generator=generator), dim=1)
    return torch.cat([torch.ones(n_items, 1), units], dim=1)


def own_level_row(shows: int, dimension: int, n_sessions: int, n_items: int = ITEMS) -> str:
    """Returns the row of one size: times of a step once ``shows`` items were shown, and the distance from the mode."""
    generator = torch.Generator().manual_seed(0)
    features = item_features(n_items, dimension, generator)
    warm, exact = OwnLevel(features, n_sessions), OwnLevel(features.double(), CHECKED)
    base = torch.randn(n_sessions, n_items, generator=generator)
    truth = base + torch.randn(n_sessions, dimension + 1, generator=generator) @ features.T
    order = torch.rand(n_sessions, n_items, generator=generator).argsort(dim=1)
    observing, updating, scoring, rescaling, distance = Clock(), Clock(), Clock(), Clock(), 0.0
    rows, checked = torch.arange(n_sessions), torch.arange(min(CHECKED, n_sessions))
    steps = shows // SLATE
    for step in range(steps):
        items = order[:, step * SLATE : (step + 1) * SLATE]
        clicks = torch.rand(items.shape, generator=generator) < torch.sigmoid(truth.gather(1, items))
        timed = step >= steps - STEPS
        for clock, call in (
            (observing, lambda items=items, clicks=clicks: warm.observe(rows, items, clicks, base)),
            (updating, lambda: warm.update(base)),
            (scoring, warm.logits),
        ):
            clock.time(call) if timed else call()
        if timed and step % 10 == 0:
            rescaling.time(lambda: (warm.moments(rows), warm.rescale(warm.scales)))
        exact.observe(checked, items[checked], clicks[checked], base)
        if timed and step % 5 == 0:
            padded = torch.zeros(CHECKED, n_items, dtype=torch.float64)
            padded[checked] = base[checked].double()
            exact.converge(padded)
            distance = max(distance, float((exact.logits() - warm.logits()[checked].double())[checked].abs().max()))
    return (
        f"| {n_sessions} | {shows} | {dimension} | {n_items:,} | {observing.row()} | {updating.row()} | "
        f"{scoring.row()} | {rescaling.row(10)} | {distance:.4f} |"
    )


def shared_level_row(n_items: int, dimension: int, n_features: int = 0) -> str:
    """Returns the row of one size: times of an update after every item was shown, per step (a fifth of an update)."""
    generator = torch.Generator().manual_seed(0)
    vectors, features = item_features(n_items, dimension + n_features, generator)[:, 1:].split(
        [dimension, n_features], 1
    )
    level = SharedLevel({"vector": vectors, "features": features}, torch.full((n_items,), 0.5), SharedScales())
    clock = Clock()
    for update in range(STEPS):
        items = torch.randint(n_items, (5 * SESSIONS * SLATE,), generator=generator)
        level.add(torch.arange(n_items), torch.full((n_items,), 0.1), torch.randn(n_items, generator=generator))
        level.add(items, torch.full(items.shape, 0.2), torch.randn(items.shape, generator=generator))
        clock.time(lambda update=update: level.update(reestimate=update % 2 == 0))
    return f"| {n_items:,} | {dimension} | {n_features} | {clock.row()} | {clock.row(5)} |"


def accuracy_row(scale: float) -> str:
    """Returns the row of one scale: largest distances from the exact posterior mean, of Laplace's and matched ones."""
    laplace, matched = [], []
    for base in (-3.0, -1.0, 0.0, 1.0, 3.0):
        for clicks, shows in COUNTS:
            ones = torch.ones(1, 1, dtype=torch.float64)
            level = _posterior(ones, base * ones, [shows], [clicks], OwnScales(0.0, 0.0, scale))
            grid = np.linspace(-9 * scale - 6, 9 * scale + 6, 8001)
            log = clicks * (base + grid) - shows * np.logaddexp(0, base + grid) - grid**2 / (2 * scale**2)
            exact = _mean(log, grid)
            laplace.append(abs(level.logits().item() - exact))
            level.match_moments(base * ones)
            matched.append(abs(level.logits().item() - exact))
    pairs = [_two_dimensions(scale, seed) for seed in range(20)]
    return (
        f"| {scale} | {max(laplace):.3f} | {max(matched):.4f} | {max(one for one, _ in pairs):.3f} | "
        f"{max(two for _, two in pairs):.4f} |"
    )


def _two_dimensions(scale: float, seed: int) -> tuple[float, float]:
    """Distances from the exact means of eight items' log-odds, with an intercept and a one-dimensional taste."""
    rng = np.random.default_rng(seed)
    side, shows, base = rng.choice([-1.0, 1.0], size=8), rng.integers(1, 8, 8), 2.0 * rng.normal(size=8)
    clicks = rng.binomial(shows, expit(base + scale * rng.normal() + scale * rng.normal() * side))
    features, bases = torch.from_numpy(np.column_stack([np.ones(8), side])), torch.from_numpy(base)[None]
    level = _posterior(features, bases, shows, clicks, OwnScales(scale, scale, 0.0))
    grid = np.linspace(-8 * scale, 8 * scale, 801)
    intercepts, tastes = np.meshgrid(grid, grid, indexing="ij")
    log = -(intercepts**2 + tastes**2) / (2 * scale**2)
    for item in range(8):
        logits = base[item] + intercepts + side[item] * tastes
        log += clicks[item] * logits - shows[item] * np.logaddexp(0, logits)
    exact = np.asarray([_mean(log, intercepts + one * tastes) for one in side])
    laplace = np.abs(level.logits()[0].numpy() - exact).max()
    level.match_moments(bases)
    return float(laplace), float(np.abs(level.logits()[0].numpy() - exact).max())


def _posterior(
    features: Tensor, base: Tensor, shows: np.ndarray | list[int], clicks: np.ndarray | list[int], scales: OwnScales
) -> OwnLevel:
    level = OwnLevel(features, 1, scales)
    for item, (shown, clicked) in enumerate(zip(shows, clicks, strict=True)):
        for answer in range(shown):
            level.observe(torch.arange(1), torch.tensor([[item]]), torch.tensor([[answer < clicked]]), base)
    level.converge(base)
    return level


def _mean(log_density: np.ndarray, values: np.ndarray) -> float:
    weights = np.exp(log_density - log_density.max())
    return float((weights * values).sum() / weights.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    sizes = (
        [(shows, DIMENSION, SESSIONS) for shows in (50, 100, 200, SHOWS, 1_000)]
        + [(SHOWS, dimension, SESSIONS) for dimension in (8, 256)]
        + [(SHOWS, DIMENSION, n_sessions) for n_sessions in (1, 256)]
    )
    alone = Clock()
    for _ in range(100):
        alone.time(lambda: None)
    lines = [
        "### Own level, per step of all sessions",
        "",
        "| sessions | shows | d | items | evidence added, ms | ratio | posterior moved, ms | ratio | items scored, ms "
        "| ratio | scales (every tenth), ms | ratio | farthest from the mode |",
        "|---:|" + "---:|" * 12,
        *(own_level_row(*size) for size in sizes),
        *(own_level_row(SHOWS, DIMENSION, SESSIONS, n_items) for n_items in (1_000, 100_000)),
        "",
        "### Shared level, every item shown",
        "",
        "| items | d | item features | an update, ms | ratio | per step (every fifth), ms | ratio |",
        "|---:|" + "---:|" * 6,
        *(shared_level_row(n_items, DIMENSION) for n_items in (1_000, ITEMS, 100_000)),
        *(shared_level_row(ITEMS, *columns) for columns in ((8, 0), (256, 0), (DIMENSION, 40))),
        "",
        "### Largest distance from the exact posterior mean, in log-odds",
        "",
        "| prior's scale | offset: mode (Laplace) | moments matched | intercept and taste: mode | moments matched |",
        "|---:|" + "---:|" * 4,
        *(accuracy_row(scale) for scale in (0.25, 0.5, 1.0, 2.0, 3.0)),
        "",
        "Ratio: to a (256, 64) x (64, 10,728) product on the same thread, timed in between. Farthest from the mode: "
        "largest difference of an item's own log-odds from the converged posterior in float64. Exact means "
        f"by quadrature, over {len(COUNTS)} counts of clicks and shows and 5 base log-odds, or 20 sets of eight items.",
        "",
        f"Made by: `python benchmarks/belief_costs.py` ({machine()}); the product took {alone.product():.1f} ms.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "belief_costs.md", text)


if __name__ == "__main__":
    main()
