"""Any Stable-Baselines3 agent on purified states: A2C and PPO, with and without the wrapper, beside two controls.

Run: python examples/wrap_any_sb3_agent.py [training steps]

``identity`` changes nothing and must match the plain agent; ``noise`` moves states as far as the purifier does, but
without its sense. An agent that gains as much from noise has not gained from purification.
"""

import sys
from collections.abc import Callable
from functools import partial

from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

import kuaifair_env
from dsrm import IdentityPurifier, StatePurifier, VecDSRM, load_purifier, noise_like
from hrl_policies import cached_purifier, single_threaded

ENV = "KuaiFair-Toy-v0"
AGENTS: dict[str, Callable[..., BaseAlgorithm]] = {
    "A2C": A2C,
    # With 64 sessions, PPO's usual 2,048 steps would be rollouts of 131,072.
    "PPO": partial(PPO, n_steps=16, batch_size=512),
}


def main(steps: int = 100_000) -> None:
    single_threaded()
    world = kuaifair_env.make_world(ENV, split="train")
    # Pretrained on the training log on first use, then cached.
    dsrm = load_purifier(cached_purifier(world, "profile", progress=True))
    purifiers: dict[str, StatePurifier | None] = {
        "raw": None,
        "identity": IdentityPurifier(),
        "noise": noise_like(dsrm, world),
        "DSRM (profile)": dsrm,
    }
    print(f"{'agent':<6}{'state':<18}{'Len':>7}{'R_each':>9}{'R_cum':>8}")
    for name, algorithm in AGENTS.items():
        for state, purifier in purifiers.items():
            summary = trained_and_evaluated(algorithm, purifier, steps)
            print(f"{name:<6}{state:<18}{summary['len']:>7.2f}{summary['r_each']:>9.3f}{summary['r_cum']:>8.2f}")


def trained_and_evaluated(
    algorithm: Callable[..., BaseAlgorithm], purifier: StatePurifier | None, steps: int
) -> dict[str, float]:
    """Trains in the training world and evaluates on held-out users of the test world, on the same kind of state."""
    train = kuaifair_env.make_sb3(ENV, n_envs=64, seed=11)
    test = kuaifair_env.make_sb3(ENV, n_envs=100, split="test")
    if purifier is not None:
        # A single environment takes DSRMObservationWrapper(gym.make(ENV), purifier) instead.
        train, test = VecDSRM(train, purifier), VecDSRM(test, purifier)
    agent = algorithm("MlpPolicy", train, seed=11, device="cpu").learn(steps)
    return kuaifair_env.evaluate(agent, test).summary()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
