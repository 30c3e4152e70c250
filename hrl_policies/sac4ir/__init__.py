"""SAC4IR, and the discrete soft actor-critic that it builds on."""

from hrl_policies.sac4ir.algorithm import SAC4IR, DiscreteSAC

__all__ = ["SAC4IR", "DiscreteSAC"]
