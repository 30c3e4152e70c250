"""Serving by methods of the zoo: in several orders of the users, with a table, a curve and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrl_policies.study.config import RunConfig, run_folder
from hrl_policies.study.curves import draw_serving
from hrl_policies.study.loading import build_policy, load_policy, load_trusted, purifier_of
from hrl_policies.study.records import write_json, write_table
from hrl_policies.study.store import StoredRun, versions
from hrl_policies.worlds import WorldPair, purified_sessions
from hrl_policies.zoo import method
from kuaifair_env.errors import ArtifactError
from kuaifair_env.evaluation import DEFAULT_SEED
from kuaifair_env.serving import CHECKPOINT_EVERY, SESSIONS, serve
from kuaifair_env.serving_results import ServingResult, ServingSummary

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from dsrm.purifier import StatePurifier

Build = Callable[[], "tuple[Any, VecEnv]"]
"""Returns an agent as it is before it serves, and sessions of the test world as it observes them."""

SUMMARY, CURVE, PICTURE = "summary.json", "curve.csv", "curve.png"
ORDERS = 5


@dataclass(frozen=True)
class ServingPlan:
    """How an agent serves; each order is a service of its own, from the agent as it was at the start.

    Attributes:
        orders: Which orders of the users.
        sessions: Sessions of each.
        users: Raw ids of the users to serve; None takes 80 % of the test world's.
        seed: Seed of the sessions' randomness.
        n_envs: Concurrent sessions.
        learn: Whether agents that can learn do.
        gradients: Whether algorithms of Stable-Baselines3 change their networks. Without, what learns are beliefs
            around their sessions.
    """

    orders: tuple[int, ...] = tuple(range(ORDERS))
    sessions: int = SESSIONS
    users: tuple[int | str, ...] | None = None
    seed: int = DEFAULT_SEED
    n_envs: int = 64
    learn: bool = True
    gradients: bool = True


def trained_agent(run: StoredRun, worlds: WorldPair, n_envs: int) -> Build:
    """Returns what builds the agent of a finished run anew, to learn from other numbers of sessions at a time."""
    config = run.config
    if method(config.method).learns:
        config = replace(config, n_envs=n_envs)
    purifier = purifier_of(run)

    def build() -> tuple[Any, VecEnv]:
        policy = load_policy(replace(run, config=config), worlds)
        return policy, sessions_like_its_own(policy, config, worlds, purifier, n_envs)

    return build


def trusted_agent(
    path: Path, config: RunConfig, worlds: WorldPair, purifier: StatePurifier | None, n_envs: int
) -> Build:
    """Returns what loads an agent by :func:`~hrl_policies.study.loading.load_trusted`, whose arguments these are."""
    config = replace(config, n_envs=n_envs)

    def build() -> tuple[Any, VecEnv]:
        policy = load_trusted(path, config, worlds, purifier)
        return policy, sessions_like_its_own(policy, config, worlds, purifier, n_envs)

    return build


def need_control(name: str, env: str) -> None:
    """Checks that a method needs no training.

    Raises:
        ValueError: If it has to be trained, with the command that does, or is not known.
    """
    if method(name).learns:
        raise ValueError(
            f"{name} has to be trained before it serves: kuaifair train --method {name} --env {env}, then give the run "
            "folder"
        )


def untrained_agent(config: RunConfig, worlds: WorldPair, n_envs: int) -> Build:
    """Returns what builds a control, which needs no training.

    Raises:
        ValueError: If the method has to be trained.
    """
    need_control(config.method, config.world)

    def build() -> tuple[Any, VecEnv]:
        return build_policy(config, worlds), purified_sessions(worlds.test, config.session, n_envs, 0, None)

    return build


def same_but_for_seeds(configs: Sequence[RunConfig]) -> None:
    """Checks that runs may be summed up as seeds of one method.

    Raises:
        ValueError: If they differ in more than their seed, or two have the same.
    """
    for config in configs[1:]:
        if replace(config, seed=configs[0].seed) != configs[0]:
            raise ValueError(
                f"runs that serve together differ in their seed alone; here are {run_folder(configs[0])} and "
                f"{run_folder(config)}"
            )
    seeds = [config.seed for config in configs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two of the runs have the same seed; got {seeds}")


def serve_in_orders(build: Build, plan: ServingPlan, folder: Path, *, progress: bool = False) -> list[ServingResult]:
    """Has an agent serve in every order; what a stopped process has done is taken from the folder.

    Args:
        build: Makes agent and sessions for each order.
        plan: How to serve.
        folder: Where each order has a folder of its own, ``order-0``, ...
        progress: Whether to show progress bars.

    Raises:
        ArtifactError: If a folder holds another service, or something else.
    """
    need_service_folder(folder)
    results = []
    for order in plan.orders:
        agent, env = build()
        results.append(
            serve(
                agent if plan.gradients else agent.predict,
                env,
                plan.users,
                plan.sessions,
                order=order,
                seed=plan.seed,
                n_envs=plan.n_envs,
                learn=plan.learn,
                folder=folder / f"order-{order}",
                checkpoint_every=min(max(plan.sessions // 20, 1), CHECKPOINT_EVERY),
                progress=progress,
            )
        )
    return results


def need_service_folder(folder: Path) -> None:
    """Checks that a folder is empty, holds a service, or is not there: a service has files of the names of a run's.

    Raises:
        ArtifactError: If it holds something else.
    """
    if any(folder.glob("[!.]*")) and not any(folder.glob("order-*")):
        raise ArtifactError(f"{folder} exists already and holds no service; choose another output folder")


def write_serving(folder: Path, title: str, results: Sequence[ServingResult], command: str) -> ServingSummary:
    """Writes what services gave in all orders: ``summary.json``, ``curve.csv`` and ``curve.png``; returns the summary.

    Args:
        folder: Where to.
        title: Name of the agent in the picture.
        results: One service for each order, and for each seed of the agent.
        command: What was typed.
    """
    summary = ServingSummary.of(results)
    served = results[0].served
    content = {
        "command": command,
        "versions": versions(),
        "agent": title,
        "learning": results[0].settings.learning,
        "reason": results[0].settings.reason,
        "world": served.world,
        "config": served.config,
        "orders": [result.settings.order for result in results],
        "agent_seeds": [result.settings.agent_seed for result in results],
        "sessions": len(results[0]),
        "means": dict(summary.means),
        "intervals": {name: [interval.low, interval.high] for name, interval in summary.intervals.items()},
        "runs": [result.summary() for result in results],
    }
    write_json(folder / SUMMARY, content)
    write_table(folder / CURVE, [row for result in results for row in _curve_rows(result)])
    draw_serving(folder / PICTURE, {title: results})
    return summary


def sessions_like_its_own(
    policy: Any, config: RunConfig, worlds: WorldPair, purifier: StatePurifier | None, n_envs: int
) -> VecEnv:
    """Returns sessions of the test world with the purifier and the reward that an agent was trained with.

    Args:
        policy: The agent, over its training sessions.
        config: Its run.
        worlds: The run's worlds.
        purifier: The run's purifier.
        n_envs: Concurrent sessions.
    """
    from stable_baselines3.common.vec_env import unwrap_vec_wrapper

    from hrl_policies.hrl_ppo.rewards import FairSessions

    sessions = purified_sessions(worlds.test, config.session, n_envs, 0, purifier)
    own = policy.get_env() if method(config.method).learns else None
    fair = None if own is None else unwrap_vec_wrapper(own, FairSessions)
    return sessions if fair is None else FairSessions(sessions, fair.fair_coef)


def _curve_rows(result: ServingResult) -> list[Mapping[str, Any]]:
    curve = result.curve()
    rows = zip(*(column.tolist() for column in curve.values()), strict=True)
    which = {"order": result.settings.order, "agent_seed": result.settings.agent_seed}
    return [which | dict(zip(curve, row, strict=True)) for row in rows]
