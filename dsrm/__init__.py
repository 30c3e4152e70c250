"""State purification for interactive recommendation: diffusion models, their controls, and wrappers.

purifier = dsrm.pretrain(world)
env = dsrm.DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0"), purifier)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsrm.item_term import ItemTerm, fit_item_term, with_item_term
from dsrm.purifier import (
    MODES,
    ConditionBuilder,
    StatePurifier,
    load_purifier,
    purifier_hash,
    save_purifier,
)

if TYPE_CHECKING:
    from dsrm.baselines import IdentityPurifier, IPSPurifier, LinearDebiasPurifier, NoisePurifier, RegressionPurifier
    from dsrm.belief_purifier import BeliefPurifier
    from dsrm.diffusion import SamplerConfig
    from dsrm.encoder import Encoder, EncoderConfig, pretrain_encoder
    from dsrm.model import DSRM, DSRMConfig
    from dsrm.pretraining import PretrainConfig, noise_like, pretrain
    from dsrm.training import TrainingConfig
    from dsrm.wrappers import DSRMObservationWrapper, DSRMVectorWrapper, VecDSRM

# torch takes seconds to import; modules that need it are imported when one of their names is used.
_TORCH_MODULES = (
    "baselines",
    "belief_purifier",
    "diffusion",
    "encoder",
    "model",
    "pretraining",
    "training",
    "wrappers",
)

__all__ = [
    "DSRM",
    "MODES",
    "BeliefPurifier",
    "ConditionBuilder",
    "DSRMConfig",
    "DSRMObservationWrapper",
    "DSRMVectorWrapper",
    "Encoder",
    "EncoderConfig",
    "IPSPurifier",
    "IdentityPurifier",
    "ItemTerm",
    "LinearDebiasPurifier",
    "NoisePurifier",
    "PretrainConfig",
    "RegressionPurifier",
    "SamplerConfig",
    "StatePurifier",
    "TrainingConfig",
    "VecDSRM",
    "fit_item_term",
    "load_purifier",
    "noise_like",
    "pretrain",
    "pretrain_encoder",
    "purifier_hash",
    "save_purifier",
    "with_item_term",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _TORCH_MODULES:
            module = import_module(f"dsrm.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'dsrm' has no attribute {name!r}")
