"""TD3, BCQ and discrete SAC on public control tasks, beside reference figures; writes docs/results/control_tasks.md.

    python benchmarks/control_tasks.py --results docs/results

Returns are means over 20 episodes (24 for CartPole) from the same starts, for several training seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from torch import nn

from hrl_policies.bcq import BCQ
from hrl_policies.common.transition_sources import collect_transitions
from hrl_policies.common.transitions import LoggedTransitions
from hrl_policies.sac4ir import DiscreteSAC
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.statistics import student_interval
from hrl_policies.study.tables import Measured, ResultTable
from kuaifair_env.files import write_text_atomically

PENDULUM, LENGTH = "Pendulum-v1", 200


class EnergyController:
    """Swings up by energy, balances by a PD controller, and acts at random in a share of the steps.

    The energy of the resting upright pole is 5 in Pendulum's units (``thdot^2 / 6 + 5 cos th``).
    """

    def __init__(self, random_share: np.ndarray, seed: int = 0) -> None:
        self.random_share = random_share
        self.rng = np.random.default_rng(seed)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        cosine, sine, speed = observation.T
        energy = speed**2 / 6 + 5 * cosine - 5
        swing = -2 * np.sign(speed) * np.sign(energy)
        balance = -10 * np.arctan2(sine, cosine) - 2 * speed
        torque = np.where(cosine > 0.9, balance, swing)
        explores = self.rng.random(len(torque)) < self.random_share
        torque = np.where(explores, self.rng.uniform(-2, 2, len(torque)), torque)
        return np.clip(torque, -2, 2)[:, None].astype(np.float32), state


class Cloned:
    """Behaviour cloning: a network fitted to the logged actions by least squares."""

    def __init__(self, data: LoggedTransitions, steps: int = 2_000) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        rng = np.random.default_rng(0)
        for _ in range(steps):
            rows = rng.integers(0, len(data), 128)
            predicted = self.net(torch.from_numpy(data.observations[rows]))
            loss = nn.functional.mse_loss(predicted, torch.from_numpy(data.actions[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        with torch.no_grad():
            return self.net(torch.from_numpy(observation)).clamp(-2, 2).numpy(), state


def returns(policy, episodes: int = 20) -> np.ndarray:
    """Plays episodes from the same starts and returns the sum of rewards of each."""
    env = make_vec_env(PENDULUM, episodes)
    env.seed(1_000)
    observation, total = env.reset(), np.zeros(episodes)
    for _ in range(LENGTH):
        actions, _ = policy.predict(observation, deterministic=True)
        observation, rewards, _, _ = env.step(actions)
        total += rewards
    return total


def noisy_log(seed: int, controller_seed: int = 0) -> LoggedTransitions:
    """Returns sixty sessions of a controller that acts at random in a tenth or in nine tenths of its steps."""
    controller = EnergyController(np.tile([0.1, 0.9], 10), controller_seed)
    return collect_transitions(controller, make_vec_env(PENDULUM, 20), 20 * 3 * LENGTH, seed=seed)


def bcq_returns(data: LoggedTransitions, seed: int) -> list[float]:
    """Returns what BCQ earns at three points of its training, because single iterates vary."""
    model = BCQ(
        "BCQPolicy",
        None,
        data,
        gamma=0.98,
        tau=0.01,
        policy_kwargs={
            "net_arch": [64, 64],
            "action_net_arch": [64, 64],
            "perturbation": 0.2,
            "samples": 20,
        },
        seed=seed,
        device="cpu",
    )
    learned = []
    for steps in (2_000, 500, 500):
        model.learn(steps, log_interval=None, reset_num_timesteps=False)
        learned.append(float(returns(model).mean()))
    return learned


def td3_return(seed: int) -> float:
    """Returns what TD3 earns after 8,000 steps."""
    model = TD3(
        "MlpPolicy",
        PENDULUM,
        learning_starts=500,
        batch_size=100,
        gamma=0.98,
        action_noise=NormalActionNoise(np.zeros(1), np.full(1, 0.1)),
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    ).learn(8_000)
    return float(returns(model).mean())


def cart_pole_return(seed: int) -> float:
    """Returns what discrete SAC earns on CartPole after 30,000 steps."""
    model = DiscreteSAC(
        "SoftItemPolicy",
        make_vec_env("CartPole-v1", 8, seed=seed),
        learning_rate=1e-3,
        buffer_size=30_000,
        learning_starts=1_000,
        batch_size=64,
        gradient_steps=4,
        target_entropy_ratio=0.5,
        huber_delta=1.0,
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    ).learn(30_000)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 8, seed=99), 24)
    return float(mean)


def td3(seed: int) -> dict[str, float]:
    """Trains TD3 on Pendulum."""
    return {"TD3, Pendulum-v1, 8,000 steps": td3_return(seed)}


def bcq(seed: int) -> dict[str, float]:
    """Learns Pendulum from a log in which every other session is mostly random, beside cloning the same log."""
    data = noisy_log(seed, seed)
    return {
        "the log that BCQ learns from": float(data.rewards.reshape(-1, LENGTH).sum(axis=1).mean()),
        "behaviour cloning of that log": float(returns(Cloned(data)).mean()),
        "BCQ, Pendulum-v1, 3,000 gradient steps": float(np.mean(bcq_returns(data, seed))),
    }


def discrete_sac(seed: int) -> dict[str, float]:
    """Trains discrete SAC on CartPole."""
    return {"discrete SAC, CartPole-v1, 30,000 steps": cart_pole_return(seed)}


REFERENCES = {
    "TD3, Pendulum-v1, 8,000 steps": "-196 ± 119: Stable-Baselines3's published model (RL Zoo, 20,000 steps)",
    "behaviour cloning of that log": "what BCQ must beat to be more than imitation",
    "BCQ, Pendulum-v1, 3,000 gradient steps": "-155: the log's controller without random steps",
    "discrete SAC, CartPole-v1, 30,000 steps": "195: where CartPole-v0 counts as solved; 500 is the most",
}
TASKS: tuple[Callable[[int], dict[str, float]], ...] = (td3, bcq, discrete_sac)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    single_threaded()
    found: dict[str, list[float]] = {}
    for task in TASKS:
        for seed in arguments.seeds:
            for name, value in task(seed).items():
                found.setdefault(name, []).append(value)
                print(name, seed, round(value, 1), flush=True)
    rows = []
    for name, values in found.items():
        mean = Measured.of_interval(student_interval(np.asarray(values)), 0)
        each = ", ".join(f"{value:.0f}" for value in values)
        rows.append((name, mean, each, REFERENCES.get(name, "-")))
    table = ResultTable(
        title="Public control tasks",
        header=("what", "mean return", "each seed", "reference"),
        rows=tuple(rows),
        notes=(
            f"Training seeds {', '.join(map(str, arguments.seeds))}; brackets: 95 % Student interval over them. BCQ "
            "learns from 12,000 transitions of a controller that acts at random in a tenth or nine tenths of "
            "its steps.",
            "Made by: python benchmarks/control_tasks.py --results RESULTS",
        ),
    )
    text = table.markdown()
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "control_tasks.md", text + "\n")


if __name__ == "__main__":
    main()
