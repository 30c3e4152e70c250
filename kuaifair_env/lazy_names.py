"""Public names of a package that are imported when they are first used, because their modules need slow libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns ``__getattr__`` and ``__dir__`` of a package some of whose names are imported on first use.

    Type checkers do not run this: the package imports the same names under ``TYPE_CHECKING``.

    Args:
        package: Name of the package.
        homes: Public names by the module that holds them.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get_name(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home_of[name]), name)

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return get_name, list_names
