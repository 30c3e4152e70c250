"""Outside our worlds: TD3 and BCQ do on Gymnasium's Pendulum what their articles say they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from torch import nn

from hrl_policies.bcq.algorithm import BCQ
from hrl_policies.common.transition_sources import collect_transitions
from hrl_policies.common.transitions import LoggedTransitions

torch.set_num_threads(1)
PENDULUM, LENGTH = "Pendulum-v1", 200


class EnergyController:
    """Swings up by energy, balances by a PD controller, and flails at random in a share of the steps.

    The energy of the resting upright pole is 5 in Pendulum's units (``thdot^2 / 6 + 5 cos th``).
    """

    def __init__(self, flailing: np.ndarray, seed: int = 0) -> None:
        self.flailing = flailing
        self.rng = np.random.default_rng(seed)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        cosine, sine, speed = observation.T
        energy = speed**2 / 6 + 5 * cosine - 5
        swing = -2 * np.sign(speed) * np.sign(energy)
        balance = -10 * np.arctan2(sine, cosine) - 2 * speed
        torque = np.where(cosine > 0.9, balance, swing)
        lost = self.rng.random(len(torque)) < self.flailing
        torque = np.where(lost, self.rng.uniform(-2, 2, len(torque)), torque)
        return np.clip(torque, -2, 2)[:, None].astype(np.float32), state


class Cloned:
    """Behaviour cloning: a network fitted to the logged actions by least squares."""

    def __init__(self, data: LoggedTransitions, steps: int = 2_000) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        rng = np.random.default_rng(0)
        for _ in range(steps):
            batch = data.sample(128, rng)
            found = self.net(torch.from_numpy(batch.observations))
            loss = nn.functional.mse_loss(found, torch.from_numpy(batch.actions))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        with torch.no_grad():
            return self.net(torch.from_numpy(observation)).clamp(-2, 2).numpy(), state


def returns(policy, episodes: int = 20) -> np.ndarray:
    env = make_vec_env(PENDULUM, episodes)
    env.seed(1_000)
    observation, total = env.reset(), np.zeros(episodes)
    for _ in range(LENGTH):
        actions, _ = policy.predict(observation, deterministic=True)
        observation, rewards, _, _ = env.step(actions)
        total += rewards
    return total


def flailing_log(seed: int, controller_seed: int = 0) -> LoggedTransitions:
    """Sixty sessions of a controller that flails in a tenth or in nine tenths of its steps."""
    controller = EnergyController(np.tile([0.1, 0.9], 10), controller_seed)
    return collect_transitions(controller, make_vec_env(PENDULUM, 20), 20 * 3 * LENGTH, seed=seed)


def bcq_returns(data: LoggedTransitions, seed: int) -> list[float]:
    """What BCQ earns at three points of its training: the last iterate flickers, so three of them count."""
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
    """What TD3 earns after 8,000 steps."""
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


@pytest.mark.slow
def test_bcq_does_better_than_the_behaviour_it_learned_from_and_than_cloning_it():
    data = flailing_log(seed=3)
    behaviour = data.rewards.reshape(-1, LENGTH).sum(axis=1)
    learned = bcq_returns(data, seed=0)
    cloned = returns(Cloned(data)).mean()
    # Even without flailing the controller earns about -155 from where these sessions start.
    assert np.mean(learned) > behaviour.mean() + 100
    assert np.mean(learned) > cloned + 100
    assert max(learned) > -300


@pytest.mark.slow
def test_td3_learns_pendulum_as_published():
    assert td3_return(seed=0) > -250
