"""Hyperparameters by method and world: from the YAML files beside this module, or a file of the user's own.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hrl_policies.common.yaml_files import parse_yaml, read_yaml, validated
from hrl_policies.zoo.search import SearchSpace, inherited_search, search_space

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_FOLDER = "hyperparameters"
_Noise = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
        attributes = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return attributes | {
            "hyperparameters": dict(self.hyperparameters),
            "search": {name: dimension.as_dict() for name, dimension in self.search.items()},
        }

    def noise_for(self, item_term: str) -> float:
        """Returns the deviation of tastes under an item term (its mode; empty for none)."""
        calibrated = self.calibrated_taste_noise
        return calibrated if item_term == "unbiased" and calibrated is not None else self.taste_noise


class _WorldSection(BaseModel):
    """What a file may say of one world; policy class, noise of tastes and search space belong to the method."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n_envs: Annotated[int, Field(ge=1)] = 64
    total_steps: Annotated[int, Field(ge=0)] = 0
    hyperparameters: dict[str, Any] = {}


class _SettingsFile(_WorldSection):
    """What a settings file holds."""

    like: str | None = None
    policy: str = ""
    taste_noise: _Noise = 0.0
    calibrated_taste_noise: _Noise | None = None
    search: dict[str, Any] = {}
    worlds: dict[str, _WorldSection] = {}


def shipped_settings(name: str, world: str = "") -> MethodSettings:
    """Returns the settings of the shipped file of a method.

    Args:
        name: Name of the method.
        world: Environment id; a world without a section in the file has what all worlds have.

    Raises:
        ValueError: If there is no file for the method, or it is not valid.
    """
    return _settings(_merged(_shipped(name), world), f"{name}.yml")


def read_settings(path: str | Path, world: str = "") -> MethodSettings:
    """Returns the settings in a file of the user's own, such as the ``best.yml`` of ``kuaifair tune``.

    Args:
        path: YAML in the form of the shipped files; ``like`` may name a shipped one.
        world: See :func:`shipped_settings`.

    Raises:
        ValueError: If there is no such file, or it holds something else.
    """
    file = validated(_SettingsFile, read_yaml(path), str(path))
    return _settings(_merged(file, world), str(path))


def worlds_in_shipped_settings(name: str) -> list[str]:
    """Returns the environment ids that the shipped file of a method, or of one that it is like, has sections for.

    Raises:
        ValueError: If there is no file for the method, or it is not valid.
    """
    file = _shipped(name)
    inherited = [] if file.like is None else worlds_in_shipped_settings(file.like)
    return sorted({*inherited, *file.worlds})


def has_shipped_settings(name: str) -> bool:
    """Returns whether there is a shipped settings file for a method."""
    return _path(name).is_file()


def _path(name: str) -> Traversable:
    return resources.files("hrl_policies.zoo").joinpath(_FOLDER, f"{name}.yml")


def _shipped(name: str) -> _SettingsFile:
    if not has_shipped_settings(name):
        raise ValueError(f"there are no hyperparameters for method {name!r}")
    content = parse_yaml(_path(name).read_text(encoding="utf-8"), f"{name}.yml")
    return validated(_SettingsFile, content, f"{name}.yml")


def _merged(file: _SettingsFile, world: str) -> dict[str, Any]:
    """Returns the settings for a world: those of the file that it is like, then its own, then those for the world."""
    own = file.model_dump(exclude_unset=True, exclude={"like", "worlds"})
    changed = own.get("hyperparameters", {})
    if file.like is not None:
        base = _merged(_shipped(file.like), world)
        own["search"] = inherited_search(base["search"], own.get("search", {}), list(changed))
        changed = overridden(base["hyperparameters"], changed)
        own = base | own
    section = file.worlds.get(world, _WorldSection()).model_dump(exclude_unset=True)
    hyperparameters = overridden(changed, section.get("hyperparameters", {}))
    return {"search": {}} | own | section | {"hyperparameters": hyperparameters}


def _settings(content: dict[str, Any], source: str) -> MethodSettings:
    space = search_space(content.pop("search"), content["hyperparameters"], source)
    return MethodSettings(**content, search=space)


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
        overrides[name.strip()] = parse_yaml(value, f"the value {value!r} of {name.strip()!r}")
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
