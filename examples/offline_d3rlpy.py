"""An offline library learns from a training log: through a Minari data set to d3rlpy, evaluated beside a control.

Run: python examples/offline_d3rlpy.py [training steps]

d3rlpy 2.8 pins an older gymnasium than KuaiFair needs. In an environment of its own this gives it what it imports:

    pip install "kuaifair[minari]"
    pip install --no-deps d3rlpy gym gym-notices structlog colorama dataclasses-json marshmallow typing-inspect
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium as gym
import minari
import numpy as np

import kuaifair_env
from dsrm import ClickScorer
from hrl_policies import QuotaGreedy, log_transitions

ENV = "KuaiFair-Toy-v0"


def write_log(folder: Path) -> minari.MinariDataset:
    """Writes the training log as a Minari data set that knows its environment, and loads it with Minari."""
    world = kuaifair_env.make_world(ENV, split="train")
    log_transitions(world, "embedding").to_minari(folder, gym.make(ENV, split="train"))
    return minari.MinariDataset(folder)


def for_d3rlpy(dataset: minari.MinariDataset) -> d3rlpy.dataset.MDPDataset:
    """Returns a Minari data set as d3rlpy's. An episode has one observation more than actions; the last one goes.

    (``d3rlpy.datasets.get_minari`` keeps it, so that observations and actions of later episodes are of other steps.)
    """
    episodes = list(dataset.iterate_episodes())
    return d3rlpy.dataset.MDPDataset(
        observations=np.concatenate([episode.observations[:-1] for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        terminals=np.concatenate([episode.terminations for episode in episodes]),
        timeouts=np.concatenate([episode.truncations for episode in episodes]),
    )


def train(data: d3rlpy.dataset.MDPDataset, steps: int) -> Any:
    """Returns TD3+BC, trained on the data alone."""
    d3rlpy.seed(11)
    config = d3rlpy.algos.TD3PlusBCConfig(
        observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(),
        action_scaler=d3rlpy.preprocessing.MinMaxActionScaler(),
    )
    agent = config.create(device="cpu:0")
    agent.fit(
        data,
        n_steps=steps,
        n_steps_per_epoch=steps,
        show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    )
    return agent


def acting(agent: Any) -> Callable[..., tuple[Any, None]]:
    """Returns an agent of d3rlpy as `evaluate` asks it: observations in, actions and no memory out."""
    return lambda observation, *_, **__: (agent.predict(observation), None)


def main(steps: int = 2_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_log(Path(folder) / "log")
        print(f"{dataset.total_episodes} sessions, {dataset.total_steps} slates of {dataset.env_spec.id}")
        agent = train(for_d3rlpy(dataset), steps)
    control = QuotaGreedy(ClickScorer.fit(kuaifair_env.make_world(ENV, split="train")))
    for name, policy, mode in (("TD3+BC of d3rlpy", acting(agent), "embedding"), ("QuotaGreedy", control, "slate")):
        test = gym.make(ENV, split="test", action_mode=mode)
        print(f"\n{name}\n{kuaifair_env.evaluate(policy, test, n_users=100).table()}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
