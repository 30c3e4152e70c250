"""MOFIR's front: clicks and long-tail share for each preference, one model for all; writes docs/results/mofir_front.*.

    python benchmarks/mofir_front.py KuaiFair-KuaiRandTwin-v0 --store runs/mofir --results docs/results

Trains with the zoo's settings, one model for each seed of a study; a store that holds the runs is read. The hypervolume
is that of the front above (0, 0); Random and the controls stand beside as points of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from kuaifair_env.splits import evaluation_users

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worlds import argument_parser, open_worlds, write_page

from hrl_policies.preference_front import FrontPoint, hypervolume, preference_front, preference_grid
from hrl_policies.study import STUDY_SEEDS, load_policy, load_run, plan_run, run_study
from hrl_policies.study.config import RunConfig, run_folder
from hrl_policies.study.figures import draw_preference_front
from hrl_policies.study.loading import build_policy
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.statistics import student_interval
from hrl_policies.study.tables import Measured, ResultTable
from hrl_policies.worlds import WorldPair
from kuaifair_env.evaluation import evaluate
from kuaifair_env.intervals import rate_interval
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import World

USERS, BATCH = 1_000, 256
POINTS = 9
BESIDE = ("random", "tail-only", "pop-only", "quota-greedy")


def sessions(world: World, config: RunConfig) -> KuaiFairVecEnv:
    """Returns sessions to evaluate in."""
    return KuaiFairVecEnv(world, config.session, BATCH, seed=0)


def place(name: str, pair: WorldPair, world: World) -> tuple[float, float]:
    """Returns clicks and long-tail share of a control."""
    config = plan_run(name, pair.name)
    found = evaluate(build_policy(config, pair), sessions(world, config), evaluation_users(world.user_ids, USERS))
    return found.engagement.reward_per_step, (1.0 - found.fairness.signed_gap) / 2.0


def mean_front(fronts: list[list[FrontPoint]]) -> list[tuple[str, list[float], list[float], list[float]]]:
    """Returns, for each preference, its weight and what each seed earned."""
    return [
        (
            f"{points[0].preference[1]:.3f}",
            [point.clicks for point in points],
            [point.tail_share for point in points],
            [point.cumulative_reward for point in points],
        )
        for points in zip(*fronts, strict=True)
    ]


def measured(values: list[float], digits: int = 3) -> Measured:
    """Returns a mean with its 95 % Student interval over seeds."""
    if len(values) < 2:
        return Measured(values[0], digits)
    return Measured.of_interval(student_interval(np.asarray(values)), digits)


def share(values: list[float]) -> Measured:
    """Returns a mean share with its 95 % Wilson interval over seeds."""
    return Measured.of_interval(rate_interval(np.asarray(values)[:, None]), 3) if len(values) > 1 else measured(values)


def table(split: str, fronts: list[list[FrontPoint]], others: list[tuple[str, float, float]]) -> ResultTable:
    """Returns the table of one world."""
    areas = [hypervolume([(point.clicks, point.tail_share) for point in front]) for front in fronts]
    rows = [
        (weight, share(clicks), share(tails), measured(rewards, 2))
        for weight, clicks, tails, rewards in mean_front(fronts)
    ]
    random = next((clicks, tail) for name, clicks, tail in others if name == "random")
    beside = "; ".join(f"{name} ({clicks:.3f}, {tail:.3f})" for name, clicks, tail in others)
    return ResultTable(
        title=f"{split} world",
        header=("weight of long-tail share", "clicks (R_each)", "long-tail share", "R_cum"),
        rows=tuple(rows),
        notes=(
            f"Hypervolume {measured(areas)}; Random alone: {random[0] * random[1]:.3f}.",
            f"(clicks, long-tail share) of controls: {beside}.",
        ),
    )


def fronts_of(store: Path, pair: WorldPair, cells: list[RunConfig], world: World) -> list[list[FrontPoint]]:
    """Evaluates every seed's model for all preferences."""
    users = evaluation_users(world.user_ids, USERS)
    return [
        preference_front(
            load_policy(load_run(store / run_folder(cell)), pair),
            sessions(world, cell),
            preference_grid(POINTS),
            users=users,
        )
        for cell in cells
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(STUDY_SEEDS))
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    cells = [plan_run("mofir", pair.name, seed=seed) for seed in arguments.seeds]
    run_study(cells, arguments.store, {pair.name: pair}).raise_for_failures()
    texts = [f"# MOFIR's front, {pair.name}"]
    for split, world in (("training", pair.train), ("test", pair.test)):
        fronts = fronts_of(arguments.store, pair, cells, world)
        others = [(name, *place(name, pair, world)) for name in BESIDE]
        picture = f"mofir_front_{split}.png"
        texts += [table(split, fronts, others).markdown(), f"![Front in the {split} world, first seed]({picture})"]
        if arguments.results:
            draw_preference_front(
                arguments.results / picture,
                fronts[0],
                others,
                title=f"MOFIR, seed {arguments.seeds[0]}, {split} world",
            )
    command = f"python benchmarks/mofir_front.py {arguments.world} --store STORE --results RESULTS"
    texts.append(
        f"{USERS:,} users, Max Len 30; brackets: 95 % interval over training seeds "
        f"{', '.join(map(str, arguments.seeds))}, Wilson's for clicks and long-tail share, else Student's. The weight "
        "that MOFIR acts with unless told otherwise is the one of "
        f"largest R_cum over users of the training world. Made by: `{command}`."
    )
    write_page(arguments.results, "mofir_front.md", "\n\n".join(texts))


if __name__ == "__main__":
    main()
