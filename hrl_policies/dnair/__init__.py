"""DNaIR: deep Q-learning rewarded for items that are new and good."""

from hrl_policies.dnair.algorithm import DNaIR

__all__ = ["DNaIR"]
