"""Session dynamics for a whole batch at once, all in :class:`SessionSimulator`.

:meth:`SessionSimulator.step` shows slates, draws feedback from the response model, appends both to the histories and
updates the leave rule (:mod:`kuaifair_env.abandonment`), which decrements temper and decides who leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.abandonment import LeaveRule
from kuaifair_env.checkpoints import plain_attributes, set_attributes
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.drift import TasteDrift
from kuaifair_env.histories import SessionHistories
from kuaifair_env.pooling import RunningClicks
from kuaifair_env.randomisation import SessionRandomisation
from kuaifair_env.response.base import History, HistoryWindow, ResponseModel, session_memory
from kuaifair_env.response.logged import UserItems
from kuaifair_env.world import World

InitialHistory = Literal["log", "empty"]
Repeats = Literal["allow", "forbid"]
RewardForm = Literal["mean", "sum"]
"""``"mean"``: mean feedback over the slate, the paper's ``r_t``; ``"sum"``: its sum, ``K`` times as much."""

_ONE = np.asarray(1)
_USER_DRAW = np.zeros(1, np.uint64)
_SESSIONS_AHEAD = 16


class Sessions(NamedTuple):
    """Which sessions to start.

    Attributes:
        users: ``int64 (n,)`` user rows.
        keys: ``uint64 (n,)`` stream keys; all randomness of a session follows from its key.
        numbers: ``int64 (n,)`` position in the source's list, or -1 where the source has none.
    """

    users: NDArray[np.int64]
    keys: seeding.Keys
    numbers: NDArray[np.int64]


class SessionSource(Protocol):
    """Decides which user starts the next session of a row, and with which random numbers."""

    def next(self, rows: IntArray) -> Sessions:
        """Returns one session for each of the given rows of the batch."""
        ...


class RandomUsers:
    """Each row of the batch is an endless, reproducible stream of uniformly drawn users.

    Args:
        users: ``int (U,)`` user rows to draw from.
        keys: ``uint64 (B,)`` stream key of each row.
    """

    def __init__(self, users: IntArray, keys: seeding.Keys) -> None:
        self._users = np.asarray(users, np.int64)
        self._keys = keys.copy()
        self._started = np.zeros(len(keys), np.int64)
        # The next sessions of each row, drawn for all rows at a time, and how many of them each row has started.
        shape = len(keys), _SESSIONS_AHEAD
        self._users_ahead, self._keys_ahead = np.zeros(shape, np.int64), np.zeros(shape, np.uint64)
        self._used = np.full(len(keys), _SESSIONS_AHEAD)

    def reseed(self, rows: IntArray, keys: seeding.Keys) -> None:
        """Starts the streams of the given rows afresh, with ``uint64 (len(rows),)`` keys; the others go on."""
        self._keys[rows] = keys
        self._started[rows] = 0
        self._used[rows] = _SESSIONS_AHEAD

    def next(self, rows: IntArray) -> Sessions:
        """See :class:`SessionSource`."""
        used = self._used.take(rows)
        if np.count_nonzero(used == _SESSIONS_AHEAD):
            self._draw_ahead()
            used = self._used.take(rows)
        self._used[rows] = used + _ONE
        self._started[rows] += _ONE
        places = rows * _SESSIONS_AHEAD + used
        return Sessions(self._users_ahead.take(places), self._keys_ahead.take(places), np.full(len(rows), -1))

    def _draw_ahead(self) -> None:
        """Draws the sessions that follow those that each row has started."""
        numbers = self._started[:, None] + np.arange(_SESSIONS_AHEAD)
        self._keys_ahead = seeding.derive(self._keys[:, None], numbers)
        draws = seeding.uniforms(self._keys_ahead, _USER_DRAW)
        self._users_ahead = self._users[(draws * len(self._users)).astype(np.int64)]
        self._used[:] = 0


class FixedSessions:
    """A given list of sessions, handed out in order, for evaluation on the same users and the same random numbers.

    When the list is exhausted its last session is repeated with number -1, so that a batch can run out.

    Args:
        users: ``int (n,)`` user rows.
        keys: ``uint64 (n,)`` stream keys.
    """

    def __init__(self, users: IntArray, keys: seeding.Keys) -> None:
        if len(users) == 0 or len(users) != len(keys):
            raise ValueError(f"need one key for each of at least one user, got {len(users)} and {len(keys)}")
        self._users = np.asarray(users, np.int64)
        self._keys = np.asarray(keys, np.uint64)
        self._started = 0

    @classmethod
    def of_users(cls, users: IntArray, episodes_per_user: int, seed: int) -> FixedSessions:
        """Returns ``episodes_per_user`` sessions of each user; keys follow from seed, user and episode."""
        if episodes_per_user < 1:
            raise ValueError(f"episodes_per_user must be at least 1, got {episodes_per_user}")
        repeated = np.repeat(np.asarray(users, np.int64), episodes_per_user)
        episodes = np.tile(np.arange(episodes_per_user), len(users))
        of_user = seeding.derive(np.asarray([seeding.stream_key(seed)], np.uint64), repeated)
        return cls(repeated, seeding.derive(of_user, episodes))

    def __len__(self) -> int:
        return len(self._users)

    def next(self, rows: IntArray) -> Sessions:
        """See :class:`SessionSource`."""
        numbers = self._started + np.arange(len(rows))
        self._started += len(rows)
        last = len(self._users) - 1
        places = np.minimum(numbers, last)
        return Sessions(self._users[places], self._keys[places], np.where(numbers > last, -1, numbers))


class Outcome(NamedTuple):
    """What one step did to each of ``B`` sessions.

    Attributes:
        items: ``int64 (B, K)``, what was shown.
        feedback: ``float32 (B, K)``, realised feedback (0 or 1 for clicks).
        clicks: ``bool (B, K)``.
        reward: ``float64 (B,)``, mean feedback over the slate, ``r_t``, or its sum.
        popular_share: ``float64 (B,)``, share of popular items in the slate, ``p_t``.
        disparity: ``float64 (B,)``, what the leave rule evaluated, ``u_t``.
        violation: ``bool (B,)``, whether the leave rule was violated.
        temper: ``float64 (B,)``, patience left.
        terminated: ``bool (B,)``, the user left.
        truncated: ``bool (B,)``, the session reached ``max_len``, or too few of the user's own candidates are left for
            a slate, and the user had not left.
    """

    items: NDArray[np.int64]
    feedback: FloatArray
    clicks: BoolArray
    reward: NDArray[np.float64]
    popular_share: NDArray[np.float64]
    disparity: NDArray[np.float64]
    violation: BoolArray
    temper: NDArray[np.float64]
    terminated: BoolArray
    truncated: BoolArray

    @property
    def done(self) -> BoolArray:
        """``bool (B,)``, whether the session is over."""
        return self.terminated | self.truncated

    @property
    def mean_feedback(self) -> NDArray[np.float64]:
        """``float64 (B,)``, mean feedback over the slate, on which leave rules go, whatever the form of the reward."""
        mean: NDArray[np.float64] = self.feedback.mean(axis=1, dtype=np.float64)
        return mean


class SessionSimulator:
    """``B`` concurrent sessions as arrays: users, steps, histories, temper and random numbers.

    The caller decides when a finished session is replaced: :meth:`step` never resets. Stepping a finished session
    again is allowed once, so that vector environments can reset one step later; its outcome means nothing.

    Args:
        world: Users, items and their response.
        batch_size: Number of sessions ``B``.
        source: Where new sessions come from.
        leave: When a user leaves.

    The other arguments are those of :class:`~kuaifair_env.batch.SessionConfig`.

    Attributes:
        started: Sessions started so far; the blocks of a randomised training world go by it.
    """

    def __init__(
        self,
        world: World,
        batch_size: int,
        source: SessionSource,
        *,
        max_len: int,
        slate_size: int,
        leave: LeaveRule,
        initial_history: InitialHistory = "log",
        repeats: Repeats = "allow",
        reward: RewardForm = "mean",
        drift: float | None = None,
    ) -> None:
        _check_settings(world, batch_size, max_len, slate_size, initial_history, repeats, reward)
        self.world = world
        self.batch_size = batch_size
        self.max_len = max_len
        self.slate_size = slate_size
        self.source = source
        self._rewards_are_sums = reward == "sum"
        # Arrays, since a small ufunc takes twice as long with a Python number.
        self._items_per_slate = np.asarray(slate_size, np.float64)
        self._max_steps = np.full(batch_size, max_len)
        self._ones = np.ones(slate_size)
        self.users = np.zeros(batch_size, np.int64)
        self.numbers = np.full(batch_size, -1, np.int64)
        self.started = 0
        self.steps = np.zeros(batch_size, np.int64)
        self.left = np.zeros(batch_size, np.bool_)
        self._leave = leave.bind(batch_size, slate_size, max_len, world)
        self._popular = world.groups.popular.astype(np.float64)
        self._drift = None if drift is None else TasteDrift(world, batch_size, drift)
        self._randomisation = _session_randomisation(world, batch_size)
        self._unrandomised_blocks = np.zeros(batch_size, np.int64)
        self._log = world.initial_history
        self._from_log = initial_history == "log"
        self._histories = SessionHistories(batch_size, slate_size, max_len, world.history_length)
        self._response_memory = session_memory(world.response, batch_size)
        self._running: RunningClicks | None = None
        self._allowed = np.ones((batch_size, world.n_items), np.bool_) if repeats == "forbid" else None
        self._candidates = world.user_candidates
        self._rows = np.arange(batch_size)
        self._draws = seeding.SessionDraws(batch_size, slate_size)

    @property
    def temper(self) -> NDArray[np.float64]:
        """``float64 (B,)``, patience left."""
        return self._leave.temper

    @property
    def blocks(self) -> NDArray[np.int64]:
        """``int64 (B,)``, the block of shared deviations that each session started in.

        All are 0 where the world is not randomised (:mod:`kuaifair_env.randomisation`).
        """
        return self._unrandomised_blocks if self._randomisation is None else self._randomisation.blocks

    @property
    def allowed(self) -> BoolArray | None:
        """``bool (B, N)``, items that may still be shown, or None when all may."""
        return self._allowed

    def history(self, rows: IntArray | None = None, length: int | None = None) -> HistoryWindow:
        """Returns what users saw last, newest last.

        Args:
            rows: Which sessions; None takes all.
            length: How many places, padded at the front where there are fewer; None takes the log context and the
                whole session, ``H + max_len K`` places.

        Raises:
            ValueError: If ``length`` is negative.
        """
        longest = self._histories.length
        if length is None:
            return self._histories.last(longest, rows)
        if length < 0:
            raise ValueError(f"a history has no {length} places; give a length of at least 0, or None for all")
        window = self._histories.last(min(length, longest), rows)
        return window if length <= longest else window.last(length)

    def clicked_means(self, rows: IntArray | None = None) -> FloatArray:
        """Returns the mean embedding of the clicked items in the last ``H`` places, ``float32 (B, d)``.

        From the first call on, running sums are kept.

        Args:
            rows: Which sessions; None takes all.
        """
        if self._running is None:
            self._running = RunningClicks(self.world.click_pool, self.batch_size, self.slate_size)
            self._running.reset(self._rows, self.history(length=self.world.history_length))
        return self._running.means(rows)

    def histories(self, rows: IntArray) -> SessionHistories:
        """Returns what the users of the given sessions saw up to now, to be looked at later."""
        return self._histories.of(rows)

    def shown(self, rows: IntArray) -> NDArray[np.int32]:
        """Returns ``int32 (len(rows), max_len, K)``, slates of these sessions, newest last.

        Only the last ``steps`` of them belong to the session.
        """
        items = self.history(rows, self.max_len * self.slate_size).items
        return items.reshape(-1, self.max_len, self.slate_size)

    def expected_catalogue(self) -> FloatArray:
        """Returns ``float32 (B, N)``, the expected feedback on every candidate now (for oracles only)."""
        response, users = self._response_now()
        return response.expected_catalogue(users, self.world.n_items, self._history_for_response())

    def reset(self, rows: IntArray, sessions: Sessions | None = None) -> None:
        """Replaces the sessions in the given rows of the batch by new ones.

        Args:
            rows: Which rows.
            sessions: One for each of them; None asks :attr:`source`.
        """
        users, keys, numbers = self.source.next(rows) if sessions is None else sessions
        self.users[rows] = users
        self.numbers[rows] = numbers
        self.steps[rows] = 0
        self._leave.reset(rows, users)
        if self._drift is not None:
            self._drift.reset(rows, users, keys)
        if self._randomisation is not None:
            self._randomisation.reset(rows, users, keys, self.started + np.arange(len(rows)))
        self.started += len(rows)
        window = self._log.take(users) if self._from_log else HistoryWindow.empty(len(rows), self.world.history_length)
        self._histories.start(rows, window)
        if self._response_memory is not None:
            self._response_memory.reset(rows, window)
        if self._running is not None and self._from_log:
            self._running.start(rows, users)
        elif self._running is not None:
            self._running.reset(rows, window)
        self._draws.start(rows, keys)
        if self._candidates is not None:
            self._max_steps[rows] = np.minimum(self._candidates.counts[users] // self.slate_size, self.max_len)
        self._allow_candidates(rows)

    def state(self) -> dict[str, Any]:
        """Returns all that running sessions are made of, as numbers and arrays; not where new ones come from."""
        return {name: plain_attributes(part) for name, part in self._parts().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on with the sessions that :meth:`state` returned."""
        for name, part in self._parts().items():
            set_attributes(part, state[name])
        if self._running is not None:
            self._running.reset(self._rows, self.history(length=self.world.history_length))

    def step(self, items: NDArray[np.int64]) -> Outcome:
        """Shows one slate to each user.

        Args:
            items: ``int64 (B, K)`` distinct candidates in each row (see :mod:`kuaifair_env.actions`).
        """
        response, users = self._response_now()
        expected = response.expected(users, items, self._history_for_response())
        feedback = response.feedback(expected, self._draws.of_step(self.steps))
        clicks = response.clicked(feedback)
        # Products with ones are the fastest sums of short rows. They add whole numbers, or float32 in float64 without
        # rounding, so that the order in which they add does not matter.
        total = feedback.astype(np.float64).dot(self._ones)
        mean = total / self._items_per_slate
        popular_share = self._popular.take(items).dot(self._ones) / self._items_per_slate
        self._remember(items, clicks)
        if self._drift is not None:
            self._drift.step(self.steps)
        temper, disparity, violation, leaves = self._leave.update(items, popular_share, mean, self.steps)
        self.left = leaves
        truncated = (self.steps >= self._max_steps) > leaves
        if self._candidates is not None:
            # Agents may still be asked for slates in finished sessions, whose list may be used up.
            self._allow_candidates(np.flatnonzero(leaves | truncated))
        reward = total if self._rewards_are_sums else mean
        return Outcome(items, feedback, clicks, reward, popular_share, disparity, violation, temper, leaves, truncated)

    def _allow_candidates(self, rows: IntArray) -> None:
        """Allows everything that the current users of the given rows may be shown in a session."""
        if self._allowed is not None:
            own = self._candidates
            self._allowed[rows] = True if own is None else own.mask(self.users[rows], self.world.n_items)

    def _parts(self) -> dict[str, Any]:
        parts = {"sessions": self, "leave": self._leave, "drift": self._drift, "memory": self._response_memory}
        parts |= {"histories": self._histories, "draws": self._draws, "randomisation": self._randomisation}
        return {name: part for name, part in parts.items() if part is not None}

    def _response_now(self) -> tuple[ResponseModel, NDArray[np.int64]]:
        """Returns what users do now, and their rows there."""
        response, users = self.world.response, self.users
        if self._drift is not None:
            response, users = self._drift.response(users), self._rows
        if self._randomisation is not None:
            response = self._randomisation.response(response)
        return response, users

    def _history_for_response(self) -> History | None:
        if self._response_memory is not None:
            return self._response_memory
        return self.history(length=self.world.history_length) if self.world.response.uses_history else None

    def _remember(self, items: NDArray[np.int64], clicks: BoolArray) -> None:
        if self._response_memory is not None:
            self._response_memory.append(items, clicks)
        if self._running is not None:
            self._running.append(items, clicks)
        self.steps = self.steps + _ONE
        self._histories.append(items, clicks)
        if self._allowed is not None:
            self._allowed[self._rows[:, None], items] = False


def _session_randomisation(world: World, batch_size: int) -> SessionRandomisation | None:
    if world.randomisation is None:
        return None
    n_items = world.n_items
    directions = world.item_directions[:n_items]
    return SessionRandomisation(world.randomisation, directions, world.exposures, batch_size)


def _check_settings(
    world: World,
    batch_size: int,
    max_len: int,
    slate_size: int,
    initial_history: InitialHistory,
    repeats: Repeats,
    reward: RewardForm,
) -> None:
    for name, number in (("batch_size", batch_size), ("max_len", max_len)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 1 <= slate_size <= world.n_items:
        raise ValueError(f"slate_size must lie in 1..{world.n_items} (the number of candidates), got {slate_size}")
    if initial_history not in ("log", "empty"):
        raise ValueError(f"initial_history must be 'log' or 'empty', got {initial_history!r}")
    if repeats not in ("allow", "forbid"):
        raise ValueError(f"repeats must be 'allow' or 'forbid', got {repeats!r}")
    if reward not in ("mean", "sum"):
        raise ValueError(f"reward must be 'mean' or 'sum', got {reward!r}")
    if world.user_candidates is not None:
        _check_replay(world, world.user_candidates, slate_size, repeats)
    elif repeats == "forbid" and max_len * slate_size > world.n_items:
        raise ValueError(
            f"repeats='forbid' needs max_len * slate_size = {max_len * slate_size} items, "
            f"but there are {world.n_items} candidates"
        )


def _check_replay(world: World, candidates: UserItems, slate_size: int, repeats: Repeats) -> None:
    if repeats != "forbid":
        raise ValueError(
            "users of this world answer what was logged, once for each item that they were shown at random; an item "
            "that comes again would get the same answer again, so repeats='forbid' is needed"
        )
    fewest = int(candidates.counts[world.users].min())
    if fewest < slate_size:
        raise ValueError(
            f"slates of {slate_size} need users with as many candidates, and one of this world has {fewest}; leave "
            f"such users out with min_candidates={slate_size}"
        )
