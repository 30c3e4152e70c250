"""State purification for interactive recommendation: diffusion models, their controls, and wrappers.

purifier = dsrm.pretrain(world)
env = dsrm.DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0"), purifier)
"""

from typing import TYPE_CHECKING, Any

from dsrm.purifier import MismatchError, StatePurifier

if TYPE_CHECKING:
    from dsrm.baselines import (
        IdentityPurifier,
        IPSPurifier,
        LinearDebiasPurifier,
        NoisePurifier,
        RegressionPurifier,
    )
    from dsrm.diffusion import SamplerConfig
    from dsrm.encoder import Encoder, EncoderConfig, pretrain_encoder
    from dsrm.item_term import ItemTerm, fit_item_term, with_item_term
    from dsrm.model import DSRM, DSRMConfig
    from dsrm.pretraining import MODES, PretrainConfig, noise_like, pretrain
    from dsrm.purifier import load_purifier, purifier_hash, save_purifier
    from dsrm.training import TrainingConfig
    from dsrm.windows import ConditionBuilder
    from dsrm.wrappers import DSRMObservationWrapper, DSRMVectorWrapper, VecDSRM

# torch takes seconds to import; names that need it are looked up when they are used.
_HOMES = {
    "load_purifier": "purifier",
    "purifier_hash": "purifier",
    "save_purifier": "purifier",
    "ConditionBuilder": "windows",
    "IdentityPurifier": "baselines",
    "IPSPurifier": "baselines",
    "LinearDebiasPurifier": "baselines",
    "NoisePurifier": "baselines",
    "Encoder": "encoder",
    "EncoderConfig": "encoder",
    "pretrain_encoder": "encoder",
    "ItemTerm": "item_term",
    "fit_item_term": "item_term",
    "with_item_term": "item_term",
    "DSRM": "model",
    "DSRMConfig": "model",
    "MODES": "pretraining",
    "PretrainConfig": "pretraining",
    "noise_like": "pretraining",
    "pretrain": "pretraining",
    "RegressionPurifier": "baselines",
    "SamplerConfig": "diffusion",
    "TrainingConfig": "training",
    "DSRMObservationWrapper": "wrappers",
    "DSRMVectorWrapper": "wrappers",
    "VecDSRM": "wrappers",
}

__all__ = [
    "DSRM",
    "MODES",
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
    "MismatchError",
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
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'dsrm' has no attribute {name!r}")
    return getattr(import_module(f"dsrm.{_HOMES[name]}"), name)
