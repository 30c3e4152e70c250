"""DORL: A2C in a world model, with rewards that penalise its uncertainty and favour what varies in the log.

Gao et al., Alleviating Matthew Effect of Offline Reinforcement Learning in Interactive Recommendation, SIGIR 2023.
Differences from the article: observed states instead of the mean of the last three items; slates; sessions with the
library's own dynamics, in which clicks come from the world model. The original steps the true environment and takes
its exits.

``P_E`` measures how varied the log is after what was shown last. For every unordered tuple of the levels (tags) of the
last ``k`` exposures of a user (``k`` = 1 and 2) the log holds a distribution of the next exposure's level. Its entropy,
divided by the log of the number of distinct levels that followed, lies in [0, 1]; a tuple that the log does not hold,
and a history that is too short, count 1. ``P_E`` is the sum over ``k``, with the feature level of EasyRL4Rec instead of
the item level of the first release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from typing_extensions import Unpack

from hrl_policies.common.sessions import AlgorithmArguments, AmongItsItems, purified_like, sessions_given
from hrl_policies.common.yaml_files import validated
from hrl_policies.world_model import (
    MAX_VARIANCE,
    LearnedResponse,
    Prediction,
    WorldModel,
    WorldModelSettings,
    WorldModelSizes,
    fit_world_model,
)
from hrl_policies.worlds import session_seed
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import PADDING
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import World

if TYPE_CHECKING:
    import scipy.sparse as sp

ExitKind = Literal["configured", "none"]


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
        self._previous = self._sessions.batch.simulator.history(length=1).items[:, 0]
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
        entropy: See :class:`PessimisticRewards`, like both weights.
        uncertainty_weight: ``l1``.
        entropy_weight: ``l2``.
        exits: See :class:`DORL`.
        seed: Seed of users and clicks.
    """
    world, config = sessions_given(env, "DORL")
    if exits == "none":
        config = replace(config, leave="never")
    sessions = KuaiFairVecEnv(replace(world, response=response, randomisation=None), config, env.num_envs, seed=seed)
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


SelfDORL = TypeVar("SelfDORL", bound="DORL")


class A2CArguments(AlgorithmArguments, total=False):
    """What :class:`DORL` leaves to Stable-Baselines3's ``A2C``, where each is described."""

    gae_lambda: float
    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    rms_prop_eps: float
    use_sde: bool
    sde_sample_freq: int
    rollout_buffer_class: type[RolloutBuffer] | None
    rollout_buffer_kwargs: dict[str, Any] | None
    normalize_advantage: bool
    policy_kwargs: dict[str, Any] | None


class DORL(AmongItsItems, A2C):
    """Offline, model-based A2C, which fits a world model to the training log and learns in it.

    ``learn`` never resets or steps the environment: it takes users, histories, items, settings and spaces from it, fits
    the ensemble on its first call, and plays sessions of its own. Callbacks see those as ``training_env``; their
    ``session`` records hold predicted clicks. The ensemble is saved and loaded with the policy.

    Args:
        policy: See Stable-Baselines3's A2C.
        env: KuaiFair sessions, purified or not.
        world_model: Arguments of :class:`~hrl_policies.world_model.WorldModelSettings`.
        uncertainty_weight: ``l1`` of the reward ``max(0, r - l1 P_U + l2 P_E - r_min)``.
        entropy_weight: ``l2`` of the reward.
        exits: ``"configured"`` applies the sessions' leave rule to predicted clicks, ``"none"`` plays every session to
            its cap.
        learning_rate: See Stable-Baselines3's A2C, like all that follows.
        n_steps: Steps of a rollout in each session.
        gamma: Discount.
        use_rms_prop: RMSprop instead of Adam.
        **kwargs: See :class:`A2CArguments`; the ensemble stays on the CPU, whatever the ``device``.

    Attributes:
        frozen_while_serving: Why it learns nothing while it serves (:func:`kuaifair_env.serve`).
        world_model_report: Report of the ensemble's fit; None before, and after parameters alone were restored.

    Raises:
        ValueError: If a setting is not valid.
        TypeError: If the environment is not a KuaiFair environment that can be modelled.
    """

    frozen_while_serving: ClassVar[str] = "it learns in a model of the log"

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        *,
        world_model: Mapping[str, Any] | None = None,
        uncertainty_weight: float = 0.01,
        entropy_weight: float = 0.05,
        exits: ExitKind = "configured",
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 16,
        gamma: float = 0.9,
        use_rms_prop: bool = False,
        _init_setup_model: bool = True,
        **kwargs: Unpack[A2CArguments],
    ) -> None:
        if exits not in get_args(ExitKind):
            raise ValueError(f"exits must be one of {get_args(ExitKind)}, got {exits!r}")
        if not (uncertainty_weight >= 0 and entropy_weight >= 0):
            raise ValueError(
                "uncertainty_weight and entropy_weight must not be negative, "
                f"got {uncertainty_weight} and {entropy_weight}"
            )
        # A plain dict, because settings are saved as JSON.
        self.world_model_settings = validated(WorldModelSettings, dict(world_model or {}), "world_model").model_dump()
        self.uncertainty_weight, self.entropy_weight, self.exits = uncertainty_weight, entropy_weight, exits
        self.world_model_sizes: dict[str, int] | None = None
        self.world_model_report: dict[str, Any] | None = None
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            use_rms_prop=use_rms_prop,
            _init_setup_model=_init_setup_model,
            **kwargs,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.env is not None:
            world, _ = sessions_given(self.env, "DORL")
            self.world_model_sizes = vars(WorldModelSizes.of(world))
        assert self.world_model_sizes is not None
        self.world_model = WorldModel(
            WorldModelSizes(**self.world_model_sizes),
            WorldModelSettings(**self.world_model_settings),
            0 if self.seed is None else self.seed,
        )

    def learn(
        self: SelfDORL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 100,
        tb_log_name: str = "DORL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDORL:
        """Fits the world model if that has not been done, and trains in it; see Stable-Baselines3.

        Raises:
            DataError: If this is a test world, or the training log does not allow a world model.
            ValueError: If there is no environment.
        """
        env, last_obs = self.env, self._last_obs
        if env is None:
            raise ValueError("DORL has no environment; call set_env, or load(..., env=...)")
        self.env = self._learned_sessions(env)
        self._last_obs = None
        try:
            return super().learn(
                total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
            )
        finally:
            self.env, self._last_obs = env, last_obs

    def _learned_sessions(self, env: Any) -> Any:
        """Returns sessions in the world model, which is fitted now unless it was before."""
        world, _ = sessions_given(env, "DORL")
        if world.split != "train":
            raise DataError(f"DORL learns about the users of the training world, got the {world.split} world")
        seed = int(np.random.SeedSequence().generate_state(1)[0]) if self.seed is None else self.seed
        if not bool(self.world_model.fitted):
            settings = WorldModelSettings(**self.world_model_settings)
            self.world_model_report = fit_world_model(self.world_model, world, settings, seed)
        return learned_sessions(
            env,
            LearnedResponse(self.world_model, world),
            FeatureEntropy.of_log(world.data.train, item_levels(world)),
            uncertainty_weight=self.uncertainty_weight,
            entropy_weight=self.entropy_weight,
            exits=self.exits,
            seed=session_seed(seed + self.num_timesteps),
        )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "world_model"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        return [*modules, "world_model"], variables
