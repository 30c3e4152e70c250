"""Fairness-aware baselines that rank items directly: SAC4IR and DNaIR, as adapted here and as in KuaiSim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from hrl_policies.zoo.methods import BuildContext, register_method, sb3_algorithm

if TYPE_CHECKING:
    from hrl_policies.common.transitions import LoggedTransitions


_SAC4IR = "Shi et al., Maximum entropy policy for long-term fairness, IEEE TSC 17(3), 2024"
_DNAIR = "Shi et al., Relieving popularity bias in interactive recommendation, ACM TOIS 42(2), 2023"
_STATES = "observed states, items shown and their feedback in the training world"


def build_sac4ir(context: BuildContext) -> Any:
    """Builds SAC4IR."""
    from hrl_policies.sac4ir.algorithm import SAC4IR

    return sb3_algorithm(SAC4IR, context)


register_method(
    "sac4ir",
    title="SAC4IR",
    family="fairness",
    reference=f"{_SAC4IR}; clicks debiased by exposure",
    kind="online",
    action_mode="slate",
    sees=f"{_STATES}, exposure in the training log",
)(build_sac4ir)
register_method(
    "sac4ir-kuaisim",
    title="SAC4IR (KuaiSim)",
    family="fairness",
    reference=f"{_SAC4IR}; its group's version for KuaiSim",
    kind="online",
    action_mode="slate",
    sees=_STATES,
)(build_sac4ir)


def build_dnair(context: BuildContext) -> Any:
    """Builds DNaIR."""
    from hrl_policies.dnair.algorithm import DNaIR

    return sb3_algorithm(DNaIR, context)


register_method(
    "dnair",
    title="DNaIR",
    family="fairness",
    reference=f"{_DNAIR}; online, one network for all users",
    kind="online",
    action_mode="slate",
    sees=f"{_STATES}, windows, exposure, quality and item-CF similarity in the training log",
    observation_mode="history",
)(build_dnair)
register_method(
    "dnair-kuaisim",
    title="DNaIR (KuaiSim)",
    family="fairness",
    reference=f"{_DNAIR}; its group's version for KuaiSim",
    kind="online",
    action_mode="slate",
    sees=f"{_STATES}, exposure and quality in the training log",
)(build_dnair)


_PAPER = "Lu et al., Fairness begins with state, arXiv:2603.03820, 2026"
_WINDOW = (
    "observed states, windows and rewards of the training world, the training log's click scorer, "
    "popularity groups"
)


def build_hierarchical(context: BuildContext) -> Any:
    """Builds HierarchicalPPO; ``use_scorer`` says whether its accuracy term starts from the greedy controls' scores."""
    from hrl_policies.hrl_ppo import HierarchicalPPO

    settings = dict(context.hyperparameters)
    if settings.pop("use_scorer", False):
        settings["scorer"] = context.worlds.scorer
    return sb3_algorithm(HierarchicalPPO, context, settings)


def _register(name: str, title: str, reference: str, purifier: str, window: bool = True) -> None:
    register_method(
        name,
        title=title,
        family="hierarchical",
        reference=reference,
        kind="online",
        action_mode="slate",
        sees=_WINDOW if window else "observed states and rewards of the training world, popularity groups",
        observation_mode="history" if window else "state",
        purifier=purifier,
    )(build_hierarchical)


_register("dsrm-hrl", "DSRM-HRL", f"{_PAPER}; with quotas and session memory", "profile")
_register("hrl", "HRL", f"{_PAPER}, without purification", "")
_register("hrl+tce", "HRL + T-CE", f"{_PAPER}, on states denoised by T-CE", "tce")
_register("hrl+rce", "HRL + R-CE", f"{_PAPER}, on states denoised by R-CE", "rce")
_register("hrl+bod", "HRL + BOD", f"{_PAPER}, on states denoised by BOD", "bod")
_register("dsrm-hrl-constant", "DSRM-HRL, constant z", "a manager that always asks for half", "profile")
_register(
    "dsrm-hrl-no-memory", "DSRM-HRL, no memory", "a worker that cannot count clicks in the window", "profile"
)
_register("dsrm-hrl-query", "DSRM-HRL, free query", "a worker that may move away from the state", "profile")
_register("flat", "FLAT", f"{_PAPER}: one PPO on purified states, one global omega", "profile")
_register("flat+fair", "FLAT + fairness", "FLAT rewarded with r + lambda Fair", "profile")
_register(
    "dsrm-hrl-literal",
    "DSRM-HRL, literal",
    f"{_PAPER}, equations 4 to 6 to the letter",
    "profile",
    window=False,
)


@register_method(
    "a2c+fair",
    title="A2C + fairness",
    family="on-policy",
    reference="A2C rewarded with r + lambda Fair, as the manager of HRL is",
    kind="online",
    action_mode="embedding",
    sees="observed states and rewards of the training world, popularity groups",
)
def build_fair_a2c(context: BuildContext) -> Any:
    """Builds A2C over sessions whose reward holds the fairness term; ``fair_coef`` is ``lambda``."""
    from dataclasses import replace

    from stable_baselines3 import A2C

    from hrl_policies.hrl_ppo.rewards import FairSessions

    settings = dict(context.hyperparameters)
    assert context.env is not None
    env = FairSessions(context.env, float(settings.pop("fair_coef")))
    return sb3_algorithm(A2C, replace(context, env=env), settings)


@register_method(
    "dorl",
    title="DORL",
    family="model-based",
    reference="Gao et al., Alleviating Matthew effect of offline reinforcement learning in interactive recommendation, "
    "SIGIR 2023",
    kind="offline",
    action_mode="embedding",
    sees="training log, user and item features, observed states, the leave rule; no response of either world",
)
def build_dorl(context: BuildContext) -> Any:
    """Builds DORL; it takes users, items and settings from the training sessions and never plays them."""
    from hrl_policies.dorl.algorithm import DORL

    return sb3_algorithm(DORL, context)


@register_method(
    "mofir",
    title="MOFIR",
    family="off-policy",
    reference="Ge et al., Toward Pareto efficient fairness-utility trade-off in recommendation through reinforcement "
    "learning, WSDM 2022",
    kind="online",
    action_mode="embedding",
    sees="observed states, items shown and their clicks in the training world, popularity groups",
)
def build_mofir(context: BuildContext) -> Any:
    """Builds MOFIR; its default preference is chosen in the training world when training ends."""
    from hrl_policies.mofir.algorithm import MOFIR

    return sb3_algorithm(MOFIR, context)


DataSource = Literal["log", "env_behaviour"]
Exposures = Literal["slates", "single"]

_SEES = "the training log: observed states, exposures and clicks"


@dataclass(frozen=True)
class OfflineData:
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

    Raises:
        ValueError: If a setting is not valid.
    """

    source: DataSource = "log"
    transitions: int | None = 100_000
    exposures: Exposures = "slates"
    session_length: int | None = None
    session_end: str = "truncated"
    action_items: str = "clicked"
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("source", DataSource), ("exposures", Exposures)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"data.{name} must be one of {get_args(kinds)}, got {getattr(self, name)!r}")
        for name in ("transitions", "session_length", "seed"):
            value = getattr(self, name)
            if not (isinstance(value, int) or (value is None and name != "seed")):
                raise ValueError(f"data.{name} must be a whole number, got {value!r}")
        if not isinstance(self.noise, (int, float)):
            raise ValueError(f"data.noise must be a number, got {self.noise!r}")
        if self.source == "env_behaviour" and self.transitions is None:
            raise ValueError("data.source=env_behaviour needs data.transitions, how many to collect")

    @classmethod
    def of(cls, content: Any) -> OfflineData:
        """Reads the group ``data``.

        Raises:
            ValueError: If it is no group, or holds unknown settings.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"data must be a group of settings such as data.source=log, got {content!r}")
        unknown = set(content) - {part.name for part in fields(cls)}
        if unknown:
            raise ValueError(
                f"data has no setting {', '.join(sorted(unknown))}; there are "
                f"{', '.join(part.name for part in fields(cls))}"
            )
        return cls(**content)


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
    from hrl_policies.common.transition_sources import (
        LogReading,
        NoisyState,
        collect_transitions,
        log_transitions,
    )
    from hrl_policies.controls import RandomSlates

    env, config = context.env, context.config
    assert env is not None
    if config.observation_mode != "state":
        raise ValueError(
            f"offline methods observe the state alone; use observation_mode='state', not {config.observation_mode!r}"
        )
    if data.source == "env_behaviour":
        assert data.transitions is not None
        if config.action_mode == "embedding":
            policy: Any = NoisyState(data.noise, data.seed)
            behaviour = {"noise": data.noise, "seed": data.seed}
        else:
            policy, behaviour = RandomSlates(seed=data.seed), {"seed": data.seed}
        return collect_transitions(policy, env, data.transitions, data.seed, behaviour=behaviour)
    size = 1 if data.exposures == "single" else config.items_per_slate
    whole = config.max_len * (config.items_per_slate // size)
    reading = LogReading(
        slate_size=size,
        session_length=whole if data.session_length is None else data.session_length,
        session_end=data.session_end,  # type: ignore[arg-type]
        action_items=data.action_items,  # type: ignore[arg-type]
        max_transitions=data.transitions,
        seed=data.seed,
    )
    purifier = env.dsrm if isinstance(env, VecDSRM) else None
    return log_transitions(context.worlds.train, config.action_mode, reading, purifier)


@register_method(
    "bcq",
    title="BCQ",
    family="offline",
    reference="Fujimoto et al., Off-policy deep reinforcement learning without exploration, ICML 2019",
    kind="offline",
    action_mode="embedding",
    sees=_SEES,
)
def build_bcq(context: BuildContext) -> Any:
    """Builds continuous BCQ; the group ``data`` says what it learns from."""
    from hrl_policies.bcq.algorithm import BCQ

    settings, data = _split(context)
    model = sb3_algorithm(BCQ, context, settings)
    model.set_transitions(offline_transitions(context, data))
    return model


@register_method(
    "bcq-discrete",
    title="BCQ, discrete",
    family="offline",
    reference="Fujimoto et al., Benchmarking batch deep reinforcement learning algorithms, 2019; slates are the top K",
    kind="offline",
    action_mode="slate",
    sees=_SEES,
)
def build_discrete_bcq(context: BuildContext) -> Any:
    """Builds discrete BCQ; ``item_head`` is ``embedding`` or ``linear``, ``data`` says what it learns from."""
    from hrl_policies.bcq.algorithm import DiscreteBCQ

    if context.config.repeats == "forbid":
        raise ValueError("bcq-discrete does not know what was shown before; it needs repeats='allow'")
    settings, data = _split(context)
    head = settings.pop("item_head", "embedding")
    if head not in ("embedding", "linear"):
        raise ValueError(f"item_head must be 'embedding' or 'linear', got {head!r}")
    if head == "embedding":
        world = context.worlds.train
        settings["item_embeddings"] = world.embeddings[: world.n_items]
    model = sb3_algorithm(DiscreteBCQ, context, settings)
    model.set_transitions(offline_transitions(context, data))
    return model


def _split(context: BuildContext) -> tuple[dict[str, Any], OfflineData]:
    """Returns the algorithm's settings and what to learn from."""
    settings = dict(context.hyperparameters)
    return settings, OfflineData.of(settings.pop("data", {}))
