"""Sessions of a service: who comes when, what each step showed, and how all of it goes on after a stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.adapters import PlayedVecEnv
from kuaifair_env.batch import SessionBatch
from kuaifair_env.checkpoints import START_ANEW, CheckpointFolder, decode, random_states, restore_random_states
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.evaluation import SessionTotals
from kuaifair_env.files import parse_as, whole
from kuaifair_env.simulator import Sessions
from kuaifair_env.world import World


@dataclass(frozen=True)
class ServedStep:
    """What a step of ``B`` concurrent sessions showed, and how users answered.

    Attributes:
        users: ``int64 (B,)``, rows of the users who were shown a slate.
        items: ``int64 (B, K)``, the slates.
        clicks: ``bool (B, K)``.
        feedback: ``float32 (B, K)``.
        steps: ``int64 (B,)``, number of the slate within its session, from 0.
        done: ``bool (B,)``, sessions that the step ended; another one has started in their place.
        live: ``bool (B,)``, sessions that are counted. Others fill up the end of a service and are not to be learned
            from.
        blocks: ``int64 (B,)``, block of the shared deviations of the sessions that were shown a slate. What was learned
            of all users holds for one block alone; blocks are numbered in the order of starting, and all are 0 in
            worlds that are not randomised (:mod:`kuaifair_env.randomisation`).
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: BoolArray
    feedback: FloatArray
    steps: NDArray[np.int64]
    done: BoolArray
    live: BoolArray
    blocks: NDArray[np.int64]


class ServedUsers:
    """Sessions of users who come one after the other, all of them once before any comes again.

    The order of each pass follows from ``order`` and the users' ids. The random numbers of a session follow from seed,
    user and visit, so that orders differ in nothing but the order. Sessions beyond the number that is counted go on
    with the next users and have the number -1.

    Args:
        world: The world of the users.
        users: ``int (U,)`` user rows.
        sessions: How many sessions are counted.
        order: Which order.
        seed: Seed of the sessions' randomness.

    Attributes:
        ids: Raw ids of the users.
        order: Which order.
        seed: Seed of the sessions' randomness.
        started: Sessions handed out so far; may be set to go on with an earlier service.
    """

    def __init__(self, world: World, users: IntArray, sessions: int, order: int, seed: int) -> None:
        self._users = np.asarray(users, np.int64)
        self.ids = world.data.users.ids[self._users]
        self._keys = world.data.users.keys[self._users].astype(np.uint64)
        self._sessions = sessions
        self.order, self.seed = order, seed
        self._order_key, self._seed_key = (
            np.asarray([seeding.stream_key(number)], np.uint64) for number in (order, seed)
        )
        self._passes: dict[int, NDArray[np.int64]] = {}
        self.started = 0

    def __len__(self) -> int:
        return self._sessions

    def next(self, rows: IntArray) -> Sessions:
        """See :class:`~kuaifair_env.simulator.SessionSource`."""
        numbers = self.started + np.arange(len(rows))
        self.started += len(rows)
        visits, places = np.divmod(numbers, len(self._users))
        users = np.concatenate([self._pass(visit)[places[visits == visit]] for visit in np.unique(visits).tolist()])
        keys = seeding.derive(seeding.derive(self._seed_key, users), visits)
        return Sessions(users, keys, np.where(numbers < self._sessions, numbers, -1))

    def _pass(self, visit: int) -> NDArray[np.int64]:
        """Returns the users in the order of their visit of this number; the last two are kept."""
        if visit not in self._passes:
            words = seeding.mix(seeding.derive(self._order_key, visit), self._keys)
            users = self._users[np.argsort(words, kind="stable")]
            self._passes = {number: kept for number, kept in self._passes.items() if number == visit - 1}
            self._passes[visit] = users
        return self._passes[visit]


class Service:
    """Sessions that an agent serves, and what is recorded of them.

    Args:
        env: The environment.
        batch: Its sessions.
        shown: The sessions as the agent may see them.
        source: Where they come from.
        bar: Progress bar of sessions.

    Attributes:
        totals: What was recorded.
        finished: How many counted sessions have ended.
        n_envs: Concurrent sessions.
    """

    def __init__(
        self, env: PlayedVecEnv, batch: SessionBatch, shown: SessionBatch, source: ServedUsers, bar: Any
    ) -> None:
        self.env, self.batch, self.shown, self.source = env, batch, shown, source
        self.totals = SessionTotals([batch], ranking=False)
        self.n_envs = batch.batch_size
        self.finished = 0
        self._bar = bar
        self._checkpoints: CheckpointFolder | None = None
        self._none_over = np.zeros(batch.batch_size, np.bool_)

    @property
    def over(self) -> bool:
        """Whether all sessions that are counted have ended."""
        return self.finished == len(self.source)

    def keep(self, checkpoints: CheckpointFolder, every: int) -> None:
        """Has checkpoints written to a folder, at least so many sessions apart."""
        self._checkpoints, self._every, self._due = checkpoints, every, every

    def checkpoint(self, agent_state: Callable[[], Any], save_agent: Callable[[Path], None]) -> None:
        """Writes a checkpoint if one is due; to be called where no step is half done.

        Args:
            agent_state: Returns numbers and arrays that the agent, or who plays it, needs besides its file.
            save_agent: Writes the agent's file.
        """
        if self._checkpoints is None or self.finished < self._due:
            return
        self._due = self.finished + self._every
        state = {
            "finished": self.finished,
            "started": self.source.started,
            "sessions": self.batch.state(),
            "totals": self.totals.state(),
            "random": random_states(),
            "wrappers": [wrapper.served_state() for wrapper in self.env.learning_wrappers],
            "agent": agent_state(),
        }
        self._checkpoints.write(self.finished, state, save_agent)

    def resume(self, load_agent: Callable[[Path], None], present: Any = None) -> Any:
        """Goes on from the newest checkpoint; returns the agent's state in it, or None if there is none.

        Args:
            load_agent: Reads the agent's file.
            present: The agent's present state; tensors and generators in it are set in place.

        Raises:
            ArtifactError: If the checkpoint is damaged, or another service's.
        """
        stored = None if self._checkpoints is None else self._checkpoints.read()
        if stored is None:
            return None
        encoded, arrays, path = stored
        with whole(path.parent, "checkpoint", START_ANEW):
            state = decode(encoded, arrays, {"agent": present})
            self.source.started = parse_as(int, state["started"])
            self.batch.restore(state["sessions"])
            self.totals.restore(state["totals"])
            for wrapper, of_wrapper in zip(self.env.learning_wrappers, state["wrappers"], strict=True):
                wrapper.restore_served(of_wrapper)
            load_agent(path)
            restore_random_states(state["random"])
            self.finished = parse_as(int, state["finished"])
            agent_state = state["agent"]
        self._due = self.finished + self._every
        self._bar.update(self.finished)
        return agent_state

    def expect_step(self) -> None:
        """Notes the sessions that the next step will show slates to."""
        self._before = self.totals.before_step(self._none_over)
        self._steps = self.batch.simulator.steps.copy()
        self._blocks = self.batch.blocks.copy()

    def record_step(self, done: BoolArray) -> ServedStep:
        """Records the step that was just taken and returns it; ``done (B,)`` says which sessions it ended."""
        ended = self.totals.after_step(self._before, done)
        self.finished += ended
        self._bar.update(ended)
        outcome = self.batch.outcome
        assert outcome is not None
        return ServedStep(
            users=self._before.users,
            items=outcome.items,
            clicks=outcome.clicks,
            feedback=outcome.feedback,
            steps=self._steps,
            done=np.asarray(done, np.bool_),
            live=self._before.listed,
            blocks=self._blocks,
        )
