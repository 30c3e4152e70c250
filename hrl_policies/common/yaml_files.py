"""Reading of YAML files into checked settings: method settings and studies share it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from kuaifair_env.errors import ArtifactError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Loads plain data, refuses a key that is given twice, and reads ``1e-3`` as a number, as YAML 1.2 does."""

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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Returns the plain data of a YAML text; a number such as ``1e-3`` is a float.

    Args:
        text: The text.
        source: Where it comes from, for error messages.

    Raises:
        ArtifactError: If it is not valid YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ArtifactError(f"{source} is not valid YAML: {error}") from error


def read_yaml(path: str | Path) -> Any:
    """Returns the plain data of a YAML file; see :func:`parse_yaml`.

    Raises:
        ArtifactError: If it cannot be read, is not valid YAML, or gives a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def validated(model: type[Model], content: Any, source: str) -> Model:
    """Returns plain data as a pydantic model.

    Args:
        model: The model; ``extra="forbid"`` makes it refuse unknown names.
        content: The data.
        source: Where it comes from, for error messages.

    Raises:
        ArtifactError: If it does not fit; the message holds all mistakes, one a line, and the known names where one is
            unknown.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = validation_problems(error, model)
        text = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n- {line}" for line in lines)
        raise ArtifactError(f"{source}:{text}") from error


def validation_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Returns what is wrong, one line for each mistake; an unknown name comes with the known ones."""
    return [_problem_line(problem, model) for problem in error.errors(include_url=False)]


def _problem_line(problem: ErrorDetails, model: type[BaseModel]) -> str:
    place, kind = problem["loc"], problem["type"]
    if place and place[-1] == "[key]":
        place, kind = place[:-1], "invalid_key"
    where = ".".join(str(part) for part in place)
    given = f", got {problem['input']!r}"
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
