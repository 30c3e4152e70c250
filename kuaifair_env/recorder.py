"""Keeps what happened in one session, so that it can be drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from kuaifair_env.leave import CategoryBoredom, LeaveRule, TemperFairness
from kuaifair_env.rendering import SessionTrace, render_ansi, render_rgb
from kuaifair_env.sessions import Outcome, SessionSimulator
from kuaifair_env.worlds import World


class SessionRecorder:
    """Collects the steps of the session in row 0 of a simulator.

    Args:
        world: For ids and popularity groups.
        rule: The leave rule, for the reason of leaving.

    Attributes:
        started: Whether there is a session.
    """

    def __init__(self, world: World, rule: LeaveRule) -> None:
        self._world = world
        self._rule = rule
        self._outcomes: list[Outcome] = []
        self._user_id = 0
        self._max_len = 0
        self._slate_size = 0
        self._start_temper = 0.0
        self.started = False

    def start(self, simulator: SessionSimulator) -> None:
        """Forgets the last session and begins with the simulator's current one."""
        self._outcomes = []
        self._user_id = int(self._world.data.users.ids[simulator.users[0]])
        self._max_len = simulator.max_len
        self._slate_size = simulator.slate_size
        self._start_temper = float(simulator.temper[0])
        self.started = True

    def add(self, outcome: Outcome) -> None:
        """Notes one step."""
        self._outcomes.append(outcome)

    def trace(self) -> SessionTrace:
        """Returns the session so far."""
        items = self._stack("items").reshape(-1, self._slate_size).astype(np.int64)
        return SessionTrace(
            items=items,
            popular=self._world.groups.popular[items],
            clicks=self._stack("clicks").reshape(-1, self._slate_size).astype(np.bool_),
            rewards=self._stack("reward"),
            tempers=np.concatenate([[self._start_temper], self._stack("temper")]),
            popular_shares=self._stack("popular_share"),
            violations=self._stack("violation").astype(np.bool_),
            user_id=self._user_id,
            max_len=self._max_len,
            leave_reason=self._leave_reason(),
            item_ids=self._world.item_ids,
            leave_below=1.0 if isinstance(self._rule, TemperFairness) else None,
        )

    def text(self) -> str:
        """Returns the session so far as text."""
        return render_ansi(self.trace())

    def picture(self) -> Any:
        """Returns the session so far as a picture, ``uint8 (height, width, 3)``."""
        return render_rgb(self.trace())

    def _stack(self, name: str) -> Any:
        return np.asarray([getattr(outcome, name)[0] for outcome in self._outcomes])

    def _leave_reason(self) -> str | None:
        if not self._outcomes or not self._outcomes[-1].done[0]:
            return None
        if self._outcomes[-1].truncated[0]:
            return "max_len reached"
        if isinstance(self._rule, TemperFairness):
            return "lost patience"
        return "bored by repetition" if isinstance(self._rule, CategoryBoredom) else "left"
