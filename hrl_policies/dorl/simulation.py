"""Sessions in a world model: clicks from its predictions, pessimistic rewards, and their entropy term ``P_E``.

``P_E`` measures how varied the log is after what was shown last. For every unordered tuple of the levels (tags) of the
last ``k`` exposures of a user (``k`` = 1 and 2) the log holds a distribution of the next exposure's level. Its entropy,
divided by the log of the number of distinct levels that followed, lies in [0, 1]; a tuple that the log does not hold,
and a history that is too short, count 1. ``P_E`` is the sum over ``k`` (Gao et al., SIGIR 2023, with the feature level
of EasyRL4Rec instead of the item level of the first release).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor

from hrl_policies.common.sessions import purified_like, sessions_given
from hrl_policies.dorl.world_model import MAX_VARIANCE, Side, WorldModel
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.response.base import PADDING, BernoulliFeedback, HistoryWindow
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import World

if TYPE_CHECKING:
    import scipy.sparse as sp


ExitKind = Literal["configured", "none"]


class Prediction(NamedTuple):
    """A world model's prediction for pairs of users and items.

    Attributes:
        mean: ``float32 (B, K)``, ensemble mean of the click, within 0..1.
        variance: ``float32 (B, K)``, the largest variance over the members.
    """

    mean: FloatArray
    variance: FloatArray


class LearnedResponse(BernoulliFeedback):
    """Clicks with the probability that an ensemble predicts; the world's own response model is not used.

    Args:
        model: The ensemble, fitted.
        world: The world whose users, items, features and tags it was fitted on.

    Attributes:
        latest: The prediction of the last call of :meth:`expected`, from which rewards are computed; None before it.
    """

    uses_history = False

    def __init__(self, model: WorldModel, world: World) -> None:
        self._model = model
        self._users, self._items = model.tables(world)
        self.n_users, self.n_items = self._users.line.shape[1], self._items.line.shape[1]
        self.latest: Prediction | None = None

    def predict(self, users: IntArray, items: IntArray) -> Prediction:
        """Returns the prediction for users ``(B,)`` with items ``(B, K)``."""
        return self._predicted(users, self._items.rows(_rows(items)))

    def expected(self, users: IntArray, items: IntArray, history: HistoryWindow | None = None) -> FloatArray:
        """Returns the predicted means, ``float32 (B, K)``; ``history`` is not read."""
        self.latest = self.predict(users, items)
        return self.latest.mean

    def expected_catalogue(self, users: IntArray, n_items: int, history: HistoryWindow | None = None) -> FloatArray:
        """Returns the predicted means on items ``0 .. n_items - 1``, ``float32 (B, n_items)``."""
        side = Side(*(part[:, None, :n_items] for part in self._items))
        return np.concatenate([self._predicted(users[row : row + 1], side).mean for row in range(len(users))])

    def rearranged(self, items: IntArray) -> LearnedResponse:
        """Returns the same model for the catalogue ``old_items[items]``."""
        other = copy.copy(self)
        other._items, other.n_items, other.latest = self._items.rows(_rows(items)), len(items), None
        return other

    def save(self, path: str | Path) -> None:
        """Refuses: an ensemble is saved with the agent that fitted it.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a learned response is saved with its agent; call DORL.save")

    def describe(self) -> dict[str, Any]:
        """Returns kind and sizes, JSON-able."""
        return {
            "kind": "learned",
            "users": self.n_users,
            "items": self.n_items,
            "members": self._model.members,
        }

    def _predicted(self, users: IntArray, items: Side) -> Prediction:
        user = self._users.rows(_rows(users)).spread()
        with torch.inference_mode():
            mean, log_variance = self._model.combined(user, items)
            return Prediction(
                mean.mean(0).clamp(0.0, 1.0).numpy(), log_variance.amax(0).exp().numpy().astype(np.float32)
            )


def _rows(rows: IntArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, np.int64))


class PessimisticRewards(VecEnvWrapper):
    """Rewards ``max(0, r - l1 P_U + l2 P_E - r_min)``, mean over the slate, in sessions of a world model.

    ``r`` is the predicted mean of the click, ``P_U`` the largest variance over the members of the ensemble, ``P_E``
    the entropy term, and ``r_min = -l1 MAX_VARIANCE`` a lower bound of the rest (Gao et al., SIGIR 2023). Episode
    records keep the clicks.

    Args:
        venv: Sessions whose response is a :class:`LearnedResponse`.
        entropy: The entropy term.
        uncertainty_weight: ``l1``.
        entropy_weight: ``l2``.

    Raises:
        TypeError: If the sessions' clicks do not come from a world model.
    """

    def __init__(
        self, venv: KuaiFairVecEnv, entropy: FeatureEntropy, uncertainty_weight: float, entropy_weight: float
    ) -> None:
        response = venv.world.response
        if not isinstance(response, LearnedResponse):
            raise TypeError(f"PessimisticRewards needs a learned response, got {type(response).__name__}")
        super().__init__(venv)
        self._sessions, self._response, self._entropy = venv, response, entropy
        self._weights = (uncertainty_weight, entropy_weight)
        self._previous: NDArray[np.int32] = np.zeros(0, np.int32)

    def reset(self) -> VecEnvObs:
        """Starts sessions."""
        return self.venv.reset()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Notes the last item of each session, for the entropy term, and sends the actions."""
        self._previous = self._sessions.batch.simulator.history().items[:, -1]
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Replaces the rewards by those of the prediction that the clicks were drawn from."""
        observation, _, done, infos = self.venv.step_wait()
        outcome, predicted = self._sessions.batch.outcome, self._response.latest
        assert outcome is not None and predicted is not None
        bonus = self._entropy.of_slates(self._previous, outcome.items)
        return observation, pessimistic(predicted, bonus, *self._weights), done, infos


def pessimistic(
    predicted: Prediction, bonus: FloatArray, uncertainty_weight: float, entropy_weight: float
) -> FloatArray:
    """Returns DORL's reward of slates, ``float32 (B,)``; see :class:`PessimisticRewards`."""
    lower_bound = -uncertainty_weight * MAX_VARIANCE
    value = predicted.mean - uncertainty_weight * predicted.variance + entropy_weight * bonus
    reward: FloatArray = np.maximum(value - lower_bound, 0.0).mean(axis=1, dtype=np.float32)
    return reward


def learned_sessions(
    env: VecEnv,
    response: LearnedResponse,
    entropy: FeatureEntropy,
    *,
    uncertainty_weight: float,
    entropy_weight: float,
    exits: ExitKind,
    seed: int | None,
) -> VecEnv:
    """Returns sessions like those of an environment, with clicks and rewards of a world model.

    Users, histories, spaces and purifier are the environment's.

    Args:
        env: See :func:`~hrl_policies.common.sessions.sessions_given`; it is neither reset nor stepped.
        response: The world model.
        entropy: The entropy term.
        uncertainty_weight: See :class:`PessimisticRewards`.
        entropy_weight: See :class:`PessimisticRewards`.
        exits: ``"configured"`` applies the environment's leave rule to predicted clicks, ``"none"`` plays every session
            to its cap.
        seed: Seed of users and clicks.
    """
    world, config = sessions_given(env, "DORL")
    if exits == "none":
        config = replace(config, leave="never")
    sessions = KuaiFairVecEnv(replace(world, response=response), config, env.num_envs, seed=seed)
    return purified_like(env, PessimisticRewards(sessions, entropy, uncertainty_weight, entropy_weight))


_ROWS_AT_ONCE = 500_000
_DECILES = 10
_QUARTILES = 4


def item_levels(world: World) -> BoolArray:
    """Returns the levels of a world's items, ``bool (M, L)``: their tags, or bins where no item has any.

    Items without a tag among tagged ones share one level. Bins are deciles of training exposures, crossed
    with quartiles of the duration where the items' features have one.
    """
    tags = world.data.items.tags
    if tags.any():
        untagged = ~tags.any(axis=1)
        return np.column_stack([tags, untagged]) if untagged.any() else tags
    code = _quantiles(world.data.train.exposures(len(tags)), _DECILES)
    features = world.data.items.features
    duration = [place for place, name in enumerate(features.names) if "duration" in name and "=" not in name]
    if duration:
        code = code * _QUARTILES + _quantiles(features.values[:, duration[0]], _QUARTILES)
    levels: BoolArray = code[:, None] == np.unique(code)
    return levels


def _quantiles(values: NDArray[Any], bins: int) -> NDArray[np.int64]:
    """Returns the quantile bin of each value; equal values share a bin."""
    return np.searchsorted(np.sort(values), values, side="left") * bins // len(values)


class FeatureEntropy:
    """``P_E`` of items, given what was shown before them.

    For an item with several levels it is the mean over them, and over their combinations with the levels before.

    Args:
        singles: ``float32 (L,)``, entropy after each level.
        pairs: ``float32 (L, L)``, entropy after each unordered pair of levels; symmetric.
        levels: ``bool (M, L)``, levels of the items, at least one of each.
    """

    def __init__(self, singles: FloatArray, pairs: FloatArray, levels: BoolArray) -> None:
        self.singles, self.pairs = singles, pairs
        members = levels.astype(np.float32)
        self._shares = members / members.sum(axis=1, keepdims=True)
        self._of_item = self._shares @ singles
        self._after_item = self._shares @ pairs

    @classmethod
    def of_log(cls, log: InteractionLog, levels: BoolArray) -> FeatureEntropy:
        """Counts a log; every combination of the levels involved counts once.

        Args:
            log: Usually the training log; rows of a user in the order of exposure.
            levels: Levels of its items.
        """
        from scipy import sparse

        count = levels.shape[1]
        members = sparse.csr_matrix(levels.astype(np.int64))
        after_one = sparse.csr_matrix((count, count), dtype=np.int64)
        after_two = sparse.csr_matrix((count * count, count), dtype=np.int64)
        for low in range(0, len(log), _ROWS_AT_ONCE):
            rows = np.arange(max(low, 1), min(low + _ROWS_AT_ONCE, len(log)))
            rows = rows[log.users[rows] == log.users[rows - 1]]
            after_one = after_one + members[log.items[rows - 1]].T @ members[log.items[rows]]
            rows = rows[(rows > 1) & (log.users[rows] == log.users[rows - 2])]
            contexts = _unordered_pairs(members, log.items[rows - 2], log.items[rows - 1])
            after_two = after_two + contexts.T @ members[log.items[rows]]
        pairs = _normalised_entropies(after_two).reshape(count, count)
        # Pairs were counted above the diagonal only.
        return cls(_normalised_entropies(after_one), np.triu(pairs) + np.triu(pairs, 1).T, levels)

    def of_slates(self, previous: IntArray, slates: IntArray) -> FloatArray:
        """Returns ``P_E`` of every item, a slate's items taken as shown one after the other.

        Args:
            previous: ``(B,)``, the item shown before each slate, or ``PADDING``.
            slates: ``(B, K)``.

        Returns:
            ``float32 (B, K)``, within 0..2.
        """
        before = np.column_stack([previous, slates[:, :-1]])
        pair = np.einsum("bkl,bkl->bk", self._after_item[before], self._shares[slates])
        entropy: FloatArray = self._of_item[slates] + np.where(before == PADDING, np.float32(1.0), pair)
        return entropy


def _unordered_pairs(members: sp.csr_matrix, first: IntArray, second: IntArray) -> sp.csr_matrix:
    """Returns ``(rows, L * L)``, how often each unordered pair of levels occurs among those of two items."""
    from scipy import sparse

    count = members.shape[1]
    sizes = np.diff(members.indptr)
    combinations = sizes[first] * sizes[second]
    rows = np.repeat(np.arange(len(first)), combinations)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(combinations) - combinations, combinations)
    level = members.indices[members.indptr[first[rows]] + number // sizes[second[rows]]]
    other = members.indices[members.indptr[second[rows]] + number % sizes[second[rows]]]
    codes = np.minimum(level, other).astype(np.int64) * count + np.maximum(level, other)
    return sparse.csr_matrix((np.ones(len(rows), np.int64), (rows, codes)), shape=(len(first), count * count))


def _normalised_entropies(counts: sp.csr_matrix) -> FloatArray:
    """Returns the entropy of each row over the log of its number of non-zeros; 1 for empty rows, 0 for one entry."""
    counts = counts.tocsr()
    counts.sum_duplicates()
    distinct = np.diff(counts.indptr)
    rows = np.repeat(np.arange(len(distinct)), distinct)
    totals = np.bincount(rows, weights=counts.data, minlength=len(distinct))
    shares = counts.data / totals[rows]
    entropy = np.bincount(rows, weights=-shares * np.log(shares), minlength=len(distinct))
    normalised = entropy / np.log(np.maximum(distinct, 2))
    normalised = np.where(distinct > 1, normalised, np.where(distinct == 1, 0.0, 1.0))
    return np.minimum(normalised, 1.0).astype(np.float32)
