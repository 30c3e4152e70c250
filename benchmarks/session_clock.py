"""What A2C gains by knowing the time, or by its critic knowing it; writes docs/results/session_clock.md.

    python benchmarks/session_clock.py KuaiFair-Toy-v0 --store STORE --results docs/results

Trained on four fifths of the training world's users and evaluated on the others, in the same world and with the same
seeds, so that nothing but the observation differs. Runs that the store holds are not run again.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worlds import argument_parser, open_worlds, short_name, write_page

from hrl_policies.study import plan_run, single_threaded, train
from hrl_policies.study.statistics import student_interval
from hrl_policies.study.tables import Cell, Measured, ResultTable
from hrl_policies.study.tuning import validation_pair
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import BuildContext, load_settings, method, register_method, sb3_algorithm
from kuaifair_env import SessionConfig

VARIANTS = {"without": ("a2c", False), "critic alone": ("a2c-clock-for-critic", True), "both": ("a2c", True)}
"""Who sees the clock: method and ``session_clock``."""

_MAX_SEEDS = 1_000
FIGURES = ("r_cum", "len", "r_each", "violation_rate")


class _ActorWithoutClock(MlpExtractor):
    def forward_actor(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward_actor(torch.nn.functional.pad(features[:, :-1], (0, 1)))


class ClockForCriticPolicy(ActorCriticPolicy):
    """An actor-critic policy whose actor does not see the last component of the state."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _ActorWithoutClock(self.features_dim, self.net_arch, self.activation_fn, self.device)


class ClockForCriticA2C(A2C):
    """A2C whose critic alone sees the session clock."""

    policy_aliases = {"MlpPolicy": ClockForCriticPolicy}  # noqa: RUF012


@register_method(
    "a2c-clock-for-critic",
    title="A2C, clock for the critic",
    family="on-policy",
    reference="benchmarks/session_clock.py",
    kind="online",
    action_mode="embedding",
    sees=method("a2c").sees,
    settings=load_settings("a2c"),
)
def build(context: BuildContext) -> Any:
    """Builds the untrained agent over the training sessions."""
    return sb3_algorithm(ClockForCriticA2C, context)


def run(pair: WorldPair, variant: str, gamma: float, seed: int, steps: int | None) -> dict[str, float]:
    """Trains with one seed and returns the headline figures of validation users, 10 sessions each."""
    name, clock = VARIANTS[variant]
    config = plan_run(
        name,
        pair.name,
        seed=seed,
        settings=load_settings("a2c", pair.name),
        total_steps=steps,
        overrides={"gamma": gamma},
        session=SessionConfig(session_clock=clock),
        episodes_per_user=10,
    )
    evaluation = train(config, pair).evaluation
    assert evaluation is not None
    summary = evaluation.summary()
    return {figure: float(summary[figure]) for figure in FIGURES}


def table_of(rows: dict[tuple[str, float, int], dict[str, float]], title: str) -> ResultTable:
    """Returns means over seeds by discount and variant, and differences from no clock paired by seed."""
    lines: list[tuple[Cell, ...]] = []
    for gamma in sorted({gamma for _, gamma, _ in rows}):
        seeds = [seed for seed in range(_MAX_SEEDS) if all((variant, gamma, seed) in rows for variant in VARIANTS)]
        values = {
            variant: np.array([[rows[variant, gamma, seed][figure] for figure in FIGURES] for seed in seeds])
            for variant in VARIANTS
        }
        for variant, of_seeds in values.items():
            gain = of_seeds[:, 0] - values["without"][:, 0]
            better = "" if variant == "without" else f"{int((gain > 0).sum())} of {len(seeds)}"
            paired: Cell = "" if not better else Measured.of_interval(student_interval(gain), 2, sign=True)
            lines.append(
                (
                    f"{gamma:g}",
                    variant,
                    Measured.of_interval(student_interval(of_seeds[:, 0]), 2),
                    paired,
                    better,
                    *(f"{of_seeds[:, place].mean():.{2 if place == 1 else 3}f}" for place in (1, 2, 3)),
                )
            )
    header = ("gamma", "who sees the clock", "R_cum", "more than without", "seeds with more", "Len", "R_each", "viol.")
    return ResultTable(title, header, tuple(lines))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, default=Path("studies/session_clock"))
    parser.add_argument("--seeds", type=int, default=10, help="number of training seeds, from 0 on")
    parser.add_argument("--steps", type=int, help="training steps; the zoo's by default")
    parser.add_argument("--gammas", nargs="+", type=float, help="discounts; the zoo's and 0.99 by default")
    arguments = parser.parse_args()
    single_threaded()
    train_world = open_worlds(arguments.world, arguments.data).train
    pair = validation_pair(train_world, arguments.world)
    shipped = load_settings("a2c", arguments.world)
    gammas = arguments.gammas or sorted({float(shipped.hyperparameters["gamma"]), 0.99})
    file = arguments.store / f"{short_name(arguments.world)}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {}
    if file.exists():
        with file.open(newline="") as stream:
            for variant, gamma, seed, *figures in csv.reader(stream):
                rows[variant, float(gamma), int(seed)] = dict(zip(FIGURES, map(float, figures), strict=True))
    for gamma in gammas:
        for seed in range(arguments.seeds):
            for variant in VARIANTS:
                if (variant, gamma, seed) in rows:
                    continue
                figures = run(pair, variant, gamma, seed, arguments.steps)
                rows[variant, gamma, seed] = figures
                with file.open("a", newline="") as stream:
                    csv.writer(stream).writerow([variant, gamma, seed, *figures.values()])
    table = table_of(rows, f"A2C with and without the session clock, training world of {pair.name}, Max Len 30")
    notes = (
        f"{len(pair.test.users)} validation users, 10 sessions each; seeds from 0 on, "
        f"{arguments.steps or shipped.total_steps:,} steps, all settings but gamma as shipped (gamma "
        f"{shipped.hyperparameters['gamma']:g}). Intervals: 95 %, Student's, over seeds; differences paired by seed.",
        f"Training world: {pair.train.data.provenance.name} ({pair.train.data.provenance.origin} data), fingerprint "
        f"{pair.train.fingerprint}.",
        f"Made by: python benchmarks/session_clock.py {arguments.world} --results RESULTS",
    )
    write_page(arguments.results, "session_clock.md", replace(table, notes=notes).markdown())


if __name__ == "__main__":
    main()
