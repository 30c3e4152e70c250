"""Policies that learn nothing: what a trained method has to beat before its result means anything.

All of them name items (``action_mode="slate"``, or ``"item"`` for slates of one) and have the ``predict`` of
Stable-Baselines3. Those marked ``privileged`` look at what the users of the evaluation world truly like; they show
what could be had, not what an agent could do.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from hrl_policies.common.click_scorer import ClickScorer
from hrl_policies.common.slates import FairCounts, best_slates, nearest_to_half
from kuaifair_env import seeding
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.spaces import state_of, top_k
from kuaifair_env.world import World

_USERS_AT_ONCE = 256
QUALITY_USERS = 2_000


class Control(Protocol):
    """A policy that needs no training."""

    privileged: ClassVar[bool]

    def bind(self, batch: SessionBatch) -> None:
        """Tells which sessions the observations come from; evaluation does this by itself."""
        ...

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Returns slates for a batch of observations, and the unchanged ``state``."""
        ...


class _SlateControl:
    """What all controls share: the sessions they are bound to, and ``predict`` around :meth:`slates`."""

    privileged: ClassVar[bool] = False

    def __init__(self) -> None:
        self._batch: SessionBatch | None = None

    def bind(self, batch: SessionBatch) -> None:
        """Takes the sessions whose observations :meth:`predict` will get.

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
            observation: ``(B, d)``, or a dict with such a ``"state"``; one observation ``(d,)`` gives one slate.
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
        batch = self._bound()
        if len(states) != batch.batch_size:
            raise ValueError(f"{len(states)} observations for a control bound to {batch.batch_size} sessions")
        slates = self.slates(states, batch)
        return (slates[0] if single else slates), state

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """Returns ``int64 (B, K)`` items for ``float32 (B, d)`` observed states."""
        raise NotImplementedError

    def _bound(self) -> SessionBatch:
        if self._batch is None:
            raise ValueError(
                "this control must know its sessions: call bind(batch) first, as evaluate() does"
            )
        return self._batch


class RandomSlates(_SlateControl):
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


class GreedyCTR(_SlateControl):
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
            raise ValueError(
                f"the scorer knows {self._scorer.n_items} candidates, the world {batch.world.n_items}"
            )

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        return top_k(self._scorer.score(states), batch.simulator.slate_size, batch.simulator.allowed)


class QuotaGreedy(GreedyCTR):
    """Half of the slate popular, half long-tail, each by the largest predicted click probability.

    The trivial fair policy: no learning, no state purification. Where half is impossible (odd slates) or outside
    the leave rule's bound it takes the nearest split inside, the better one of two. It knows the bound.

    Args:
        scorer: The click model.
    """

    def bind(self, batch: SessionBatch) -> None:
        """See :class:`GreedyCTR`."""
        super().bind(batch)
        self._fair = FairCounts(batch)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        counts = nearest_to_half(self._fair.now())
        return best_slates(
            self._scorer.score(states), batch.world.groups.popular, counts, batch.simulator.allowed
        )


class SessionQuota(QuotaGreedy):
    """QuotaGreedy that also counts: clicks on an item in the window raise its score, skips lower it.

    What listening to the session is worth without any learning by reinforcement. It may take any number of popular
    items that the leave rule does not punish. Its two weights are round numbers, not tuned.

    Args:
        scorer: The click model.
        click: Log-odds that a click in the window adds.
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
        worth = np.where(window.clicks[rows, places], self._click, -self._skip)
        np.add.at(scores, (rows, window.items[rows, places]), worth)
        return best_slates(scores, batch.world.groups.popular, self._fair.now(), batch.simulator.allowed)


class QualityOracle(_SlateControl):
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

    def bind(self, batch: SessionBatch) -> None:
        """See :class:`Control`."""
        super().bind(batch)
        self._fair = FairCounts(batch)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        scores = np.broadcast_to(self._quality, (len(states), len(self._quality)))
        return best_slates(scores, batch.world.groups.popular, self._fair.now(), batch.simulator.allowed)


class Oracle(_SlateControl):
    """The best slate inside the leave rule's bound by what the current user truly likes now.

    It maximises the expected reward of each step among slates that the rule does not punish, and of all slates
    where there are none. It does not plan ahead: where feedback depends on history, or where breaking the bound
    would pay, a session could still be better.
    """

    privileged: ClassVar[bool] = True

    def bind(self, batch: SessionBatch) -> None:
        """See :class:`Control`."""
        super().bind(batch)
        self._fair = FairCounts(batch)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        scores = batch.simulator.expected_catalogue()
        return best_slates(scores, batch.world.groups.popular, self._fair.now(), batch.simulator.allowed)


def item_quality(world: World, users: int = QUALITY_USERS) -> FloatArray:
    """Returns the true mean expected feedback on every candidate, over the users of a world.

    Args:
        world: Whose response model tells the truth.
        users: Take at most so many users, spread evenly over the world's list.

    Returns:
        ``float32 (N,)``.
    """
    count = min(users, len(world.users))
    rows = world.users[np.linspace(0, len(world.users) - 1, count).round().astype(np.int64)]
    total = np.zeros(world.n_items)
    for low in range(0, count, _USERS_AT_ONCE):
        part = rows[low : low + _USERS_AT_ONCE]
        history = world.initial_history.take(part) if world.response.uses_history else None
        total += world.response.expected_catalogue(part, world.n_items, history).sum(axis=0, dtype=np.float64)
    return np.asarray(total / count, np.float32)
