"""BCQ: offline Q-learning that stays near the actions of a log, for continuous and for discrete actions."""

from hrl_policies.bcq.algorithm import BCQ, DiscreteBCQ

__all__ = ["BCQ", "DiscreteBCQ"]
