"""Hierarchical PPO: a manager weighs accuracy against fairness, a worker ranks items (paper 4.3)."""

from hrl_policies.common.slates import QuotaSlateDistribution, SlateDistribution
from hrl_policies.hrl_ppo.algorithm import LITERAL, HierarchicalPPO
from hrl_policies.hrl_ppo.networks import HierarchySettings
from hrl_policies.hrl_ppo.policy import HierarchicalPolicy
from hrl_policies.hrl_ppo.ranking import RankingPolicy, RankingSettings

__all__ = [
    "LITERAL",
    "HierarchicalPPO",
    "HierarchicalPolicy",
    "HierarchySettings",
    "QuotaSlateDistribution",
    "RankingPolicy",
    "RankingSettings",
    "SlateDistribution",
]
