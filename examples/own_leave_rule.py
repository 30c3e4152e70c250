"""A leave rule of your own: a frozen dataclass with ``bind``, given as ``leave=`` wherever sessions are made.

Run: python examples/own_leave_rule.py

Users of this one leave after a number of slates in a row on which they clicked nothing; how popular the items are is
nothing to them. Two controls meet the same held-out users under it and under the default rule, which makes users leave
unequal slates: what a fair policy is worth depends on the rule, so say which one a result was got under.
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import kuaifair_env
from hrl_policies.common.click_scorer import ClickScorer
from hrl_policies.controls import GreedyCTR, QuotaGreedy
from kuaifair_env.abandonment import BoundLeaveRule, LeaveDecision
from kuaifair_env.data.schema import BoolArray, IntArray

ENV = "KuaiFair-Toy-v0"


@dataclass(frozen=True)
class DullSlates:
    """Users leave after ``patience`` slates in a row without a click; results name the rule with its fields.

    Attributes:
        patience: How many dull slates in a row make a user leave.
    """

    patience: int = 2

    def bind(self, batch_size: int, slate_size: int, max_len: int, tags: BoolArray) -> BoundLeaveRule:
        """Returns the rule with the state of ``batch_size`` sessions."""
        return _BoundDullSlates(self.patience, batch_size)


class _BoundDullSlates:
    """All sessions at once, an array entry each: no loop over users."""

    def __init__(self, patience: int, batch_size: int) -> None:
        self._patience = patience
        self._dull = np.zeros(batch_size, np.int64)

    def reset(self, rows: IntArray) -> None:
        """New sessions begin in these rows."""
        self._dull[rows] = 0

    def update(
        self,
        items: IntArray,
        popular_share: NDArray[np.float64],
        reward: NDArray[np.float64],
        steps: NDArray[np.int64],
    ) -> LeaveDecision:
        """Digests a slate of each session. A new array each time: callers keep earlier decisions."""
        dull = reward == 0.0
        self._dull = np.where(dull, self._dull + 1, 0)
        # Users leave when their temper, the dull slates that they would still forgive, falls below 1.
        return LeaveDecision(self.temper(), np.zeros(len(items)), dull, self._dull >= self._patience)

    def temper(self) -> NDArray[np.float64]:
        """Patience left."""
        return (self._patience - self._dull).astype(np.float64)


def main() -> None:
    scorer = ClickScorer.fit(kuaifair_env.make_world(ENV, split="train"))
    print(f"{'leave rule':<16}{'policy':<13}{'Len':>7}{'R_each':>9}{'R_cum':>8}{'broken':>9}")
    for name, rule in (("temper", "temper"), ("dull slates", DullSlates()), ("dull, 1", DullSlates(1))):
        for policy in (GreedyCTR(scorer), QuotaGreedy(scorer)):
            test = gym.make(ENV, split="test", action_mode="slate", leave=rule)
            found = kuaifair_env.evaluate(policy, test).summary()
            print(
                f"{name:<16}{type(policy).__name__:<13}{found['len']:>7.2f}{found['r_each']:>9.3f}"
                f"{found['r_cum']:>8.2f}{found['violation_rate']:>9.3f}"
            )
    print("broken: share of slates that broke the rule. A session of a satisfied user ends after 30 slates.")


if __name__ == "__main__":
    main()
