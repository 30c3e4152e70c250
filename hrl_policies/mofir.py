"""MOFIR: one actor and one vector critic for every balance of clicks against long-tail exposure.

Ge et al., Toward Pareto efficient fairness-utility trade-off in recommendation through reinforcement learning, WSDM
2022: DDPG whose networks take the preference vector (a conditioned network, after Abels et al., Dynamic weights in
multi-objective deep reinforcement learning, ICML 2019). No code of it is public; what the article leaves open follows
the first author's FCPO and common practice. Differences: observed states instead of a GRU over five clicks, queries of
length 1, both rewards divided by the slate size, and a default preference that is chosen in the training world.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypedDict, TypeVar, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, polyak_update, update_learning_rate
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn
from typing_extensions import Unpack

from hrl_policies.common.sessions import AmongItsItems, OffPolicyArguments, purified_like, sessions_given
from hrl_policies.common.slates import SlateReplayBuffer, SlateReplaySamples, executed_slates, state_space
from hrl_policies.preference_front import preference_front, preference_grid
from hrl_policies.unit_norm import UnitNormActor, begins_with_query, critic_inputs
from kuaifair_env.observations import state_of
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.splits import evaluation_users

OBJECTIVES = ("clicks", "tail_share")
"""The two components of rewards, preferences and values."""


class ConditionedActor(UnitNormActor):
    """``mu(s, w)``, a unit vector; its features hold the preference too.

    Preferences ask for queries far from each other, so that it may go further from the state than ``UnitNormActor``.
    """

    step = 0.3

    def forward(self, obs: Tensor, preferences: Tensor) -> Tensor:  # type: ignore[override]
        """Returns unit vectors ``(B, d)`` for states and preferences ``(B, 2)``."""
        features = self.extract_features(obs, self.features_extractor)
        return self.direction(features, self.mu(torch.cat([features, preferences], dim=1)))


class VectorCritics(BaseModel):
    """One critic or two, each ``Q(s, a, w)`` in two dimensions; arguments as ``ContinuousCritic``'s.

    They see :func:`~hrl_policies.unit_norm.critic_inputs` and preferences.
    """

    features_extractor: BaseFeaturesExtractor
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 1,
        share_features_extractor: bool = False,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.from_state = begins_with_query(observation_space, action_space.shape[0])
        inputs = features_dim + (2 if self.from_state else 1) * action_space.shape[0] + len(OBJECTIVES)
        self.share_features_extractor = share_features_extractor
        self.networks = nn.ModuleList(
            nn.Sequential(*create_mlp(inputs, len(OBJECTIVES), net_arch, activation_fn)) for _ in range(n_critics)
        )

    def forward(self, obs: Tensor, actions: Tensor, preferences: Tensor) -> Tensor:
        """Returns values ``(critics, B, 2)``."""
        features = self.extract_features(obs, self.features_extractor)
        inputs = torch.cat([critic_inputs(features, actions, self.from_state), preferences], dim=1)
        return torch.stack([network(inputs) for network in self.networks])


class TD3PolicyArguments(TypedDict, total=False):
    """What :class:`PreferencePolicy` leaves to Stable-Baselines3's ``TD3Policy``, where each is described."""

    net_arch: list[int] | dict[str, list[int]] | None
    activation_fn: type[nn.Module]
    features_extractor_class: type[BaseFeaturesExtractor]
    features_extractor_kwargs: dict[str, Any] | None
    normalize_images: bool
    optimizer_class: type[torch.optim.Optimizer]
    optimizer_kwargs: dict[str, Any] | None
    n_critics: int
    share_features_extractor: bool


class PreferencePolicy(TD3Policy):
    """Actor and critics for states and preferences, with a default preference.

    Of ``Dict`` observations only ``state`` is read. The default preference is a buffer, saved with the networks.

    Args:
        observation_space: ``Box``, or ``Dict`` with a ``Box`` called ``state``.
        action_space: ``Box``.
        lr_schedule: Learning rate of the actor, and of the critics until the algorithm sets theirs.
        **kwargs: See :class:`TD3PolicyArguments`.
    """

    preference: Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        **kwargs: Unpack[TD3PolicyArguments],
    ) -> None:
        super().__init__(state_space(observation_space), action_space, lr_schedule, **kwargs)
        self.register_buffer("preference", torch.full((len(OBJECTIVES),), 1.0 / len(OBJECTIVES)))

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> ConditionedActor:
        """Returns a new actor."""
        settings = self._update_features_extractor(self.actor_kwargs, features_extractor)
        settings["features_dim"] += len(OBJECTIVES)
        return ConditionedActor(**settings).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> VectorCritics:  # type: ignore[override]
        """Returns new critics."""
        settings = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return VectorCritics(**settings).to(self.device)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        preference: Any = None,
    ) -> tuple[NDArray[Any], Any]:
        """Returns actions, which are always deterministic.

        Args:
            observation: One observation, or a batch.
            state: Passed through.
            episode_start: Ignored.
            deterministic: Ignored.
            preference: Weights of clicks and long-tail share, ``(2,)`` or ``(B, 2)``; only their ratio counts. None
                takes the policy's default.

        Raises:
            ValueError: If it is not a preference.
        """
        self.set_training_mode(False)
        states = state_of(observation)
        tensor, batched = self.obs_to_tensor(states)
        weights = self.preference
        if preference is not None:
            weights = torch.as_tensor(as_preferences(preference), device=self.device)
        if weights.ndim == 2 and len(weights) != len(cast(Tensor, tensor)):
            raise ValueError(
                f"{len(cast(Tensor, tensor))} observations need as many preferences or one, got {len(weights)}"
            )
        with torch.no_grad():
            actions = self.actor(tensor, weights.expand(len(cast(Tensor, tensor)), -1)).cpu().numpy()
        actions = self.unscale_action(actions)
        return (actions if batched else actions[0]), state

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return cast(Tensor, self.actor(observation, self.preference.expand(len(observation), -1)))


def as_preferences(preference: Any) -> NDArray[np.float32]:
    """Returns a preference, or one for each session, scaled to sum to 1.

    Args:
        preference: Weights of clicks and long-tail share, ``(2,)`` or ``(B, 2)``.

    Raises:
        ValueError: If the shape is another, or weights are negative, infinite or all 0.
    """
    weights = np.asarray(preference, np.float64)
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(OBJECTIVES):
        raise ValueError(f"a preference is (weight of clicks, weight of long-tail share), got {preference!r}")
    totals = weights.sum(axis=-1, keepdims=True)
    if not np.isfinite(weights).all() or (weights < 0).any() or (totals <= 0).any():
        raise ValueError(f"weights of a preference are finite, not negative and not all 0, got {preference!r}")
    return np.asarray(weights / totals, np.float32)


SelfMOFIR = TypeVar("SelfMOFIR", bound="MOFIR")
_PREFERENCE = "preference"


class MOFIR(AmongItsItems, TD3):
    """Preference-conditioned DDPG over queries, with the reward ``(mean clicks, long-tail share)`` of a slate.

    Each session draws a preference ``w ~ Dirichlet(1, 1)``. An update evaluates every transition by the preference it
    was played with and by a random one, and averages. ``predict(..., preference=(w_click, w_fair))`` acts for a
    preference; without one it acts for :attr:`preference`, which ``learn`` chooses at its end: the one of ``grid_size``
    whose R_cum is largest over ``validation_users`` users of the training world. Give ``preference`` to fix it instead.

    Args:
        policy: ``"PreferencePolicy"`` or a subclass of it.
        env: KuaiFair sessions with ``action_mode="embedding"``, purified or not.
        preference: The default preference; None chooses one after training.
        validation_users: Largest number of users that it is chosen on.
        grid_size: Number of preferences that it is chosen from, at least 2.
        learning_rate: Learning rate of the actor; a number or a schedule.
        critic_learning_rate: Learning rate of the critics.
        buffer_size: Transitions kept, over all sessions.
        learning_starts: Steps before updates begin; they are explored as later ones.
        batch_size: Transitions of an update.
        gamma: Discount.
        epsilon: Share of random actions at the start, and at the end of training.
        exploration_noise: Largest length, about, of Gaussian noise on all other queries, which have length 1; lengths
            are uniform (:class:`~hrl_policies.unit_norm.QueryNoise`).
        twin: Two critics, of which targets take the one with the smaller ``w . Q``, as in TD3; False is the original.
        scalar_weight: Weight, at the end of training, of the loss ``(w . y - w . Q)^2`` beside ``|y - Q|^2``; it grows
            from 0 in proportion to the steps taken.
        policy_delay: Updates of the critics for one of the actor.
        target_policy_noise: Deviation of the noise on target actions; 0 is DDPG.
        target_noise_clip: Largest noise on a component of a target action.
        policy_kwargs: See :class:`~hrl_policies.mofir.PreferencePolicy`.
        **kwargs: See :class:`~hrl_policies.common.sessions.OffPolicyArguments`.

    Raises:
        ValueError: If a setting is not valid.
        TypeError: If the environment is not a KuaiFair environment.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"PreferencePolicy": PreferencePolicy}
    policy: PreferencePolicy
    replay_buffer: SlateReplayBuffer

    def __init__(
        self,
        policy: str | type[PreferencePolicy],
        env: GymEnv | str | None,
        *,
        preference: Any = None,
        validation_users: int = 200,
        grid_size: int = 9,
        learning_rate: float | Schedule = 1e-4,
        critic_learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 100_000,
        learning_starts: int = 1_000,
        batch_size: int = 256,
        gamma: float = 0.99,
        epsilon: tuple[float, float] | list[float] = (0.2, 0.1),
        exploration_noise: float = 0.7,
        twin: bool = False,
        scalar_weight: float = 0.0,
        policy_delay: int = 1,
        target_policy_noise: float = 0.0,
        target_noise_clip: float = 0.5,
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Unpack[OffPolicyArguments],
    ) -> None:
        if len(epsilon) != 2 or not all(0 <= value <= 1 for value in epsilon):
            raise ValueError(f"epsilon is (share at the start, share at the end), each in 0..1, got {epsilon}")
        if not (exploration_noise >= 0 and scalar_weight >= 0 and target_policy_noise >= 0):
            raise ValueError("exploration_noise, scalar_weight and target_policy_noise must not be negative")
        if validation_users < 1 or grid_size < 2:
            raise ValueError(
                f"need at least 1 validation user and 2 preferences, got {validation_users} and {grid_size}"
            )
        self.fixed_preference = None if preference is None else as_preferences(preference).tolist()
        self.validation_users, self.grid_size = validation_users, grid_size
        self.critic_learning_rate = critic_learning_rate
        self.epsilon = (float(epsilon[0]), float(epsilon[1]))
        self.exploration_noise, self.scalar_weight = exploration_noise, scalar_weight
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=gamma,
            replay_buffer_class=SlateReplayBuffer,
            policy_delay=policy_delay,
            target_policy_noise=target_policy_noise,
            target_noise_clip=target_noise_clip,
            policy_kwargs={**(policy_kwargs or {}), "n_critics": 2 if twin else 1},
            _init_setup_model=_init_setup_model,
            **kwargs,
        )

    @property
    def preference(self) -> tuple[float, float]:
        """The preference that :meth:`predict` acts for by default: weights of clicks and long-tail share."""
        clicks, fair = self.policy.preference.tolist()
        return clicks, fair

    def _setup_model(self) -> None:
        if self.env is not None:
            _, config = sessions_given(self.env, "MOFIR")
            columns = {_PREFERENCE: ((len(OBJECTIVES),), "float32")}
            self.replay_buffer_kwargs = {"slate_size": config.items_per_slate, "columns": columns}
        super()._setup_model()
        self._critic_schedule = FloatSchedule(self.critic_learning_rate)
        # A loaded model that trains on must draw other random numbers than at its start.
        if self.seed is not None and self.num_timesteps > 0:
            self._rng = np.random.default_rng([self.seed, self.num_timesteps])
        else:
            self._rng = np.random.default_rng(self.seed)
        self._preferences = np.zeros((0, len(OBJECTIVES)), np.float32)
        if self.fixed_preference is not None:
            self.policy.preference.copy_(torch.tensor(self.fixed_preference))

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        preference: Any = None,
    ) -> tuple[NDArray[Any], Any]:
        """Returns actions for a preference; see :meth:`PreferencePolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic, preference)

    def learn(
        self: SelfMOFIR,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "MOFIR",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMOFIR:
        """Trains, and then chooses the default preference unless one was given; see Stable-Baselines3.

        Only users of a training world can be asked which one they like best; elsewhere it stays as it was.
        """
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        assert self.env is not None
        if self.fixed_preference is None and sessions_given(self.env, "MOFIR")[0].split == "train":
            self.choose_preference()
        return self

    def choose_preference(self) -> tuple[float, float]:
        """Makes the preference with the largest R_cum over users of the training world the default, and returns it."""
        assert self.env is not None
        world, config = sessions_given(self.env, "MOFIR")
        users = evaluation_users(world.user_ids, self.validation_users)
        sessions = purified_like(self.env, KuaiFairVecEnv(world, config, len(users), seed=0))
        front = preference_front(self, sessions, preference_grid(self.grid_size), users=users)
        best = max(front, key=lambda point: point.cumulative_reward)
        self.policy.preference.copy_(torch.tensor(best.preference))
        return self.preference

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Updates critics, actor and targets; see Stable-Baselines3."""
        self.policy.set_training_mode(True)
        update_learning_rate(self.actor.optimizer, self.lr_schedule(self._current_progress_remaining))
        update_learning_rate(self.critic.optimizer, self._critic_schedule(self._current_progress_remaining))
        critic_losses, actor_losses = [], []
        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self.replay_buffer.sample(batch_size)
            drawn = torch.from_numpy(self._session_preferences(batch_size)).to(self.device)
            preferences = torch.cat([batch.extras[_PREFERENCE], drawn])
            critic_losses.append(self._update_critics(batch, preferences))
            if self._n_updates % self.policy_delay == 0:
                actor_losses.append(self._update_actor(batch, preferences))
                polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
                polyak_update(self.actor.parameters(), self.actor_target.parameters(), self.tau)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/critic_loss", float(np.mean(critic_losses)))
        if actor_losses:
            self.logger.record("train/actor_loss", float(np.mean(actor_losses)))

    def targets(self, batch: SlateReplaySamples, preferences: Tensor) -> Tensor:
        """Returns ``y = r + gamma (1 - d) Q'(s', mu'(s', w), w)``, ``float32 (n, 2)``.

        Args:
            batch: ``m`` transitions; ``preferences`` may be a multiple as long, for the same transitions repeated.
            preferences: ``(n, 2)``.
        """
        times = len(preferences) // len(batch.items)
        rewards = torch.stack([batch.feedback.mean(1), self._tail[batch.items].to(torch.float32).mean(1)], dim=1)
        after = batch.next_observations.repeat(times, 1)
        with torch.no_grad():
            actions = self.actor_target(after, preferences)
            if self.target_policy_noise:
                noise = self.target_policy_noise * torch.randn_like(actions)
                noise = noise.clamp(-self.target_noise_clip, self.target_noise_clip)
                actions = torch.nn.functional.normalize(actions + noise, dim=1)
            values = self.critic_target(after, actions, preferences)
            worse = (values * preferences).sum(-1).argmin(0)
            value = values[worse, torch.arange(len(preferences), device=values.device)]
        following = self.gamma * (1.0 - batch.dones.repeat(times, 1)) * value
        targets: Tensor = (rewards.repeat(times, 1) + following).detach()
        return targets

    def _update_critics(self, batch: SlateReplaySamples, preferences: Tensor) -> float:
        times = len(preferences) // len(batch.items)
        states, actions = batch.observations.repeat(times, 1), batch.actions.repeat(times, 1)
        values = self.critic(states, actions, preferences)
        gaps = values - self.targets(batch, preferences)
        loss = gaps.square().sum(-1).mean(1).sum()
        ramp = self.scalar_weight * (1.0 - self._current_progress_remaining)
        if ramp:
            loss = loss + ramp * (gaps * preferences).sum(-1).square().mean(1).sum()
        self.critic.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.critic.optimizer.step()
        return float(loss.detach())

    def _update_actor(self, batch: SlateReplaySamples, preferences: Tensor) -> float:
        states = batch.observations.repeat(len(preferences) // len(batch.items), 1)
        actions = self.actor(states, preferences)
        value = self.critic(states, actions, preferences)[0]
        loss = -(value * preferences).sum(1).mean()
        self.actor.optimizer.zero_grad()
        # Without the critics' gradients, which are not needed.
        torch.autograd.backward(loss, inputs=list(self.actor.parameters()))
        self.actor.optimizer.step()
        return float(loss.detach())

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        assert self.env is not None, "set the environment before learning"
        world, _ = sessions_given(self.env, "MOFIR")
        self._tail = torch.from_numpy(~world.groups.popular).to(self.device)
        self._preferences = self._session_preferences(self.n_envs)
        return super()._setup_learn(*args, **kwargs)

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns actions as executed, and as stored: for each session's preference, some of them random."""
        size = cast(spaces.Box, self.action_space).shape[0]
        chosen = self.policy.scale_action(self.predict(self._last_obs, preference=self._preferences)[0])
        lengths = self.exploration_noise * self._rng.random((n_envs, 1))
        noise = lengths / size**0.5 * self._rng.standard_normal((n_envs, size))
        first, last = self.epsilon
        is_random = self._rng.random((n_envs, 1)) < last + (first - last) * self._current_progress_remaining
        queries = np.where(is_random, self._rng.standard_normal((n_envs, size)), chosen + noise)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        scaled = queries.astype(np.float32)
        return self.policy.unscale_action(scaled), scaled

    def _store_transition(
        self,
        replay_buffer: Any,
        buffer_action: NDArray[Any],
        new_obs: Any,
        reward: NDArray[Any],
        dones: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        assert self.env is not None
        replay_buffer.note(executed_slates(self.env, infos), {_PREFERENCE: self._preferences})
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        ended = np.flatnonzero(dones)
        self._preferences[ended] = self._session_preferences(len(ended))

    def _session_preferences(self, count: int) -> NDArray[np.float32]:
        return self._rng.dirichlet(np.ones(len(OBJECTIVES)), count).astype(np.float32)

    def _excluded_save_params(self) -> list[str]:
        own = ["_critic_schedule", "_rng", "_preferences", "_tail"]
        return [*super()._excluded_save_params(), *own]
