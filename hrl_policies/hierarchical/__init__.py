"""Hierarchical PPO: a manager weighs accuracy against fairness, a worker ranks items (paper 4.3)."""

from hrl_policies.hierarchical.algorithm import HierarchicalPPO
from hrl_policies.hierarchical.policy import HierarchicalPolicy
from hrl_policies.hierarchical.settings import HierarchySettings
from hrl_policies.hierarchical.slate_distribution import QuotaSlateDistribution, SlateDistribution

__all__ = [
    "HierarchicalPPO",
    "HierarchicalPolicy",
    "HierarchySettings",
    "QuotaSlateDistribution",
    "SlateDistribution",
]
