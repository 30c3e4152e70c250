"""Offline methods: they learn from the training log, or from what a behaviour policy did in the training world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from hrl_policies.zoo.methods import BuildContext, register_method, sb3_algorithm

if TYPE_CHECKING:
    from hrl_policies.baselines.transitions import LoggedTransitions

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
        session_end: See :class:`~hrl_policies.baselines.log_transitions.LogReading`.
        action_items: See :class:`~hrl_policies.baselines.log_transitions.LogReading`.
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
        DataError: If the log holds no transitions; see :mod:`hrl_policies.baselines.log_transitions`.
        ValueError: If a setting is not valid, or the sessions show more than a state.
    """
    from dsrm.wrappers import VecDSRM
    from hrl_policies.baselines.collection import NoisyState, collect_transitions
    from hrl_policies.baselines.controls import RandomSlates
    from hrl_policies.baselines.log_transitions import LogReading, log_transitions

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
    from hrl_policies.baselines.bcq import BCQ

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
    from hrl_policies.baselines.discrete_bcq import DiscreteBCQ

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
