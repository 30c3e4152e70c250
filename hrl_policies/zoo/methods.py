"""Every method by name: what it is, where it comes from, what it may see, and how it is built."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping
from copy import deepcopy
from dataclasses import dataclass
from importlib import metadata
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Literal

from hrl_policies.worlds import WorldPair
from hrl_policies.zoo.settings import MethodSettings, has_shipped_settings
from kuaifair_env.batch import SessionConfig
from kuaifair_env.spaces import ActionMode, ObservationMode

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv


GROUP = "kuaifair.methods"

_tried: set[tuple[str, str]] = set()
"""Name and value of the entry points of this process that were loaded, or failed to."""


def load_plugins(methods: MutableMapping[str, Any]) -> None:
    """Imports the plugins that are installed, each once; one that fails is warned about and leaves nothing behind.

    Args:
        methods: Where methods are registered.
    """
    for point in metadata.entry_points(group=GROUP):
        key = (point.name, point.value)
        if key in _tried:
            continue
        # Marked first: a plugin may look up methods while it is imported.
        _tried.add(key)
        before = dict(methods)
        try:
            point.load()
        except Exception as error:
            # A plugin may fail in any way at all, and must not take the zoo with it.
            methods.clear()
            methods.update(before)
            package = "" if point.dist is None else f" of the package {point.dist.name}"
            warnings.warn(
                f"the plugin {point.name!r}{package} ({point.value}) was left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


MethodKind = Literal["online", "offline", "control"]


@dataclass(frozen=True)
class BuildContext:
    """What a method is built from.

    Attributes:
        worlds: Both worlds. Only controls that are marked privileged may ask the test world what users like.
        config: How sessions run, with the method's own action mode.
        seed: Training seed.
        env: The training sessions; None for controls.
        policy: Name of the policy class; empty for controls.
        hyperparameters: Arguments of the algorithm.
    """

    worlds: WorldPair
    config: SessionConfig
    seed: int
    env: VecEnv | None
    policy: str
    hyperparameters: Mapping[str, Any]


@dataclass(frozen=True)
class MethodSpec:
    """A method of the zoo.

    Attributes:
        name: What the command line calls it.
        title: What tables call it.
        family: ``"on-policy"``, ``"off-policy"``, ``"control"``, ...
        reference: Where it comes from.
        kind: ``"online"`` trains in the training world, ``"offline"`` on its log, ``"control"`` not at all.
        action_mode: How it acts.
        observation_mode: Whether it observes the state alone, or the window behind it too.
        purifier: Mode of the purifier that is part of the method (see ``dsrm.pretrain.MODES``); empty for none.
        sees: What it may look at.
        privileged: Whether it looks at what users of the test world truly like.
        build: Makes the untrained algorithm (an SB3 ``BaseAlgorithm``), or the control.
        settings: How it is trained unless told otherwise; None takes the shipped file of its name.
    """

    name: str
    title: str
    family: str
    reference: str
    kind: MethodKind
    action_mode: ActionMode
    sees: str
    privileged: bool
    build: Callable[[BuildContext], Any]
    observation_mode: ObservationMode = "state"
    purifier: str = ""
    settings: MethodSettings | None = None

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return self.kind != "control"


METHODS: dict[str, MethodSpec] = {}
"""The methods registered so far, in the order of the tables; :func:`all_methods` asks plugins too."""

Builder = Callable[[BuildContext], Any]


def register_method(
    name: str,
    *,
    title: str,
    family: str,
    reference: str,
    kind: MethodKind,
    action_mode: ActionMode,
    sees: str,
    privileged: bool = False,
    observation_mode: ObservationMode = "state",
    purifier: str = "",
    settings: MethodSettings | None = None,
) -> Callable[[Builder], Builder]:
    """Registers a build function as a method; see :class:`MethodSpec` for the arguments.

    A package of one's own names the module that does so as an entry point of the group ``kuaifair.methods``; see
    :mod:`hrl_policies.zoo.methods`.

    Raises:
        ValueError: If the name is taken, or a method that learns has no settings.
    """

    def register(build: Builder) -> Builder:
        if name in METHODS:
            raise ValueError(f"a method called {name!r} exists already: {METHODS[name].title}")
        if kind != "control" and settings is None and not has_shipped_settings(name):
            raise ValueError(
                f"{name!r} learns and needs settings: register_method(..., settings=MethodSettings(...))"
            )
        METHODS[name] = MethodSpec(
            name,
            title,
            family,
            reference,
            kind,
            action_mode,
            sees,
            privileged,
            build,
            observation_mode,
            purifier,
            settings,
        )
        return build

    return register


def method(name: str) -> MethodSpec:
    """Returns a method by name; plugins are loaded if the zoo itself has none of that name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in METHODS and name not in all_methods():
        raise ValueError(f"no method is called {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


def all_methods() -> Mapping[str, MethodSpec]:
    """Returns :data:`METHODS` with those of installed plugins (:mod:`hrl_policies.zoo.methods`)."""
    load_plugins(METHODS)
    return METHODS


def learners() -> list[str]:
    """Returns the names of the methods that are trained."""
    return [spec.name for spec in all_methods().values() if spec.learns]


def controls() -> list[str]:
    """Returns the names of the controls."""
    return [spec.name for spec in all_methods().values() if not spec.learns]


_STATE_AND_CLICKS = "observed states and rewards of the training world"


@register_method(
    "a2c",
    title="A2C",
    family="on-policy",
    reference="Mnih et al., Asynchronous methods for deep reinforcement learning, ICML 2016; Stable-Baselines3",
    kind="online",
    action_mode="embedding",
    sees=_STATE_AND_CLICKS,
)
def build_a2c(context: BuildContext) -> Any:
    """Builds Stable-Baselines3's A2C."""
    from stable_baselines3 import A2C

    return sb3_algorithm(A2C, context)


@register_method(
    "td3",
    title="TD3",
    family="off-policy",
    reference="Fujimoto et al., Addressing function approximation error in actor-critic methods, ICML 2018; "
    "Stable-Baselines3",
    kind="online",
    action_mode="embedding",
    sees=_STATE_AND_CLICKS,
)
def build_td3(context: BuildContext) -> Any:
    """Builds Stable-Baselines3's TD3; ``action_noise_std`` becomes Gaussian exploration noise."""
    import numpy as np
    from stable_baselines3 import TD3
    from stable_baselines3.common.noise import NormalActionNoise

    hyperparameters = dict(context.hyperparameters)
    deviation = hyperparameters.pop("action_noise_std", None)
    if deviation is not None:
        size = context.worlds.train.dimension
        noise = NormalActionNoise(np.zeros(size), np.full(size, float(deviation)))
        hyperparameters["action_noise"] = noise
    return sb3_algorithm(TD3, context, hyperparameters)


@register_method(
    "ppo",
    title="PPO",
    family="on-policy",
    reference="Schulman et al., Proximal policy optimization algorithms, 2017; Stable-Baselines3",
    kind="online",
    action_mode="embedding",
    sees=_STATE_AND_CLICKS,
)
def build_ppo(context: BuildContext) -> Any:
    """Builds Stable-Baselines3's PPO."""
    from stable_baselines3 import PPO

    return sb3_algorithm(PPO, context)


@register_method(
    "sac",
    title="SAC",
    family="off-policy",
    reference="Haarnoja et al., Soft actor-critic, ICML 2018; Stable-Baselines3",
    kind="online",
    action_mode="embedding",
    sees=_STATE_AND_CLICKS,
)
def build_sac(context: BuildContext) -> Any:
    """Builds Stable-Baselines3's SAC."""
    from stable_baselines3 import SAC

    return sb3_algorithm(SAC, context)


@register_method(
    "recurrent-ppo",
    title="RecurrentPPO",
    family="on-policy",
    reference="PPO with an LSTM; sb3-contrib",
    kind="online",
    action_mode="embedding",
    sees=_STATE_AND_CLICKS + ", of the whole session so far",
)
def build_recurrent_ppo(context: BuildContext) -> Any:
    """Builds sb3-contrib's RecurrentPPO."""
    from sb3_contrib import RecurrentPPO

    return sb3_algorithm(RecurrentPPO, context)


@register_method(
    "tqc",
    title="TQC",
    family="off-policy",
    reference="Kuznetsov et al., Controlling overestimation bias with truncated mixture of continuous "
    "distributional quantile critics, ICML 2020; sb3-contrib",
    kind="online",
    action_mode="embedding",
    sees=_STATE_AND_CLICKS,
)
def build_tqc(context: BuildContext) -> Any:
    """Builds sb3-contrib's TQC."""
    from sb3_contrib import TQC

    return sb3_algorithm(TQC, context)


@register_method(
    "random",
    title="Random",
    family="control",
    reference="uniform over all candidates",
    kind="control",
    action_mode="slate",
    sees="nothing",
)
def build_random(context: BuildContext) -> Any:
    """Builds uniformly random slates."""
    from hrl_policies.controls import RandomSlates

    return RandomSlates(seed=context.seed)


@register_method(
    "pop-only",
    title="PopOnly",
    family="control",
    reference="uniform over the popular candidates",
    kind="control",
    action_mode="slate",
    sees="popularity groups",
)
def build_pop_only(context: BuildContext) -> Any:
    """Builds random slates of popular items."""
    from hrl_policies.controls import RandomSlates

    return RandomSlates(context.worlds.test.groups.popular, context.seed)


@register_method(
    "tail-only",
    title="TailOnly",
    family="control",
    reference="uniform over the long-tail candidates",
    kind="control",
    action_mode="slate",
    sees="popularity groups",
)
def build_tail_only(context: BuildContext) -> Any:
    """Builds random slates of long-tail items."""
    from hrl_policies.controls import RandomSlates

    return RandomSlates(~context.worlds.test.groups.popular, context.seed)


@register_method(
    "greedy-ctr",
    title="GreedyCTR",
    family="control",
    reference="largest predicted click probability",
    kind="control",
    action_mode="slate",
    sees="training log, observed state",
)
def build_greedy_ctr(context: BuildContext) -> Any:
    """Builds the greedy control."""
    from hrl_policies.controls import GreedyCTR

    return GreedyCTR(context.worlds.scorer)


@register_method(
    "quota-greedy",
    title="QuotaGreedy",
    family="control",
    reference="half popular, half long-tail, each by predicted click probability",
    kind="control",
    action_mode="slate",
    sees="training log, observed state, popularity groups, the leave rule's bound",
)
def build_quota_greedy(context: BuildContext) -> Any:
    """Builds the trivial fair control."""
    from hrl_policies.controls import QuotaGreedy

    return QuotaGreedy(context.worlds.scorer)


@register_method(
    "session-quota",
    title="SessionQuota",
    family="control",
    reference="QuotaGreedy that counts clicks and skips in the window",
    kind="control",
    action_mode="slate",
    sees="training log, observed state, window, popularity groups, the leave rule's bound",
)
def build_session_quota(context: BuildContext) -> Any:
    """Builds the fair control that listens to the session."""
    from hrl_policies.controls import SessionQuota

    return SessionQuota(context.worlds.scorer)


@register_method(
    "quality-oracle",
    title="QualityOracle",
    family="control",
    reference="best fair slate by true mean appeal",
    kind="control",
    action_mode="slate",
    sees="the test world's true item quality, popularity groups, the leave rule's bound",
    privileged=True,
)
def build_quality_oracle(context: BuildContext) -> Any:
    """Builds the oracle that knows items but no users."""
    from hrl_policies.controls import QualityOracle

    return QualityOracle(context.worlds.test)


@register_method(
    "oracle",
    title="Oracle",
    family="control",
    reference="best fair slate by the user's true expected feedback",
    kind="control",
    action_mode="slate",
    sees="the test world's true feedback, popularity groups, the leave rule's bound",
    privileged=True,
)
def build_oracle(context: BuildContext) -> Any:
    """Builds the oracle that knows everything."""
    from hrl_policies.controls import Oracle

    return Oracle()


def sb3_algorithm(
    algorithm: Any, context: BuildContext, hyperparameters: Mapping[str, Any] | None = None
) -> Any:
    """Builds an SB3 algorithm over the training sessions.

    Args:
        algorithm: Its class.
        context: What to build from.
        hyperparameters: Instead of the context's.

    Raises:
        ValueError: If it does not know one of the hyperparameters.
    """
    # Stable-Baselines3 writes into the policy_kwargs that it is given.
    settings = deepcopy(dict(context.hyperparameters if hyperparameters is None else hyperparameters))
    unknown = set(settings) - _arguments(algorithm)
    if unknown:
        raise ValueError(f"{algorithm.__name__} has no hyperparameter {', '.join(sorted(unknown))}")
    try:
        return algorithm(context.policy, context.env, seed=context.seed, device="cpu", verbose=0, **settings)
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
