"""Beliefs as candidates: the best items of both popularity groups for each session, with what is known of each.

An agent that ranks needs no more: candidates and their features are computed once for each step, and nothing frozen is
computed again in an optimizer's epochs. No agent that learns from them knows single items, so that it can be used with
other catalogues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from dsrm.belief import NOISE, Belief
from dsrm.belief_purifier import BeliefObservations, BeliefPurifier, HasBatch, RunningBeliefs
from dsrm.tolerance_belief import ToleranceBelief, TolerancePrior, popular_share, taste_items
from kuaifair_env.batch import SessionBatch, SessionConfig
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.fair_counts import fair_counts_now
from kuaifair_env.files import Tensors, parse_as
from kuaifair_env.ranking import top_k
from kuaifair_env.world import World

if TYPE_CHECKING:
    from typing_extensions import Self

CANDIDATES_PER_GROUP = 16
"""Items of each popularity group that an agent ranks; at least a slate."""

CANDIDATE_FEATURES = (
    "logit",
    "prior",
    "shared",
    "shared_deviation",
    "taste",
    "offset",
    "deviation",
    "similarity",
    "clicks",
    "skips",
    "popular",
    "exposures",
)
SESSION_FEATURES = (
    "clock",
    "click_rate",
    "shows",
    "level",
    "level_deviation",
    "taste_size",
    "best_popular",
    "best_tail",
    "popular_taste",
    "last_share",
)
COUNT_FEATURES = ("allowed", "risk")

BOUND = 50.0
"""Bound of all features."""
_NONE = -1


class CandidatePurifier(BeliefPurifier):
    """A belief that shows agents candidates instead of a state.

    An observation is a dict. With ``C`` the number of candidates, ``K`` the slate size:

    | entry | shape | what |
    |---|---|---|
    | ``candidates`` | ``int64 (C,)`` | the best popular items by the posterior mean of their log-odds, then the best others, best first; -1 where a group has no more that may be shown |
    | ``features`` | ``float32 (C, 12)`` | :data:`CANDIDATE_FEATURES` of each |
    | ``counts`` | ``float32 (K + 1, 2)`` | for each number of popular items in a slate: whether the leave rule allows it and the groups can fill it; by what chance the user does not tolerate it (:class:`~dsrm.tolerance_belief.ToleranceBelief`) |
    | ``joint_risks`` | ``float32 (K + 1, K + 1)`` | by what chance the user tolerates neither of two numbers |
    | ``slates_left`` | ``float32 (1,)`` | for how many slates after the next one the user will stay, where what it tells of the user can be made use of; elsewhere 0 |
    | ``state`` | ``float32 (10,)`` | :data:`SESSION_FEATURES` |

    Features of candidates: ``logit`` is the posterior mean of all parts together, with Thompson sampling's draw of the
    item's offset where the wrapper learns; ``prior``, ``shared``, ``taste`` and ``offset`` are its parts,
    ``shared_deviation`` the spread of the shared offset, ``deviation`` that of the user's own part; ``similarity`` is the
    cosine of the user's purified vector and the item's embedding; ``clicks`` and ``skips`` are log(1 + how often) in
    the session; ``exposures`` is log(1 + how often) in the training log.

    Features of sessions: ``clock`` is slates shown / Max Len; ``click_rate`` of the items shown; ``shows`` is
    log(1 + how many); ``level`` and ``level_deviation`` are mean and spread of ``b_u``; ``taste_size`` is the length of
    ``w_u``; ``best_popular`` and ``best_tail`` are mean log-odds of the best half a slate of both groups;
    ``popular_taste`` is the popular share of the clicks that the belief expects if all items were shown alike;
    ``last_share`` is the popular share of the last slate, half before the first.

    Arguments are those of :class:`~dsrm.belief_purifier.BeliefPurifier`, and:

    Args:
        tolerance: How tolerated popular shares lie before a session, fitted to training users; None takes a normal one.
    """  # noqa: E501

    kind = "candidates"

    def __init__(self, *arguments: Any, tolerance: TolerancePrior | None = None) -> None:
        super().__init__(*arguments)
        self.tolerance = TolerancePrior.normal() if tolerance is None else tolerance

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return super().settings() | {"tolerance": asdict(self.tolerance)}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> Self:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        purifier = super().restore(tensors, settings)
        purifier.tolerance = parse_as(TolerancePrior, settings["tolerance"])
        return purifier


class CandidateObservations(BeliefObservations):
    """Puts candidates in the place of observations.

    Args:
        purifier: The purifier.
        sessions: The environment.
    """

    _purifier: CandidatePurifier

    def __init__(self, purifier: CandidatePurifier, sessions: HasBatch) -> None:
        purifier.bind(sessions.world)
        self.space = candidate_space(sessions.world, sessions.batch.config)
        self.belief = purifier.belief(sessions.world)
        self._purifier = purifier
        self._sessions = sessions
        self._candidates: RunningCandidates | None = None
        self._last: dict[str, NDArray[Any]] | None = None

    @property
    def running(self) -> RunningCandidates:  # type: ignore[override]
        """What is known of the sessions that the environment plays now."""
        batch = self._sessions.batch
        if self._candidates is None or self._candidates.batch is not batch:
            self._candidates = RunningCandidates(self._purifier, self.belief, batch)
        return self._candidates

    def started(self, observations: Any, learns: bool) -> Any:
        """See :class:`~dsrm.purified_observations.SessionObservations`."""
        return self.running.look(explores=learns)

    def stepped(self, observations: Any, learns: bool) -> Any:
        """See :class:`~dsrm.purified_observations.SessionObservations`."""
        if learns:
            self.running.learn()
        self._last = self.running.step()
        return self.running.look(explores=learns)

    def last(self, observations: Sequence[Any], rows: IntArray) -> list[Any]:
        """See :class:`~dsrm.purified_observations.SessionObservations`.

        What a session's last slate says of its user is left out: an agent shows nothing more to that user.
        """
        assert self._last is not None
        return [{name: array[row] for name, array in self._last.items()} for row in rows.tolist()]


class RunningCandidates(RunningBeliefs):
    """Candidates of ``B`` running sessions, as :class:`CandidatePurifier` describes them.

    Args:
        purifier: The purifier.
        belief: What all sessions share.
        batch: The sessions.
    """

    def __init__(self, purifier: CandidatePurifier, belief: Belief, batch: SessionBatch) -> None:
        super().__init__(purifier, belief, batch)
        world, n_sessions = batch.world, batch.batch_size
        popular = world.groups.popular
        self._members = [np.flatnonzero(group) for group in (popular, ~popular)]
        self._sizes = _group_sizes(world, batch.config)
        self._scores = torch.empty(n_sessions, world.n_items)
        self._group_scores = [torch.empty(n_sessions, len(members)) for members in self._members]
        self._popular = np.repeat(np.asarray([True, False]), self._sizes).astype(np.float32)
        self._exposures = np.log1p(world.exposures).astype(np.float32)
        self._units = torch.from_numpy(belief.items.embeddings)
        of_taste = taste_items(world.n_items)
        self._taste_items = torch.from_numpy(of_taste)
        self._taste_popular = torch.from_numpy(popular[of_taste].astype(np.float32))
        self._tolerance = ToleranceBelief(batch.config, n_sessions, purifier.tolerance)
        self._noise = NOISE[batch.config.repeats]
        self._draws = torch.zeros(n_sessions, world.n_items)
        space = candidate_space(world, batch.config)
        self._shown: dict[str, NDArray[Any]] = {
            name: np.zeros((n_sessions, *(part.shape or ())), part.dtype) for name, part in space.spaces.items()
        }

    def look(self, explores: bool) -> dict[str, NDArray[Any]]:
        """Returns the observations of all sessions, after what they showed since the last call.

        Args:
            explores: Whether sessions rank by draws of the items' shared offsets (Thompson sampling), one for each.
        """
        begun = self._evidence.begin()
        n_items = self.batch.world.n_items
        if len(begun):
            self.note_begun(begun)
            if explores:
                # Torch's own generator, which Stable-Baselines3 seeds.
                self._draws[torch.from_numpy(begun)] = torch.randn(len(begun), n_items)
        beliefs = self._evidence.beliefs
        logits = beliefs.logits(converged=self._evidence.take(), out=self._scores)
        if explores:
            logits.addcmul_(self._belief.shared.deviation, self._draws, value=self._noise)
        popular_taste = popular_share(logits.index_select(1, self._taste_items), self._taste_popular).numpy()
        self._tolerance.start(begun, popular_taste[begun])
        allowed = self.batch.simulator.allowed
        candidates, values = self._best(logits, allowed)
        features = self._candidate_features(candidates, values)
        self._shown = {
            "state": self._session_features(values, popular_taste),
            "candidates": np.where(np.isneginf(values), _NONE, candidates),
            "features": features,
            "counts": self._count_features(allowed),
            "joint_risks": self._tolerance.joint_risks().astype(np.float32),
            "slates_left": self._slates_left(values),
        }
        return dict(self._shown)

    def step(self) -> dict[str, NDArray[Any]]:
        """Takes what the last step says of tolerance, and returns last observations of sessions that it ended."""
        outcome = self.batch.outcome
        assert outcome is not None
        self._tolerance.observe(outcome.popular_share, outcome.violation)
        self._over[self.batch.finished] = True
        state = self._shown["state"].copy()
        state[:, SESSION_FEATURES.index("clock")] += 1.0 / self.batch.config.max_len
        state[:, SESSION_FEATURES.index("last_share")] = outcome.popular_share
        return self._shown | {"state": np.minimum(state, BOUND)}

    def own(self) -> dict[str, Any]:
        """See :class:`~dsrm.belief_purifier.RunningBeliefs`."""
        return super().own() | self._shown | {"draws": self._draws.numpy(), "tolerance": self._tolerance.weights}

    def _best(self, scores: Tensor, allowed: NDArray[np.bool_] | None) -> tuple[NDArray[np.int64], FloatArray]:
        """Returns the best items of both groups and their scores, ``(B, C)``; minus infinity where none is left."""
        if allowed is not None:
            scores.masked_fill_(torch.from_numpy(~allowed), -torch.inf)
        items, values = [], []
        for members, size, own in zip(self._members, self._sizes, self._group_scores, strict=True):
            torch.index_select(scores, 1, torch.from_numpy(members), out=own)
            best = top_k(own.numpy(), size) if size else np.zeros((len(own), 0), np.int64)
            items.append(members[best])
            values.append(np.take_along_axis(own.numpy(), best, axis=1))
        return np.concatenate(items, axis=1), np.concatenate(values, axis=1)

    def _candidate_features(self, candidates: NDArray[np.int64], values: FloatArray) -> FloatArray:
        beliefs = self._evidence.beliefs
        places = torch.from_numpy(candidates)
        parts = beliefs.explain(places)
        taste = beliefs.moments().means[:, 1:]
        states = torch.from_numpy(unit_rows(self._evidence.states)[:, : self._dimension])
        vectors = torch.nn.functional.normalize(taste + float(self._similarity) * states, dim=1, eps=1e-6)
        similarity = torch.einsum("bd,bnd->bn", vectors, self._units[places])
        columns = [
            np.where(np.isneginf(values), np.float32(-BOUND), values),
            parts.prior.numpy(),
            parts.shared.numpy(),
            parts.shared_deviation.numpy(),
            parts.taste.numpy(),
            parts.offset.numpy(),
            parts.deviation.numpy(),
            similarity.numpy(),
            np.log1p(parts.clicks.numpy()),
            np.log1p((parts.shows - parts.clicks).numpy()),
            np.broadcast_to(self._popular, candidates.shape),
            self._exposures[candidates],
        ]
        return np.stack(columns, axis=2, dtype=np.float32).clip(-BOUND, BOUND)

    def _session_features(self, values: FloatArray, popular_taste: FloatArray) -> FloatArray:
        beliefs = self._evidence.beliefs
        shows, clicks = (array.numpy() for array in beliefs.own.totals())
        means, deviations = beliefs.moments()
        half = max(self.batch.config.items_per_slate // 2, 1)
        n_popular = self._sizes[0]
        finite = np.where(np.isneginf(values), np.float32(-BOUND), values)
        groups = finite[:, :n_popular][:, :half], finite[:, n_popular:][:, :half]
        steps = self._evidence.steps
        last = np.where(steps > 0, self._last_shares(), 0.5)
        columns = [
            np.minimum(steps / self.batch.config.max_len, 1.0),
            clicks / np.maximum(shows, 1.0),
            np.log1p(shows),
            means[:, 0].numpy(),
            deviations[:, 0].numpy(),
            means[:, 1:].norm(dim=1).numpy(),
            *(group.mean(axis=1) if group.shape[1] else np.full(len(values), -BOUND) for group in groups),
            popular_taste,
            last,
        ]
        return np.stack(columns, axis=1, dtype=np.float32).clip(-BOUND, BOUND)

    def _last_shares(self) -> NDArray[np.float64]:
        outcome = self.batch.outcome
        return np.full(self.batch.batch_size, 0.5) if outcome is None else outcome.popular_share

    def _count_features(self, allowed: NDArray[np.bool_] | None) -> FloatArray:
        slate_size = self.batch.config.items_per_slate
        if allowed is None:
            left = [np.full((self.batch.batch_size, 1), len(members)) for members in self._members]
        else:
            left = [np.count_nonzero(allowed[:, members], axis=1)[:, None] for members in self._members]
        counts = np.arange(slate_size + 1)
        possible = (counts <= left[0]) & (slate_size - counts <= left[1])
        fair = possible & fair_counts_now(self.batch)
        fair = np.where(fair.any(axis=1, keepdims=True), fair, possible)
        return np.stack([fair, self._tolerance.risks()], axis=2, dtype=np.float32)

    def _slates_left(self, values: FloatArray) -> FloatArray:
        best = np.sort(values, axis=1)[:, -self.batch.config.items_per_slate :]
        click_rates = torch.sigmoid(torch.from_numpy(best)).mean(dim=1).numpy()
        simulator = self.batch.simulator
        left = self._tolerance.slates_left(simulator.temper, click_rates)
        possible = self.batch.config.max_len - simulator.steps - 1
        return np.minimum(left, possible).clip(0.0, BOUND)[:, None].astype(np.float32)


def candidate_space(world: World, config: SessionConfig) -> spaces.Dict:
    """Returns the space of a :class:`CandidatePurifier`'s observations."""
    n_candidates, n_counts = sum(_group_sizes(world, config)), config.items_per_slate + 1

    def features(*shape: int) -> spaces.Box:
        return spaces.Box(-BOUND, BOUND, shape, np.float32)

    return spaces.Dict(
        {
            "state": features(len(SESSION_FEATURES)),
            "candidates": spaces.Box(_NONE, world.n_items - 1, (n_candidates,), np.int64),
            "features": features(n_candidates, len(CANDIDATE_FEATURES)),
            "counts": features(n_counts, len(COUNT_FEATURES)),
            "joint_risks": features(n_counts, n_counts),
            "slates_left": features(1),
        }
    )


def _group_sizes(world: World, config: SessionConfig) -> list[int]:
    """Returns how many candidates there are of the popular items, and of the others."""
    n_popular = int(np.count_nonzero(world.groups.popular))
    size = max(CANDIDATES_PER_GROUP, config.items_per_slate)
    return [min(size, n_popular), min(size, world.n_items - n_popular)]
