"""A leave rule of your own: a frozen dataclass with ``bind``, given as ``leave=`` wherever sessions are made.

Run: python examples/own_leave_rule.py

Users of this one leave after a number of slates in a row on which they clicked nothing; how popular the items are is
not their concern. Two controls meet the same held-out users under it and under the default rule, which makes users
leave unequal slates: the value of a fair policy depends on the rule, so results name it.
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import kuaifair_env
from dsrm import ClickScorer
from hrl_policies import GreedyCTR, QuotaGreedy
from kuaifair_env import BoundLeaveRule, LeaveDecision, WorldFacts
from kuaifair_env.data.schema import IntArray

ENV = "KuaiFair-Toy-v0"


@dataclass(frozen=True)
class DullSlates:
    """Users leave after ``patience`` slates in a row without a click; results name the rule with its fields.

    Attributes:
        patience: How many dull slates in a row make a user leave.
    """

    patience: int = 2

    def bind(self, batch_size: int, slate_size: int, max_len: int, world: WorldFacts) -> BoundLeaveRule:
        """Returns the rule with the state of ``batch_size`` sessions."""
        return _BoundDullSlates(batch_size, float(self.patience))


class _BoundDullSlates(BoundLeaveRule):
    """All sessions at once, an array entry each: no loop over users. Temper is the dull slates still forgiven."""

    def update(
        self,
        items: IntArray,
        popular_share: NDArray[np.float64],
        reward: NDArray[np.float64],
        steps: NDArray[np.int64],
    ) -> LeaveDecision:
        """Decrements the temper after a dull slate and restores it after a click."""
        dull = reward == 0.0
        self.temper = np.where(dull, self.temper - 1.0, self.start)
        return LeaveDecision(self.temper.copy(), np.zeros(len(items)), dull, self.temper < 1.0)


def main() -> None:
    scorer = ClickScorer.fit(kuaifair_env.make_world(ENV, split="train"))
    print(f"{'leave rule':<16}{'policy':<13}{'Len':>7}{'R_each':>9}{'R_cum':>8}{'broken':>9}")
    for name, rule in (("temper", "temper"), ("dull slates", DullSlates()), ("dull, 1", DullSlates(1))):
        for policy in (GreedyCTR(scorer), QuotaGreedy(scorer)):
            test = gym.make(ENV, split="test", action_mode="slate", leave=rule)
            summary = kuaifair_env.evaluate(policy, test).summary()
            print(
                f"{name:<16}{type(policy).__name__:<13}{summary['len']:>7.2f}{summary['r_each']:>9.3f}"
                f"{summary['r_cum']:>8.2f}{summary['violation_rate']:>9.3f}"
            )
    print("broken: share of slates that broke the rule. A session of a satisfied user ends after 30 slates.")


if __name__ == "__main__":
    main()
