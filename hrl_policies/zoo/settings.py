"""Hyperparameters by method and world: from the YAML files beside this module, or as the method itself brings them.

A file holds the settings for all worlds, and may hold others for some of them, by environment id::

    total_steps: 500000
    hyperparameters:
      learning_rate: 0.0009
    worlds:
      KuaiFair-Toy-v0:
        total_steps: 100000
        hyperparameters:
          learning_rate: 0.003

What a section does not name is as in all worlds. A file may also say ``like: OTHER``, and then holds only what differs
from that method's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hrl_policies.zoo.search import SearchSpace, inherited_search, search_space

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_FOLDER = "hyperparameters"
_LIKE, _WORLDS, _HYPERPARAMETERS, _SEARCH = "like", "worlds", "hyperparameters", "search"
_KEYS = {
    "policy",
    "n_envs",
    "total_steps",
    "taste_noise",
    "calibrated_taste_noise",
    _HYPERPARAMETERS,
    _SEARCH,
}
# What a world may have otherwise; policy class, noise of tastes and search space belong to the method.
_WORLD_KEYS = {"n_envs", "total_steps", _HYPERPARAMETERS}


@dataclass(frozen=True)
class MethodSettings:
    """How a method is trained unless told otherwise.

    Attributes:
        policy: Name of the policy class.
        n_envs: Concurrent training sessions.
        total_steps: Training steps, counted over all sessions (one slate shown is one step).
        taste_noise: Deviation of the tastes that training users have besides the training world's, in log-odds; see
            ``kuaifair_env.randomisation``.
        calibrated_taste_noise: The same where the item term was calibrated on unbiased feedback, so that scores are
            less wrong; None takes ``taste_noise``.
        hyperparameters: Arguments of the algorithm.
        search: Where to look for better ones; see :mod:`hrl_policies.zoo.search`. Empty if nobody said.
    """

    policy: str = "MlpPolicy"
    n_envs: int = 64
    total_steps: int = 0
    taste_noise: float = 0.0
    calibrated_taste_noise: float | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    search: SearchSpace = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns what a settings file holds."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return parts | {
            _HYPERPARAMETERS: dict(self.hyperparameters),
            _SEARCH: {name: dimension.as_dict() for name, dimension in self.search.items()},
        }

    def noise_for(self, item_term: str) -> float:
        """Returns the deviation of tastes under an item term (its mode; empty for none)."""
        calibrated = self.calibrated_taste_noise
        return calibrated if item_term == "unbiased" and calibrated is not None else self.taste_noise


def load_settings(method: str, world: str = "") -> MethodSettings:
    """Returns the settings of a method: those that it was registered with, or else the shipped ones.

    Args:
        method: Its name.
        world: Environment id; a world without a section in the file has what all worlds have.

    Raises:
        ValueError: If there is no file for the method, or it holds unknown keys.
    """
    # methods.py imports this module.
    from hrl_policies.zoo.methods import METHODS

    spec = METHODS.get(method)
    if spec is not None and spec.settings is not None:
        return spec.settings
    return _settings(_shipped(method, world), f"{method}.yml")


def worlds_with_settings(method: str) -> list[str]:
    """Returns the environment ids for which a method has settings of their own.

    Raises:
        ValueError: If there is no file for the method, or it holds unknown keys.
    """
    from hrl_policies.zoo.methods import METHODS

    spec = METHODS.get(method)
    if spec is not None and spec.settings is not None:
        return []
    content = _parsed_file(method)
    inherited = worlds_with_settings(content[_LIKE]) if content.get(_LIKE) is not None else []
    return sorted({*inherited, *content.get(_WORLDS, {})})


def read_settings(path: str | Path, world: str = "") -> MethodSettings:
    """Returns the settings in a file of one's own, such as the ``best.yml`` of ``kuaifair tune``.

    Args:
        path: YAML in the form of the shipped files; ``like`` may name a shipped one.
        world: See :func:`load_settings`.

    Raises:
        ValueError: If there is no such file, or it holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the settings {path} cannot be read: {error}") from error
    return _settings(_content(_parsed(text, str(path)), str(path), world), str(path))


def _settings(content: dict[str, Any], source: str) -> MethodSettings:
    lines = content.pop(_SEARCH, {})
    for name, least in (("n_envs", 1), ("total_steps", 0)):
        value = content.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{source}: {name} must be a whole number from {least}, got {value!r}")
    for name in ("taste_noise", "calibrated_taste_noise"):
        value = content.get(name, 0.0)
        unset = value is None and name == "calibrated_taste_noise"
        if not unset and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf
        ):
            raise ValueError(f"{source}: {name} must be a number from 0, got {value!r}")
    if not isinstance(content.get("policy", ""), str):
        raise ValueError(f"{source}: policy must be the name of a policy class, got {content['policy']!r}")
    return MethodSettings(**content, search=search_space(lines, content.get(_HYPERPARAMETERS, {}), source))


def has_shipped_settings(method: str) -> bool:
    """Returns whether there is a shipped settings file for a method."""
    return _shipped_file(method).is_file()


def _shipped_file(method: str) -> Traversable:
    return resources.files("hrl_policies.zoo").joinpath(_FOLDER, f"{method}.yml")


def _parsed_file(method: str) -> dict[str, Any]:
    if not has_shipped_settings(method):
        raise ValueError(f"there are no hyperparameters for method {method!r}")
    return _parsed(_shipped_file(method).read_text(encoding="utf-8"), f"{method}.yml")


def _shipped(method: str, world: str) -> dict[str, Any]:
    return _content(_parsed_file(method), f"{method}.yml", world)


def _parsed(text: str, source: str) -> dict[str, Any]:
    """Returns what a file says, once its form is known to be right."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds no settings; it may hold {sorted(_KEYS)}")
    unknown = set(content) - _KEYS - {_LIKE, _WORLDS}
    if unknown:
        raise ValueError(
            f"{source} holds unknown keys {sorted(unknown, key=str)}; it may hold {sorted(_KEYS)}"
        )
    for name in (_HYPERPARAMETERS, _SEARCH):
        _need_group(content.get(name, {}), f"{source}: {name}", "settings by name")
    _need_group(content.get(_WORLDS, {}), f"{source}: {_WORLDS}", "settings by environment id")
    for world, section in content.get(_WORLDS, {}).items():
        if not isinstance(section, Mapping) or not set(section) <= _WORLD_KEYS:
            raise ValueError(
                f"{source}: {_WORLDS}: {world} may hold {sorted(_WORLD_KEYS)}, each with its value, got {section!r}"
            )
        _need_group(
            section.get(_HYPERPARAMETERS, {}), f"{source}: {world}: {_HYPERPARAMETERS}", "settings by name"
        )
    return content


def _need_group(group: Any, where: str, what: str) -> None:
    if not isinstance(group, Mapping) or not all(isinstance(key, str) for key in group):
        raise ValueError(f"{where} is a group of {what}, got {group!r}")


def _content(content: dict[str, Any], source: str, world: str) -> dict[str, Any]:
    """Returns the settings for a world: what the file is like, then its own, then what it says of the world."""
    other, there = content.pop(_LIKE, None), content.pop(_WORLDS, {}).get(world, {})
    if other is not None:
        base, own = _shipped(other, world), content.pop(_HYPERPARAMETERS, {})
        search = inherited_search(base.pop(_SEARCH, {}), content.pop(_SEARCH, {}), list(own))
        changed = overridden(base[_HYPERPARAMETERS], own)
        content = base | content | {_HYPERPARAMETERS: changed, _SEARCH: search}
    changed = overridden(content.get(_HYPERPARAMETERS, {}), there.get(_HYPERPARAMETERS, {}))
    return {**content, **there, _HYPERPARAMETERS: changed}


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Turns ``name=value`` texts into hyperparameters; values are YAML, dots go into nested settings.

    Raises:
        ValueError: If a text is not of that form.
    """
    overrides: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"a hyperparameter is given as name=value, got {text!r}")
        try:
            overrides[name.strip()] = _value(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {name.strip()!r} is not valid YAML: {value!r}") from error
    return overrides


def overridden(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with some replaced; ``policy_kwargs.log_std_init`` reaches into ``policy_kwargs``.

    Raises:
        ValueError: If a name reaches into something that is not a group of settings.
    """
    result = dict(settings)
    for name, value in overrides.items():
        first, dot, rest = name.partition(".")
        if not dot:
            result[first] = value
            continue
        inner = result.get(first, {})
        if not isinstance(inner, Mapping):
            raise ValueError(f"{name!r} cannot be set: {first!r} is {inner!r}, not a group of settings")
        result[first] = overridden(inner, {rest: value})
    return result


def _value(text: str) -> Any:
    """Parses YAML; ``1e-3``, which YAML 1.1 takes for text, is a number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
