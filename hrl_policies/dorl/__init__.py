"""DORL: A2C in a learned world model that is pessimistic where it is unsure."""

from hrl_policies.dorl.algorithm import DORL

__all__ = ["DORL"]
