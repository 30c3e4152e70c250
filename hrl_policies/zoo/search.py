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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

SEARCH_KINDS = ("log", "uniform", "integer", "choice")


class Trial(Protocol):
    """The part of Optuna's trial that asks for values."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Returns a number between two."""
        ...

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Returns a whole number between two, ends included."""
        ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Returns one of several values."""
        ...


class Dimension(Protocol):
    """Where to look for one hyperparameter."""

    def suggest(self, trial: Trial, name: str) -> Any:
        """Returns the value that a trial tries."""
        ...

    def holds(self, value: Any) -> bool:
        """Returns whether a value lies in it."""
        ...

    def asked(self, value: Any) -> Any:
        """Returns what Optuna calls a value."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Returns it as settings files write it."""
        ...


@dataclass(frozen=True)
class Interval:
    """All numbers between two.

    Attributes:
        low: The least.
        high: The largest.
        log: Whether they are tried evenly on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: Trial, name: str) -> float:
        """See :class:`Dimension`."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """See :class:`Dimension`."""
        return _is_number(value) and self.low <= value <= self.high

    def asked(self, value: Any) -> float:
        """See :class:`Dimension`."""
        return float(value)

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Dimension`."""
        return {"log" if self.log else "uniform": [self.low, self.high]}


@dataclass(frozen=True)
class Integers:
    """All whole numbers between two, ends included.

    Attributes:
        low: The least.
        high: The largest.
    """

    low: int
    high: int

    def suggest(self, trial: Trial, name: str) -> int:
        """See :class:`Dimension`."""
        return trial.suggest_int(name, self.low, self.high)

    def holds(self, value: Any) -> bool:
        """See :class:`Dimension`."""
        return _is_number(value) and value == int(value) and self.low <= value <= self.high

    def asked(self, value: Any) -> int:
        """See :class:`Dimension`."""
        return int(value)

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Dimension`."""
        return {"integer": [self.low, self.high]}


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Attributes:
        options: The values; lists and groups too.
    """

    options: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        """See :class:`Dimension`."""
        labels = [self.asked(option) for option in self.options]
        return self.options[labels.index(trial.suggest_categorical(name, labels))]

    def holds(self, value: Any) -> bool:
        """See :class:`Dimension`."""
        return value in self.options

    def asked(self, value: Any) -> Any:
        """See :class:`Dimension`; lists and groups go by their JSON, for Optuna keeps plain values only."""
        return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Dimension`."""
        return {"choice": list(self.options)}


SearchSpace = Mapping[str, Dimension]


def search_space(content: Any, hyperparameters: Mapping[str, Any], source: str) -> dict[str, Dimension]:
    """Reads a ``search`` section; see the module for its form.

    Args:
        content: The section, as YAML gives it.
        hyperparameters: The shipped ones.
        source: Where it stands, for error messages.

    Raises:
        ValueError: If a line is not of that form, names no shipped hyperparameter, or leaves out its shipped value.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: search is a group of lines NAME: {{KIND: [...]}}, got {content!r}")
    space = {str(name): _dimension(f"{source}: search of {name!r}", line) for name, line in content.items()}
    for name, dimension in space.items():
        value = setting(hyperparameters, name, source)
        if not dimension.holds(value):
            raise ValueError(
                f"{source}: search of {name!r} leaves out the shipped value {value!r}, which is the first trial"
            )
    return space


def inherited_search(
    base: Mapping[str, Any], own: Mapping[str, Any], changed: Sequence[str]
) -> dict[str, Any]:
    """Returns the section of a file that is ``like`` another.

    Args:
        base: The other's section.
        own: The file's own section.
        changed: Hyperparameters that the file sets itself.
    """
    kept = {
        name: line
        for name, line in base.items()
        if not any(
            f"{name}.".startswith(f"{fixed}.") or f"{fixed}.".startswith(f"{name}.") for fixed in changed
        )
    }
    return {name: line for name, line in (kept | dict(own)).items() if line is not None}


def setting(hyperparameters: Mapping[str, Any], name: str, source: str) -> Any:
    """Returns a hyperparameter by its (dotted) name.

    Raises:
        ValueError: If there is none.
    """
    value: Any = hyperparameters
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(
                f"{source}: search names {name!r}, but hyperparameters holds no such setting; add its default there"
            )
        value = value[part]
    return value


def _dimension(where: str, line: Any) -> Dimension:
    if not isinstance(line, Mapping) or len(line) != 1 or next(iter(line)) not in SEARCH_KINDS:
        raise ValueError(f"{where} must be one of {', '.join(SEARCH_KINDS)} and its values, got {line!r}")
    kind, values = next(iter(line.items()))
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{where}: {kind} needs a list of at least two values, got {values!r}")
    if kind == "choice":
        options = tuple(_plain(value) for value in values)
        if any(option in options[:place] for place, option in enumerate(options)):
            raise ValueError(f"{where}: choice holds a value twice: {values!r}")
        return Choice(options)
    ends = [_number(where, value) for value in values]
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError(f"{where}: {kind} needs [low, high] with low < high, got {values!r}")
    if kind == "log" and ends[0] <= 0:
        raise ValueError(f"{where}: log needs positive numbers, got {values!r}")
    if kind == "integer":
        if any(end != int(end) for end in ends):
            raise ValueError(f"{where}: integer needs whole numbers, got {values!r}")
        return Integers(int(ends[0]), int(ends[1]))
    return Interval(ends[0], ends[1], log=kind == "log")


def _number(where: str, value: Any) -> float:
    """Returns a finite number; ``1e-4``, which YAML 1.1 takes for text, is one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} needs finite numbers, got {value!r}")
    return number


def _plain(value: Any) -> Any:
    """Returns a value of YAML, with numbers such as ``1e-4`` read as numbers."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
