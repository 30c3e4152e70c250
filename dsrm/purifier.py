"""What a state purifier is: the one protocol behind which every purifier and every control stands."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium import spaces

from kuaifair_env.data.schema import FloatArray
from kuaifair_env.errors import KuaiFairError
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.worlds import World


class MismatchError(KuaiFairError, ValueError):
    """A purifier or encoder was made for another world: other data, catalogue or embeddings."""


@runtime_checkable
class StatePurifier(Protocol):
    """Turns observed states ``s~`` into purified states ``s^`` (the paper's ``Pi_theta``).

    Purifying is a pure function of one row: the same state and window give the same purified state in any batch,
    process and order. A purifier that draws random numbers keys them by its seed and the bytes of the state.
    """

    def bind(self, world: World) -> spaces.Box:
        """Checks that the purifier fits a world, and returns the space of purified states.

        Args:
            world: Whose states are to be purified.

        Raises:
            MismatchError: If the purifier was made for another dimension, catalogue or data set.
        """
        ...

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """Returns the purified states.

        Args:
            states: ``float32 (B, d)``, observed states ``s~_t``.
            window: The windows of items and feedback behind them.

        Returns:
            ``float32 (B, d_out)``, within the space that :meth:`bind` returned.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Returns kind, configuration and provenance, JSON-able."""
        ...


def state_space(bound: float, dimension: int) -> spaces.Box:
    """Returns the space of states whose components lie within ``[-bound, bound]``."""
    return spaces.Box(-float(bound), float(bound), (dimension,), np.float32)
