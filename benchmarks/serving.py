"""Controls and trained agents that serve the same users, beside what they do frozen; writes serving_WORLD_REPEATS.md.

    python benchmarks/serving.py kuairand --repeats allow --data DATA --store STORE --results docs/results
    python benchmarks/serving.py KuaiFair-KuaiRandTwin-v0 --repeats forbid --store STORE --results docs/results

Everybody serves 1,000 users of the test world, or all if there are fewer, once each, in several orders. Methods that
learn are trained first, in the training world with the zoo's settings. What the store holds is not done again.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from worlds import argument_parser, cell, open_worlds, short_name, write_page

from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.study import plan_run, single_threaded
from hrl_policies.study.curves import draw_serving
from hrl_policies.study.runner import train
from hrl_policies.study.serving import trained_agent, untrained_agent
from hrl_policies.study.statistics import mean_interval, student_interval
from hrl_policies.study.store import load_run
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import method
from kuaifair_env import EvaluationResult, ServingResult, SessionConfig, evaluate, serve
from kuaifair_env.files import write_text_atomically

CONTROLS = ("quota-greedy", "session-quota", "item-quota", "belief-quota", "oracle")
LEARNS_NOTHING = ("quota-greedy", "session-quota", "quality-oracle", "oracle")
LOW, HIGH = "quota-greedy", "oracle"
USERS, N_ENVS = 1_000, 64
COURSE = "course.json"
COURSE_AT = (0, 50, 125, 250, 500, 1_000)
SCALES = {
    "own intercept": ("own", "intercept"),
    "own taste": ("own", "taste"),
    "own offset": ("own", "offset"),
    "shared vector": ("shared", "vector"),
    "shared features": ("shared", "features"),
    "shared offset": ("shared", "offset"),
}


@dataclass(frozen=True)
class Services:
    """What one method did.

    Attributes:
        name: Of the method.
        serving: One service for each order.
        frozen: The method as it was before it served, evaluated on the same users.
        steps: Training steps; 0 of a control.
        courses: Scales of the belief while serving, for each order; empty where there is no belief.
    """

    name: str
    serving: Sequence[ServingResult]
    frozen: EvaluationResult
    steps: int
    courses: Sequence[Sequence[Mapping[str, Any]]]

    @property
    def title(self) -> str:
        """Name in tables."""
        return method(self.name).title + (" †" if method(self.name).privileged else "")


def users_of(pair: WorldPair) -> tuple[int | str, ...]:
    """Returns raw ids of the users who are served."""
    rows = np.random.default_rng(5).permutation(pair.test.users)[:USERS]
    return tuple(pair.test.data.users.ids[rows].tolist())


def services(name: str, pair: WorldPair, arguments: Namespace) -> Services:
    """Trains a method if it learns, has it serve in every order, and evaluates it as it was."""
    config = plan_run(name, pair.name, session=SessionConfig(repeats=arguments.repeats), total_steps=arguments.steps)
    folder = arguments.store / short_name(arguments.world) / arguments.repeats / name
    if method(name).learns:
        run = folder / "run"
        if not run.exists():
            train(config, pair, output=run)
        build = trained_agent(load_run(run), pair, N_ENVS)
    else:
        build = untrained_agent(config, pair, N_ENVS)
    users = users_of(pair)
    results, courses = [], []
    for order in range(_orders(name, arguments)):
        agent, env = build()
        place = folder / f"order-{order}"
        others = order == 0
        served = serve(agent, env, users, len(users), order=order, n_envs=N_ENVS, evaluate_others=others, folder=place)
        print(f"{name} order {order}: {served.served.engagement.cumulative_reward:.3f}", flush=True)
        results.append(served)
        if isinstance(agent, BeliefQuota):
            courses.append(course_of(agent, place / COURSE))
    agent, env = build()
    frozen = results[0].served if name in LEARNS_NOTHING else evaluate(agent, env, users)
    return Services(name, results, frozen, config.total_steps, courses)


def _orders(name: str, arguments: Namespace) -> int:
    if name in LEARNS_NOTHING:
        return 1
    orders: int = arguments.trained_orders if method(name).learns else arguments.orders
    return orders


def course_of(agent: BeliefQuota, path: Path) -> list[dict[str, Any]]:
    """Returns the scales of a belief while serving, from the agent that served or from where they were kept."""
    if not path.exists():
        rows = [{"sessions": then.sessions, **asdict(then.scales)} for then in agent.belief.course]
        write_text_atomically(path, json.dumps(rows))
    stored: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return stored


def serving_table(found: Sequence[Services]) -> list[str]:
    """Returns the table of serving."""
    by_name = {one.name: one for one in found}
    low, high = (by_name[name].serving[0].served.engagement.cumulative_reward for name in (LOW, HIGH))
    lines = [
        "| agent | learning | orders | R_cum, all sessions | first 125 | last 125 | Len | AD | violation rate | "
        "share of the way | other users, frozen: before, after |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        rows = [result.summary() for result in one.serving]
        parts = [[part["r_cum"] for part in (result.first(125), result.last(125))] for result in one.serving]
        rewards = np.asarray([row["r_cum"] for row in rows])
        means = [float(np.mean([row[name] for row in rows])) for name in ("len", "ad", "violation_rate")]
        first, last = np.mean(parts, axis=0)
        lines.append(
            f"| {one.title} | {one.serving[0].settings.learning} | {len(rows)} | {_over_orders(rewards)} | {first:.2f} "
            f"| {last:.2f} | {means[0]:.2f} | {means[1]:.3f} | {means[2]:.3f} "
            f"| {_over_orders((rewards - low) / (high - low))} | {_others(rows)} |"
        )
    return lines


def frozen_table(found: Sequence[Services]) -> list[str]:
    """Returns the table of frozen agents."""
    sessions = {one.name: one.frozen.sessions for one in found}
    rewards = {name: each.return_[np.argsort(each.user_ids)] for name, each in sessions.items()}
    low, high = rewards[LOW].mean(), rewards[HIGH].mean()
    lines = [
        "| agent | R_cum | more than QuotaGreedy | Len | AD | violation rate | share of the way |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        more = "" if one.name == LOW else cell(mean_interval(rewards[one.name] - rewards[LOW]), sign=True)
        engagement, fairness = one.frozen.engagement, one.frozen.fairness
        lines.append(
            f"| {one.title} | {cell(mean_interval(rewards[one.name]))} | {more} | {engagement.length:.2f} "
            f"| {fairness.absolute_difference:.3f} | {fairness.violation_rate:.3f} "
            f"| {(rewards[one.name].mean() - low) / (high - low):.2f} |"
        )
    return lines


def course_table(one: Services) -> list[str]:
    """Returns the scales of a belief while serving, mean over orders."""
    lines = [f"| after sessions | {' | '.join(SCALES)} |", "|---:|" + "---:|" * len(SCALES)]
    for sessions in COURSE_AT:
        then = [
            next((row for row in course[1:] if row["sessions"] >= sessions), course[-1]) if sessions else course[0]
            for course in one.courses
        ]
        cells = [np.mean([row[level][name] for row in then]) for level, name in SCALES.values()]
        lines.append(f"| {sessions:,} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return lines


def _others(rows: Sequence[Mapping[str, float]]) -> str:
    """Returns R_cum on users whom the first service did not meet; one number for who learns nothing."""
    return ", ".join(f"{rows[0][name]:.2f}" for name in ("before_r_cum", "after_r_cum") if name in rows[0])


def _over_orders(values: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    return f"{values[0]:.2f}" if len(values) < 2 else cell(student_interval(values))


def notes(pair: WorldPair, found: Sequence[Services], arguments: Namespace) -> list[str]:
    """Returns what the tables rest on: users, training, data, and the command."""
    data = pair.test.data
    names, steps = " ".join(one.name for one in found), f" --steps {arguments.steps}" if arguments.steps else ""
    trained = ", ".join(f"{one.title} {one.steps:,}" for one in found if one.steps)
    of_training = [
        f"- Trained with the zoo's settings in the randomised training world, seed 11, for so many steps: {trained}. "
        "One seed says nothing about how much seeds differ: intervals are over orders alone.",
        "- A run folder holds no replay buffer: that of TD3 begins empty.",
    ]
    return [
        f"- {len(found[0].serving[0]):,} users of the test world, "
        f"`numpy.random.default_rng(5).permutation(world.users)[:{USERS}]`, once each, {N_ENVS} at a time; Max Len 30, "
        f"K 10, repeats {arguments.repeats}.",
        *(of_training if trained else []),
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the test "
        f"world {pair.test.fingerprint}.",
        f"- Made by: python benchmarks/serving.py {arguments.world} --repeats {arguments.repeats} --orders "
        f"{arguments.orders} --trained-orders {arguments.trained_orders} --methods {names}{steps} --data DATA --store "
        "STORE --results docs/results.",
    ]


def page(pair: WorldPair, found: Sequence[Services], arguments: Namespace, picture: str) -> str:
    """Returns the page of a world."""
    course = [line for one in found if one.courses for line in ("", f"{one.title}:", "", *course_table(one))]
    lines = [
        f"# Serving: {pair.name}, repeats {arguments.repeats}",
        "",
        "*Share of the way*: from QuotaGreedy to the Oracle, both measured in the same run. † knows answers: a bound, "
        "not a method.",
        "",
        "### Serving: what was learned is kept from session to session",
        "",
        *serving_table(found),
        "",
        "Brackets: Student's 95 % interval over orders of the users. Agents that learn nothing do the same in every "
        "order, so that one is played. Other users: those whom the service does not meet, first order.",
        "",
        f"![Curves over sessions served]({picture})",
        "",
        "### Frozen: nothing is kept, the same users and the same agents before they served",
        "",
        *frozen_table(found),
        "",
        "Brackets: 95 % bootstrap intervals over users; differences are paired.",
        "",
        "### Scales that empirical Bayes chose while serving, mean over orders",
        *course,
        "",
        "## Notes",
        "",
        *notes(pair, found, arguments),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", choices=("allow", "forbid"), default="allow")
    parser.add_argument("--store", type=Path, required=True, help="folder for trained agents and services")
    parser.add_argument("--methods", nargs="+", default=CONTROLS, help="quota-greedy and oracle are always there")
    parser.add_argument("--orders", type=int, default=5, help="orders of the users, of controls that learn")
    parser.add_argument("--trained-orders", type=int, default=2, help="of methods that are trained")
    parser.add_argument("--steps", type=int, help="training steps; the zoo's where not given")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    names: dict[str, None] = dict.fromkeys((LOW, *(name for name in arguments.methods if name != HIGH), HIGH))
    found = []
    for name in names:
        print(name, flush=True)
        found.append(services(name, pair, arguments))
    stem = f"serving_{short_name(arguments.world)}_{arguments.repeats}"
    if arguments.results is not None:
        draw_serving(arguments.results / f"{stem}.png", {one.title: one.serving for one in found})
    write_page(arguments.results, f"{stem}.md", page(pair, found, arguments, f"{stem}.png"))


if __name__ == "__main__":
    main()
