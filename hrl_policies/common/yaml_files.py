"""Reading of YAML files into checked settings: method settings and studies share it."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from kuaifair_env.errors import SettingsError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)


_MAX_SHOWN = 200
"""Letters of a value that a message shows."""
_MAX_ENTRIES = 1_000_000
"""Entries of a file, those that aliases repeat included: a few lines of aliases of aliases stand for billions."""


class _Loader(yaml.SafeLoader):
    """Loads plain data and reads ``1e-3`` as a number, as YAML 1.2 does.

    It refuses a key that is given twice, numbers that are not finite, and aliases that repeat too much.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _entries(node, {}) > _MAX_ENTRIES:
            problem = f"it holds more than {_MAX_ENTRIES:,} entries, counting what its aliases repeat"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is not a finite number", problem_mark=node.start_mark)
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark)
            keys.add((key.tag, key.value))
        return node


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def _entries(node: yaml.Node, counted: dict[int, int]) -> int:
    """Returns how many nodes a node stands for; ``counted`` holds those that were counted, by identity."""
    if id(node) not in counted:
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = itertools.chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
        counted[id(node)] = 1 + sum(_entries(part, counted) for part in parts)
    return counted[id(node)]


def parse_yaml(text: str, source: str) -> Any:
    """Returns the plain data of a YAML text; a number such as ``1e-3`` is a float.

    Args:
        text: The text.
        source: Where it comes from, for error messages.

    Raises:
        SettingsError: If it is not valid YAML, gives a key twice, or holds numbers that are not finite.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise SettingsError(f"{source} is not valid YAML{where}: {error.problem or error.context}") from error
    except RecursionError as error:
        raise SettingsError(f"{source} is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path) -> Any:
    """Returns the plain data of a YAML file; see :func:`parse_yaml`.

    Raises:
        SettingsError: If it cannot be read, is not valid YAML, or gives a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def validated(model: type[Model], content: Any, source: str) -> Model:
    """Returns plain data as a pydantic model.

    Args:
        model: The model; ``extra="forbid"`` makes it refuse unknown names.
        content: The data.
        source: Where it comes from, for error messages.

    Raises:
        SettingsError: If it does not fit; the message holds all mistakes, one a line, and the known names where one is
            unknown.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = validation_problems(error, model)
        text = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n- {line}" for line in lines)
        raise SettingsError(f"{source}:{text}") from error


def validation_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Returns what is wrong, one line for each mistake; an unknown name comes with the known ones."""
    return [_problem_line(problem, model) for problem in error.errors(include_url=False)]


def _problem_line(problem: ErrorDetails, model: type[BaseModel]) -> str:
    place, kind = problem["loc"], problem["type"]
    if place and place[-1] == "[key]":
        place, kind = place[:-1], "invalid_key"
    where = ".".join(str(part) for part in place)
    given = f", got {textwrap.shorten(repr(problem['input']), _MAX_SHOWN)}"
    if kind == "extra_forbidden":
        return f"{where} is unknown; there are {', '.join(_names_at(model, place[:-1]))}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "invalid_key":
        return f"{where} must be a name"
    if kind in ("dict_type", "model_type"):
        return f"{where} must be a group of settings by name{given}".lstrip()
    if kind == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return f"{where} {problem['msg'].replace('Input should be', 'must be')}{given}".lstrip()


def _names_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Returns the fields of the model that a place leads to; keys of mappings and places in lists are passed over."""
    for part in place:
        field = model.model_fields.get(str(part))
        inner = None if field is None else _inner_model(field.annotation)
        model = model if inner is None else inner
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for inner in map(_inner_model, get_args(annotation)) if inner is not None), None)
