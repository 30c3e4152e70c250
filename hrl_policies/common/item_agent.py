"""Agents that score every item and show the best, or draw them: what the discrete baselines have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import Tensor, nn
from typing_extensions import Unpack

from hrl_policies.common.sessions import AmongItsItems, OffPolicyArguments, allowed_items
from hrl_policies.common.slates import (
    ExecutedSlates,
    SlateDistribution,
    SlateReplayBuffer,
    SlateReplaySamples,
    executed_slates,
    item_masks,
    slate_shape,
    state_space,
)
from kuaifair_env.batch import SessionBatch
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.observations import stack_observations, state_of
from kuaifair_env.sb3 import world_beneath
from kuaifair_env.world import World

HeadKind = Literal["embedding", "linear"]


class ItemNet(nn.Module):
    """Hidden layers with ReLU, and scores of items ``<q, w_i> + b_i`` by their outputs.

    Args:
        state_size: Size of a state.
        net_arch: Units of the hidden layers.
        n_items: Items ``N``.
        dimension: Size ``d`` of item embeddings.
        head: ``"linear"`` learns a row of weights ``w_i`` for each item. ``"embedding"`` takes its embedding instead,
            and learns the query ``q``: what is learnt about an item is learnt about items that resemble it, and no
            ``(F, N)`` matrix is updated.

    Raises:
        ValueError: If the head is unknown, or there are no embeddings for it.
    """

    def __init__(self, state_size: int, net_arch: Sequence[int], n_items: int, dimension: int, head: HeadKind) -> None:
        super().__init__()
        if head not in get_args(HeadKind):
            raise ValueError(f"head must be one of {get_args(HeadKind)}, got {head!r}")
        if head == "embedding" and not dimension:
            raise ValueError("head='embedding' needs item embeddings, which only KuaiFair environments have")
        if not net_arch or min(net_arch) < 1:
            raise ValueError(f"net_arch must name the units of one hidden layer or more, got {net_arch!r}")
        self.hidden = nn.Sequential(*create_mlp(state_size, -1, list(net_arch)))
        self.rows, self.query = None, None
        if head == "linear":
            self.rows = nn.Linear(net_arch[-1], n_items)
        else:
            self.query = nn.Linear(net_arch[-1], dimension)
            self.bias = nn.Parameter(torch.zeros(n_items))

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Returns one score for each item, ``float32 (B, N)``.

        Args:
            states: ``float32 (B, state_size)``.
            embeddings: ``float32 (N, d)``.
        """
        queries, weights, bias = self._factors(states, embeddings)
        return torch.addmm(bias, queries, weights.T)

    def score_items(self, states: Tensor, embeddings: Tensor, items: Tensor) -> Tensor:
        """Returns scores ``float32 (B, K)`` of items ``int64 (B, K)`` alone, at a cost independent of ``N``."""
        queries, weights, bias = self._factors(states, embeddings)
        return torch.einsum("bf,bkf->bk", queries, weights[items]) + bias[items]

    def _factors(self, states: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries ``(B, F)``, and weights ``(N, F)`` and bias ``(N,)`` of the items."""
        features = self.hidden(states)
        if self.rows is not None:
            return features, self.rows.weight, self.rows.bias
        assert self.query is not None
        return self.query(features), embeddings, self.bias


class ItemPolicyArguments(TypedDict, total=False):
    """What every :class:`ItemPolicy` takes besides spaces and schedule; described there."""

    net_arch: Sequence[int]
    head: HeadKind
    dimension: int


class ItemPolicy(BasePolicy):
    """A policy from states to slates of distinct items.

    Args:
        observation_space: ``Box`` of states, or ``Dict`` with a ``Box`` called ``state``.
        action_space: ``MultiDiscrete`` of ``K`` times ``N`` (``action_mode="slate"``), or ``Discrete``.
        lr_schedule: Learning rate.
        net_arch: Units of hidden layers.
        head: ``"embedding"`` scores items by their embeddings, ``"linear"`` by weights of their own.
        dimension: Size ``d`` of item embeddings; 0 where there are none.

    Attributes:
        embeddings: ``float32 (N, d)``, item embeddings that the networks score by.

    Raises:
        ValueError: If a space or setting does not fit.
    """

    embeddings: Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: Sequence[int] = (256, 256),
        head: HeadKind = "embedding",
        dimension: int = 0,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=False)
        self.n_items, self.slate_size = slate_shape(action_space)
        self.state_size = int(state_space(observation_space).shape[0])
        self.net_arch, self.head, self.dimension = tuple(net_arch), head, dimension
        self.register_buffer("embeddings", torch.zeros(self.n_items, dimension))

    def set_embeddings(self, world: World) -> None:
        """Takes the item embeddings of the training world, scaled to length 1."""
        self.embeddings.copy_(torch.from_numpy(unit_rows(world.embeddings[: world.n_items])))

    def make_net(self) -> ItemNet:
        """Returns a new network over the catalogue."""
        return ItemNet(self.state_size, self.net_arch, self.n_items, self.dimension, self.head)

    def states(self, observation: Any) -> Tensor:
        """Returns the states of a batch of observations, ``float32 (B, state_size)``."""
        return torch.as_tensor(state_of(observation), device=self.device).to(torch.float32)

    @abstractmethod
    def choose(self, observation: Any, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        """Returns slates, ``int64 (B, K)``.

        Args:
            observation: A batch.
            deterministic: Whether to show the best items instead of exploring.
            allowed: ``bool (B, N)``, items that may be shown; None allows all.
        """

    def actions(self, slates: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns slates ``(B, K)`` as actions: ``(B,)`` if the action space is ``Discrete``."""
        return slates[:, 0] if isinstance(self.action_space, spaces.Discrete) else slates

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
        action_masks: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], tuple[NDArray[Any], ...] | None]:
        """Returns actions for one observation or a batch, and ``state`` as it came.

        Args:
            observation: One observation or a batch.
            state: Not used.
            episode_start: Not used.
            deterministic: See :meth:`choose`.
            action_masks: ``bool (B, N)``, items that may be shown; or such masks once for each slot, ``(B, K N)``, as
                sb3-contrib's ``get_action_masks`` gives them.

        Raises:
            ValueError: If the masks do not fit, or allow fewer than ``K`` items.
        """
        self.set_training_mode(False)
        single = np.ndim(state_of(observation)) == 1
        batch = stack_observations([observation]) if single else observation
        with torch.inference_mode():
            slates = self.choose(batch, deterministic, self.masks(action_masks))
        actions = self.actions(slates.cpu().numpy())
        return (actions[0] if single else actions), state

    def masks(self, action_masks: NDArray[np.bool_] | None) -> Tensor | None:
        """Returns action masks as :meth:`choose` takes them; see :meth:`predict`."""
        if action_masks is None:
            return None
        return torch.as_tensor(item_masks(action_masks, self.n_items, self.slate_size), device=self.device)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.choose(observation, deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "net_arch": self.net_arch,
            "head": self.head,
            "dimension": self.dimension,
        }


SelfItemAgent = TypeVar("SelfItemAgent", bound="ItemAgent")


class ItemAgentArguments(OffPolicyArguments, total=False):
    """What every :class:`ItemAgent` takes: the arguments described there, and those of all off-policy algorithms."""

    learning_rate: float | Schedule
    buffer_size: int
    batch_size: int
    huber_delta: float
    max_grad_norm: float
    policy_kwargs: dict[str, Any] | None
    _init_setup_model: bool


class ItemAgent(AmongItsItems, OffPolicyAlgorithm):
    """An off-policy algorithm whose actions are items: KuaiFair sessions, or any environment with ``Discrete`` actions.

    Under ``repeats="forbid"`` items that a session has seen are masked when slates are chosen, in training and, once
    :meth:`bind` was called (``evaluate`` does), in :meth:`predict`. Targets range over all items: the buffer keeps no
    masks.

    Args:
        policy: Name or class of the policy.
        env: Sessions with ``action_mode="slate"`` or ``"item"``, or another environment with ``Discrete`` actions.
        learning_starts: Steps with uniformly random slates before learning starts.
        gamma: Discount.
        learning_rate: A number or a schedule.
        buffer_size: Transitions kept, over all sessions.
        batch_size: Transitions of an update.
        huber_delta: Larger errors of values count linearly, which moves them from the mean towards the median: with a
            small delta agents underrate that users leave.
        max_grad_norm: The gradient of each network is clipped to this norm.
        policy_kwargs: Arguments of the policy; without item embeddings the default head is ``"linear"``.
        **kwargs: See :class:`~hrl_policies.common.sessions.OffPolicyArguments`.

    Raises:
        ValueError: If a setting is not valid, or actions are not items.
    """

    policy: ItemPolicy
    replay_buffer: SlateReplayBuffer

    def __init__(
        self,
        policy: str | type[ItemPolicy],
        env: GymEnv | str,
        *,
        learning_starts: int,
        gamma: float,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 100_000,
        batch_size: int = 256,
        huber_delta: float = 10.0,
        max_grad_norm: float = 10.0,
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Unpack[OffPolicyArguments],
    ) -> None:
        if min(batch_size, buffer_size) < 1:
            raise ValueError("batch_size and buffer_size must be at least 1")
        if not huber_delta > 0.0:
            raise ValueError(f"huber_delta must be positive, got {huber_delta}")
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=gamma,
            replay_buffer_class=SlateReplayBuffer,
            policy_kwargs=dict(policy_kwargs or {}),
            support_multi_env=True,
            sde_support=False,
            **kwargs,
        )
        self.huber_delta, self.max_grad_norm = huber_delta, max_grad_norm
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        # Checked before the replay buffer reads the action space.
        slate_shape(self.action_space)
        world = None if self.env is None else world_beneath(self.env)
        if world is not None:
            self.policy_kwargs.setdefault("dimension", world.dimension)
        elif self.env is not None:
            self.policy_kwargs.setdefault("head", "linear")
        super()._setup_model()
        self._bound: SessionBatch | None = None
        if world is not None:
            self._read_items(world)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        normalize = self._vec_normalize_env
        if normalize is not None and normalize.norm_reward:
            raise ValueError(
                f"{type(self).__name__} learns from the feedback on each item, which VecNormalize does not scale; use "
                "VecNormalize(..., norm_reward=False)"
            )
        return super()._setup_learn(*args, **kwargs)

    def _read_items(self, world: World) -> None:
        """Takes from the training world what the agent may know about items."""
        self.policy.set_embeddings(world)

    def learn(
        self: SelfItemAgent,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfItemAgent:
        """Trains the agent; see Stable-Baselines3. The default ``tb_log_name`` is the name of the class."""
        name = tb_log_name or type(self).__name__
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Takes gradient steps on batches out of the buffer, and logs the mean of what they return."""
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        records: dict[str, list[Tensor]] = {}
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            for name, value in self._update(batch).items():
                records.setdefault(name, []).append(value)
        self._n_updates += gradient_steps
        for name, values in records.items():
            self.logger.record(f"train/{name}", float(torch.stack(values).mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    @abstractmethod
    def _update(self, batch: SlateReplaySamples) -> Mapping[str, Tensor]:
        """Takes a gradient step on a batch and returns its losses by name."""

    @abstractmethod
    def _update_learning_rates(self) -> None:
        """Sets the optimisers' learning rates to those of the schedules."""

    def bind(self, batch: SessionBatch) -> None:
        """Takes the sessions whose observations :meth:`predict` will get, so that it masks the items they have seen.

        Raises:
            ValueError: If their actions are not item ids.
        """
        if batch.config.action_mode == "embedding":
            raise ValueError("this agent names items; evaluate it with action_mode='slate', not 'embedding'")
        self._bound = batch

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
        action_masks: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], tuple[NDArray[Any], ...] | None]:
        """Returns actions; see :meth:`~hrl_policies.common.item_agent.ItemPolicy.predict`.

        Without ``action_masks`` those of the sessions given to :meth:`bind` hold.

        Raises:
            ValueError: If the observations are not those of the bound sessions.
        """
        if action_masks is None and self._bound is not None and self._bound.simulator.allowed is not None:
            action_masks = self._bound.simulator.allowed
            states = state_of(observation)
            if len(action_masks) != len(np.atleast_2d(states)):
                raise ValueError(
                    f"{len(np.atleast_2d(states))} observations for an agent bound to {len(action_masks)} sessions; "
                    "bind(batch) again, or give action_masks"
                )
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        assert self.env is not None
        allowed = self.policy.masks(allowed_items(self.env))
        with torch.inference_mode():
            if self.num_timesteps < learning_starts:
                even = torch.zeros(n_envs, self.policy.n_items, device=self.device)
                slates = SlateDistribution(even, self.policy.slate_size, allowed).sample()
            else:
                slates = self.policy.choose(self._last_obs, deterministic=False, allowed=allowed)
        actions = self.policy.actions(slates.cpu().numpy())
        return actions, actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: NDArray[Any],
        new_obs: Any,
        reward: NDArray[Any],
        dones: NDArray[np.bool_],
        infos: list[dict[str, Any]],
    ) -> None:
        assert self.env is not None
        if world_beneath(self.env) is None:
            executed = ExecutedSlates(buffer_action[:, None], reward[:, None].astype(np.float32))
        else:
            executed = executed_slates(self.env, infos)
        self.replay_buffer.note(executed, self._extra_columns(executed, new_obs, dones, infos))
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _extra_columns(
        self, executed: ExecutedSlates, new_obs: Any, dones: NDArray[np.bool_], infos: list[dict[str, Any]]
    ) -> dict[str, NDArray[Any]]:
        """Returns the additional columns of the buffer for the step that just happened."""
        return {}

    def _slot_rewards(self, batch: SlateReplaySamples) -> Tensor:
        """Returns what each slot earned, ``float32 (n, K)``: its feedback, and whatever wrappers add to the reward."""
        return batch.feedback + (batch.rewards - batch.feedback.mean(dim=1, keepdim=True))

    def _minimize(self, optimizer: torch.optim.Optimizer, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Takes a step against the clipped gradient of a loss, or of outputs whose own gradient is given."""
        optimizer.zero_grad()
        torch.autograd.backward(loss, gradient)
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.max_grad_norm)
        optimizer.step()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_bound"]
