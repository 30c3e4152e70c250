"""What off-policy agents over items have in common: slates, masks, and a buffer of what was really shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from hrl_policies.common.buffers import (
    Column,
    ExecutedSlates,
    SlateReplayBuffer,
    SlateReplaySamples,
    executed_slates,
)
from hrl_policies.common.item_policy import ItemPolicy, catalogue_of
from hrl_policies.common.slates import SlateDistribution
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray
from kuaifair_env.sb3 import KuaiFairVecEnv, world_beneath
from kuaifair_env.spaces import state_of
from kuaifair_env.world import World


class ItemAgent(OffPolicyAlgorithm):
    """An off-policy algorithm whose actions are items: KuaiFair sessions, or any environment with ``Discrete`` actions.

    Under ``repeats="forbid"`` items that a session has seen are masked when slates are chosen, in training and, once
    :meth:`bind` was called (``evaluate`` does), in :meth:`predict`. Targets range over all items: the buffer keeps no
    masks.

    Args:
        policy: Name or class of the policy.
        env: Sessions with ``action_mode="slate"`` or ``"item"``, or another environment with ``Discrete`` actions.
        columns: What the buffer keeps besides; see :class:`~hrl_policies.common.buffers.SlateReplayBuffer`.
        max_grad_norm: Where each network's gradient is cut off.

    All other arguments are Stable-Baselines3's.
    """

    policy: ItemPolicy
    replay_buffer: SlateReplayBuffer

    def __init__(
        self,
        policy: str | type[ItemPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | Schedule,
        buffer_size: int,
        learning_starts: int,
        batch_size: int,
        tau: float,
        gamma: float,
        train_freq: int | tuple[int, str],
        gradient_steps: int,
        max_grad_norm: float,
        columns: Mapping[str, Column] | None,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: torch.device | str,
    ) -> None:
        if min(batch_size, buffer_size) < 1:
            raise ValueError("batch_size and buffer_size must be at least 1")
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            replay_buffer_class=SlateReplayBuffer,
            replay_buffer_kwargs={"columns": dict(columns or {})},
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
        )
        self.max_grad_norm = max_grad_norm
        self._n_updates = 0

    def _setup_model(self) -> None:
        # Refuses actions that are no items before the buffer asks about them.
        catalogue_of(self.action_space)
        world = None if self.env is None else world_beneath(self.env)
        if world is not None:
            self.policy_kwargs.setdefault("dimension", world.dimension)
        elif self.env is not None:
            self.policy_kwargs.setdefault("head", "linear")
        super()._setup_model()
        self._bound: SessionBatch | None = None
        if world is not None:
            self._fill(world)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        scaled = self._vec_normalize_env
        if scaled is not None and scaled.norm_reward:
            raise ValueError(
                f"{type(self).__name__} learns from the feedback on each item, which VecNormalize does not scale; use "
                "VecNormalize(..., norm_reward=False)"
            )
        return super()._setup_learn(*args, **kwargs)

    def _fill(self, world: World) -> None:
        """Takes what the agent may know of items from the training world."""
        self.policy.fill(world)

    def bind(self, batch: SessionBatch) -> None:
        """Tells which sessions :meth:`predict` will be asked about, so that it masks what they have seen.

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
                even = torch.zeros(n_envs, self.policy.items, device=self.device)
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
        self.replay_buffer.note(executed, self._extras(executed, new_obs, dones, infos))
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _extras(
        self,
        executed: ExecutedSlates,
        new_obs: Any,
        dones: NDArray[np.bool_],
        infos: list[dict[str, Any]],
    ) -> dict[str, NDArray[Any]]:
        """Returns the agent's own columns of the step that just happened."""
        return {}

    def _slot_rewards(self, batch: SlateReplaySamples) -> Tensor:
        """Returns what each slot earned, ``float32 (n, K)``: its feedback, and whatever wrappers add to the reward."""
        return batch.feedback + (batch.rewards - batch.feedback.mean(dim=1, keepdim=True))

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Takes a step against the gradient of a loss."""
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._step(optimizer)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes a step against the gradients that are there."""
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        optimizer.step()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_bound"]


def allowed_items(env: VecEnv) -> BoolArray | None:
    """Returns the items that the sessions beneath a ``VecEnv`` may be shown now, ``bool (B, N)``; None for all."""
    if isinstance(env.unwrapped, KuaiFairVecEnv):
        return env.unwrapped.batch.simulator.allowed
    if world_beneath(env) is None or env.get_attr("config", indices=0)[0].repeats == "allow":
        return None
    return np.stack(env.env_method("action_masks"))
