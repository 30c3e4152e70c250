"""A purifier of your own: any object with ``bind``, ``purify`` and ``describe`` goes where DSRM goes.

Run: python examples/own_purifier.py

This one shrinks states towards the mean state of the training log, as an empirical Bayes estimate would: the fewer
clicks stand behind a state, the less it is believed. Agents train on its states through ``dsrm.VecDSRM``, as in
``wrap_any_sb3_agent.py``.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

import kuaifair_env
from dsrm import ClickScorer, DSRMObservationWrapper, probe, probe_set, purified_states, report_table
from hrl_policies import QuotaGreedy
from kuaifair_env import HistoryWindow, MismatchError, World
from kuaifair_env.data.schema import FloatArray

ENV = "KuaiFair-Toy-v0"


class ShrinkingPurifier:
    """Weighs a state of ``n`` clicks by ``n / (n + strength)`` and the mean state by the rest.

    Args:
        world: The training world.
        strength: How many clicks the mean state is worth.
    """

    def __init__(self, world: World, strength: float = 5.0) -> None:
        log = world.data.train
        self.mean: FloatArray = world.embeddings[log.items[log.clicks]].mean(axis=0)
        self.strength = strength
        self.data_hash = world.data.data_hash

    def bind(self, world: World) -> spaces.Box:
        """Refuses worlds over other data; a wrong number would be worse than an error."""
        if world.data.data_hash != self.data_hash:
            raise MismatchError("the mean state is that of another data set")
        bound = float(np.abs(world.embeddings).max())
        return spaces.Box(-bound, bound, (world.dimension,), np.float32)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """A pure function of each row, for a whole batch at once."""
        clicks = window.clicks.sum(axis=1, keepdims=True)
        trust = (clicks / (clicks + self.strength)).astype(np.float32)
        purified: FloatArray = trust * states + (1 - trust) * self.mean
        return purified

    def describe(self) -> dict[str, Any]:
        """What stands in the results beside the numbers."""
        return {"kind": "shrinking", "strength": self.strength, "data": self.data_hash}


def main() -> None:
    world = kuaifair_env.make_world(ENV, split="train")
    purifier = ShrinkingPurifier(world)

    # It wraps an environment like any other purifier ...
    env = DSRMObservationWrapper(gym.make(ENV), purifier)
    observation, _ = env.reset(seed=0)
    print("purified state:", np.round(observation[:4], 3), "...\n")

    # ... and is probed like any other: does it know more about interest, and less about popularity?
    test = kuaifair_env.make_world(ENV, split="test")
    probes = probe_set(test, "short")
    print(report_table(probe(probes, purified_states(probes, test, {"shrinking": purifier}))))

    # What counts is what a policy earns with it: the same control, the same users, the same random numbers.
    control = QuotaGreedy(ClickScorer.fit(world))
    evaluated = gym.make(ENV, split="test", action_mode="slate")
    for name, sessions in (("raw", evaluated), ("shrinking", DSRMObservationWrapper(evaluated, purifier))):
        summary = kuaifair_env.evaluate(control, sessions).summary()
        print(f"QuotaGreedy on {name:<10} Len {summary['len']:.2f}  R_cum {summary['r_cum']:.2f}")


if __name__ == "__main__":
    main()
