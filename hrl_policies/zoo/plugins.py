"""Methods from other packages: entry points of the group ``kuaifair.methods``.

A package says in its ``pyproject.toml``::

    [project.entry-points."kuaifair.methods"]
    my-agent = "my_package.kuaifair_methods"

Importing that module must register the methods (:func:`hrl_policies.zoo.register_method`). It happens when somebody
asks for a name that the zoo does not have, or for all of them; never for ``kuaifair train --method a2c``. The value may
also be ``module:object``.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from importlib import metadata
from typing import Any

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
