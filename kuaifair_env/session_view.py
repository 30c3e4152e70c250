"""Single sessions of a batched environment, as the vector interfaces show them, and what cannot be set there."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NoReturn, Protocol

import numpy as np

from kuaifair_env.batch import SessionBatch, SessionConfig
from kuaifair_env.data.schema import BoolArray, raw_id
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

SETTINGS = frozenset(field.name for field in fields(SessionConfig))
"""Settings of sessions, fixed when an environment is made."""


class HasSessions(Protocol):
    """A batched environment.

    Attributes:
        world: The world of its sessions.
        config: Their settings.
        batch: The sessions.
    """

    world: World
    config: SessionConfig
    batch: SessionBatch


class SessionView:
    """One session of a batched environment, for ``get_attr``, ``env_method`` and ``call``.

    It has the attributes that a single :class:`~kuaifair_env.env.KuaiFairEnv` has.

    Args:
        env: The environment.
        row: Which of its sessions.
    """

    def __init__(self, env: HasSessions, row: int) -> None:
        self._env = env
        self._row = row
        self.action_space = env.batch.action_space
        self.observation_space = env.batch.observation_space
        self.render_mode: str | None = None
        self.spec = None

    @property
    def world(self) -> World:
        """The world of the sessions."""
        return self._env.world

    @property
    def config(self) -> SessionConfig:
        """Their settings."""
        return self._env.config

    @property
    def user_id(self) -> int | str:
        """Raw id of the current user."""
        return raw_id(self._env.batch.user_ids[self._row])

    @property
    def temper(self) -> float:
        """The current user's patience."""
        return float(self._env.batch.simulator.temper[self._row])

    @property
    def finished_window(self) -> HistoryWindow | None:
        """What the user saw (see :meth:`history_window`) if the last step ended the session, else None."""
        batch = self._env.batch
        place = np.flatnonzero(batch.finished == self._row)
        return None if batch.finished_window is None or not len(place) else batch.finished_window.take(place)

    def history_window(self, length: int | None = None) -> HistoryWindow:
        """Returns what the user saw; see ``KuaiFairEnv.history_window``."""
        return self._env.batch.simulator.history(np.asarray([self._row]), length)

    def action_masks(self) -> BoolArray:
        """Returns the items that may be shown now, as sb3-contrib's ``MaskablePPO`` expects them."""
        return self._env.batch.action_mask(self._row)


class FixedSettings:
    """Base class of environments and wrappers that refuse to assign to a setting, which would have no effect."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            refuse_to_set(name)
        super().__setattr__(name, value)


def refuse_to_set(name: str) -> NoReturn:
    """Refuses to set an attribute of an environment that would have no effect.

    Raises:
        AttributeError: Always; says what to do instead.
    """
    if name in SETTINGS:
        raise AttributeError(
            f"{name!r} is fixed when an environment is made, setting it has no effect; make another one with {name}=..."
        )
    raise AttributeError(
        f"{name!r} is nothing that can be set in KuaiFair environments; settings of worlds and sessions are given to "
        "gym.make(...), gym.make_vec(...) or kuaifair_env.make_sb3(...)"
    )
