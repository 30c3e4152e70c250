"""Settings of methods: hyperparameters by world, and where to look for better ones, as data.

Settings come from the YAML files in ``hyperparameters``, from a file of the user's own, or with the method::

    total_steps: 500000
    hyperparameters:
      learning_rate: 0.0007
      n_steps: 16
      n_epochs: 4
      vf_coef: 0.5
      policy_kwargs:
        log_std_init: -1.8
    worlds:
      KuaiFair-Toy-v0:
        total_steps: 100000
        hyperparameters:
          learning_rate: 0.003
    search:
      learning_rate: {log: [0.0001, 0.01]}               # between the two, evenly on a logarithmic scale
      n_steps: {choice: [8, 16, 32]}                     # one of these; anything that YAML can write
      vf_coef: {uniform: [0.1, 1.0]}                     # between the two
      n_epochs: {integer: [1, 8]}                        # a whole number between the two, ends included
      policy_kwargs.log_std_init: {choice: [-2.5, -1.8, -1.0]}

What a section of ``worlds`` does not name is as in all worlds.

The section ``search`` says what may be tuned. Only hyperparameters that the file sets can be searched, and the value
that it sets must lie in the space: the shipped settings are the first trial. Steps and sessions, which are the budget,
cannot be searched, nor can the randomisation of the training world, which is the same for every method.

A file may say ``like: OTHER``, and then holds only what differs from that method's. It inherits OTHER's search space,
except what it sets itself, which is what tells the two methods apart; ``NAME: null`` takes a line out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from hrl_policies.common.yaml_files import parse_yaml, read_yaml, validated, validation_problems
from kuaifair_env.errors import SettingsError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    import optuna


class Interval(BaseModel, frozen=True, strict=True):
    """All numbers between two.

    Attributes:
        low: The least.
        high: The largest.
        log: Whether they are tried evenly on a logarithmic scale.
    """

    low: FiniteFloat
    high: FiniteFloat
    log: bool = False

    @model_validator(mode="after")
    def _need_order(self) -> Interval:
        _check_order(self.low, self.high)
        if self.log and self.low <= 0:
            raise ValueError(f"log needs positive numbers, got {self.low:g}")
        return self

    def suggest(self, trial: optuna.Trial, name: str) -> float:
        """Returns the value that a trial tries."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def contains(self, value: Any) -> bool:
        """Returns whether a value lies in it."""
        return _is_number(value) and self.low <= value <= self.high

    def to_optuna(self, value: Any) -> float:
        """Returns what Optuna calls a value."""
        return float(value)

    def as_dict(self) -> dict[str, Any]:
        """Returns it as settings files write it."""
        return {"log" if self.log else "uniform": [self.low, self.high]}


class Integers(BaseModel, frozen=True, strict=True):
    """All whole numbers between two, ends included.

    Attributes:
        low: The least.
        high: The largest.
    """

    low: int
    high: int

    @model_validator(mode="after")
    def _need_order(self) -> Integers:
        _check_order(self.low, self.high)
        return self

    def suggest(self, trial: optuna.Trial, name: str) -> int:
        """See :class:`Interval`."""
        return trial.suggest_int(name, self.low, self.high)

    def contains(self, value: Any) -> bool:
        """See :class:`Interval`."""
        return _is_number(value) and value == int(value) and self.low <= value <= self.high

    def to_optuna(self, value: Any) -> int:
        """See :class:`Interval`."""
        return int(value)

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Interval`."""
        return {"integer": [self.low, self.high]}


class Choice(BaseModel, frozen=True, strict=True):
    """One of several values.

    Attributes:
        options: The values; lists and groups too.
    """

    options: list[Any] = Field(min_length=2)

    @field_validator("options")
    @classmethod
    def _need_distinct(cls, options: list[Any]) -> list[Any]:
        if any(option in options[:place] for place, option in enumerate(options)):
            raise ValueError(f"choice holds a value twice: {options!r}")
        return options

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """See :class:`Interval`."""
        labels = [self.to_optuna(option) for option in self.options]
        return self.options[labels.index(trial.suggest_categorical(name, labels))]

    def contains(self, value: Any) -> bool:
        """See :class:`Interval`."""
        return value in self.options

    def to_optuna(self, value: Any) -> Any:
        """See :class:`Interval`; lists and groups go by their JSON, for Optuna keeps plain values only."""
        return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Interval`."""
        return {"choice": list(self.options)}


Dimension = Interval | Integers | Choice
"""Where to look for one hyperparameter."""

SearchSpace = Mapping[str, Dimension]


def search_space(content: Mapping[str, Any], hyperparameters: Mapping[str, Any], source: str) -> SearchSpace:
    """Reads a ``search`` section; see the module for its form.

    Args:
        content: The section, as YAML gives it.
        hyperparameters: The shipped ones.
        source: Where it stands, for error messages.

    Raises:
        SettingsError: If a line is not of that form, names no shipped hyperparameter, or leaves out its shipped value;
            the message holds all such lines.
    """
    problems = [
        f"{source}: search of {name!r}: {problem}"
        for name, line in content.items()
        for problem in _line_problems(line, hyperparameters, name)
    ]
    if problems:
        raise SettingsError("\n".join(problems))
    return {name: _dimension(line) for name, line in content.items()}


def _line_problems(line: Any, hyperparameters: Mapping[str, Any], name: str) -> list[str]:
    try:
        dimension = _dimension(line)
        value = setting(hyperparameters, name)
    except ValidationError as error:
        return validation_problems(error, Interval)
    except ValueError as error:
        return [str(error)]
    if dimension.contains(value):
        return []
    return [f"leaves out the shipped value {value!r}, which is the first trial"]


def inherited_search(base: Mapping[str, Any], own: Mapping[str, Any], changed: Sequence[str]) -> dict[str, Any]:
    """Returns the section of a file that is ``like`` another.

    Args:
        base: The other's section.
        own: The file's own section.
        changed: Hyperparameters that the file sets itself.
    """
    inherited = {
        name: line
        for name, line in base.items()
        if not any(f"{name}.".startswith(f"{fixed}.") or f"{fixed}.".startswith(f"{name}.") for fixed in changed)
    }
    return {name: line for name, line in (inherited | dict(own)).items() if line is not None}


def setting(hyperparameters: Mapping[str, Any], name: str) -> Any:
    """Returns a hyperparameter by its (dotted) name.

    Raises:
        ValueError: If there is none.
    """
    value: Any = hyperparameters
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError("hyperparameters holds no such setting; add its default there")
        value = value[part]
    return value


def _dimension(line: Any) -> Dimension:
    match line if isinstance(line, Mapping) and len(line) == 1 else None:
        case {"log": [low, high]}:
            return Interval(low=low, high=high, log=True)
        case {"uniform": [low, high]}:
            return Interval(low=low, high=high)
        case {"integer": [low, high]}:
            return Integers(low=low, high=high)
        case {"choice": [*options]}:
            return Choice(options=options)
    raise ValueError(
        f"must be {{KIND: [low, high]}} with KIND log, uniform or integer, or {{choice: [...]}}, got {line!r}"
    )


def _check_order(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"needs [low, high] with low < high, got [{low:g}, {high:g}]")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class MethodSettings:
    """How a method is trained unless told otherwise.

    Attributes:
        policy: Name of the policy class.
        n_envs: Concurrent training sessions.
        total_steps: Training steps, counted over all sessions (one slate shown is one step).
        hyperparameters: Arguments of the algorithm.
        search: Where to look for better ones; see the module. Empty if nobody said.
    """

    policy: str = "MlpPolicy"
    n_envs: int = 64
    total_steps: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    search: SearchSpace = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns what a settings file holds."""
        attributes = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return attributes | {
            "hyperparameters": dict(self.hyperparameters),
            "search": {name: dimension.as_dict() for name, dimension in self.search.items()},
        }


def read_settings(path: str | Path, world: str = "") -> MethodSettings:
    """Returns the settings in a file of the user's own, such as the ``best.yml`` of ``kuaifair tune``.

    Args:
        path: YAML in the form of the shipped files; ``like`` may name a shipped one.
        world: Environment id; a world without a section in the file has what all worlds have.

    Raises:
        ValueError: If there is no such file, or it holds something else.
    """
    file = validated(_SettingsFile, read_yaml(path), str(path))
    return _settings(_merged(file, world), str(path))


def shipped_settings(name: str, world: str = "") -> MethodSettings:
    """Returns the settings in the shipped file of a method; arguments and errors as :func:`read_settings`."""
    return _settings(_merged(_shipped(name), world), f"{name}.yml")


def shipped_worlds(name: str) -> list[str]:
    """Returns the environment ids for which the shipped file of a method has settings of their own."""
    file = _shipped(name)
    inherited = [] if file.like is None else shipped_worlds(file.like)
    return sorted({*inherited, *file.worlds})


class _WorldSection(BaseModel):
    """What a file may say of one world; policy class and search space belong to the method."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n_envs: Annotated[int, Field(ge=1)] = 64
    total_steps: Annotated[int, Field(ge=0)] = 0
    hyperparameters: dict[str, Any] = {}


class _SettingsFile(_WorldSection):
    like: str | None = None
    policy: str = ""
    search: dict[str, Any] = {}
    worlds: dict[str, _WorldSection] = {}


def shipped_file(name: str) -> Traversable:
    """Returns where the settings file of a shipped method is, whether there is one or not."""
    return resources.files("hrl_policies.zoo").joinpath("hyperparameters", f"{name}.yml")


@cache  # a study asks for the same file once per run
def _shipped(name: str) -> _SettingsFile:
    if not shipped_file(name).is_file():
        raise ValueError(f"there are no hyperparameters for method {name!r}")
    content = parse_yaml(shipped_file(name).read_text(encoding="utf-8"), f"{name}.yml")
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
        ValueError: If a text is not of that form, or a name is given twice.
    """
    overrides: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"a hyperparameter is given as name=value, got {text!r}")
        if name.strip() in overrides:
            raise ValueError(f"the hyperparameter {name.strip()} is given twice")
        overrides[name.strip()] = parse_yaml(value, f"the value {value!r} of {name.strip()!r}")
    return overrides


_LEAST: dict[str, float] = {
    **dict.fromkeys(("batch_size", "buffer_size", "n_epochs", "n_steps"), 1),
    **dict.fromkeys(("clip_range", "gae_lambda", "gamma", "learning_rate", "learning_starts", "tau"), 0),
    **dict.fromkeys(("max_grad_norm", "vf_coef"), 0),
}
_MOST: dict[str, float] = {**dict.fromkeys(("gae_lambda", "gamma", "tau"), 1), "learning_rate": 10}


def check_hyperparameters(hyperparameters: Mapping[str, Any]) -> None:
    """Checks numbers that algorithms take and that no training can use, such as a ``gamma`` of 5.

    Raises:
        ValueError: If one is no number where there has to be one, or out of range.
    """
    for name, least in _LEAST.items():
        value, most = hyperparameters.get(name, least), _MOST.get(name, math.inf)
        if isinstance(value, str) or (isinstance(value, int | float) and not least <= value <= most):
            limits = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
            raise ValueError(f"{name} must be a number {limits}, got {value!r}")


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
