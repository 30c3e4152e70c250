"""What may be tuned: search spaces as data, in the ``search`` section of a method's settings file.

Each line names a hyperparameter, with dots into groups, and says where to look for it::

    hyperparameters:
      learning_rate: 0.0007
      n_steps: 16
      n_epochs: 4
      vf_coef: 0.5
      policy_kwargs:
        log_std_init: -1.8
    search:
      learning_rate: {log: [0.0001, 0.01]}               # between the two, evenly on a logarithmic scale
      n_steps: {choice: [8, 16, 32]}                     # one of these; anything that YAML can write
      vf_coef: {uniform: [0.1, 1.0]}                     # between the two
      n_epochs: {integer: [1, 8]}                        # a whole number between the two, ends included
      policy_kwargs.log_std_init: {choice: [-2.5, -1.8, -1.0]}

Only hyperparameters that the file sets can be searched, and the value that it sets must lie in the space: the shipped
settings are the first trial. Steps, sessions and the taste noise of training users cannot be searched: the first two
are the budget, and the last is there for worlds other than the one in which validation users are evaluated.

A file with ``like: OTHER`` inherits OTHER's space, except what it sets itself, which is what tells the two methods
apart; ``NAME: null`` takes a line out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from hrl_policies.common.yaml_files import validation_problems
from kuaifair_env.errors import ArtifactError

if TYPE_CHECKING:
    import optuna


class Dimension(BaseModel):
    """Where to look for one hyperparameter."""

    model_config = ConfigDict(frozen=True, strict=True)

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Returns the value that a trial tries."""
        raise NotImplementedError

    def contains(self, value: Any) -> bool:
        """Returns whether a value lies in it."""
        raise NotImplementedError

    def to_optuna(self, value: Any) -> Any:
        """Returns what Optuna calls a value."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Returns it as settings files write it."""
        raise NotImplementedError


class Interval(Dimension):
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
        """See :class:`Dimension`."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def contains(self, value: Any) -> bool:
        """See :class:`Dimension`."""
        return _is_number(value) and self.low <= value <= self.high

    def to_optuna(self, value: Any) -> float:
        """See :class:`Dimension`."""
        return float(value)

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Dimension`."""
        return {"log" if self.log else "uniform": [self.low, self.high]}


class Integers(Dimension):
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
        """See :class:`Dimension`."""
        return trial.suggest_int(name, self.low, self.high)

    def contains(self, value: Any) -> bool:
        """See :class:`Dimension`."""
        return _is_number(value) and value == int(value) and self.low <= value <= self.high

    def to_optuna(self, value: Any) -> int:
        """See :class:`Dimension`."""
        return int(value)

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Dimension`."""
        return {"integer": [self.low, self.high]}


class Choice(Dimension):
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
        """See :class:`Dimension`."""
        labels = [self.to_optuna(option) for option in self.options]
        return self.options[labels.index(trial.suggest_categorical(name, labels))]

    def contains(self, value: Any) -> bool:
        """See :class:`Dimension`."""
        return value in self.options

    def to_optuna(self, value: Any) -> Any:
        """See :class:`Dimension`; lists and groups go by their JSON, for Optuna keeps plain values only."""
        return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Dimension`."""
        return {"choice": list(self.options)}


SearchSpace = Mapping[str, Dimension]


def search_space(content: Mapping[str, Any], hyperparameters: Mapping[str, Any], source: str) -> SearchSpace:
    """Reads a ``search`` section; see the module for its form.

    Args:
        content: The section, as YAML gives it.
        hyperparameters: The shipped ones.
        source: Where it stands, for error messages.

    Raises:
        ArtifactError: If a line is not of that form, names no shipped hyperparameter, or leaves out its shipped value;
            the message holds all such lines.
    """
    problems = [
        f"{source}: search of {name!r}: {problem}"
        for name, line in content.items()
        for problem in _line_problems(line, hyperparameters, name)
    ]
    if problems:
        raise ArtifactError("\n".join(problems))
    return {name: _dimension(line) for name, line in content.items()}


def _line_problems(line: Any, hyperparameters: Mapping[str, Any], name: str) -> list[str]:
    try:
        dimension = _dimension(line)
        value = setting(hyperparameters, name)
    except ValidationError as error:
        return validation_problems(error, Dimension)
    except ValueError as error:
        return [str(error)]
    if dimension.contains(value):
        return []
    return [f"leaves out the shipped value {value!r}, which is the first trial"]


def inherited_search(
    base: Mapping[str, Any], own: Mapping[str, Any], changed: Sequence[str]
) -> dict[str, Any]:
    """Returns the section of a file that is ``like`` another.

    Args:
        base: The other's section.
        own: The file's own section.
        changed: Hyperparameters that the file sets itself.
    """
    inherited = {
        name: line
        for name, line in base.items()
        if not any(
            f"{name}.".startswith(f"{fixed}.") or f"{fixed}.".startswith(f"{name}.") for fixed in changed
        )
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
