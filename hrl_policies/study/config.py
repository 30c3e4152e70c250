"""Configuration of a run: everything that its result depends on, as plain JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hrl_policies.zoo import MethodSettings, MethodSpec, check_hyperparameters, load_settings, method, overridden
from kuaifair_env.abandonment import LEAVE_RULES, leave_rule, rule_text
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import DEFAULT_SEED
from kuaifair_env.randomisation import RandomisationLike, describe_setting, randomisation_setting
from kuaifair_env.settings import DEFAULTS
from kuaifair_env.splits import EVALUATION_USERS

_MAX_SLUG = 60
# Everything is evaluated at once in memory: more would be found out only after the training.
_MOST_EPISODES = 10_000

STUDY_SEEDS = (11, 15, 19)
"""Training seeds of a study, those of the paper's code base."""


@dataclass(frozen=True)
class PurifierIdentity:
    """Which purifier stands between sessions and agent.

    Attributes:
        name: Its mode, such as ``"profile"``, or its kind where it has none.
        hash: First 16 hex digits of the SHA-256 of its file, of which a run folder holds a copy; empty for a purifier
            that a study has yet to pretrain.
    """

    name: str
    hash: str = ""

    @classmethod
    def of_file(cls, path: str | Path) -> PurifierIdentity:
        """Reads a purifier's file.

        Raises:
            ArtifactError: If it is not one.
        """
        from dsrm.purifier import load_purifier, purifier_hash

        described = load_purifier(path).describe()
        mode = described.get("report", {}).get("mode", described["kind"])
        return cls(str(mode), purifier_hash(path))


@dataclass(frozen=True)
class RunConfig:
    """One run: a method, trained with one seed in one world, evaluated in the other.

    Attributes:
        method: Name in the zoo.
        world: Environment id, or the name that a study gives to worlds of its own.
        world_settings: What else :func:`kuaifair_env.make_world` was given (never a path).
        seed: Training seed.
        session: How sessions run; the action mode is the method's.
        policy: Name of the policy class; empty for controls.
        n_envs: Concurrent training sessions.
        total_steps: Training steps over all sessions; 0 for controls.
        hyperparameters: Arguments of the algorithm.
        users: Raw ids of the held-out users to evaluate on; None where ``n_users`` says how many.
        n_users: Number of such users, see :func:`kuaifair_env.evaluation.users_to_evaluate`; None where ids are given.
        episodes_per_user: Sessions of each.
        evaluation_seed: Seed of the randomness of those sessions, the same for all methods.
        purifier: What purifies the observed states, in training and in evaluation; None leaves them as they are.
        item_term: Mode of the item term that the worlds hold (see ``dsrm.item_term``); empty for none.
        randomisation: How far users of the training world deviate from its response model
            (``kuaifair_env.randomisation``), with the training seed; None for methods that play no sessions there.
        variant: What tells this run from others of its method in a study, such as ``"learning_rate=0.001"``; tables
            and folders show it, results do not depend on it.
    """

    method: str
    world: str
    seed: int = STUDY_SEEDS[0]
    session: SessionConfig = field(default_factory=SessionConfig)
    world_settings: Mapping[str, Any] = field(default_factory=dict)
    policy: str = ""
    n_envs: int = 0
    total_steps: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    users: tuple[int | str, ...] | None = None
    n_users: int | None = EVALUATION_USERS
    episodes_per_user: int = 1
    evaluation_seed: int = DEFAULT_SEED
    purifier: PurifierIdentity | None = None
    item_term: str = ""
    randomisation: RandomisationLike = None
    variant: str = ""

    def __post_init__(self) -> None:
        spec = method(self.method)
        if (self.users is None) == (self.n_users is None):
            raise ValueError("give users (raw ids) or n_users (a number of them), and not both")
        if self.user_count < 1 or self.episodes_per_user < 1:
            raise ValueError(
                f"users and episodes_per_user must be at least 1, got {self.user_count}, {self.episodes_per_user}"
            )
        if self.episodes_per_user > _MOST_EPISODES:
            raise ValueError(f"episodes_per_user must be at most {_MOST_EPISODES:,}, got {self.episodes_per_user:,}")
        if spec.learns and (self.total_steps < 1 or self.n_envs < 1):
            raise ValueError(
                f"{self.method} trains: total_steps and n_envs must be at least 1, "
                f"got {self.total_steps} and {self.n_envs}"
            )
        if spec.purifier and self.purifier is None:
            raise ValueError(
                f"{self.method} learns on purified states: name a purifier, PurifierIdentity.of_file(PATH), as "
                f"`kuaifair pretrain --mode {spec.purifier}` or hrl_policies.worlds.cached_purifier makes them"
            )
        if spec.needs_repeats and self.session.repeats == "forbid":
            raise ValueError(f"{self.method} needs repeats='allow': {spec.needs_repeats}")
        if self.seed < 0:
            raise ValueError(f"a seed is not negative, got {self.seed}")

    @property
    def user_count(self) -> int:
        """How many users the policy is evaluated on, at most: a world may have fewer."""
        return (self.n_users or 0) if self.users is None else len(self.users)

    def as_dict(self) -> dict[str, Any]:
        """Returns a JSON-able copy."""
        return {part.name: getattr(self, part.name) for part in fields(self)} | {
            "session": self.session.describe(),
            "world_settings": dict(self.world_settings),
            "hyperparameters": dict(self.hyperparameters),
            "users": None if self.users is None else list(self.users),
            "purifier": None if self.purifier is None else asdict(self.purifier),
            "randomisation": describe_setting(self.randomisation),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunConfig:
        """Reads what :meth:`as_dict` wrote.

        Raises:
            KeyError: If something is missing; TypeError or ValueError, if something is unknown or of another type.
        """
        purifier, users = content.get("purifier"), content["users"]
        return cls(
            **{
                **content,
                "session": _session_config(content["session"]),
                "users": None if users is None else tuple(users),
                "purifier": None if purifier is None else PurifierIdentity(**purifier),
                "randomisation": randomisation_setting(content["randomisation"]),
            }
        )


def plan_run(
    method_name: str,
    world: str,
    *,
    seed: int = STUDY_SEEDS[0],
    session: SessionConfig | None = None,
    total_steps: int | None = None,
    n_envs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    world_settings: Mapping[str, Any] | None = None,
    users: Sequence[int | str] | None = None,
    n_users: int | None = None,
    episodes_per_user: int = 1,
    evaluation_seed: int = DEFAULT_SEED,
    purifier: PurifierIdentity | None = None,
    item_term: str = "",
    randomisation: Any = "auto",
    settings: MethodSettings | None = None,
    variant: str = "",
) -> RunConfig:
    """Returns the configuration of a run with the zoo's settings, some of them replaced.

    What is not described here is as in :class:`RunConfig`: ``session`` (its action mode is replaced by the method's),
    and ``total_steps`` and ``n_envs`` instead of the zoo's numbers. ``randomisation`` is what
    :func:`kuaifair_env.randomisation.randomisation_setting` reads; methods that do not learn online have none.
    ``overrides`` are hyperparameters by (dotted) name (see :func:`hrl_policies.zoo.overridden`). ``settings`` stand
    instead of the zoo's (:func:`hrl_policies.zoo.read_settings`); what is given besides goes first. Evaluation plays
    1,000 users where neither ``users`` nor ``n_users`` is given.

    Raises:
        ValueError: If a name or number is not valid.
    """
    spec = method(method_name)
    common: dict[str, Any] = {
        "method": method_name,
        "world": world,
        "seed": seed,
        "session": _with_modes(session or SessionConfig(), spec),
        "world_settings": dict(world_settings or {}),
        "users": None if users is None else tuple(users),
        "n_users": EVALUATION_USERS if users is None and n_users is None else n_users,
        "episodes_per_user": episodes_per_user,
        "evaluation_seed": evaluation_seed,
        "purifier": purifier,
        "item_term": item_term,
        "variant": variant,
    }
    if not spec.learns:
        if overrides or settings is not None:
            given = "a settings file" if settings is not None else sorted(overrides or {})
            raise ValueError(f"{method_name} is a control and has no hyperparameters; got {given}")
        return RunConfig(**common)
    if settings is None:
        settings = load_settings(method_name, world)
    hyperparameters = overridden(settings.hyperparameters, overrides or {})
    check_hyperparameters(hyperparameters)
    return RunConfig(
        **common,
        policy=settings.policy,
        n_envs=settings.n_envs if n_envs is None else n_envs,
        total_steps=settings.total_steps if total_steps is None else total_steps,
        hyperparameters=hyperparameters,
        randomisation=randomisation_setting(randomisation) if spec.kind == "online" else None,
    )


def _session_config(content: Mapping[str, Any]) -> SessionConfig:
    """Reads what ``SessionConfig.describe`` wrote.

    Raises:
        ValueError: If the leave rule is not one of this library.
    """
    name = content["leave"].get("rule")
    if name not in LEAVE_RULES:
        raise ValueError(f"its leave rule {name!r} is none of this version's and cannot be rebuilt from its file")
    return SessionConfig(**content)


def run_folder(config: RunConfig) -> Path:
    """Returns the name of a run's folder inside a store."""
    world = re.sub(r"[^A-Za-z0-9.]+", "-", config.world).strip("-")
    session = config.session
    name = config.method if config.purifier is None else f"{config.method}+{config.purifier.name}"
    name += f"-item-{config.item_term}" if config.item_term else ""
    name += unusual_worlds(config.world_settings)
    name += f"-{_slug(config.variant)}" if config.variant else ""
    kind = f"len{session.max_len}-k{session.items_per_slate}{_unusual(session)}"
    return Path(world) / f"{name}-{kind}-seed{config.seed}"


def unusual_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those settings of worlds that are not the default ones, apart from where their data come from."""
    return {
        name: value
        for name, value in sorted(settings.items())
        if name not in ("source", "allow_partial") and value != DEFAULTS.get(name)
    }


def unusual_worlds(settings: Mapping[str, Any]) -> str:
    """Returns what is unusual about worlds, as part of a file name; nothing for default ones."""
    unusual = unusual_settings(settings)
    return f"-{_slug(json.dumps(unusual, sort_keys=True))}" if unusual else ""


def _with_modes(session: SessionConfig, spec: MethodSpec) -> SessionConfig:
    """Returns the session settings with a method's modes, and the slate size of the original.

    A method that looks at the state alone takes the window too, where the sessions were asked to give it.
    """
    observation_mode = session.observation_mode if spec.observation_mode == "state" else spec.observation_mode
    return replace(
        session, slate_size=session.items_per_slate, action_mode=spec.action_mode, observation_mode=observation_mode
    )


def _slug(text: str) -> str:
    """Returns a text as part of a file name; a hash tells apart texts that a file name cannot."""
    plain = re.sub(r"[^A-Za-z0-9.=+_-]+", "-", text).strip("-.")[:_MAX_SLUG]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _unusual(session: SessionConfig) -> str:
    """Returns what is unusual about sessions, besides their length and slates; nothing for the default ones."""
    usual = SessionConfig()
    unusual = []
    rule = leave_rule(session.leave)
    if rule != leave_rule(usual.leave):
        unusual.append(_slug(rule_text(rule)))
    if session.initial_history != usual.initial_history:
        unusual.append(f"{session.initial_history}-history")
    if session.repeats != usual.repeats:
        unusual.append(f"{session.repeats}-repeats")
    if session.duplicates != usual.duplicates:
        unusual.append(f"{session.duplicates}-duplicates")
    if session.reward != usual.reward:
        unusual.append(f"{session.reward}-reward")
    if session.drift != usual.drift:
        unusual.append(f"drift-{session.drift:g}")
    if session.session_clock:
        unusual.append("session-clock")
    return "".join(f"-{part}" for part in unusual)
