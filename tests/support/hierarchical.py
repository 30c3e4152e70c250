"""Small hierarchical agents, rollouts of them, sessions whose best slates are known, and comparisons of weights."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from helpers import small_world
from stable_baselines3.common.callbacks import BaseCallback

from hrl_policies.hrl_ppo import HierarchicalPPO
from kuaifair_env.batch import SessionConfig
from kuaifair_env.sb3 import KuaiFairVecEnv

K = 6
# Odd items are always clicked, even ones never: rewards and clicks follow from the slate, and the best are known.
PARITY = small_world(np.tile((np.arange(50) % 2).astype(float), (40, 1)))
POPULAR = PARITY.groups.popular
FORMS = ("simplex", "paper", "her4if", "quota")
WORKERS = ("query", "strict", "her4if")
COMBINATIONS = [
    *({"weights": weights, "worker": worker} for weights, worker in itertools.product(FORMS, WORKERS)),
    *({"manager": "flat", "weights": weights} for weights in ("simplex", "paper")),
    {"manager": "constant", "weights": "quota", "constant": 3.0},
    {"memory": True, "weights": "quota", "candidates": 14},
    {"interval": 4},
]
IDS = ["-".join(map(str, combination.values())) for combination in COMBINATIONS]


def sessions(n: int = 8, seed: int = 0, world=PARITY, **settings):
    given = {"action_mode": "slate", "slate_size": K, "observation_mode": "history"} | settings
    return KuaiFairVecEnv(world, SessionConfig(**given), n, seed=seed)


PLAIN = {"weights": "simplex", "worker": "query", "memory": False}
SMALL = {"n_steps": 8, "batch_size": 32, "n_epochs": 2, "seed": 0, "target_kl": None, "device": "cpu"}


def agent(hierarchy=None, env=None, **settings) -> HierarchicalPPO:
    """A small agent whose levels have plain forms, but for what is given."""
    given = {**SMALL, "click_scorer": None, "slot_credit": 0.0, "learning_rate": 3e-4} | settings
    env = sessions() if env is None else env
    return HierarchicalPPO("HierarchicalPolicy", env, hierarchy=PLAIN | (hierarchy or {}), **given)


def trained(hierarchy=None, steps: int = 128, **settings) -> HierarchicalPPO:
    return agent(hierarchy, **settings).learn(steps)


class Listener(BaseCallback):
    """Notes what a rollout's steps said."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict] = []

    def _on_step(self) -> bool:
        self.steps.append(
            {
                "infos": [dict(info) for info in self.locals["infos"]],
                "slates": self.locals["slates"].copy(),
                "reward": self.training_env.unwrapped.batch.outcome.reward.copy(),
            }
        )
        return True


def roll(model: HierarchicalPPO, callback: BaseCallback | None = None):
    """Plays one rollout without learning from it."""
    _, wrapped = model._setup_learn(10_000, callback, reset_num_timesteps=False)
    wrapped.on_training_start({}, {})
    assert model.collect_rollouts(model.env, wrapped, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


def batches(model: HierarchicalPPO, size: int = 1000):
    return list(model.rollout_buffer.get(size, np.random.default_rng(0)))


def observations(n: int = 12, seed: int = 5, **settings):
    return sessions(n, seed, **settings).reset()


def weights(model, level: str = "policy"):
    module = model.policy if level == "policy" else getattr(model.policy, level)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(before, after):
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def shown(model):
    """The slates of the last rollout, as the environment's items, ``(T, B, K)``."""
    rollout, table = model.rollout_buffer, model.policy.table
    actions = rollout._flat_actions
    places = actions.candidates.gather(1, actions.slots)
    return table.order[places].numpy().reshape(rollout.buffer_size, rollout.n_envs, -1)
