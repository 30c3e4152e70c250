"""Sessions in which preference models are compared: what is known of a user, and the answers that are to be predicted.

In fitted worlds sessions are played once for all models and training seeds, and the world's own click probabilities are
what is to be predicted; among real random rows it is each user's next rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from numpy.typing import NDArray
from real_rows import FIRST_ROWS, ROUNDS, RandomRows, shared_correction
from torch import Tensor

from dsrm.belief import Belief, BeliefItems, BeliefScales
from dsrm.own_level import OwnLevel, OwnScales
from dsrm.preference import ClosedForm, Evidence, LogContexts, Moments
from dsrm.preference_training import PreferenceKind
from dsrm.session_evidence import SessionEvidence
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.controls import Control, RandomSlates
from hrl_policies.worlds import WorldPair
from kuaifair_env import SessionConfig, World, serve
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.observations import observed_states
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.simulator import FixedSessions
from kuaifair_env.splits import chosen_users, evaluation_users

USERS, SERVED_SESSIONS, N_ENVS, BATCH = 800, 1_000, 64, 256
SHOWS, CANDIDATES, K = (0, 10, 50, 100, 200), 100, 10
STAGES = (0, 10, 20, 50, 100)
MIN_PROBABILITY = 1e-4
FURTHER_USERS, FURTHER_SALT = 1_500, 16
FROZEN, SERVED = "frozen", "above the shared level"
REAL, SHARED = "real rows", "real rows above a shared correction"
RANDOM, BELIEF, NOBODY = "random slates", "BeliefQuota", "nothing shown"
ROWS = "random rows"
NONE, CLOSED, WIDE = "nothing known of the user", "closed form", "closed form, scales of belief-quota"
TRUTH = "the world's own probabilities"
MODELS: tuple[PreferenceKind, ...] = ("gaussian", "mixture", "regression", "diffusion")


@dataclass(frozen=True)
class Predicted:
    """Log-odds of clicks: means and variances of the predictive distribution, both ``float32 (B, n)``."""

    means: Tensor
    variances: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Mean click probabilities (MacKay, "The evidence framework applied to classification networks", 1992)."""
        return torch.sigmoid(self.means / torch.sqrt(1.0 + torch.pi * self.variances / 8.0))


@dataclass(frozen=True)
class PredictionTask:
    """Items of ``B`` sessions whose answers are to be predicted, and what is known of their users.

    Attributes:
        users: ``int64 (B,)``, rows of the users.
        evidence: What is known of them.
        items: ``int64 (B, n)``.
        base: ``float32 (B, n)``, log-odds of a click without the user's own part.
        own_offsets: ``float32 (B, n)``, the item's own offset if preferences are 0.
        remaining: ``float32 (B, n)``, the share of the preference's part in the log-odds that such an offset leaves.
        offset_variance: Prior variance of such offsets.
        truth: ``float32 (B, n)``, click probabilities, or clicks.
        asked: ``bool (B, n)``, which entries count.
    """

    users: NDArray[np.int64]
    evidence: Evidence
    items: Tensor
    base: Tensor
    own_offsets: Tensor
    remaining: Tensor
    offset_variance: float
    truth: Tensor
    asked: Tensor

    @classmethod
    def of_level(
        cls,
        users: IntArray,
        own: OwnLevel,
        contexts: Tensor,
        base: Tensor,
        items: Tensor,
        truth: Tensor,
        asked: Tensor | None = None,
    ) -> PredictionTask:
        """Reads what a converged own level knows of the items; ``base`` is ``float32 (B, N)``."""
        evidence = Evidence(contexts, own.means.clone(), own.covariances.clone(), own.widths.clone())
        nothing = torch.zeros_like(own.means)
        intercept = nothing.clone()
        intercept[:, 0] = 1.0
        own_offsets = own.logits_at(nothing).gather(1, items)
        remaining = own.logits_at(intercept).gather(1, items) - own_offsets
        asked = torch.ones_like(items, dtype=torch.bool) if asked is None else asked
        variance = own.scales.offset**2
        of_items = base.gather(1, items), own_offsets, remaining
        return cls(np.asarray(users, np.int64), evidence, items, *of_items, variance, truth, asked)

    @classmethod
    def joined(cls, tasks: Sequence[PredictionTask]) -> PredictionTask:
        """Returns several batches with the same scales as one."""
        names = ("items", "base", "own_offsets", "remaining", "truth", "asked")
        arrays = {name: torch.cat([getattr(task, name) for task in tasks]) for name in names}
        of_evidence = (
            torch.cat([getattr(task.evidence, name) for task in tasks]) for name in ("contexts", "means", "covariances")
        )
        evidence = Evidence(*of_evidence, tasks[0].evidence.scales)
        users = np.concatenate([task.users for task in tasks])
        return cls(users=users, evidence=evidence, offset_variance=tasks[0].offset_variance, **arrays)

    def predicted(self, moments: Moments, columns: Tensor) -> Predicted:
        """Returns what a model predicts; correlations are those of the closed form.

        Args:
            moments: Of the model.
            columns: ``(N, d + 1)``: ones and unit embeddings.
        """
        evidence = self.evidence
        features = columns[self.items]
        linear = (features @ moments.means[..., None])[..., 0]
        ratios = moments.deviations / (evidence.scales * evidence.deviations)
        scaled = features * (evidence.scales * ratios)[:, None]
        variances = ((scaled @ evidence.covariances) * scaled).sum(-1)
        return Predicted(
            self.base + self.own_offsets + self.remaining * linear,
            self.remaining**2 * variances + self.offset_variance * self.remaining,
        )

    def without_answers(self, columns: Tensor) -> Predicted:
        """Returns what is predicted of users of whom nothing is known but their prior."""
        variances = ((columns[self.items] * self.evidence.scales) ** 2).sum(-1) + self.offset_variance
        return Predicted(self.base, variances)


def task_name(regime: str, policy: str, shows: int) -> str:
    """Returns how a store calls a task."""
    return f"{regime}, {policy if shows else NOBODY}, {shows}"


def split_name(name: str) -> tuple[str, str, int]:
    """Returns regime, policy and shows of a task's name."""
    regime, policy, shows = name.rsplit(", ", 2)
    return regime, policy, int(shows)


def item_columns(items: BeliefItems) -> Tensor:
    """Returns ``float32 (N, d + 1)``: ones and unit embeddings."""
    embeddings = torch.from_numpy(items.embeddings)
    return torch.cat([torch.ones(len(embeddings), 1), embeddings], dim=1)


def users_of(world: World) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns rows of the users whose answers are predicted, at most half of all, and of those served before."""
    chosen = evaluation_users(world.user_ids, min(USERS, len(world.users) // 2))
    evaluated = np.isin(world.user_ids, chosen)
    return world.users[evaluated], world.users[~evaluated]


def served_belief(pair: WorldPair, path: Path) -> Path:
    """Has BeliefQuota serve other users, and returns the file with what it learned of the items."""
    if not path.exists():
        session = SessionConfig(slate_size=K, action_mode="slate")
        env = KuaiFairVecEnv(pair.test, session, N_ENVS, seed=0)
        control = BeliefQuota(pair.scorer)
        others = pair.test.data.users.ids[users_of(pair.test)[1]]
        result = serve(control, env, others, SERVED_SESSIONS, evaluate_others=False)
        print(f"served {SERVED_SESSIONS}: R_cum {result.served.engagement.cumulative_reward:.2f}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        control.belief.save(path)
    return path


@dataclass(frozen=True)
class Setting:
    """What the sessions of a fitted world have in common.

    Attributes:
        pair: Both worlds.
        regime: :data:`FROZEN` or :data:`SERVED`.
        policy: :data:`RANDOM` or :data:`BELIEF`.
        scales: Of the own level, where nothing was served before.
        belief: File of what was learned while serving, if it was.
    """

    pair: WorldPair
    regime: str
    policy: str
    scales: OwnScales
    belief: Path | None

    def beliefs(self) -> list[Belief]:
        """Returns the beliefs by which sessions are read; frozen, a second one has the scales of BeliefQuota."""
        items = BeliefItems.of_world(self.pair.test)
        if self.belief is None:
            return [Belief(items, BeliefScales(own=self.scales)), Belief(items)]
        served = Belief(items)
        served.load(self.belief)
        return [served]

    def control(self, batch: SessionBatch) -> Control:
        """Returns the policy, bound to sessions."""
        control: Control = RandomSlates() if self.policy == RANDOM else BeliefQuota(self.pair.scorer)
        control.bind(batch)
        if isinstance(control, BeliefQuota) and self.belief is not None:
            control.belief.load(self.belief)
            control.bind(batch)  # running sessions take the scales that were learned
        return control


def fitted_tasks(setting: Setting) -> Iterator[tuple[str, list[PredictionTask]]]:
    """Plays the sessions of a test world and yields names and tasks: one for each belief of the setting."""
    world = setting.pair.test
    users = users_of(world)[0]
    rng = np.random.default_rng(16)
    batches: dict[int, list[list[PredictionTask]]] = {shows: [] for shows in SHOWS}
    for first in range(0, len(users), BATCH):
        batch_users = users[first : first + BATCH]
        items = np.argsort(rng.random((len(batch_users), world.n_items)), axis=1)[:, :CANDIDATES]
        for shows, tasks in _played(setting, batch_users, torch.from_numpy(items)):
            batches[shows].append(tasks)
    for shows, of_batches in batches.items():
        name = task_name(setting.regime, setting.policy, shows)
        yield name, [PredictionTask.joined(tasks) for tasks in zip(*of_batches, strict=True)]


def _played(setting: Setting, users: IntArray, items: Tensor) -> Iterator[tuple[int, list[PredictionTask]]]:
    """Plays one session of each user, and yields tasks at the given numbers of shows."""
    world, scorer = setting.pair.test, setting.pair.scorer
    session = SessionConfig(max_len=max(SHOWS) // K, slate_size=K, action_mode="slate", leave="never")
    batch = SessionBatch(world, session, len(users))
    batch.take_sessions_from(FixedSessions.of_users(users, 1, seed=0))
    batch.reset(np.arange(len(users)))
    control = setting.control(batch)
    beliefs = setting.beliefs()
    readers = [SessionEvidence(belief, scorer, batch, ClosedForm()) for belief in beliefs]
    for reader in readers:
        reader.begin()
    window = world.initial_history.take(users)
    prior = torch.from_numpy(scorer.score(observed_states(world, window)))
    contexts = torch.from_numpy(LogContexts(world).summarise(window))
    for shows in range(0, max(SHOWS) + 1, K):
        if shows in SHOWS:
            truth = torch.from_numpy(batch.simulator.expected_catalogue()).gather(1, items)
            tasks = []
            for reader, belief in zip(readers, beliefs, strict=True):
                reader.take()
                reader.beliefs.logits(converged=True)
                base = prior + belief.shared.mean
                tasks.append(PredictionTask.of_level(users, reader.beliefs.own, contexts, base, items, truth))
            yield shows, tasks
        if shows < max(SHOWS):
            actions, _ = control.predict(batch.observe(), deterministic=True)
            batch.step(actions)


def true_preferences(pair: WorldPair, belief: Path, scales: OwnScales) -> Tensor:
    """Returns ``float32 (B, d + 1)``, what the test world's users like beyond scorer and shared mean.

    It is the ridge regression of their log-odds on the columns of the own level.
    """
    world = pair.test
    users = users_of(world)[0]
    served = Setting(pair, SERVED, BELIEF, scales, belief).beliefs()[0]
    window = world.initial_history.take(users)
    probabilities = torch.from_numpy(world.response.expected_catalogue(users, world.n_items, window))
    prior = torch.from_numpy(pair.scorer.score(observed_states(world, window)))
    own = torch.logit(probabilities, MIN_PROBABILITY) - prior - served.shared.mean
    columns = item_columns(served.items)
    precision = columns.T @ columns + torch.eye(columns.shape[1])
    return torch.linalg.solve(precision, columns.T @ own.T).T


def real_tasks(pair: WorldPair, scales: OwnScales, further: bool = False) -> Iterator[tuple[str, list[PredictionTask]]]:
    """Yields tasks of real random rows: of held-out users, or of further users kept for a final check.

    Args:
        pair: The worlds of a data set with random rows.
        scales: Of the own level.
        further: Whether to take the further users.
    """
    world = _with_further_users(pair.test) if further else pair.test
    rows = RandomRows.of_world(world)
    items, clicks = _all_rows(rows)
    belief_items = BeliefItems.of_world(world)
    window = world.initial_history.take(rows.users)
    prior = torch.from_numpy(pair.scorer.score(observed_states(world, window)))
    contexts = torch.from_numpy(LogContexts(world).summarise(window))
    columns = item_columns(belief_items)
    corrected = prior + shared_correction(prior, rows, FIRST_ROWS, belief_items).mean
    known = _observed(OwnLevel(columns, len(items), scales), items[:, :FIRST_ROWS], clicks[:, :FIRST_ROWS], corrected)
    above = _estimated_scales(known, corrected, belief_items, scales)
    for regime, base, all_scales in ((REAL, prior, (scales, OwnScales())), (SHARED, corrected, (above,))):
        for first, last in pairwise(STAGES):
            if regime == SHARED and first < FIRST_ROWS:
                continue
            some = np.flatnonzero(items[:, first] >= 0)
            asked = torch.from_numpy(items[some, first:last] >= 0)
            wanted = torch.from_numpy(np.maximum(items[some, first:last], 0))
            truth = torch.from_numpy(clicks[some, first:last].astype(np.float32))
            tasks = []
            for chosen in all_scales:
                own = _observed(
                    OwnLevel(columns, len(some), chosen), items[some, :first], clicks[some, :first], base[some]
                )
                own.converge(base[some])
                known_of = (rows.users[some], own, contexts[some], base[some])
                tasks.append(PredictionTask.of_level(*known_of, wanted, truth, asked))
            yield task_name(regime, ROWS, first), tasks


def _with_further_users(world: World) -> World:
    """Returns the world with users who are not held out and have random rows, chosen by a hash of their ids."""
    counts = np.bincount(world.data.test.users, minlength=len(world.data.users))
    further = np.setdiff1d(np.flatnonzero(counts), world.users)
    chosen = further[chosen_users(world.data.users.ids[further], FURTHER_USERS, FURTHER_SALT)]
    return replace(world, users=chosen)


def _all_rows(rows: RandomRows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns all rows of each user in time, ``(U, 100)``, items -1 where there are no more."""
    later = rows.later
    places = FIRST_ROWS + np.arange(len(later)) - later.offsets(len(rows.users))[later.users]
    some = places < STAGES[-1]
    items = np.full((len(rows.users), STAGES[-1]), -1, np.int64)
    clicks = np.zeros(items.shape, np.bool_)
    items[:, :FIRST_ROWS], clicks[:, :FIRST_ROWS] = rows.items, rows.clicks
    items[later.users[some], places[some]] = later.items[some]
    clicks[later.users[some], places[some]] = later.clicks[some]
    return items, clicks


def _observed(own: OwnLevel, items: NDArray[np.int64], clicks: NDArray[np.bool_], base: Tensor) -> OwnLevel:
    """Adds rows to what is known, one of each user at a time: an item may come twice."""
    for place in range(items.shape[1]):
        one = slice(place, place + 1)
        shown, clicked = torch.from_numpy(items[:, one]), torch.from_numpy(clicks[:, one])
        own.observe(torch.arange(len(items)), shown, clicked, base)
    return own


def _estimated_scales(own: OwnLevel, base: Tensor, items: BeliefItems, scales: OwnScales) -> OwnScales:
    """Returns own scales as a belief estimates them from what sessions show above the shared level."""
    belief = Belief(items, BeliefScales(own=scales))
    for _ in range(ROUNDS):
        own.converge(base)
        belief.move(own.moments(torch.arange(len(base))))
        own.rescale(belief.own_scales)
    print("own scales above the shared correction:", [round(scale, 3) for scale in astuple(belief.own_scales)])
    return belief.own_scales


def expected_log_loss(task: PredictionTask, probabilities: Tensor) -> FloatArray:
    """Returns ``float32 (B,)``, the mean cross-entropy of each session's items, in nats."""
    q = probabilities.clamp(1e-6, 1.0 - 1e-6)
    losses = -(task.truth * q.log() + (1.0 - task.truth) * (1.0 - q).log())
    return np.asarray((losses * task.asked).sum(1) / task.asked.sum(1))


def expected_auc(task: PredictionTask, scores: Tensor) -> FloatArray:
    """Returns ``float32 (B,)``, the chance that a clicked item of a session ranks above one that is not.

    Pairs count by the probability of being that; NaN where there are none. Ties count half.
    """
    values = []
    for rows in torch.arange(len(scores)).split(BATCH):
        clicked = task.truth[rows] * task.asked[rows]
        skipped = (1.0 - task.truth[rows]) * task.asked[rows]
        weights = clicked[:, :, None] * skipped[:, None, :]
        weights.diagonal(dim1=1, dim2=2).zero_()
        order = torch.sign(scores[rows][:, :, None] - scores[rows][:, None, :])
        total = weights.sum((1, 2))
        values.append(torch.where(total > 0, (weights * (order + 1.0) / 2.0).sum((1, 2)) / total, torch.nan))
    return np.asarray(torch.cat(values))
