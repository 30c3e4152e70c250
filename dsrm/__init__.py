"""State purification for interactive recommendation: beliefs, diffusion models, their controls, and wrappers.

A purifier stands between an environment and any agent: what the agent then sees as its state is purified.

    import gymnasium as gym
    import kuaifair_env
    from dsrm import DSRMObservationWrapper, PretrainConfig, pretrain

    world = kuaifair_env.make_world("KuaiFair-Toy-v0", split="train")
    purifier = pretrain(world, PretrainConfig(mode="profile"))
    env = DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0"), purifier)

What is there:

* wrappers: :class:`DSRMObservationWrapper` (one environment), :class:`DSRMVectorWrapper` (``gym.make_vec``) and
  :class:`VecDSRM` (Stable-Baselines3);
* purifiers: :func:`pretrain` fits one of :data:`MODES`; :class:`BeliefPurifier` makes a belief about the user the
  state, :class:`CandidatePurifier` shows the items that it ranks best; :class:`DSRM` is the paper's diffusion model;
* controls: :class:`IdentityPurifier`, :func:`noise_like`, :class:`LinearDebiasPurifier`, :class:`IPSPurifier`,
  :class:`RegressionPurifier`;
* files: :func:`save_purifier`, :func:`load_purifier`;
* what purification does to states: :func:`probe_set`, :func:`purified_states`, :func:`probe`, :func:`report_table`;
* what the log alone says of a click: :class:`ClickScorer`, :class:`ItemTerm`;
* :class:`StatePurifier` is the protocol that a purifier of your own follows.

Importing this package does not import torch; names that need it are looked up when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsrm.click_scorer import ClickScorer
from dsrm.item_term import ItemTerm, fit_item_term, with_item_term
from dsrm.purifier import (
    MODES,
    BasePurifier,
    ConditionBuilder,
    StatePurifier,
    load_purifier,
    purifier_hash,
    save_purifier,
)
from kuaifair_env.lazy_names import lazy_names

if TYPE_CHECKING:
    from dsrm.baselines import IdentityPurifier, IPSPurifier, LinearDebiasPurifier, NoisePurifier, RegressionPurifier
    from dsrm.belief_purifier import BeliefPurifier
    from dsrm.candidates import CandidatePurifier
    from dsrm.diffusion import SamplerConfig
    from dsrm.encoder import Encoder, EncoderConfig, pretrain_encoder
    from dsrm.model import DSRM, DSRMConfig
    from dsrm.pretraining import PretrainConfig, noise_like, pretrain
    from dsrm.probe_data import ProbeSet, probe_set
    from dsrm.probes import ProbeReport, probe, purified_states, report_table
    from dsrm.training import TrainingConfig
    from dsrm.wrappers import DSRMObservationWrapper, DSRMVectorWrapper, VecDSRM

__all__ = [
    "DSRM",
    "MODES",
    "BasePurifier",
    "BeliefPurifier",
    "CandidatePurifier",
    "ClickScorer",
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
    "ProbeReport",
    "ProbeSet",
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
    "probe",
    "probe_set",
    "purified_states",
    "purifier_hash",
    "report_table",
    "save_purifier",
    "with_item_term",
]

# torch takes seconds to import: what needs it is imported when it is first used.
_HOMES = {
    "dsrm.baselines": (
        "IPSPurifier",
        "IdentityPurifier",
        "LinearDebiasPurifier",
        "NoisePurifier",
        "RegressionPurifier",
    ),
    "dsrm.belief_purifier": ("BeliefPurifier",),
    "dsrm.candidates": ("CandidatePurifier",),
    "dsrm.diffusion": ("SamplerConfig",),
    "dsrm.encoder": ("Encoder", "EncoderConfig", "pretrain_encoder"),
    "dsrm.model": ("DSRM", "DSRMConfig"),
    "dsrm.pretraining": ("PretrainConfig", "noise_like", "pretrain"),
    "dsrm.probe_data": ("ProbeSet", "probe_set"),
    "dsrm.probes": ("ProbeReport", "probe", "purified_states", "report_table"),
    "dsrm.training": ("TrainingConfig",),
    "dsrm.wrappers": ("DSRMObservationWrapper", "DSRMVectorWrapper", "VecDSRM"),
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
