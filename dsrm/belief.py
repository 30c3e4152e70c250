"""A belief about users and items in two levels: what all users share, and what each current user likes beyond that.

    logit(u, i) = prior_ui + [b + g . x_i + delta_i] + [b_u + w_u . e_i + delta_ui]

``prior_ui`` is what the training log predicts at the session's start. The shared part (:mod:`dsrm.shared_level`) is
kept from session to session; the user's own part (:mod:`dsrm.own_level`) starts anew with each session. Both learn from
what the agent showed. What a platform showed before (the log behind a session) enters the prior alone: which items a
platform leaves unclicked says something else than what a user skips of an agent's slates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsrm.click_scorer import ClickScorer
from dsrm.own_level import STEADY, OwnLevel, OwnMoments, OwnScales
from dsrm.preference import ClosedForm, Evidence, Moments, PreferenceModel
from dsrm.shared_level import PRIOR_PARAMETERS, SharedLevel, SharedScales
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import (
    Family,
    Tensors,
    open_artifact,
    parse_as,
    save_artifact,
    take_tensors,
    with_prefix,
    without_prefix,
)
from kuaifair_env.randomisation import offset_shape
from kuaifair_env.simulator import Repeats
from kuaifair_env.world import World

BELIEFS = Family("kuaifair-belief", 5, "belief", "serve again")

NOISE: dict[Repeats, float] = {"allow": 0.5, "forbid": 0.3}
"""Spread of Thompson sampling's draws of item offsets while serving, in posterior standard deviations.

Where no item comes back within a session, a draw that misleads costs more than it teaches.
"""

_ALSO = "also."
_OF_SHARED = ("weights", "values", "mean", "deviation", "coefficients")
_OF_OWN = ("squares", "determined", "steady")
_COLUMNS = ("embeddings", "features", "log")
_EMBEDDING_TOLERANCE = 1e-3
_STEPS_PER_UPDATE, _STEPS_PER_SCALES = 5, 10
_MAX_STEP, _MIN_WEIGHT = 4.0, 1e-6
_FIRST_USERS = 20.0
"""Weight of the first share of steady users when it is re-estimated, in users."""
_SESSIONS_REMEMBERED = 200
"""Over how many sessions own scales are estimated: they shrink as the shared part learns what the log misjudges."""


@dataclass(frozen=True)
class BeliefScales:
    """Prior standard deviations of both levels, in log-odds.

    They begin wide: the training log agrees with itself and cannot show how far it is from what users do now.
    """

    own: OwnScales = field(default_factory=lambda: OwnScales(steady=STEADY))
    shared: SharedScales = field(default_factory=SharedScales)

    @classmethod
    def of_users(cls, own: OwnScales) -> BeliefScales:
        """Returns scales with a fitted own part; a log seldom tells how steady users are, so some are taken to be."""
        return cls(own=replace(own, steady=STEADY))


def evidence_kept(drift: float | None) -> float:
    """Returns the share of what answers say of a user that is left a slate later.

    Of a taste that correlates by ``a`` with that of a slate before, an answer then explains ``a^2`` as much variance.

    Args:
        drift: Slates after which a taste correlates by .5 with that before (:class:`~kuaifair_env.drift.TasteDrift`);
            None where tastes stay.
    """
    return 1.0 if drift is None else 0.5 ** (2.0 / drift)


class ScalesThen(NamedTuple):
    """The scales after a number of sessions."""

    sessions: int
    scales: BeliefScales


@dataclass(frozen=True)
class BeliefItems:
    """What a belief reads of the items: nothing but the training log and the catalogue.

    Attributes:
        data_hash: Hash of the data set.
        ids: ``int64 (N,)``, keys of the candidates.
        embeddings: ``float32 (N, d)``, unit agent-side embeddings of the candidates, in both levels; ``d`` may be 0.
        exposures: ``int64 (N,)``, how often each was shown in the training log.
        features: ``float32 (N, m)``, standardised item features in the shared level; ``m`` may be 0.
        log: ``float32 (N, 3)``, what the training log says of each, in the shared level: the item's part of the prior's
            log-odds, its log exposures, both standardised, and their product; ``(N, 0)`` where the prior is not known.
    """

    data_hash: str
    ids: NDArray[np.int64]
    embeddings: FloatArray
    exposures: NDArray[np.int64]
    features: FloatArray
    log: FloatArray

    @classmethod
    def of_world(cls, world: World, scorer: ClickScorer | None = None) -> BeliefItems:
        """Reads the items of a world; its response and its test log are not read.

        Args:
            world: The world.
            scorer: The prior of the belief, for :attr:`log`.
        """
        n_items = world.n_items
        embeddings = world.embeddings[:n_items] if world.item_term is None else world.embeddings[:n_items, :-1]
        ids = world.data.items.keys[:n_items]
        said = np.zeros((n_items, 0), np.float32)
        if scorer is not None:
            said = _said_by_log(world.exposures, scorer.item_scores)
        return cls(world.data.data_hash, ids, unit_rows(embeddings), world.exposures, _features(world), said)

    def without_columns(self) -> BeliefItems:
        """Returns the items without columns for vectors to run over: each then is known by its offset alone."""
        empty = np.zeros((len(self.embeddings), 0), np.float32)
        return replace(self, embeddings=empty, features=empty, log=empty)

    def same_as(self, other: BeliefItems) -> bool:
        """Says whether these are the same items in the same order, with the same columns."""
        return (
            self.data_hash == other.data_hash
            and np.array_equal(self.ids, other.ids)
            and all(_alike(getattr(self, name), getattr(other, name)) for name in _COLUMNS)
        )


class Belief:
    """What is kept while serving: the shared level, and the scales of both.

    Fresh, it is *frozen*: the shared level is at its prior. Nothing is kept of single sessions: memory is
    ``O(N (d + m))`` whatever was served, but for six numbers every fifth step in :attr:`course`.

    Args:
        items: What is known of the items.
        scales: Where the scales begin.

    Raises:
        ValueError: If the scales have the log weighed, and the items do not hold what it says.

    Attributes:
        items: The items.
        shared: The shared level.
        own_scales: Scales of the own part, of running sessions too.
        sessions: Sessions learned from.
        steps: Steps learned from.
        block: Block of a randomised world that the shared level is about (:mod:`kuaifair_env.randomisation`).
        course: The scales after each update of the shared level.
    """

    def __init__(self, items: BeliefItems, scales: BeliefScales | None = None) -> None:
        self._first = BeliefScales() if scales is None else scales
        self.items = items
        columns = {"vector": items.embeddings, "features": items.features}
        if self._first.shared.log > 0:
            if not items.log.shape[1]:
                raise ValueError(
                    f"a scale of {self._first.shared.log} for what the log says needs items that hold it: give "
                    "BeliefItems.of_world the click scorer too"
                )
            columns["log"] = items.log
        self.shared = SharedLevel(
            {name: torch.from_numpy(group) for name, group in columns.items()},
            torch.from_numpy(offset_shape(items.exposures).astype(np.float32)),
            self._first.shared,
        )
        self.own_scales = self._first.own
        self.sessions = 0
        self.course: list[ScalesThen] = [ScalesThen(0, self._first)]
        self._squares = torch.zeros(3, dtype=torch.float64)
        self._steady = torch.zeros(2, dtype=torch.float64)  # users taken as steady, of how many
        self._determined = torch.zeros(3, dtype=torch.float64)
        self.steps = 0
        self.block = 0

    @property
    def scales(self) -> BeliefScales:
        """The scales now."""
        return BeliefScales(self.own_scales, self.shared.scales)

    def start_block(self, block: int) -> None:
        """Starts the shared level anew, with the scales of now, for another block of a randomised world."""
        self.block = block
        self.shared.start_anew()

    def remember(self, moments: OwnMoments, sessions: int) -> None:
        """Takes what some finished sessions say about the own scales; older ones count less."""
        memory = (1.0 - 1.0 / _SESSIONS_REMEMBERED) ** sessions
        self._squares = memory * self._squares + moments.squares
        self._determined = memory * self._determined + moments.determined
        self._steady = memory * self._steady + moments.users()
        self.sessions += sessions

    def move(self, running: OwnMoments | None) -> None:
        """Moves the shared level to the posterior of all answers so far, and maybe the scales.

        Args:
            running: What running sessions say about the own scales; scales of both levels then move by a step of the
                marginal likelihood's fixed point. None leaves them as they are.
        """
        self.shared.update(reestimate=running is not None)
        if running is not None:
            own = self._first.own
            first = torch.tensor([own.intercept, own.taste, own.offset], dtype=torch.float64) ** 2
            numerator = self._squares + running.squares + PRIOR_PARAMETERS * first
            estimate = numerator / (self._determined + running.determined + PRIOR_PARAMETERS)
            intercept, taste, offset = estimate.clamp(min=0.0).sqrt().tolist()
            steady, sessions = (self._steady + running.users()).tolist()
            share = (steady + _FIRST_USERS * own.steady_share) / (sessions + _FIRST_USERS)
            self.own_scales = OwnScales(intercept, taste, offset, own.steady, share)
        self.course.append(ScalesThen(self.sessions, self.scales))

    def save(self, path: str | Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Writes the belief to one safetensors file, atomically.

        Args:
            path: The file.
            tensors: What else to keep in it, by name.
        """
        also = with_prefix({name: tensor.numpy() for name, tensor in (tensors or {}).items()}, _ALSO)
        save_artifact(path, "two-level", also | self.tensors(), self.settings(), BELIEFS)

    def load(self, path: str | Path) -> dict[str, Tensor]:
        """Takes the place of what :meth:`save` wrote, and returns what else was kept in the file.

        Raises:
            ArtifactError: If the file is missing, damaged, foreign, or a belief about other items.
        """
        with open_artifact(path, "two-level", BELIEFS) as (_, arrays, settings):
            self.restore(arrays, settings, path)
        return {name: torch.from_numpy(array) for name, array in without_prefix(arrays, _ALSO).items()}

    def tensors(self) -> Tensors:
        """Returns what was learned, and the items that it is about, as arrays by name."""
        return {
            **{name: getattr(self.shared, name).numpy() for name in _OF_SHARED},
            "squares": self._squares.numpy(),
            "determined": self._determined.numpy(),
            "steady": self._steady.numpy(),
            "ids": self.items.ids,
            **{name: getattr(self.items, name) for name in _COLUMNS},
        }

    def settings(self) -> dict[str, Any]:
        """Returns the JSON-able rest of what was learned."""
        return {
            "data_hash": self.items.data_hash,
            "sessions": self.sessions,
            "steps": self.steps,
            "block": self.block,
            "scales": asdict(self.scales),
            "course": [[then.sessions, asdict(then.scales)] for then in self.course],
        }

    def restore(self, tensors: Tensors, settings: Mapping[str, Any], source: str | Path) -> None:
        """Takes the place of what :meth:`tensors` and :meth:`settings` returned.

        Args:
            tensors: The arrays.
            settings: The rest.
            source: Where they come from, for messages.

        Raises:
            ArtifactError: If the belief is about other items.
            ValueError: If something is missing or does not fit; nothing has changed then.
        """
        shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(_COLUMNS, (None, None))
        take_tensors(tensors, shapes | {"ids": (None,), "squares": (3,), "determined": (3,), "steady": (2,)})
        of_items = {name: tensors[name] for name in ("ids", *_COLUMNS)}
        if not self.items.same_as(replace(self.items, data_hash=settings["data_hash"], **of_items)):
            raise ArtifactError(f"{source} holds a belief about other items than these, or with other columns")
        take_tensors(tensors, {name: tuple(getattr(self.shared, name).shape) for name in _OF_SHARED})
        scales = parse_as(BeliefScales, settings["scales"])
        course = [ScalesThen(*entry) for entry in parse_as(list[tuple[int, BeliefScales]], settings["course"])]
        first = course[0].scales
        counters = [parse_as(int, settings[name]) for name in ("sessions", "steps", "block")]
        learned = {name: torch.from_numpy(tensors[name].copy()) for name in (*_OF_SHARED, *_OF_OWN)}
        self.course, self._first, self.own_scales = course, first, scales.own
        self.sessions, self.steps, self.block = counters
        self.shared.restore(scales.shared, first.shared, learned)
        self._squares, self._determined, self._steady = (learned[name] for name in _OF_OWN)


class LogitParts(NamedTuple):
    """What log-odds of a click are made of, each ``float32 (B, n)``.

    Attributes:
        prior: What the training log predicts at the session's start.
        shared: Posterior mean of what all users share about the item.
        shared_deviation: Its spread.
        taste: ``w_u . e_i`` at the posterior mean.
        offset: Posterior mean of ``delta_ui``.
        deviation: Posterior standard deviation of the user's own part.
        shows: How often the session showed the item.
        clicks: How often it was clicked.
    """

    prior: Tensor
    shared: Tensor
    shared_deviation: Tensor
    taste: Tensor
    offset: Tensor
    deviation: Tensor
    shows: Tensor
    clicks: Tensor


class SessionBeliefs:
    """The beliefs about the users of ``B`` concurrent sessions.

    Args:
        belief: What all sessions share.
        n_sessions: Number of sessions ``B``.
        preference: Which distribution users' own parts have, given evidence.
        kept: See :class:`~dsrm.own_level.OwnLevel`.
    """

    def __init__(
        self, belief: Belief, n_sessions: int, preference: PreferenceModel | None = None, kept: float = 1.0
    ) -> None:
        self._belief = belief
        self._preference = ClosedForm() if preference is None else preference
        self._embeddings = embeddings = torch.from_numpy(belief.items.embeddings)
        self.own = OwnLevel(
            torch.cat([torch.ones(len(embeddings), 1), embeddings], dim=1), n_sessions, belief.own_scales, kept
        )
        self._prior = torch.zeros(n_sessions, len(embeddings))
        self._contexts = torch.zeros(n_sessions, 0)
        self._shared_mean = belief.shared.mean
        self._base = self._prior + self._shared_mean
        self._moments = Moments(torch.zeros_like(self.own.means), self.own.widths.expand_as(self.own.means))
        self._offsets = self.own.offsets_at(self._moments.means)

    def start(self, rows: Tensor, prior: Tensor, contexts: Tensor | None = None) -> None:
        """Starts new sessions.

        Args:
            rows: ``int64 (n,)``.
            prior: ``float32 (n, N)``, log-odds of a click at the session's start, from the training log.
            contexts: ``float32 (n, c)``, what the log shows of the users, for models that read it.
        """
        self._prior[rows] = prior
        self._base[rows] = prior + self._shared_mean
        if contexts is not None:
            if not self._contexts.shape[1]:
                self._contexts = torch.zeros(len(self._contexts), contexts.shape[1])
            self._contexts[rows] = contexts
        self.own.start(rows)

    def observe(self, rows: Tensor, items: Tensor, clicks: Tensor) -> None:
        """Adds answers to slates that an agent showed; see :meth:`OwnLevel.observe`."""
        self.own.observe(rows, items, clicks, self._base)

    def update(self, converged: bool = False) -> Moments:
        """Moves what is known of the users to all evidence so far.

        Args:
            converged: Whether own posteriors are moved all the way to their modes; otherwise they move by a few steps
                from where they were, which is enough after each single slate.

        Returns:
            Mean and spread of the users' own parts.
        """
        self.move(converged)
        self._moments = self._preference.moments(self.evidence())
        self._offsets = self.own.offsets_at(self._moments.means)
        return self._moments

    def move(self, converged: bool = False) -> None:
        """Does what :meth:`update` does for the closed form alone, of which the next answers are predicted."""
        if self._shared_mean is not self._belief.shared.mean:
            self._shared_mean = self._belief.shared.mean
            torch.add(self._prior, self._shared_mean, out=self._base)
        if converged:
            self.own.converge(self._base)
        else:
            self.own.update(self._base)

    def logits(self, converged: bool = False, out: Tensor | None = None) -> Tensor:
        """Returns ``float32 (B, N)``, the posterior log-odds of a click on every item; see :meth:`update`.

        Args:
            converged: See :meth:`update`.
            out: ``float32 (B, N)``, where to put them; None takes new memory.
        """
        self.update(converged)
        logits = torch.addmm(self._base, self._moments.means, self.own.features.T, out=out)
        return self.own.add_offsets(logits, self._offsets)

    def explain(self, items: Tensor) -> LogitParts:
        """Returns what the log-odds of a click on some items are made of, as of the last :meth:`update`.

        Args:
            items: ``int64 (B, n)``.
        """
        shows, clicks, offsets = self.own.answers(items, self._offsets)
        return LogitParts(
            self._prior.gather(1, items),
            self._belief.shared.mean[items],
            self._belief.shared.deviation[items],
            self._taste(items),
            offsets,
            self.own.variances(items).clamp(min=0.0).sqrt(),
            shows,
            clicks,
        )

    def refresh(self, rows: Tensor) -> Moments:
        """Does what :meth:`update` does for sessions that were started since, and leaves the others as they are.

        Args:
            rows: ``int64 (n,)``, the rows of these sessions, of which there is no evidence yet.
        """
        fresh = self._preference.moments(self.evidence().take(rows))
        for ours, theirs in zip(self._moments, fresh, strict=True):
            ours[rows] = theirs
        return self._moments

    def evidence(self) -> Evidence:
        """Returns what is known about the users, as of the last :meth:`update`."""
        return Evidence(self._contexts, self.own.means, self.own.covariances, self.own.widths)

    def moments(self) -> Moments:
        """Returns mean and spread of the users' own parts, as of the last :meth:`update`."""
        return self._moments

    def _taste(self, items: Tensor) -> Tensor:
        """Returns ``w_u . e_i`` of items ``(B, n)`` as of the last :meth:`update`."""
        return (self._embeddings[items] @ self._moments.means[:, 1:, None])[..., 0]

    def learn(self, items: Tensor, clicks: Tensor, live: Tensor, done: Tensor) -> None:
        """Hands on what the slates that followed the last :meth:`update` say about what all users share.

        An answer ``y`` that was predicted with probability ``p`` observes the shared term with precision
        ``h = p (1 - p)`` at its mean + ``(y - p) / h``: the own part is taken as known before the answer. Where that
        would be a step of more than four, as for clicks on what nobody was thought to click, the precision is raised
        until it is four; a Gaussian knows nothing of how the curvature changes on the way. Each fifth step moves the
        shared level, each tenth the scales.

        Args:
            items: ``int64 (B, K)``.
            clicks: ``bool (B, K)``.
            live: ``bool (B,)``, sessions to learn from.
            done: ``bool (B,)``, sessions that have ended.
        """
        offsets = self.own.answers(items, self._offsets).offsets
        own = self._moments.means[:, :1] + self._taste(items) + offsets
        probability = torch.sigmoid(self._base.gather(1, items) + own)[live]
        surprise = clicks[live].to(probability.dtype) - probability
        weights = torch.maximum(probability * (1.0 - probability), surprise.abs() / _MAX_STEP).clamp(min=_MIN_WEIGHT)
        values = self._belief.shared.mean[items[live]] + surprise / weights
        ended, running = (torch.nonzero(live & over)[:, 0] for over in (done, ~done))
        if len(ended):
            self._belief.remember(self.own.moments(ended), len(ended))
        self._belief.shared.add(items[live].reshape(-1), weights.reshape(-1), values.reshape(-1))
        self._belief.steps += 1
        if self._belief.steps % _STEPS_PER_UPDATE:
            return
        rescales = self._belief.steps % _STEPS_PER_SCALES == 0 and len(running) > 0
        self._belief.move(self.own.moments(running) if rescales else None)
        if rescales:
            self.own.rescale(self._belief.own_scales)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that is known of the running sessions, by name; :meth:`restore` takes it."""
        moments = {f"moments.{name}": tensor for name, tensor in self._moments._asdict().items()}
        return self.own.tensors() | moments | {"prior": self._prior, "contexts": self._contexts}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`tensors` returned, for as many sessions over the same items, with what was shared then."""
        self.own.restore(tensors, self._belief.own_scales)
        self._prior, self._contexts = tensors["prior"].clone(), tensors["contexts"].clone()
        self._shared_mean = self._belief.shared.mean
        self._base = self._prior + self._shared_mean
        self._moments = Moments(*(tensors[f"moments.{name}"].clone() for name in Moments._fields))
        self._offsets = self.own.offsets_at(self._moments.means)


def _alike(one: FloatArray, two: FloatArray) -> bool:
    return one.shape == two.shape and bool(np.allclose(one, two, atol=_EMBEDDING_TOLERANCE))


def _features(world: World) -> FloatArray:
    """Returns features and tags of the candidates, ``float32 (N, m)``, standardised and then over ``sqrt(m)``."""
    features = world.data.items.features.values[: world.n_items]
    standard = _standardised(np.concatenate([features, world.tags], axis=1, dtype=np.float64))
    standard = standard[:, standard.any(axis=0)]
    return np.asarray(standard / np.sqrt(max(standard.shape[1], 1)), np.float32)


def _said_by_log(exposures: NDArray[np.int64], scores: FloatArray) -> FloatArray:
    """Returns the columns of :attr:`BeliefItems.log`."""
    score, exposed = _standardised(np.stack([scores, np.log1p(exposures)], axis=1).astype(np.float64)).T
    return np.stack([score, exposed, score * exposed], axis=1).astype(np.float32)


def _standardised(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns columns in deviations from their mean, three at most; one that is the same throughout becomes 0."""
    deviations = columns.std(axis=0)
    differ = deviations > 1e-6
    standard = (columns - columns.mean(axis=0)) / np.where(differ, deviations, 1.0)
    return np.asarray(np.where(differ, np.clip(standard, -3.0, 3.0), 0.0))
