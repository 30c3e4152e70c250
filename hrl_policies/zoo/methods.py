"""The table of methods: what each is, where it comes from, what it may see, and how it is built."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from hrl_policies.common.yaml_files import validated
from hrl_policies.worlds import cached_purifier
from hrl_policies.zoo.registry import BuildContext, Builder, MethodSpec, add_method

if TYPE_CHECKING:
    from hrl_policies.common.transitions import LoggedTransitions


def sb3_algorithm(
    algorithm: Any, context: BuildContext, hyperparameters: Mapping[str, Any] | None = None, policy: Any = None
) -> Any:
    """Builds an SB3 algorithm over the training sessions.

    Args:
        algorithm: Its class.
        context: What to build from.
        hyperparameters: Instead of the context's.
        policy: Class of the policy, where the algorithm does not know it by the context's name.

    Raises:
        ValueError: If it does not know one of the hyperparameters.
    """
    # Stable-Baselines3 writes into the policy_kwargs that it is given.
    settings = deepcopy(dict(context.hyperparameters if hyperparameters is None else hyperparameters))
    unknown = set(settings) - _arguments(algorithm)
    if unknown:
        raise ValueError(f"{algorithm.__name__} has no hyperparameter {', '.join(sorted(unknown))}")
    try:
        return algorithm(policy or context.policy, context.env, seed=context.seed, device="cpu", verbose=0, **settings)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{algorithm.__name__} refuses its hyperparameters: {error}") from error


def _arguments(algorithm: type[Any]) -> set[str]:
    """Returns the names of a class's arguments, those that it hands on to its bases by ``**`` included."""
    names: set[str] = set()
    for base in algorithm.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = signature(vars(base)["__init__"]).parameters
        names |= set(parameters)
        if all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _algorithm(module: str, name: str) -> Builder:
    """Returns a builder of an SB3 algorithm, whose module is imported on first use."""

    def build(context: BuildContext) -> Any:
        return sb3_algorithm(getattr(import_module(module), name), context)

    return build


def _controls() -> Any:
    """Returns the module of controls, which imports torch, on first use."""
    return import_module("hrl_policies.controls")


def build_belief_quota(context: BuildContext) -> Any:
    """Builds the control that ranks by a belief in two levels."""
    from hrl_policies.belief_controls import BeliefQuota

    return BeliefQuota(context.worlds.scorer, seed=context.seed)


def _candidates(context: BuildContext) -> Any:
    """Returns the purifier that DSRM-HRL starts from: its click scorer, which goes by item features, and its scales."""
    from dsrm.purifier import load_purifier

    return load_purifier(cached_purifier(context.worlds.train, "candidates"))


def build_belief_quota_of_features(context: BuildContext) -> Any:
    """Builds the control that does what DSRM-HRL does before it is trained."""
    from hrl_policies.belief_controls import BeliefQuota

    start = _candidates(context)
    return BeliefQuota(start.scorer, seed=context.seed, scales=start.scales)


def build_session_quota_of_features(context: BuildContext) -> Any:
    """Builds the control that knows of items what DSRM-HRL knows before it serves, and counts clicks and skips."""
    return _controls().SessionQuota(_candidates(context).scorer)


def build_item_quota(context: BuildContext) -> Any:
    """Builds the control that ranks by an offset for each item, which all users share."""
    from hrl_policies.belief_controls import ItemQuota

    return ItemQuota(context.worlds.scorer, seed=context.seed)


_TARGET_CLIP = 2.5
"""Largest noise of target actions, in deviations."""


def build_td3(context: BuildContext) -> Any:
    """Builds Stable-Baselines3's TD3.

    ``action_noise_std`` becomes Gaussian exploration noise. With ``UnitNormPolicy`` noise is given by its length,
    beside an action's 1: ``exploration_noise`` is the largest of ``QueryNoise``, ``target_noise`` that of target
    actions, clipped at 2.5 deviations.
    """
    from stable_baselines3 import TD3
    from stable_baselines3.common.noise import NormalActionNoise

    hyperparameters, size = dict(context.hyperparameters), context.worlds.train.dimension
    if context.policy == "UnitNormPolicy":
        from hrl_policies.unit_norm import QueryNoise, UnitNormPolicy

        deviation = float(hyperparameters.pop("target_noise")) / size**0.5
        hyperparameters["target_policy_noise"] = deviation
        hyperparameters["target_noise_clip"] = _TARGET_CLIP * deviation
        hyperparameters["action_noise"] = QueryNoise(size, float(hyperparameters.pop("exploration_noise")))
        return sb3_algorithm(TD3, context, hyperparameters, UnitNormPolicy)
    deviation = hyperparameters.pop("action_noise_std", None)
    if deviation is not None:
        hyperparameters["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, float(deviation)))
    return sb3_algorithm(TD3, context, hyperparameters)


def build_fair_a2c(context: BuildContext) -> Any:
    """Builds A2C over sessions whose reward holds the fairness term; ``fair_coef`` is ``lambda``."""
    from stable_baselines3 import A2C

    from hrl_policies.hrl_ppo.rewards import FairSessions

    hyperparameters = dict(context.hyperparameters)
    assert context.env is not None
    env = FairSessions(context.env, float(hyperparameters.pop("fair_coef")))
    return sb3_algorithm(A2C, replace(context, env=env), hyperparameters)


def build_hierarchical(context: BuildContext) -> Any:
    """Builds HierarchicalPPO; the click scorer that it would fit is that of the greedy controls, fitted once.

    The group ``guard`` is for whoever trains it (:class:`hrl_policies.guard.GuardSettings`).
    """
    from hrl_policies.hrl_ppo import HierarchicalPPO

    hyperparameters = {name: value for name, value in context.hyperparameters.items() if name != "guard"}
    if hyperparameters.get("click_scorer") == "fit":
        hyperparameters["click_scorer"] = context.worlds.scorer
    return sb3_algorithm(HierarchicalPPO, context, hyperparameters)


class OfflineData(BaseModel):
    """What an offline method of the zoo learns from; the group ``data`` of its hyperparameters.

    Attributes:
        source: ``"log"``, the training log; ``"env_behaviour"``, sessions of a behaviour policy in the training world:
            the observed state with noise (embedding actions), or uniformly random slates.
        transitions: How many at most (log) or at least (behaviour); None takes the whole log.
        exposures: ``"slates"`` of the session's size, or ``"single"`` exposures; a log is read this way.
        session_length: Steps after which a logged session is cut; None takes the sessions' Max Len, times the slate
            size for single exposures.
        session_end: See :class:`~hrl_policies.common.transition_sources.LogReading`.
        action_items: See :class:`~hrl_policies.common.transition_sources.LogReading`.
        noise: Length of the behaviour policy's noise beside the state's 1 (embedding actions).
        seed: Of what is drawn: sessions out of a log, a behaviour policy's sessions and noise. It does not follow the
            training seed, so that all seeds of a study learn from the same transitions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: Literal["log", "env_behaviour"] = "log"
    transitions: int | None = 100_000
    exposures: Literal["slates", "single"] = "slates"
    session_length: int | None = None
    session_end: str = "truncated"
    action_items: str = "clicked"
    noise: float = 1.0
    seed: int = 0

    @model_validator(mode="after")
    def _need_number(self) -> OfflineData:
        if self.source == "env_behaviour" and self.transitions is None:
            raise ValueError("source=env_behaviour needs transitions, how many to collect")
        return self


def offline_transitions(context: BuildContext, data: OfflineData) -> LoggedTransitions:
    """Returns the transitions that a method learns from, observed as its agent observes.

    Args:
        context: Worlds, sessions and their purifier.
        data: What to take.

    Raises:
        DataError: If the log holds no transitions; see :mod:`hrl_policies.common.transition_sources`.
        ValueError: If a setting is not valid, or the sessions show more than a state.
    """
    from dsrm.wrappers import VecDSRM
    from hrl_policies.common.transition_sources import LogReading, NoisyState, collect_transitions, log_transitions

    env, config = context.env, context.config
    assert env is not None
    if config.observation_mode != "state":
        raise ValueError(
            f"offline methods observe the state alone; use observation_mode='state', not {config.observation_mode!r}"
        )
    if data.source == "env_behaviour":
        assert data.transitions is not None
        if config.action_mode == "embedding":
            policy: Any = NoisyState(data.noise, data.seed, context.worlds.train.dimension)
            behaviour = {"noise": data.noise, "seed": data.seed}
        else:
            policy, behaviour = _controls().RandomSlates(seed=data.seed), {"seed": data.seed}
        return collect_transitions(policy, env, data.transitions, data.seed, behaviour=behaviour)
    size = 1 if data.exposures == "single" else config.items_per_slate
    whole = config.max_len * (config.items_per_slate // size)
    reading = {
        "slate_size": size,
        "session_length": whole if data.session_length is None else data.session_length,
        "session_end": data.session_end,
        "action_items": data.action_items,
        "max_transitions": data.transitions,
        "seed": data.seed,
        "session_clock": config.session_clock,
    }
    purifier = env.purifier if isinstance(env, VecDSRM) else None
    return log_transitions(context.worlds.train, config.action_mode, validated(LogReading, reading, "data"), purifier)


def build_bcq(context: BuildContext) -> Any:
    """Builds continuous BCQ; the group ``data`` says what it learns from."""
    from hrl_policies.bcq import BCQ

    hyperparameters, data = _without_data(context)
    model = sb3_algorithm(BCQ, context, hyperparameters)
    model.set_transitions(offline_transitions(context, data))
    return model


def build_discrete_bcq(context: BuildContext) -> Any:
    """Builds discrete BCQ; ``item_head`` is ``embedding`` or ``linear``, ``data`` says what it learns from."""
    from hrl_policies.bcq import DiscreteBCQ

    hyperparameters, data = _without_data(context)
    head = hyperparameters.pop("item_head", "embedding")
    if head not in ("embedding", "linear"):
        raise ValueError(f"item_head must be 'embedding' or 'linear', got {head!r}")
    if head == "embedding":
        world = context.worlds.train
        hyperparameters["item_embeddings"] = world.embeddings[: world.n_items]
    model = sb3_algorithm(DiscreteBCQ, context, hyperparameters)
    model.set_transitions(offline_transitions(context, data))
    return model


def _without_data(context: BuildContext) -> tuple[dict[str, Any], OfflineData]:
    hyperparameters = dict(context.hyperparameters)
    return hyperparameters, validated(OfflineData, hyperparameters.pop("data", {}), "data")


_OBSERVED = "observed states and rewards of the training world"
_GROUPS = "popularity groups"
_BOUND = "the leave rule's bound"
_OFFLINE = "the training log: observed states, exposures and clicks"
_FEEDBACK = "observed states, items shown and their feedback in the training world"
_WINDOW = (
    "observed states, windows and rewards of the training world, the training log's click scorer, popularity groups"
)
_WORLD_MODEL = "training log, user and item features, observed states, the leave rule; no response of either world"
_FEEDBACK_AND_GROUPS = "observed states, items shown and their clicks in the training world, popularity groups"
_SB3 = "Stable-Baselines3"
_SAC4IR = "Shi et al., Maximum entropy policy for long-term fairness, IEEE TSC 17(3), 2024"
_DNAIR = "Shi et al., Relieving popularity bias in interactive recommendation, ACM TOIS 42(2), 2023"
_PAPER = "Lu et al., Fairness begins with state, arXiv:2603.03820, 2026"

_query_agent = partial(MethodSpec, kind="online", action_mode="embedding", sees=_OBSERVED)
_control = partial(MethodSpec, family="control", kind="control", action_mode="slate")
_item_ranker = partial(MethodSpec, family="fairness", kind="online", action_mode="slate")
_hierarchical = partial(
    MethodSpec, build=build_hierarchical, family="hierarchical", kind="online", action_mode="slate", sees=_WINDOW,
    observation_mode="history", purifier="profile",
)  # fmt: skip
_from_belief = partial(
    MethodSpec, build=build_hierarchical, family="hierarchical", kind="online", action_mode="slate",
    purifier="candidates",
    sees="what belief-quota sees, rewards of the training world, and when temper falls",
)  # fmt: skip

_build_sac4ir = _algorithm("hrl_policies.sac4ir", "SAC4IR")
_build_dnair = _algorithm("hrl_policies.dnair", "DNaIR")

_TABLE: tuple[MethodSpec, ...] = (
    _query_agent(
        "a2c", "A2C", f"Mnih et al., Asynchronous methods for deep reinforcement learning, ICML 2016; {_SB3}",
        _algorithm("stable_baselines3", "A2C"), family="on-policy",
    ),
    _query_agent(
        "td3", "TD3",
        f"Fujimoto et al., Addressing function approximation error in actor-critic methods, ICML 2018; {_SB3}",
        build_td3, family="off-policy",
    ),
    _query_agent(
        "a2c-literature", "A2C, literature", "the same with Stable-Baselines3's settings",
        _algorithm("stable_baselines3", "A2C"), family="on-policy",
    ),
    _query_agent(
        "td3-literature", "TD3, literature", "the same with its authors' policy and settings", build_td3,
        family="off-policy",
    ),
    _query_agent(
        "ppo", "PPO", f"Schulman et al., Proximal policy optimization algorithms, 2017; {_SB3}",
        _algorithm("stable_baselines3", "PPO"), family="on-policy",
    ),
    _query_agent(
        "sac", "SAC", f"Haarnoja et al., Soft actor-critic, ICML 2018; {_SB3}",
        _algorithm("stable_baselines3", "SAC"), family="off-policy",
    ),
    _query_agent(
        "recurrent-ppo", "RecurrentPPO", "PPO with an LSTM; sb3-contrib",
        _algorithm("sb3_contrib", "RecurrentPPO"), family="on-policy",
        sees=f"{_OBSERVED}, of the whole session so far",
    ),
    _query_agent(
        "tqc", "TQC",
        "Kuznetsov et al., Controlling overestimation bias with truncated mixture of continuous "
        "distributional quantile critics, ICML 2020; sb3-contrib",
        _algorithm("sb3_contrib", "TQC"), family="off-policy",
    ),
    _control(
        "random", "Random", "uniform over all candidates",
        lambda context: _controls().RandomSlates(seed=context.seed), sees="nothing",
    ),
    _control(
        "pop-only", "PopOnly", "uniform over the popular candidates",
        lambda context: _controls().RandomSlates(context.worlds.test.groups.popular, context.seed), sees=_GROUPS,
    ),
    _control(
        "tail-only", "TailOnly", "uniform over the long-tail candidates",
        lambda context: _controls().RandomSlates(~context.worlds.test.groups.popular, context.seed), sees=_GROUPS,
    ),
    _control(
        "greedy-ctr", "GreedyCTR", "largest predicted click probability",
        lambda context: _controls().GreedyCTR(context.worlds.scorer), sees="training log, observed state",
    ),
    _control(
        "quota-greedy", "QuotaGreedy", "half popular, half long-tail, each by predicted click probability",
        lambda context: _controls().QuotaGreedy(context.worlds.scorer),
        sees=f"training log, observed state, {_GROUPS}, {_BOUND}",
    ),
    _control(
        "tolerance-quota", "ToleranceQuota", "best slate by predicted click probability that the user tolerates",
        lambda context: _controls().ToleranceQuota(context.worlds.scorer),
        sees=f"training log, observed state, {_GROUPS}, {_BOUND}, each user's tolerance", privileged=True,
    ),
    _control(
        "mean-tolerance-quota", "MeanToleranceQuota", "the same by what users tolerate on average",
        lambda context: _controls().MeanToleranceQuota(context.worlds.scorer),
        sees=f"training log, observed state, {_GROUPS}, {_BOUND}, the mean of users' tolerances", privileged=True,
    ),
    _control(
        "session-quota", "SessionQuota", "QuotaGreedy that counts clicks and skips in log context and session",
        lambda context: _controls().SessionQuota(context.worlds.scorer),
        sees=f"training log, observed state, window, {_GROUPS}, {_BOUND}",
    ),
    _control(
        "session-quota-features", "SessionQuota, items by features",
        "the same with items estimated from their features too, as DSRM-HRL does",
        build_session_quota_of_features,
        sees=f"training log, item features, observed state, window, {_GROUPS}, {_BOUND}",
    ),
    _control(
        "item-quota", "ItemQuota", "best fair slate by an offset for each item, learned while serving",
        build_item_quota, sees=f"training log, feedback while serving, {_GROUPS}, {_BOUND}",
    ),
    _control(
        "belief-quota", "BeliefQuota", "best fair slate by a belief about user and items, in closed form",
        build_belief_quota,
        sees=f"training log, feedback of the session, and of all users while serving, {_GROUPS}, {_BOUND}",
    ),
    _control(
        "belief-quota-features", "BeliefQuota, items by features",
        "the same with items by features and scales fitted: DSRM-HRL before training, where the bound is known",
        build_belief_quota_of_features,
        sees="training log, item features, feedback of the session, and of all users while serving, "
        f"{_GROUPS}, {_BOUND}",
    ),
    _control(
        "quality-oracle", "QualityOracle", "best fair slate by true mean appeal",
        lambda context: _controls().QualityOracle(context.worlds.test),
        sees=f"the test world's true item quality, {_GROUPS}, {_BOUND}", privileged=True,
    ),
    _control(
        "oracle", "Oracle", "best fair slate by the user's true expected feedback",
        lambda context: _controls().Oracle(),
        sees=f"the test world's true feedback, {_GROUPS}, {_BOUND}", privileged=True,
    ),
    _item_ranker(
        "sac4ir", "SAC4IR", f"{_SAC4IR}; clicks debiased by exposure", _build_sac4ir,
        sees=f"{_FEEDBACK}, exposure in the training log",
    ),
    _item_ranker(
        "sac4ir-kuaisim", "SAC4IR (KuaiSim)", f"{_SAC4IR}; its group's version for KuaiSim", _build_sac4ir,
        sees=_FEEDBACK,
    ),
    _item_ranker(
        "dnair", "DNaIR", f"{_DNAIR}; online, one network for all users", _build_dnair,
        sees=f"{_FEEDBACK}, windows, exposure, quality and item-CF similarity in the training log",
        observation_mode="history",
    ),
    _item_ranker(
        "dnair-kuaisim", "DNaIR (KuaiSim)", f"{_DNAIR}; its group's version for KuaiSim", _build_dnair,
        sees=f"{_FEEDBACK}, exposure and quality in the training log",
    ),
    _from_belief("dsrm-hrl", "DSRM-HRL", f"{_PAPER}; from a belief on, with quotas"),
    _hierarchical("hrl", "HRL", f"{_PAPER}, without purification", purifier=""),
    _hierarchical("hrl+tce", "HRL + T-CE", f"{_PAPER}, on states denoised by T-CE", purifier="tce"),
    _hierarchical("hrl+rce", "HRL + R-CE", f"{_PAPER}, on states denoised by R-CE", purifier="rce"),
    _hierarchical("hrl+bod", "HRL + BOD", f"{_PAPER}, on states denoised by BOD", purifier="bod"),
    _hierarchical("hrl+cdae", "HRL + CDAE", f"{_PAPER}, on states denoised by CDAE", purifier="cdae"),
    _hierarchical("hrl+diffrec", "HRL + DiffRec", f"{_PAPER}, on states denoised by DiffRec", purifier="diffrec"),
    _from_belief("dsrm-hrl-constant", "DSRM-HRL, constant z", "a manager that always asks for half"),
    _hierarchical("flat", "FLAT", f"{_PAPER}: one PPO on purified states, one global omega"),
    _hierarchical("flat+fair", "FLAT + fairness", "FLAT rewarded with r + lambda Fair"),
    _hierarchical(
        "paper", "DSRM-HRL, to the letter", f"{_PAPER}, equations 4 to 6 to the letter",
        sees=f"{_OBSERVED}, {_GROUPS}", observation_mode="state",
    ),
    _query_agent(
        "a2c+fair", "A2C + fairness", "A2C rewarded with r + lambda Fair, as the manager of HRL is",
        build_fair_a2c, family="on-policy", sees=f"{_OBSERVED}, {_GROUPS}",
    ),
    MethodSpec(
        "dorl", "DORL",
        "Gao et al., Alleviating Matthew effect of offline reinforcement learning in interactive "
        "recommendation, SIGIR 2023",
        _algorithm("hrl_policies.dorl", "DORL"), family="model-based", kind="offline",
        action_mode="embedding",
        sees=_WORLD_MODEL,
    ),
    _query_agent(
        "mofir", "MOFIR",
        "Ge et al., Toward Pareto efficient fairness-utility trade-off in recommendation through "
        "reinforcement learning, WSDM 2022",
        _algorithm("hrl_policies.mofir", "MOFIR"), family="off-policy",
        sees=_FEEDBACK_AND_GROUPS,
    ),
    MethodSpec(
        "bcq", "BCQ", "Fujimoto et al., Off-policy deep reinforcement learning without exploration, ICML 2019",
        build_bcq, family="offline", kind="offline", action_mode="embedding", sees=_OFFLINE,
    ),
    MethodSpec(
        "bcq-discrete", "BCQ, discrete",
        "Fujimoto et al., Benchmarking batch deep reinforcement learning algorithms, 2019; slates are the top K",
        build_discrete_bcq, family="offline", kind="offline", action_mode="slate", sees=_OFFLINE,
        needs_repeats="it does not know what was shown before",
    ),
    MethodSpec(
        "dorl-literature", "DORL, literature", "the same with the discount of its authors",
        _algorithm("hrl_policies.dorl", "DORL"), family="model-based", kind="offline", action_mode="embedding",
        sees=_WORLD_MODEL,
    ),
    _query_agent(
        "mofir-literature", "MOFIR, literature", "the same with common settings of DDPG",
        _algorithm("hrl_policies.mofir", "MOFIR"), family="off-policy", sees=_FEEDBACK_AND_GROUPS,
    ),
    MethodSpec(
        "bcq-literature", "BCQ, literature", "the same with its authors' networks and settings",
        build_bcq, family="offline", kind="offline", action_mode="embedding", sees=_OFFLINE,
    ),
)  # fmt: skip

for _spec in _TABLE:
    add_method(_spec)
