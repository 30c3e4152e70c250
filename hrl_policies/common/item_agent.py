"""What off-policy agents over items have in common: slates, masks, and a buffer of what was shown."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from torch import Tensor

from hrl_policies.common.buffers import (
    ExecutedSlates,
    SlateReplayBuffer,
    SlateReplaySamples,
    executed_slates,
)
from hrl_policies.common.item_policy import ItemPolicy
from hrl_policies.common.sessions import allowed_items
from hrl_policies.common.slates import SlateDistribution, slate_shape
from kuaifair_env.batch import SessionBatch
from kuaifair_env.sb3 import world_beneath
from kuaifair_env.spaces import state_of
from kuaifair_env.world import World

SelfItemAgent = TypeVar("SelfItemAgent", bound="ItemAgent")


class ItemAgent(OffPolicyAlgorithm):
    """An off-policy algorithm whose actions are items: KuaiFair sessions, or any environment with ``Discrete`` actions.

    Under ``repeats="forbid"`` items that a session has seen are masked when slates are chosen, in training and, once
    :meth:`bind` was called (``evaluate`` does), in :meth:`predict`. Targets range over all items: the buffer keeps no
    masks.

    Args:
        policy: Name or class of the policy.
        env: Sessions with ``action_mode="slate"`` or ``"item"``, or another environment with ``Discrete`` actions.
        max_grad_norm: The gradient of each network is clipped to this norm.
        policy_kwargs: Arguments of the policy.
        kwargs: All other arguments of Stable-Baselines3's ``OffPolicyAlgorithm``.
    """

    policy: ItemPolicy
    replay_buffer: SlateReplayBuffer

    def __init__(
        self,
        policy: str | type[ItemPolicy],
        env: GymEnv | str,
        *,
        max_grad_norm: float,
        policy_kwargs: dict[str, Any] | None,
        **kwargs: Any,
    ) -> None:
        if min(kwargs["batch_size"], kwargs["buffer_size"]) < 1:
            raise ValueError("batch_size and buffer_size must be at least 1")
        super().__init__(
            policy,
            env,
            replay_buffer_class=SlateReplayBuffer,
            policy_kwargs=dict(policy_kwargs or {}),
            support_multi_env=True,
            sde_support=False,
            **kwargs,
        )
        self.max_grad_norm = max_grad_norm
        self._n_updates = 0

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
        """Returns actions; see :meth:`~hrl_policies.common.item_policy.ItemPolicy.predict`.

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
        self,
        executed: ExecutedSlates,
        new_obs: Any,
        dones: NDArray[np.bool_],
        infos: list[dict[str, Any]],
    ) -> dict[str, NDArray[Any]]:
        """Returns the additional columns of the buffer for the step that just happened."""
        return {}

    def _slot_rewards(self, batch: SlateReplaySamples) -> Tensor:
        """Returns what each slot earned, ``float32 (n, K)``: its feedback, and whatever wrappers add to the reward."""
        return batch.feedback + (batch.rewards - batch.feedback.mean(dim=1, keepdim=True))

    def _clip_and_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradients of an optimiser's parameters and takes its step."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        optimizer.step()

    def _minimize(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Takes a step against the clipped gradient of a loss."""
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._clip_and_step(optimizer)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_bound"]
