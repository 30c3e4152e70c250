"""The purifier that holds a belief: what the current user likes and what all users share, as the state of an agent.

Its states are no function of a window. They follow sessions from their start, slate by slate, so a
:class:`BeliefPurifier` purifies through the wrappers of :mod:`dsrm.wrappers` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from dsrm.belief import Belief, BeliefItems, BeliefScales, evidence_kept
from dsrm.click_scorer import ClickScorer, ScorerReport
from dsrm.preference import ClosedForm, Moments, PreferenceModel, restore_preference
from dsrm.purified_observations import SessionObservations
from dsrm.purifier import BasePurifier, WorldKey, purified_space
from dsrm.session_evidence import SessionEvidence
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.errors import MismatchError
from kuaifair_env.files import Tensors, parse_as, take_tensors, with_prefix, without_prefix
from kuaifair_env.observations import with_state
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

if TYPE_CHECKING:
    from typing_extensions import Self

LOG_ODDS = 20.0
"""Bound of means. Unit embeddings turn a component into as many log-odds at most, and probabilities of a click at 20
are within 3e-9 of 1: larger ones tell nothing more."""

LOG_DEVIATIONS = (-10.0, 3.0)
"""Bounds of log spreads. The smallest spread changes no probability by more than 1.2e-5, the largest is that of
:data:`LOG_ODDS`."""

_BELIEF, _SCORER, _PREFERENCE = "belief.", "scorer.", "preference."
_OF_SCORER = ("item_scores", "directions")
_NOTHING_LEARNED: tuple[Tensors, dict[str, Any]] = ({}, {})


class BeliefPurifier(BasePurifier):
    """States that hold a belief: posterior mean and spread of the user's preference, and what all users share.

    With ``d`` the size of the agent-side embeddings (an item term does not count), a state has ``3 d + 4`` entries:

    | entries | what | bounds |
    |---|---|---|
    | ``[0, d)`` | posterior mean of the user's vector ``w`` over unit item embeddings, in log-odds | +-20 |
    | ``d`` | posterior mean of ``b``, by how much the user clicks more than predicted | +-20 |
    | ``[d + 1, 2 d + 1)`` | log posterior standard deviation of each component of ``w`` | -10, 3 |
    | ``2 d + 1`` | log posterior standard deviation of ``b`` | -10, 3 |
    | ``[2 d + 2, 3 d + 2)`` | ``g``, what all users share over unit item embeddings | +-20 |
    | ``3 d + 2`` | the shared ``b`` | +-20 |
    | ``3 d + 3`` | session clock, slates shown / Max Len | 0, 1 |

    The mean of ``w`` is that of the whole vector: what the click scorer predicts from the observed state at the
    session's start (its coefficient times the unit state), and what the session's answers add.

    Args:
        scorer: Predicts clicks at a session's start, from the training log.
        preference: The distribution of users' own parts given evidence; None takes the closed form.
        scales: Where the scales of the belief begin.
        key: The world that it was made in.
        report: Provenance, JSON-able.
        learned: What a belief has learned of all users (its tensors and settings); nothing if empty.
    """

    kind = "belief"

    def __init__(
        self,
        scorer: ClickScorer,
        preference: PreferenceModel | None,
        scales: BeliefScales,
        key: WorldKey,
        report: Mapping[str, Any],
        learned: tuple[Tensors, Mapping[str, Any]] = _NOTHING_LEARNED,
    ) -> None:
        self.scorer = scorer
        self.preference: PreferenceModel = ClosedForm() if preference is None else preference
        self.scales = scales
        self.key = key
        self.report = dict(report)
        self._learned = learned

    @classmethod
    def closed_form(
        cls, world: World, scales: BeliefScales | None = None, scorer: ClickScorer | None = None
    ) -> BeliefPurifier:
        """Returns the purifier of a world whose users' own parts have the closed form.

        Args:
            world: A training world; its training log is read.
            scales: Where the scales of the belief begin; None takes wide ones.
            scorer: The click scorer (``WorldPair.scorer`` where there is an item term); None fits one.
        """
        provenance = world.data.provenance
        report = {"mode": cls.kind, "data": asdict(provenance), "test_log": "unread"}
        scales = BeliefScales() if scales is None else scales
        fitted = ClickScorer.fit(world) if scorer is None else scorer
        return cls(fitted, ClosedForm(), scales, WorldKey.of_world(world), report)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        self.key.check(world)
        if self.scorer.n_items != world.n_items:
            raise MismatchError(
                f"the purifier's click scorer knows {self.scorer.n_items} candidates, and there are {world.n_items}; "
                "pretrain one for this environment (kuaifair pretrain)"
            )
        return belief_space(_dimension(world))

    def purify(self, states: FloatArray, window: HistoryWindow) -> NoReturn:
        """Refuses: a belief is about sessions, not about windows.

        Raises:
            TypeError: Always; says what to do.
        """
        raise TypeError(
            "a belief follows sessions from their start and purifies no single states; wrap the environment "
            "(DSRMObservationWrapper, DSRMVectorWrapper, VecDSRM). Offline methods learn on its states from sessions, "
            "not from the log: data={'source': 'env_behaviour'}"
        )

    def belief(self, world: World) -> Belief:
        """Returns a belief about a world's items: at its prior, or with what was learned of all users."""
        belief = Belief(BeliefItems.of_world(world, self.scorer), self.scales)
        tensors, settings = self._learned
        if tensors:
            belief.restore(tensors, settings, "the purifier")
        return belief

    def with_learned(self, belief: Belief, world: World) -> BeliefPurifier:
        """Returns the purifier with what a belief has learned, for other sessions to begin with.

        What was learned in a randomised training world holds for one block of it alone. It is left out there but for
        the scales.

        Args:
            belief: The belief.
            world: Where it learned.
        """
        if world.randomisation is not None:
            belief = deepcopy(belief)
            belief.start_block(0)
        tensors = {name: array.copy() for name, array in belief.tensors().items()}
        learned = copy(self)
        learned._learned = (tensors, belief.settings())
        return learned

    def describe(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.StatePurifier`; what was learned of all users changes no state's meaning."""
        return {name: value for name, value in super().describe().items() if name != "learned"}

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return {
            "scorer": asdict(self.scorer.report),
            "preference": {"kind": self.preference.kind, **self.preference.settings()},
            "scales": asdict(self.scales),
            "world": asdict(self.key),
            "report": self.report,
            "learned": dict(self._learned[1]),
        }

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        of_scorer = {name: getattr(self.scorer, name) for name in _OF_SCORER}
        of_preference = with_prefix(self.preference.tensors(), _PREFERENCE)
        return with_prefix(of_scorer, _SCORER) | of_preference | with_prefix(self._learned[0], _BELIEF)

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> Self:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        of_scorer, of_preference, learned = (
            without_prefix(tensors, prefix) for prefix in (_SCORER, _PREFERENCE, _BELIEF)
        )
        directions = take_tensors(of_scorer, {"directions": (None, None)})["directions"]
        take_tensors(of_scorer, {"item_scores": directions.shape[1:]})
        described = parse_as(dict[str, Any], settings["preference"])
        preference = restore_preference(described.pop("kind"), of_preference, described)
        return cls(
            ClickScorer(of_scorer["item_scores"], directions, parse_as(ScorerReport, settings["scorer"])),
            preference,
            parse_as(BeliefScales, settings["scales"]),
            parse_as(WorldKey, settings["world"]),
            parse_as(dict[str, Any], settings["report"]),
            (learned, parse_as(dict[str, Any], settings["learned"])),
        )


class HasBatch(Protocol):
    """An environment that plays one batch of sessions.

    Attributes:
        world: Their world.
        batch: The sessions; another one while the environment is evaluated.
    """

    world: World
    batch: SessionBatch


class BeliefObservations(SessionObservations):
    """Puts beliefs about the users of running sessions in the place of their observed states.

    Args:
        purifier: The purifier.
        space: Space of an observation.
        sessions: The environment.

    Attributes:
        belief: What all sessions share.
    """

    def __init__(self, purifier: BeliefPurifier, space: spaces.Space[Any], sessions: HasBatch) -> None:
        self.space = with_state(space, purified_space(purifier, sessions.world))
        self.belief = purifier.belief(sessions.world)
        self._purifier = purifier
        self._sessions = sessions
        self._running: BeliefStates | None = None
        self._reached: FloatArray | None = None

    @property
    def running(self) -> BeliefStates:
        """What is known of the sessions that the environment plays now."""
        batch = self._sessions.batch
        if self._running is None or self._running.batch is not batch:
            self._running = BeliefStates(self._purifier, self.belief, batch)
        return self._running

    def started(self, observations: Any, learns: bool) -> Any:
        """See :class:`~dsrm.purified_observations.SessionObservations`."""
        return with_state(observations, self.running.start())

    def stepped(self, observations: Any, learns: bool) -> Any:
        """See :class:`~dsrm.purified_observations.SessionObservations`."""
        running = self.running
        if learns:
            running.learn()
        self._reached = running.step()
        return with_state(observations, running.start())

    def last(self, observations: Sequence[Any], rows: IntArray) -> list[Any]:
        """See :class:`~dsrm.purified_observations.SessionObservations`."""
        assert self._reached is not None
        return [with_state(one, state) for one, state in zip(observations, self._reached[rows], strict=True)]

    def state(self) -> dict[str, Any]:
        """Returns all that is known, of all users and of running sessions, as arrays and numbers."""
        return {"belief": (self.belief.tensors(), self.belief.settings()), "running": self.running.tensors()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what :meth:`state` returned."""
        tensors, settings = state["belief"]
        self.belief.restore(tensors, settings, "the checkpoint")
        self.running.restore(state["running"])


class RunningBeliefs:
    """What is known of ``B`` running sessions, and what all users share of it.

    Where tastes drift it forgets as fast (:func:`~dsrm.belief.evidence_kept`), by the rate in the sessions' settings.

    Args:
        purifier: The purifier.
        belief: What all sessions share.
        batch: The sessions.
    """

    def __init__(self, purifier: BeliefPurifier, belief: Belief, batch: SessionBatch) -> None:
        self.batch = batch
        self._belief = belief
        self._dimension = belief.items.embeddings.shape[1]
        preference = None if isinstance(purifier.preference, ClosedForm) else purifier.preference
        kept = evidence_kept(batch.config.drift)
        self._evidence = SessionEvidence(belief, purifier.scorer, batch, preference, kept)
        self._similarity = similarity_coefficient(purifier.scorer, batch.world)
        n_sessions = batch.batch_size
        self._over = np.ones(n_sessions, np.bool_)
        self._counted = np.zeros(n_sessions, np.bool_)
        self._blocks = np.zeros(n_sessions, np.int64)

    def note_begun(self, rows: NDArray[np.int64]) -> None:
        """Notes which sessions began, ``int64 (n,)``: whether they are counted, and their block."""
        self._over[rows] = False
        self._counted[rows], self._blocks[rows] = self.batch.counted[rows], self.batch.blocks[rows]

    def learn(self) -> None:
        """Learns what the last step says about what all users share, before the step itself is taken."""
        outcome = self.batch.outcome
        assert outcome is not None
        done = np.zeros_like(self._over)
        done[self.batch.finished] = True
        live = self._counted & ~self._over
        if live.any():
            self._evidence.learn(outcome.items, outcome.clicks, live, done, self._blocks)

    def own(self) -> dict[str, Any]:
        """Returns what is known of the running sessions besides the evidence, as arrays by name."""
        return {"over": self._over, "counted": self._counted, "blocks": self._blocks}

    def tensors(self) -> dict[str, Any]:
        """Returns all that is known of the running sessions, by name; :meth:`restore` takes it."""
        return {"own": self.own(), "evidence": self._evidence.tensors()}

    def restore(self, tensors: Mapping[str, Any]) -> None:
        """Takes what :meth:`tensors` returned, for as many sessions over the same items."""
        for name, array in self.own().items():
            array[...] = tensors["own"][name]
        self._evidence.restore(tensors["evidence"])


class BeliefStates(RunningBeliefs):
    """The states of ``B`` running sessions, as :class:`BeliefPurifier` lists their entries.

    Args:
        purifier: The purifier.
        belief: What all sessions share.
        batch: The sessions.
    """

    def __init__(self, purifier: BeliefPurifier, belief: Belief, batch: SessionBatch) -> None:
        super().__init__(purifier, belief, batch)
        space = belief_space(self._dimension)
        self._low, self._high = space.low, space.high
        self._states = np.zeros((batch.batch_size, 3 * self._dimension + 4), np.float32)

    def start(self) -> FloatArray:
        """Starts the beliefs about users whose session has begun, and returns the states of all, ``float32 (B, n)``."""
        beliefs, begun = self._evidence.beliefs, self._evidence.begin()
        if not len(begun):
            return self._states.copy()
        if beliefs.own.scales != self._belief.own_scales:
            beliefs.own.rescale(self._belief.own_scales)
        self.note_begun(begun)
        rows = torch.from_numpy(begun)
        moments = beliefs.update() if len(begun) == len(self._over) else beliefs.refresh(rows)
        self._states[begun] = self._entries(begun, moments)
        return self._states.copy()

    def step(self) -> FloatArray:
        """Takes what the last step showed, and returns the states that it led to, of sessions that it ended too."""
        shown = np.flatnonzero(~self._over)
        self._evidence.take_step(shown)
        moments = self._evidence.beliefs.update()
        self._over[self.batch.finished] = True
        self._states[shown] = self._entries(shown, moments)
        return self._states.copy()

    def own(self) -> dict[str, Any]:
        """See :class:`RunningBeliefs`."""
        return super().own() | {"states": self._states}

    def _entries(self, rows: NDArray[np.int64], moments: Moments) -> FloatArray:
        """Returns the states of the sessions in some rows; beliefs list ``b`` first, states last."""
        d = self._dimension
        means, deviations = (array.numpy()[rows] for array in moments)
        shared = self._belief.shared.coefficients.numpy()
        entries = np.empty((len(rows), 3 * d + 4), np.float32)
        entries[:, :d] = means[:, 1:] + self._similarity * unit_rows(self._evidence.states[rows])[:, :d]
        entries[:, d] = means[:, 0]
        with np.errstate(divide="ignore"):  # a scale of 0 leaves no spread
            entries[:, d + 1 : 2 * d + 1], entries[:, 2 * d + 1] = np.log(deviations[:, 1:]), np.log(deviations[:, 0])
        entries[:, 2 * d + 2 : 3 * d + 2], entries[:, 3 * d + 2] = shared[1 : d + 1], shared[0]
        entries[:, 3 * d + 3] = self._evidence.steps[rows] / self.batch.config.max_len
        return np.clip(entries, self._low, self._high, out=entries)


def belief_space(dimension: int) -> spaces.Box:
    """Returns the space of a :class:`BeliefPurifier`'s states for embeddings of some size."""
    means, deviations = np.full(dimension + 1, LOG_ODDS), np.ones(dimension + 1)
    low = np.concatenate([-means, LOG_DEVIATIONS[0] * deviations, -means, [0.0]])
    high = np.concatenate([means, LOG_DEVIATIONS[1] * deviations, means, [1.0]])
    return spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


def _dimension(world: World) -> int:
    return world.dimension - (world.item_term is not None)


def similarity_coefficient(scorer: ClickScorer, world: World) -> np.float32:
    """Returns the log-odds of a click per unit of similarity between state and item."""
    units = unit_rows(world.embeddings[: world.n_items])
    return np.float32(np.einsum("nd,dn->", units, scorer.directions) / len(units))
