"""Sessions as every environment form plays them: actions in, observations and episode records out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.abandonment import (
    LEAVE_RULES,
    RULE_PARAMETERS,
    LeaveRuleLike,
    describe_rule,
    leave_rule,
    plain_number,
)
from kuaifair_env.actions import ActionMode, Duplicates, action_decoder
from kuaifair_env.checkpoints import set_attributes
from kuaifair_env.checks import need_whole
from kuaifair_env.data.schema import BoolArray, IdArray, IntArray
from kuaifair_env.histories import SessionHistories
from kuaifair_env.metrics import gini_of_sessions, signed_gap, slate_disparity
from kuaifair_env.observations import ObservationMode, observer
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.simulator import (
    InitialHistory,
    Outcome,
    RandomUsers,
    Repeats,
    RewardForm,
    Sessions,
    SessionSimulator,
    SessionSource,
)
from kuaifair_env.world import World

AUTO_SLATE_SIZE = 10
_NO_ROWS = np.zeros(0, np.int64)
# Each has objects of its own in some forms of the environment; more would take minutes until memory is short.
_MOST_SESSIONS = 1_000_000
_RUNNING_TOTALS = ("_returns", "_popular", "_violations")

# What ``info["session"]`` calls columns of EpisodeRecords; the others keep their names.
_INFO_NAMES = {
    **{
        "user_ids": "user_id",
        "numbers": "number",
        "length": "len",
        "return_": "r_cum",
        "mean_reward": "r_each",
    },
    "absolute_difference": "ad",
}


@dataclass(frozen=True)
class SessionConfig:
    """How sessions run and how an agent takes part.

    Attributes:
        max_len: Max Len of the paper: the temper that a user starts with, and the cap in steps.
        slate_size: Items per slate ``K``; None means 10, or 1 in ``item`` mode.
        action_mode: ``"embedding"``, ``"slate"`` or ``"item"`` (see :mod:`kuaifair_env.actions`).
        observation_mode: ``"state"`` or ``"history"`` (see :mod:`kuaifair_env.observations`).
        session_clock: Whether states end with steps taken / Max Len (see
            :class:`~kuaifair_env.observations.ClockedObserver`).
        leave: A leave rule, or one as a name, a text or a mapping (see :func:`kuaifair_env.abandonment.leave_rule`);
            what is more than a name becomes the rule itself.
        initial_history: ``"log"`` starts from the user's training log, ``"empty"`` cold.
        repeats: ``"forbid"`` shows an item at most once per session.
        duplicates: What ``slate`` mode does with an item that a slate holds twice: ``"error"``, or ``"replace"`` by the
            most similar item that may be shown (see :class:`~kuaifair_env.actions.FilledSlateActions`), which also
            replaces what ``repeats="forbid"`` rules out. With it SB3's ``MultiDiscrete`` policies can be trained.
        reward: ``"mean"`` or ``"sum"`` of the feedback over the slate; users leave by the mean in both.
        drift: Slates after which a user's taste correlates by .5 with that at the start of the session (see
            :class:`~kuaifair_env.drift.TasteDrift`); None lets tastes stay.
    """

    max_len: int = 30
    slate_size: int | None = None
    action_mode: ActionMode = "embedding"
    observation_mode: ObservationMode = "state"
    session_clock: bool = False
    leave: LeaveRuleLike = "temper"
    initial_history: InitialHistory = "log"
    repeats: Repeats = "allow"
    duplicates: Duplicates = "error"
    reward: RewardForm = "mean"
    drift: float | None = None

    def __post_init__(self) -> None:
        sizes = {"max_len": self.max_len, "slate_size": self.slate_size}
        need_whole(1, **{name: size for name, size in sizes.items() if size is not None})
        if self.drift is not None and not _is_positive(self.drift):
            raise ValueError(f"drift must be a positive number of slates, or None, got {self.drift!r}")
        if not isinstance(self.session_clock, bool):
            raise ValueError(f"session_clock must be True or False, got {self.session_clock!r}")
        rule = leave_rule(self.leave)
        if not isinstance(self.leave, str) or self.leave not in LEAVE_RULES:
            object.__setattr__(self, "leave", rule)
        if self.duplicates not in get_args(Duplicates):
            raise ValueError(f"duplicates must be one of {get_args(Duplicates)}, got {self.duplicates!r}")
        if self.duplicates == "replace" and self.action_mode != "slate":
            raise ValueError(f"duplicates='replace' is for action_mode='slate'; {self.action_mode!r} mode has none")

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> SessionConfig:
        """Returns the configuration of an environment's settings, among which may be parameters of the leave rule.

        Args:
            settings: Fields of this class, and ``ad_bound`` and the other
                ``kuaifair_env.abandonment.RULE_PARAMETERS``, by name.

        Raises:
            ValueError: If the leave rule has no such parameter, or a value is not valid.
        """
        parameters = {name: value for name, value in settings.items() if name in RULE_PARAMETERS}
        own = {name: value for name, value in settings.items() if name not in RULE_PARAMETERS}
        if parameters:
            own["leave"] = leave_rule(own.get("leave", cls.leave), parameters)
        return cls(**own)

    @property
    def items_per_slate(self) -> int:
        """The slate size in force."""
        if self.slate_size is not None:
            return self.slate_size
        return 1 if self.action_mode == "item" else AUTO_SLATE_SIZE

    def describe(self) -> dict[str, Any]:
        """Returns all settings, JSON-able; the leave rule spelled out."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings |= {"slate_size": self.items_per_slate, "leave": describe_rule(leave_rule(self.leave))}
        return {name: plain_number(value) for name, value in settings.items()}


@dataclass(frozen=True, repr=False)
class EpisodeRecords:
    """Records of ``n`` finished sessions, one entry each.

    Attributes:
        user_ids: Raw ids.
        numbers: ``int64``, place in the list of fixed sessions, or -1.
        length: ``int64``, Len: steps taken.
        return_: ``float64``, R_cum: sum of rewards.
        mean_reward: ``float64``, R_each: mean reward of a step.
        popular_share: ``float64``, share of popular items among all that was shown.
        absolute_difference: ``float64``, AD of the session, ``|2 * popular_share - 1|``.
        signed_gap: ``float64``, ``2 * popular_share - 1``.
        violation_rate: ``float64``, share of steps that broke the leave rule.
        gini: ``float64``, Gini of the session's exposure over all candidates, zeros included.
        coverage: ``float64``, share of the candidates that were shown.
        left: ``bool``, the user left (rather than reaching the cap).
    """

    user_ids: IdArray
    numbers: NDArray[np.int64]
    length: NDArray[np.int64]
    return_: NDArray[np.float64]
    mean_reward: NDArray[np.float64]
    popular_share: NDArray[np.float64]
    absolute_difference: NDArray[np.float64]
    signed_gap: NDArray[np.float64]
    violation_rate: NDArray[np.float64]
    gini: NDArray[np.float64]
    coverage: NDArray[np.float64]
    left: BoolArray

    def __repr__(self) -> str:
        return f"EpisodeRecords({len(self)} sessions)"

    def __len__(self) -> int:
        return len(self.user_ids)

    def take(self, rows: IntArray | BoolArray) -> EpisodeRecords:
        """Returns some of the records."""
        return EpisodeRecords(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concatenated(cls, records: Sequence[EpisodeRecords]) -> EpisodeRecords:
        """Returns several batches of records as one."""
        return cls(*(np.concatenate([getattr(some, field.name) for some in records]) for field in fields(cls)))

    def as_dict(self) -> dict[str, NDArray[Any]]:
        """Returns all columns under the names that they have here."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def infos(self) -> list[dict[str, Any]]:
        """Returns each session's record under the names that ``info["session"]`` uses."""
        columns = self.columns()
        return [
            dict(zip(columns, row, strict=True))
            for row in zip(*[column.tolist() for column in columns.values()], strict=True)
        ]

    def columns(self) -> dict[str, NDArray[Any]]:
        """Returns all columns under the names that ``info["session"]`` uses."""
        return {name: getattr(self, column) for name, column in _INFO_COLUMNS.items()}


_INFO_COLUMNS = {_INFO_NAMES.get(field.name, field.name): field.name for field in fields(EpisodeRecords)}
_SLATE_INFOS = ("items", "clicks", "feedback")
_STEP_INFOS = ("popular_share", "disparity", "temper", "violation")


def step_infos(outcome: Outcome, batch: SessionBatch) -> dict[str, NDArray[Any]]:
    """Returns what ``infos`` say of a step of all sessions: rows of items and clicks, raw ids of items and users."""
    infos = {name: getattr(outcome, name) for name in _SLATE_INFOS + _STEP_INFOS}
    return infos | {"item_ids": batch.item_ids.take(outcome.items), "user_id": batch.user_ids}


def step_info(outcome: Outcome, batch: SessionBatch, row: int) -> dict[str, Any]:
    """Returns what ``info`` says of one session's step; see :func:`step_infos`."""
    info = {name: getattr(outcome, name)[row] for name in _SLATE_INFOS}
    for name in _STEP_INFOS:
        info[name] = getattr(outcome, name).item(row)
    info["item_ids"] = batch.item_ids.take(info["items"])
    info["user_id"] = batch.user_id(row)
    return info


class SessionBatch:
    """``B`` sessions with their action decoder, observer and running totals.

    The three environment forms (single, Gymnasium vector, SB3 vector) are thin adapters of this class.

    Args:
        world: Users, items and their response.
        config: How sessions run.
        batch_size: Number of concurrent sessions ``B``, at most a million.

    Attributes:
        outcome: What the last step did, or None before the first.
        finished: Rows whose session the last step ended.
        finished_records: Their records in that order, or None if there are none.
    """

    def __init__(self, world: World, config: SessionConfig, batch_size: int) -> None:
        if batch_size > _MOST_SESSIONS:
            raise ValueError(f"{batch_size:,} sessions at once are more than {_MOST_SESSIONS:,}")
        self.world = world
        self.config = config
        self.batch_size = batch_size
        slate_size = config.items_per_slate
        candidates = world.embeddings[: world.n_items]
        self.item_ids = world.item_ids
        self.decoder = action_decoder(config.action_mode, candidates, slate_size, config.duplicates)
        self._observer = observer(config.observation_mode, world, config.session_clock)
        self.action_space = self.decoder.space
        self.observation_space = self._observer.space
        self._random_users = RandomUsers(world.users, seeding.stream_keys(0, batch_size))
        self._ids_of_users = world.data.users.ids
        self._all = np.arange(batch_size)
        self.simulator = SessionSimulator(
            world,
            batch_size,
            self._random_users,
            max_len=config.max_len,
            slate_size=slate_size,
            leave=leave_rule(config.leave),
            initial_history=config.initial_history,
            repeats=config.repeats,
            reward=config.reward,
            drift=config.drift,
        )
        self._returns = np.zeros(batch_size)
        self._popular = np.zeros(batch_size)
        self._violations = np.zeros(batch_size)
        self.outcome: Outcome | None = None
        self.finished: IntArray = _NO_ROWS
        self.finished_records: EpisodeRecords | None = None
        self._finished_histories: SessionHistories | None = None

    def seed(self, keys: seeding.Keys, rows: IntArray | None = None) -> None:
        """Gives rows their own endless streams of random users.

        Args:
            keys: ``uint64``, one key for each of the rows.
            rows: Which rows; None takes all. Where all are seeded sessions are counted anew.
        """
        self._random_users.reseed(self._all if rows is None else rows, keys)
        self.simulator.source = self._random_users
        if rows is None or len(rows) == self.batch_size:
            self.simulator.started = 0

    def take_sessions_from(self, source: SessionSource) -> None:
        """Takes sessions from another source from now on (fixed lists for evaluation)."""
        self.simulator.source = source

    def state(self) -> dict[str, Any]:
        """Returns the running sessions and the last outcome as arrays; not where new sessions come from."""
        return {
            "simulator": self.simulator.state(),
            "records": {name: getattr(self, name) for name in _RUNNING_TOTALS},
            "outcome": None if self.outcome is None else tuple(self.outcome),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on with the sessions that :meth:`state` returned."""
        self.simulator.restore(state["simulator"])
        set_attributes(self, state["records"])
        self.outcome = None if state["outcome"] is None else Outcome(*state["outcome"])

    def reset(self, rows: IntArray, sessions: Sessions | None = None) -> None:
        """Starts new sessions in the given rows: those given, or what the source hands out."""
        self.simulator.reset(rows, sessions)
        self._returns[rows] = 0.0
        self._popular[rows] = 0.0
        self._violations[rows] = 0.0

    def chosen_sessions(self, rows: IntArray, options: Sequence[Mapping[str, Any]]) -> Sessions:
        """Returns a session for each of the given rows, drawn at random but for what its options choose.

        Args:
            rows: Rows of the batch.
            options: For each row ``{"user_id": raw id, "session_key": 0 <= integer < 2**64}``, both optional.

        Raises:
            ValueError: If an option or a user is unknown; nothing has been drawn then.
        """
        chosen = [_checked_options(of_row, self.world) for of_row in options]
        drawn = self.simulator.source.next(rows)
        for place, (user, key) in enumerate(chosen):
            if user is not None:
                drawn.users[place] = user
            if key is not None:
                drawn.keys[place] = key
        return drawn

    def observe(self, rows: IntArray | None = None) -> Any:
        """Returns one observation per session, stacked; of the given rows or of all."""
        return self._observer.observe(self.simulator, rows)

    def step(self, actions: NDArray[Any], over: BoolArray | None = None) -> Outcome:
        """Decodes and executes one action per session.

        Args:
            actions: ``(B, *action_space.shape)``.
            over: ``bool (B,)``, sessions that are finished and whose action is ignored.

        Raises:
            ValueError: If an action is not valid; nothing has happened then.
        """
        items = self._slates(np.asarray(actions), over)
        outcome = self.simulator.step(items)
        self._returns = self._returns + outcome.reward
        self._popular = self._popular + outcome.popular_share
        self._violations = self._violations + outcome.violation
        done = outcome.terminated | outcome.truncated
        if over is not None:
            done = done & ~over
        self.finished, self.finished_records, self._finished_histories = _NO_ROWS, None, None
        if np.count_nonzero(done):
            self.finished = done.nonzero()[0]
            self._finished_histories = self.simulator.histories(self.finished)
            self.finished_records = self._records(self.finished, self._finished_histories)
        self.outcome = outcome
        return outcome

    def _slates(self, actions: NDArray[Any], over: BoolArray | None) -> NDArray[np.int64]:
        if actions.ndim == 0 or len(actions) != self.batch_size:
            raise ValueError(f"need one action for each of {self.batch_size} sessions, got shape {actions.shape}")
        allowed = self.simulator.allowed
        if over is None or not np.count_nonzero(over):
            return self.decoder.decode(actions, allowed)
        # Finished sessions are shown their last slate again, which does not matter.
        assert self.outcome is not None
        slates = self.outcome.items.copy()
        live = np.flatnonzero(~over)
        if len(live):
            slates[live] = self.decoder.decode(actions.take(live, axis=0), None if allowed is None else allowed[live])
        return slates

    @property
    def blocks(self) -> NDArray[np.int64]:
        """``int64 (B,)``, the block of shared deviations that each session started in; see ``SessionSimulator``.

        Whoever learns something of all users in a randomised training world starts it anew with each block.
        """
        return self.simulator.blocks

    @property
    def counted(self) -> BoolArray:
        """``bool (B,)``, sessions on the list of who is evaluated or served; all where there is no list.

        Others fill up the end of an evaluation or a service.
        """
        return (self.simulator.numbers >= 0) | (self.simulator.source is self._random_users)

    @property
    def user_ids(self) -> IdArray:
        """``(B,)``, raw ids of the current users."""
        return self._ids_of_users.take(self.simulator.users)

    def user_id(self, row: int) -> Any:
        """Returns the raw id of one session's user, a plain number or text."""
        return self._ids_of_users.item(self.simulator.users.item(row))

    @property
    def finished_window(self) -> HistoryWindow | None:
        """What the users of the sessions in :attr:`finished` saw (see :meth:`history_window`), or None.

        A purifier needs it for the last observation.
        """
        histories = self._finished_histories
        return None if histories is None else histories.last(histories.length)

    def history_window(self, length: int | None = None) -> HistoryWindow:
        """Returns what users saw: the last ``length`` places, or the log context and the whole session."""
        return self.simulator.history(length=length)

    def action_masks(self) -> BoolArray:
        """Returns ``bool (B, N)``, the items that may be shown now."""
        shape = self.batch_size, self.world.n_items
        allowed = self.simulator.allowed
        return np.ones(shape, np.bool_) if allowed is None else allowed.copy()

    def action_mask(self, row: int) -> BoolArray:
        """Returns the mask of one session as sb3-contrib's ``MaskablePPO`` reads it: once for each slot of a slate."""
        allowed = self.simulator.allowed
        mask = np.ones(self.world.n_items, np.bool_) if allowed is None else allowed[row]
        return np.tile(mask, self.config.items_per_slate if self.config.action_mode == "slate" else 1)

    def _records(self, rows: IntArray, histories: SessionHistories) -> EpisodeRecords:
        """Returns the records of the sessions in the given rows, as they stand, whose users saw the given histories."""
        steps = self.simulator.steps[rows]
        popular_share = self._popular[rows] / steps
        slate_size, n_items = self.simulator.slate_size, self.world.n_items
        candidates_shown = _candidates_shown(histories.shown(steps), steps * slate_size, n_items)
        return EpisodeRecords(
            user_ids=self._ids_of_users[self.simulator.users[rows]],
            numbers=self.simulator.numbers[rows],
            length=steps,
            return_=self._returns[rows],
            mean_reward=self._returns[rows] / steps,
            popular_share=popular_share,
            absolute_difference=slate_disparity(popular_share),
            signed_gap=signed_gap(popular_share),
            violation_rate=self._violations[rows] / steps,
            gini=gini_of_sessions(candidates_shown, n_items),
            coverage=candidates_shown[:, 0] / n_items,
            left=self.simulator.left[rows],
        )


def _is_positive(number: Any) -> bool:
    return isinstance(number, Real) and not isinstance(number, bool) and 0 < float(number) < float("inf")


def _checked_options(options: Mapping[str, Any], world: World) -> tuple[int | None, int | None]:
    """Returns the user row and the session key that reset options choose."""
    unknown = set(options) - {"user_id", "session_key"}
    if unknown:
        raise ValueError(f"reset options are 'user_id' and 'session_key', got {sorted(unknown)}")
    user, key = options.get("user_id"), options.get("session_key")
    if key is not None:
        if not isinstance(key, (int, np.integer)) or not 0 <= key < 2**64:
            raise ValueError(f"session_key must be an integer from 0 to 2**64 - 1, got {key!r}")
        key = int(key)
    if user is None:
        return None, key
    rows = world.user_rows(user)
    if len(rows) != 1:
        raise ValueError(f"user_id must be one raw user id, got {user!r}")
    return int(rows[0]), key


def _candidates_shown(items: NDArray[np.int32], counts: NDArray[np.int64], n_items: int) -> NDArray[np.int64]:
    """Counts the candidates that each session showed at least once, at least twice and so on.

    Args:
        items: All that was shown, one session after the other.
        counts: ``(n,)``, how many items each session showed.
        n_items: Number of candidates ``N``.

    Returns:
        ``int64 (n, C)``, as :func:`~kuaifair_env.metrics.gini_of_sessions` reads them.
    """
    n = len(counts)
    # 32 bits are sorted twice as fast.
    first: NDArray[Any] = n_items * np.arange(n, dtype=np.int32 if n * n_items < 2**31 else np.int64)
    # A number for each candidate of each session; sessions stay together when they are sorted.
    showings = items + first.repeat(counts)
    showings.sort()
    is_first = np.empty(len(showings) + 1, np.bool_)
    is_first[0] = is_first[-1] = True
    np.not_equal(showings[1:], showings[:-1], out=is_first[1:-1])
    begins = is_first.nonzero()[0]
    times = begins[1:] - begins[:-1]
    most = int(np.maximum.reduce(times))
    sessions = showings.take(begins[:-1]) // n_items
    exactly = np.bincount(sessions * most + times - 1, minlength=n * most).reshape(n, most)
    return np.add.accumulate(exactly[:, ::-1], axis=1)[:, ::-1]
