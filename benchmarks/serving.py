"""Controls and trained agents that serve the same users, beside what they do frozen; writes serving_WORLD_REPEATS.md.

    python benchmarks/serving.py kuairand --repeats allow --data DATA --store STORE --results docs/results
    python benchmarks/serving.py KuaiFair-KuaiRandTwin-v0 --repeats forbid --store STORE --results docs/results

    python benchmarks/serving.py kuairand --sessions 20000 --orders 3 --data DATA --store STORE --results docs/results

Everybody serves 1,000 users of the test world, or all if there are fewer, once each, in several orders; or, with
``--sessions``, 80 % of its users as often as that takes. Methods that learn are trained first, in the training world
with the zoo's settings; those whose state is a belief serve with networks that learn, and with networks that stay,
unless their guard kept the start, and networks stay anyhow. What the store holds is not done again.
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
from hrl_policies.study import PurifierIdentity, plan_run, single_threaded
from hrl_policies.study.curves import draw_serving
from hrl_policies.study.runner import train
from hrl_policies.study.serving import trained_agent, untrained_agent
from hrl_policies.study.statistics import mean_interval, student_interval
from hrl_policies.study.store import load_run
from hrl_policies.worlds import WorldPair, cached_purifier
from hrl_policies.zoo import method
from kuaifair_env import EvaluationResult, ServingResult, SessionConfig, evaluate, serve
from kuaifair_env.files import write_text_atomically

CONTROLS = ("quota-greedy", "session-quota", "item-quota", "belief-quota", "oracle")
LEARNS_NOTHING = ("quota-greedy", "session-quota", "quality-oracle", "oracle")
LOW, HIGH, FLOOR = "quota-greedy", "oracle", "belief-quota"
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
    "shared log": ("shared", "log"),
}


@dataclass(frozen=True)
class Services:
    """What one method did.

    Attributes:
        name: Of the method.
        gradients: Whether its networks learn while serving, if it has any.
        serving: One service for each order.
        frozen: The method as it was before it served, evaluated on the same users.
        steps: Training steps; 0 of a control.
        courses: Scales of the belief while serving, for each order; empty where there is no belief.
    """

    name: str
    gradients: bool
    serving: Sequence[ServingResult]
    frozen: EvaluationResult
    steps: int
    courses: Sequence[Sequence[Mapping[str, Any]]]

    @property
    def title(self) -> str:
        """Name in tables."""
        spec = method(self.name)
        return spec.title + (" †" if spec.privileged else "") + ("" if self.gradients else ", networks stay")


def users_of(pair: WorldPair) -> tuple[int | str, ...]:
    """Returns raw ids of the users who are served."""
    rows = np.random.default_rng(5).permutation(pair.test.users)[:USERS]
    return tuple(pair.test.data.users.ids[rows].tolist())


def services(name: str, pair: WorldPair, arguments: Namespace, gradients: bool) -> Services:
    """Trains a method if it learns, has it serve in every order, and evaluates it as it was."""
    mode = method(name).purifier
    purifier = cached_purifier(pair.train, mode) if mode else None
    clock = method(name).learns and not mode  # beliefs have it in their state, and controls do not read it
    config = plan_run(
        name,
        pair.name,
        session=SessionConfig(repeats=arguments.repeats, session_clock=clock),
        total_steps=arguments.steps,
        purifier=PurifierIdentity.of_file(purifier) if purifier else None,
    )
    folder = arguments.store / short_name(arguments.world) / arguments.repeats / name
    if method(name).learns:
        run = folder / "run"
        if not run.exists():
            train(config, pair, purifier=purifier, output=run)
        build = trained_agent(load_run(run), pair, N_ENVS)
    else:
        build = untrained_agent(config, pair, N_ENVS)
    evaluated_on = users_of(pair)
    users = evaluated_on if arguments.sessions is None else None
    sessions = arguments.sessions or len(evaluated_on)
    results, courses = [], []
    for order in range(_orders(name, arguments)):
        agent, env = build()
        place = folder / f"{sessions}{'' if gradients else '-networks-stay'}" / f"order-{order}"
        served = serve(
            agent if gradients else agent.predict,
            env,
            users,
            sessions,
            order=order,
            n_envs=N_ENVS,
            evaluate_others=order == 0,
            folder=place,
        )
        print(f"{name} order {order}: {served.served.engagement.cumulative_reward:.3f}", flush=True)
        results.append(served)
        if isinstance(agent, BeliefQuota):
            courses.append(course_of(agent, place / COURSE))
    agent, env = build()
    alike = name in LEARNS_NOTHING and users is not None
    frozen = results[0].served if alike else evaluate(agent, env, evaluated_on)
    return Services(name, gradients, results, frozen, config.total_steps, courses)


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
    part = _part(found)
    lines = [
        f"| agent | learning | orders | R_cum, all sessions | first {part:,} | last {part:,} | Len | AD "
        "| violation rate | share of the way | more than BeliefQuota | other users, frozen: before, after |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        rows = [result.summary() for result in one.serving]
        parts = [[figures["r_cum"] for figures in (each.first(part), each.last(part))] for each in one.serving]
        rewards = np.asarray([row["r_cum"] for row in rows])
        means = [float(np.mean([row[name] for row in rows])) for name in ("len", "ad", "violation_rate")]
        first, last = np.asarray(parts).T
        lines.append(
            f"| {one.title} | {one.serving[0].settings.learning} | {len(rows)} | {_over_orders(rewards)} "
            f"| {_over_orders(first)} | {_over_orders(last)} | {means[0]:.2f} | {means[1]:.3f} | {means[2]:.3f} "
            f"| {_over_orders((rewards - low) / (high - low))} | {_more(one, by_name.get(FLOOR))} | {_others(rows)} |"
        )
    return lines


def _part(found: Sequence[Services]) -> int:
    """Returns how many sessions the first and the last part of a service are: an eighth, 1,000 at most."""
    return min(len(found[0].serving[0]) // 8, 1_000)


def frozen_table(found: Sequence[Services]) -> list[str]:
    """Returns the table of frozen agents."""
    found = [one for one in found if one.gradients]  # frozen, they are the same
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
        lines.append(f"| {min(sessions, len(one.serving[0])):,} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return lines


def _more(one: Services, floor: Services | None) -> str:
    """Returns by how much an agent that learns is ahead of another control that does, paired by order."""
    if floor is None or one.name in (FLOOR, *LEARNS_NOTHING):
        return ""
    rewards = [[each.served.engagement.cumulative_reward for each in who.serving] for who in (one, floor)]
    shared = min(len(of_orders) for of_orders in rewards)
    more = np.subtract(*(of_orders[:shared] for of_orders in rewards))
    return cell(student_interval(more), sign=True) if shared > 1 else f"{more[0]:+.2f}"


def _others(rows: Sequence[Mapping[str, float]]) -> str:
    """Returns R_cum on users whom the first service did not meet; one number for who learns nothing."""
    return ", ".join(f"{rows[0][name]:.2f}" for name in ("before_r_cum", "after_r_cum") if name in rows[0])


def _over_orders(values: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    return f"{values[0]:.2f}" if len(values) < 2 else cell(student_interval(values))


def notes(pair: WorldPair, found: Sequence[Services], arguments: Namespace) -> list[str]:
    """Returns what the tables rest on: users, training, data, and the command."""
    data = pair.test.data
    names = " ".join(one.name for one in found if one.gradients)
    options = f" --steps {arguments.steps}" if arguments.steps else ""
    options += f" --sessions {arguments.sessions}" if arguments.sessions else ""
    trained = ", ".join(f"{one.title} {one.steps:,}" for one in found if one.steps and one.gradients)
    served = (
        f"`numpy.random.default_rng(5).permutation(world.users)[:{USERS}]`, once each"
        if arguments.sessions is None
        else "the 80 % that a hash of their ids chooses, all once before any comes again"
    )
    of_training = [
        f"- Trained with the zoo's settings in the randomised training world, seed 11, for so many steps: {trained}. "
        "One seed says nothing about how much seeds differ: intervals are over orders alone. All of them see the "
        "session's clock.",
        "- A run folder holds no replay buffer: it begins empty. Where the guard of a run kept its start, networks "
        "stay as they are, and the belief alone learns.",
    ]
    return [
        f"- {len(found[0].serving[0]):,} sessions of users of the test world: {served}, {N_ENVS} at a time; Max Len "
        f"30, K 10, repeats {arguments.repeats}. Frozen: {len(pair.test.users[:USERS]):,} users, once each.",
        *(of_training if trained else []),
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the test "
        f"world {pair.test.fingerprint}.",
        f"- Made by: python benchmarks/serving.py {arguments.world} --repeats {arguments.repeats} --orders "
        f"{arguments.orders} --trained-orders {arguments.trained_orders} --methods {names}{options} --data DATA "
        "--store STORE --results docs/results.",
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
        "Brackets: Student's 95 % interval over orders of the users; differences are over the orders that both served. "
        "Agents that learn nothing do the same in every order, so that one is played. Other users: those whom the "
        "service does not meet, first order.",
        "",
        f"![Curves over sessions served]({picture})",
        "",
        "### Frozen: nothing is kept, the same agents before they served",
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
    parser.add_argument("--sessions", type=int, help="sessions of each service; by default one for each of the users")
    parser.add_argument("--steps", type=int, help="training steps; the zoo's where not given")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    names: dict[str, None] = dict.fromkeys((LOW, *(name for name in arguments.methods if name != HIGH), HIGH))
    found = []
    for name in names:
        print(name, flush=True)
        found.append(services(name, pair, arguments, gradients=True))
        if method(name).purifier and found[-1].serving[0].settings.learning != "posterior":
            found.append(services(name, pair, arguments, gradients=False))
    stem = f"serving_{short_name(arguments.world)}_{arguments.repeats}"
    stem += f"_{arguments.sessions}" if arguments.sessions else ""
    if arguments.results is not None:
        draw_serving(arguments.results / f"{stem}.png", {one.title: one.serving for one in found})
    write_page(arguments.results, f"{stem}.md", page(pair, found, arguments, f"{stem}.png"))


if __name__ == "__main__":
    main()
