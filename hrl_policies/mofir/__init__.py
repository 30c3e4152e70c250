"""MOFIR: one agent for every balance of clicks against long-tail exposure."""

from hrl_policies.mofir.algorithm import MOFIR

__all__ = ["MOFIR"]
