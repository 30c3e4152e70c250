"""A2C and PPO whose state is a belief about the user, or the observed one; writes belief_agents_WORLD.md and .csv.gz.

    python benchmarks/belief_agents.py KuaiFair-Toy-v0 --store STORE --results docs/results

Agents are trained in the randomised training world, are evaluated in the test world as they are, and then serve its
users: with their networks as they are, and with networks that learn. A belief goes on learning in both services. What
the store holds is not done again.
"""

from __future__ import annotations

import csv
import io
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from worlds import argument_parser, cell, open_worlds, short_name, write_page

from dsrm.pretraining import PretrainConfig, pretrain
from dsrm.purifier import save_purifier
from hrl_policies.study import PurifierIdentity, plan_run, single_threaded
from hrl_policies.study.runner import train
from hrl_policies.study.serving import Build, trained_agent, untrained_agent
from hrl_policies.study.statistics import holm
from hrl_policies.study.store import load_run
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import method
from kuaifair_env import ServingResult, SessionConfig, serve
from kuaifair_env.data.schema import IdArray
from kuaifair_env.files import write_text_atomically
from kuaifair_env.intervals import crossed_difference, crossed_mean, interval_of
from kuaifair_env.splits import serving_split
from kuaifair_env.world import World

ALGORITHMS = ("a2c", "ppo")
OVERRIDES: dict[str, dict[str, Any]] = {"a2c": {}, "ppo": {"gamma": 0.95, "policy_kwargs.log_std_init": -2.7}}
"""Where settings are not the zoo's. PPO's give agents that care for the next slate alone."""
STATES = {"observed": "observed state and clock", "closed_form": "belief, closed form", "belief": "belief, diffusion"}
"""What agents see; all but the first are modes of pretraining."""
CONTROLS = {"quota-greedy": 1, "belief-quota": 3, "oracle": 1}
"""In how many orders they serve."""
SETTINGS = {"frozen": "frozen", "posterior": "serving, networks as they are", "both": "serving, networks learn"}
"""What is learned; beliefs learn in both services."""
N_ENVS, PASSES, FIRST_AND_LAST = 64, 6, 160
SIGNIFICANT = 0.05
DIFFUSION = " Diffusion: pretrained once for all seeds, `PretrainConfig(mode='belief')`."
RUN, SERVED = "run", "result.json"
FIGURES = ("r_cum", "len", "violation_rate", "first", "last")


class Result(NamedTuple):
    """What one agent did in one setting.

    Attributes:
        rewards: ``(U,)``, R_cum of each user, mean over sessions, in the order of the users' ids.
        figures: By name: R_cum, Len and violation rate over all sessions, R_cum of the first and last ones served.
    """

    rewards: NDArray[np.float64]
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Agent:
    """An agent of the page: a method that sees a state, or a control."""

    method: str
    state: str = ""

    @property
    def title(self) -> str:
        """Name in tables."""
        name = method(self.method).title + (" †" if method(self.method).privileged else "")
        return f"{name}, {STATES[self.state]}" if self.state else name


Results = dict[tuple[Agent, str], dict[int, Result]]
"""By agent and setting, then by seed."""


def purifier_file(pair: WorldPair, state: str, folder: Path) -> Path:
    """Returns the file of a purifier, which all seeds share; makes it where it is missing."""
    path = folder / f"{state}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_purifier(pretrain(pair.train, PretrainConfig(mode=state)), path)  # type: ignore[arg-type]
    return path


def play(pair: WorldPair, agent: Agent, seed: int, steps: int, store: Path) -> Path:
    """Trains an agent, evaluates it and has it serve, but for what the store holds; returns its folder there."""
    folder = store / f"{agent.method}-{agent.state}" / str(seed)
    if not (folder / RUN).exists():
        purifier = None if agent.state == "observed" else purifier_file(pair, agent.state, store / "purifiers")
        config = plan_run(
            agent.method,
            pair.name,
            seed=seed,
            session=SessionConfig(session_clock=purifier is None),
            total_steps=steps,
            n_envs=N_ENVS,
            overrides=OVERRIDES[agent.method],
            purifier=None if purifier is None else PurifierIdentity.of_file(purifier),
        )
        train(config, pair, purifier=purifier, output=folder / RUN)
    build = trained_agent(load_run(folder / RUN), pair, N_ENVS)
    have_serve(build, seed, folder / "posterior", gradients=False)
    have_serve(build, seed, folder / "both")
    return folder


def play_control(pair: WorldPair, name: str, order: int, store: Path) -> Path:
    """Evaluates a control and has it serve in one order, but for what the store holds; returns its folder there."""
    folder, config = store / name / str(order), plan_run(name, pair.name)
    if not (folder / RUN).exists():
        train(config, pair, output=folder / RUN)
    have_serve(untrained_agent(config, pair, N_ENVS), order, folder / "posterior")
    return folder


def have_serve(build: Build, order: int, folder: Path, *, gradients: bool = True) -> None:
    """Has an agent serve in one order of the users, with its networks as they are or not."""
    if not (folder / SERVED).exists():
        agent, env = build()
        agent = agent if gradients else agent.predict
        sessions = PASSES * len(served_users(env.get_attr("world")[0]))
        serve(agent, env, sessions=sessions, order=order, n_envs=N_ENVS, evaluate_others=False, folder=folder)


def served_users(world: World) -> IdArray:
    """Returns raw ids of the users who are served."""
    return serving_split(world.user_ids)[0]


def results_of(folder: Path) -> dict[str, Result]:
    """Returns what an agent of one seed did, by setting."""
    run = load_run(folder / RUN)
    rows = run.sessions()
    results = {"frozen": Result(by_user(*([row[name] for row in rows] for name in ("user_id", "r_cum"))), run.summary)}
    for setting in ("posterior", "both"):
        if (folder / setting / SERVED).exists():
            served = ServingResult.load(folder / setting)
            sessions = served.served.sessions
            parts = {"first": served.first(FIRST_AND_LAST), "last": served.last(FIRST_AND_LAST)}
            figures = served.summary() | {name: part["r_cum"] for name, part in parts.items()}
            results[setting] = Result(by_user(sessions.user_ids, sessions.return_), figures)
    return results


def by_user(user_ids: Any, rewards: Any) -> NDArray[np.float64]:
    """Returns the mean reward of each user."""
    users, places = np.unique(np.asarray(user_ids), return_inverse=True)
    return np.bincount(places, np.asarray(rewards, np.float64)) / np.bincount(places, minlength=len(users))


def stored(store: Path, seeds: int) -> Results:
    """Returns what all agents did, of every one of the first seeds of which the store holds all."""
    results: Results = {}
    agents = [Agent(name, state) for name in ALGORITHMS for state in STATES] + [Agent(name) for name in CONTROLS]
    for agent in agents:
        folders = (store / (f"{agent.method}-{agent.state}" if agent.state else agent.method)).glob("*")
        last = "both" if agent.state else "posterior"
        for folder in sorted((one for one in folders if (one / last / SERVED).exists()), key=lambda one: int(one.name)):
            for setting, result in results_of(folder).items():
                if int(folder.name) < (seeds if agent.state else 1 if setting == "frozen" else CONTROLS[agent.method]):
                    results.setdefault((agent, setting), {})[int(folder.name)] = result
    return results


def rewards(of_seeds: Mapping[int, Result]) -> NDArray[np.float64]:
    """Returns the table ``(S, U)`` of an agent's R_cum."""
    return np.stack([of_seeds[seed].rewards for seed in sorted(of_seeds)])


def setting_tables(results: Results) -> list[str]:
    """Returns a table of what every agent did for each setting."""
    lines = []
    for setting, title in SETTINGS.items():
        lines += [
            f"### {title[0].upper()}{title[1:]}",
            "",
            "| agent | seeds, orders | R_cum | Len | violation rate | first 160 sessions | last 160 |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for (agent, of), seeds in results.items():
            if of == setting:
                length, violations, first, last = (_mean(seeds, name) for name in FIGURES[1:])
                mean = cell(interval_of(crossed_mean(rewards(seeds))))
                number = len(seeds) if agent.state or len(seeds) > 1 else ""
                lines.append(
                    f"| {agent.title} | {number} | {mean} | {length:.2f} | {violations:.3f} "
                    f"| {_shown(first)} | {_shown(last)} |"
                )
        lines.append("")
    return lines[:-1]


def _mean(seeds: Mapping[int, Result], figure: str) -> float:
    return float(np.mean([result.figures.get(figure, np.nan) for result in seeds.values()]))


def _shown(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def claims_tables(results: Results) -> list[str]:
    """Returns differences between states under one algorithm in one setting, with p-values by Holm over all of them."""
    pairs = (("closed_form", "observed"), ("belief", "observed"), ("belief", "closed_form"))
    methods = dict.fromkeys(agent.method for agent, _ in results if agent.state)
    compared = [
        (name, setting, first, second)
        for name in methods
        for setting in SETTINGS
        for first, second in pairs
        if (Agent(name, first), setting) in results and (Agent(name, second), setting) in results
    ]
    estimates = [
        crossed_difference(*(rewards(results[Agent(name, state), setting]) for state in (first, second)))
        for name, setting, first, second in compared
    ]
    adjusted = holm(np.asarray([estimate.p_value() for estimate in estimates]))
    lines = []
    for setting, title in SETTINGS.items():
        lines += [
            f"### {title[0].upper()}{title[1:]}: differences",
            "",
            "| algorithm | state | minus | difference of R_cum | p, Holm |",
            "|---|---|---|---:|---:|",
        ]
        for (name, of, first, second), estimate, p in zip(compared, estimates, adjusted, strict=True):
            if of == setting:
                difference = cell(interval_of(estimate), sign=True)
                lines.append(
                    f"| {method(name).title} | {STATES[first]} | {STATES[second]} | {difference} "
                    f"| {'< 0.001' if p < 0.001 else f'{p:.3f}'} |"
                )
        lines.append("")
    lines.pop()
    lines += [
        "",
        f"{(adjusted <= SIGNIFICANT).sum()} of {len(adjusted)} differences are shown: p at most {SIGNIFICANT}.",
    ]
    return lines


def against_quota(results: Results) -> str:
    """Returns a sentence on how agents and QuotaGreedy compare, frozen."""
    quota = rewards(results[Agent("quota-greedy"), "frozen"])
    gaps = [
        f"{agent.title} {cell(interval_of(crossed_difference(rewards(seeds), quota)), sign=True)}"
        for (agent, setting), seeds in results.items()
        if agent.state and setting == "frozen"
    ]
    return f"Frozen, more than QuotaGreedy, which learns nothing by reinforcement: {'; '.join(gaps)}."


def csv_of(results: Results) -> str:
    """Returns the figures of every seed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("method", "state", "setting", "seed", *FIGURES))
    for (agent, setting), seeds in results.items():
        for seed, result in seeds.items():
            figures = [_rounded(result.figures.get(name)) for name in FIGURES]
            writer.writerow((agent.method, agent.state, setting, seed, *figures))
    return stream.getvalue()


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def page(results: Results, pair: WorldPair, arguments: Namespace) -> str:
    """Returns the page of a world."""
    data, served = pair.test.data, served_users(pair.test)
    n_seeds = {agent.method: len(seeds) for (agent, _), seeds in results.items() if agent.state}
    seeds = ", ".join(f"{method(name).title} {number}" for name, number in n_seeds.items())
    lines = [
        f"# {' and '.join(method(name).title for name in n_seeds)} with and without a belief as state: {pair.name}",
        "",
        "## What they did",
        "",
        *setting_tables(results),
        "",
        "Brackets: 95 % intervals over training seeds and users, crossed. † knows answers: a bound, not a method.",
        "",
        "## Differences",
        "",
        *claims_tables(results),
        "",
        "Brackets: 95 % intervals, seeds independent, users paired. P-values are adjusted by Holm over all rows.",
        "",
        against_quota(results),
        "",
        "## Notes",
        "",
        f"- Training: {arguments.steps:,} steps (the zoo: 500,000) in the randomised training world, {N_ENVS} sessions "
        f"at a time, repeats allowed, Max Len 30, K 10; training seeds from 0 on: {seeds}. Settings are the zoo's, the "
        "same for all states; changes: "
        + "; ".join(f"{method(name).title}: {OVERRIDES[name] or 'none'}" for name in n_seeds)
        + ". They were chosen on held-out users of the training world.",
        "- Observed state: with the session clock, which beliefs hold too. A belief learns the shared level while "
        "agents are trained, anew in each block of the randomised world."
        + (DIFFUSION if any(agent.state == "belief" for agent, _ in results) else ""),
        f"- Frozen: {len(pair.test.users)} held-out users, one session each. Serving: {len(served)} of them, {PASSES} "
        "sessions each, order of the users by the training seed. Networks that learn explore; those that do not act "
        "deterministically. Controls serve in the orders from 0 on.",
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the test "
        f"world {pair.test.fingerprint}.",
        f"- Made by: python benchmarks/belief_agents.py {arguments.world} --seeds {arguments.seeds} --steps "
        f"{arguments.steps} --algorithms {' '.join(arguments.algorithms)} --states {' '.join(arguments.states)} "
        "--store STORE --results docs/results",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder for trained agents and services")
    parser.add_argument("--seeds", type=int, default=10, help="number of training seeds, from 0 on")
    parser.add_argument("--steps", type=int, default=60_000, help="training steps")
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--states", nargs="+", default=tuple(STATES), choices=STATES)
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    for seed in range(arguments.seeds):
        for agent in (Agent(name, state) for name in arguments.algorithms for state in arguments.states):
            done = results_of(play(pair, agent, seed, arguments.steps, arguments.store))
            told = ", ".join(f"{setting} {result.figures['r_cum']:.2f}" for setting, result in done.items())
            print(f"{agent.title}, seed {seed}: {told}", flush=True)
    for name, orders in CONTROLS.items():
        for order in range(orders):
            play_control(pair, name, order, arguments.store)
    results = stored(arguments.store, arguments.seeds)
    stem = f"belief_agents_{short_name(arguments.world)}"
    if arguments.results is not None:
        write_text_atomically(arguments.results / f"{stem}.csv.gz", csv_of(results))
    write_page(arguments.results, f"{stem}.md", page(results, pair, arguments))


if __name__ == "__main__":
    main()
