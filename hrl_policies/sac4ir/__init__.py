"""SAC4IR: discrete soft actor-critic with clicks debiased by exposure."""

from hrl_policies.sac4ir.algorithm import SAC4IR
from hrl_policies.sac4ir.discrete_sac import DiscreteSAC

__all__ = ["SAC4IR", "DiscreteSAC"]
