"""State purification for interactive recommendation: diffusion models, their controls, and wrappers.

purifier = dsrm.pretrain(world, dsrm.PretrainConfig(mode="profile"))
env = dsrm.DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0"), purifier)
"""

from typing import TYPE_CHECKING, Any

from dsrm.purifier import MismatchError, StatePurifier

if TYPE_CHECKING:
    from dsrm.artifacts import load_purifier, purifier_hash, save_purifier
    from dsrm.calibration import calibration_users
    from dsrm.condition import ConditionBuilder
    from dsrm.controls import IdentityPurifier, IPSPurifier, LinearDebiasPurifier, NoisePurifier
    from dsrm.encoder import Encoder, EncoderConfig
    from dsrm.encoder_training import pretrain_encoder
    from dsrm.item_term import ItemTerm, fit_item_term, with_item_term
    from dsrm.model import DSRM, DSRMConfig
    from dsrm.pretraining import MODES, PretrainConfig, noise_like, pretrain
    from dsrm.regression import RegressionPurifier
    from dsrm.samplers import SamplerConfig
    from dsrm.training import TrainingConfig
    from dsrm.wrappers import DSRMObservationWrapper, DSRMVectorWrapper, VecDSRM

# torch takes seconds to import; names that need it are looked up when they are used.
_HOMES = {
    "load_purifier": "artifacts",
    "purifier_hash": "artifacts",
    "save_purifier": "artifacts",
    "calibration_users": "calibration",
    "ConditionBuilder": "condition",
    "IdentityPurifier": "controls",
    "IPSPurifier": "controls",
    "LinearDebiasPurifier": "controls",
    "NoisePurifier": "controls",
    "Encoder": "encoder",
    "EncoderConfig": "encoder",
    "pretrain_encoder": "encoder_training",
    "ItemTerm": "item_term",
    "fit_item_term": "item_term",
    "with_item_term": "item_term",
    "DSRM": "model",
    "DSRMConfig": "model",
    "MODES": "pretraining",
    "PretrainConfig": "pretraining",
    "noise_like": "pretraining",
    "pretrain": "pretraining",
    "RegressionPurifier": "regression",
    "SamplerConfig": "samplers",
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
    "calibration_users",
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
