"""Policies that learn nothing: what a trained method has to beat before its result means anything.

All of them name items (``action_mode="slate"``, or ``"item"`` for slates of one) and have the ``predict`` of
Stable-Baselines3. Those marked ``privileged`` look at what the users of the evaluation world truly like; they show
what could be had, not what an agent could do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dsrm.click_scorer import ClickScorer
from kuaifair_env import seeding
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.fair_counts import fair_counts_now, tolerated_counts_now, users_tolerance
from kuaifair_env.observations import state_of
from kuaifair_env.ranking import top_k
from kuaifair_env.response.logged import LoggedResponse
from kuaifair_env.world import World

_USERS_AT_ONCE = 256
QUALITY_USERS = 2_000


class Control(ABC):
    """A policy that needs no training: :meth:`predict` of Stable-Baselines3 around :meth:`slates`."""

    privileged: ClassVar[bool] = False

    def __init__(self) -> None:
        self._batch: SessionBatch | None = None

    def bind(self, batch: SessionBatch) -> None:
        """Takes the sessions whose observations :meth:`predict` will get; ``evaluate`` calls this.

        Raises:
            ValueError: If their actions are not item ids.
        """
        if batch.config.action_mode == "embedding":
            raise ValueError("controls name items; evaluate them with action_mode='slate', not 'embedding'")
        self._batch = batch

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Returns slates for observations, and ``state`` as it came.

        Args:
            observation: ``(B, d)``, or a dict with such a ``"state"``; one observation ``(d,)`` gives one slate. A
                session clock is ignored.
            state: Not used.
            episode_start: Not used.
            deterministic: Not used: random controls are random by design, the others never are.

        Returns:
            ``int64 (B, K)`` and ``state``.

        Raises:
            ValueError: If the control is not bound, or the observations are not those of its sessions.
        """
        states = np.asarray(state_of(observation), np.float32)
        single = states.ndim == 1
        states = states[None] if single else states
        batch = self._batch
        if batch is None:
            raise ValueError("this control must know its sessions: call bind(batch) first, as evaluate() does")
        if len(states) != batch.batch_size:
            raise ValueError(f"{len(states)} observations for a control bound to {batch.batch_size} sessions")
        if batch.config.session_clock:
            states = states[:, :-1]
        slates = self.slates(states, batch)
        return (slates[0] if single else slates), state

    @abstractmethod
    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """Returns ``int64 (B, K)`` items for ``float32 (B, d)`` observed states."""


class RandomSlates(Control):
    """Uniformly random distinct items, optionally of one popularity group.

    In an evaluation the slate follows from the seed, the session's number and the step alone, so that results do
    not depend on the batch size. In endless sessions without numbers it follows from the order of the calls.
    When all items of the group were shown already (``repeats="forbid"``) others fill the slate.

    Args:
        group: ``bool (N,)``, items to draw from, or None for all.
        seed: Seed of the draws.
    """

    def __init__(self, group: BoolArray | None = None, seed: int = 0) -> None:
        super().__init__()
        self._group = group
        self._key = np.asarray([seeding.stream_key(seed)], np.uint64)
        self._rng = np.random.default_rng(seed)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        simulator, items = batch.simulator, batch.world.n_items
        numbered = simulator.numbers >= 0
        keys = seeding.derive(self._key, np.where(numbered, simulator.numbers, 0))
        if not numbered.all():
            keys = np.where(numbered, keys, self._rng.integers(2**63, size=len(keys)).astype(np.uint64))
        keys = seeding.derive(keys, simulator.steps)
        draws = seeding.uniforms(keys[:, None], np.arange(items, dtype=np.uint64))
        scores = draws.astype(np.float32)
        if self._group is not None:
            scores -= ~self._group
        return top_k(scores, simulator.slate_size, simulator.allowed)


class GreedyCTR(Control):
    """The ``K`` items with the largest predicted click probability.

    Args:
        scorer: The click model.
    """

    def __init__(self, scorer: ClickScorer) -> None:
        super().__init__()
        self._scorer = scorer

    def bind(self, batch: SessionBatch) -> None:
        """See :class:`Control`; also checks that scorer and sessions have the same candidates."""
        super().bind(batch)
        if self._scorer.n_items != batch.world.n_items:
            raise ValueError(f"the scorer knows {self._scorer.n_items} candidates, the world {batch.world.n_items}")

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        return top_k(self._scorer.score(states), batch.simulator.slate_size, batch.simulator.allowed)


class QuotaGreedy(GreedyCTR):
    """Half of the slate popular, half long-tail, each by the largest predicted click probability.

    The trivial fair policy: no learning, no state purification. Where half is impossible (odd slates) or outside
    the leave rule's bound it takes the nearest split inside, the better one of two. It knows the bound, but not what
    single users tolerate (``leave="personal"``): they all get half.

    Args:
        scorer: The click model.
    """

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        return _best_allowed(self._scorer.score(states), batch, nearest_to_half(fair_counts_now(batch)))


class ToleranceQuota(GreedyCTR):
    """The best slate inside the leave rule's bound by predicted click probability.

    Under ``leave="personal"`` the bound is about the popular share that the current user tolerates, which no agent is
    told: the gap from :class:`QuotaGreedy` is what knowing it can add, without knowing more of the user's taste.

    Args:
        scorer: The click model.
    """

    privileged: ClassVar[bool] = True

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        return _best_allowed(self._scorer.score(states), batch, tolerated_counts_now(batch, users_tolerance(batch)))


class MeanToleranceQuota(GreedyCTR):
    """:class:`ToleranceQuota` for the mean of all users' tolerances, which one constant quota can know.

    The gap between the two is what there is to decide for single users.

    Args:
        scorer: The click model.
    """

    privileged: ClassVar[bool] = True

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        mean = batch.world.tolerated_shares[batch.world.users].mean()
        counts = tolerated_counts_now(batch, np.full(batch.batch_size, mean))
        return _best_allowed(self._scorer.score(states), batch, counts)


class SessionQuota(GreedyCTR):
    """A quota that counts clicks: those on an item raise its score, skips lower it, as far back as the log context.

    What listening to the session is worth without any reinforcement learning. It may take any number of popular
    items that the leave rule does not punish. Its two weights are round numbers, not tuned.

    Args:
        scorer: The click model.
        click: Log-odds that a click in the log context or the session adds.
        skip: Log-odds that a skip takes away.
    """

    def __init__(self, scorer: ClickScorer, click: float = 0.5, skip: float = 0.25) -> None:
        super().__init__(scorer)
        self._click, self._skip = np.float32(click), np.float32(skip)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        scores = self._scorer.score(states)
        window = batch.history_window()
        rows, places = np.nonzero((window.items >= 0) & (window.items < batch.world.n_items))
        change = np.where(window.clicks[rows, places], self._click, -self._skip)
        np.add.at(scores, (rows, window.items[rows, places]), change)
        return _best_allowed(scores, batch, fair_counts_now(batch))


class QualityOracle(Control):
    """The best slate inside the leave rule's bound by the items' true mean appeal: all that is not personal taste.

    The gap to :class:`Oracle` is what knowing the user can add at most; the gap from :class:`QuotaGreedy` what a
    better estimate of the items can add at most.

    Args:
        world: The evaluation world.
    """

    privileged: ClassVar[bool] = True

    def __init__(self, world: World) -> None:
        super().__init__()
        self._quality = item_quality(world)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        scores = np.broadcast_to(self._quality, (len(states), len(self._quality)))
        return _best_allowed(scores, batch, tolerated_counts_now(batch, users_tolerance(batch)))


class Oracle(Control):
    """The best slate inside the leave rule's bound by what the current user truly likes now.

    It maximises the expected reward of each step among slates that the rule does not punish, and of all slates
    where there are none. It does not plan ahead: where feedback depends on history, or where breaking the bound
    would pay, a session could still be better.
    """

    privileged: ClassVar[bool] = True

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        counts = tolerated_counts_now(batch, users_tolerance(batch))
        return _best_allowed(batch.simulator.expected_catalogue(), batch, counts)


def item_quality(world: World, users: int = QUALITY_USERS) -> FloatArray:
    """Returns the true mean expected feedback on every candidate, over the users of a world.

    Where feedback was logged it is the mean over everybody to whom the item was shown, the current user among them.

    Args:
        world: Its response model gives the truth.
        users: Take at most so many users, spread evenly over the world's list.

    Returns:
        ``float32 (N,)``.
    """
    if isinstance(world.response, LoggedResponse):
        return world.response.item_means(world.n_items)
    count = min(users, len(world.users))
    rows = world.users[np.linspace(0, len(world.users) - 1, count).round().astype(np.int64)]
    total = np.zeros(world.n_items)
    for low in range(0, count, _USERS_AT_ONCE):
        part = rows[low : low + _USERS_AT_ONCE]
        history = world.initial_history.take(part) if world.response.uses_history else None
        total += world.response.expected_catalogue(part, world.n_items, history).sum(axis=0, dtype=np.float64)
    return np.asarray(total / count, np.float32)


def nearest_to_half(counts: BoolArray) -> BoolArray:
    """Keeps of the allowed counts those nearest to half a slate (two of them for odd slates).

    Where no count is allowed all are taken to be.

    Args:
        counts: ``bool (..., K + 1)``.
    """
    slate_size = counts.shape[-1] - 1
    usable = counts | ~counts.any(axis=-1, keepdims=True)
    distance = np.where(usable, np.abs(2 * np.arange(slate_size + 1) - slate_size), 2 * slate_size + 1)
    return np.asarray(usable & (distance == distance.min(axis=-1, keepdims=True)))


def best_slates(
    scores: FloatArray, popular: BoolArray, counts: BoolArray, allowed: BoolArray | None = None
) -> NDArray[np.int64]:
    """Returns, for each row, the slate of the largest total score whose number of popular items is allowed.

    Exact: for each count ``c`` the best slate is the best ``c`` popular and the best ``K - c`` long-tail items.
    Items come best first, equal scores by the smaller item; of equally good counts the smallest is taken. A row
    in which no allowed count can be filled gets the best slate of any count.

    Args:
        scores: ``float32 (B, N)``, finite.
        popular: ``bool (N,)``.
        counts: ``bool (K + 1,)`` or ``(B, K + 1)``; entry ``c`` says whether ``c`` popular items are allowed.
        allowed: ``bool (B, N)``, items that may be shown, or None for all.

    Returns:
        ``int64 (B, K)``.

    Raises:
        ValueError: If a row has fewer than ``K`` items to show, or a score is NaN.
    """
    slate_size = counts.shape[-1] - 1
    popular_items, popular_scores = _best_of_group(scores, popular, slate_size, allowed)
    tail_items, tail_scores = _best_of_group(scores, ~popular, slate_size, allowed)
    totals = _totals(popular_scores) + _totals(tail_scores)[:, ::-1]
    totals = np.where(counts, totals, -np.inf)
    best = totals.argmax(axis=1)
    items = np.concatenate([popular_items, tail_items], axis=1)
    values = np.concatenate([popular_scores, tail_scores], axis=1)
    rank = np.arange(slate_size)
    taken = np.concatenate([rank < best[:, None], rank < slate_size - best[:, None]], axis=1)
    order = np.lexsort((items, np.where(taken, -values, np.inf)), axis=1)[:, :slate_size]
    slates = np.take_along_axis(items, order, axis=1)
    impossible = np.isneginf(totals.max(axis=1))
    if impossible.any():
        rows_allowed = None if allowed is None else allowed[impossible]
        slates[impossible] = top_k(scores[impossible], slate_size, rows_allowed)
    return slates


def _best_allowed(scores: FloatArray, batch: SessionBatch, counts: BoolArray) -> NDArray[np.int64]:
    return best_slates(scores, batch.world.groups.popular, counts, batch.simulator.allowed)


def _best_of_group(
    scores: FloatArray, group: BoolArray, slate_size: int, allowed: BoolArray | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the best ``K`` items of a group and their scores, ``(B, K)``; minus infinity where items are missing."""
    members = np.flatnonzero(group)
    items = np.zeros((len(scores), slate_size), np.int64)
    values = np.full((len(scores), slate_size), -np.inf)
    count = min(slate_size, len(members))
    if count:
        own = scores[:, members]
        if allowed is not None:
            own = np.where(allowed[:, members], own, np.float32(-np.inf))
        best = top_k(own, count)
        items[:, :count] = members[best]
        values[:, :count] = np.take_along_axis(own, best, axis=1)
    return items, values


def _totals(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ``(B, K + 1)``, the sum of the best 0, 1, ..., K scores."""
    return np.concatenate([np.zeros((len(scores), 1)), np.cumsum(scores, axis=1)], axis=1)
