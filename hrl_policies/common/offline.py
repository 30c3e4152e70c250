"""The base of offline algorithms: Stable-Baselines3's interface over logged transitions instead of an environment."""

from __future__ import annotations

import sys
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import configure_logger
from torch import Tensor
from typing_extensions import Unpack

from hrl_policies.common.sessions import AlgorithmArguments, AmongItsItems
from hrl_policies.common.transitions import LoggedTransitions, scaled_actions
from kuaifair_env.catalogue import check_catalogues

SelfOffline = TypeVar("SelfOffline", bound="OfflineAlgorithm")


class TensorBatch(NamedTuple):
    """Transitions as tensors on the device.

    Attributes:
        observations: ``float32 (B, d)``.
        actions: ``float32 (B, m)`` in ``[-1, 1]``, or ``int64 (B, K)`` item ids.
        rewards: ``float32 (B, 1)``.
        next_observations: ``float32 (B, d)``.
        not_terminated: ``float32 (B, 1)``, 0 where the session terminated, else 1.
        slot_rewards: ``float32 (B, K)``, feedback on each item of a slate, or None.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    not_terminated: Tensor
    slot_rewards: Tensor | None

    def take(self, rows: Tensor) -> TensorBatch:
        """Returns some of the transitions."""
        return TensorBatch(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


class OfflineArguments(AlgorithmArguments, total=False):
    """What every :class:`OfflineAlgorithm` takes: the arguments described there, and those of all algorithms."""

    tau: float
    gamma: float
    policy_kwargs: dict[str, Any] | None
    _init_setup_model: bool


class OfflineAlgorithm(AmongItsItems):
    """Base of algorithms that learn from :class:`LoggedTransitions` alone; one timestep is one gradient step.

    Training never touches the environment, which only provides spaces, and sessions for callbacks that evaluate. The
    random numbers of a step follow from the seed and the number of the step, so that interrupted and resumed training
    gives the same parameters as training in one piece.

    Subclasses update the networks of their policy in :meth:`_update`.

    Args:
        policy: Policy class or its name.
        env: Sessions of the training world; None takes the spaces of the transitions.
        transitions: What to learn from; may be given later (:meth:`set_transitions`).
        learning_rate: A number or a schedule.
        batch_size: Transitions of a gradient step.
        tau: Step of the target networks.
        gamma: Discount.
        policy_kwargs: Arguments of the policy.
        **kwargs: See :class:`~hrl_policies.common.sessions.AlgorithmArguments`.

    Attributes:
        supported_action_spaces: Kinds of action spaces that the algorithm can act in.
        frozen_while_serving: Why it learns nothing while it serves (:func:`kuaifair_env.serve`).

    Raises:
        ValueError: If a setting is not valid, spaces do not fit, or there are neither sessions nor transitions.
    """

    supported_action_spaces: ClassVar[tuple[type[spaces.Space[Any]], ...]]
    frozen_while_serving: ClassVar[str] = "it learns from logged transitions alone"

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str | None,
        transitions: LoggedTransitions | None,
        *,
        learning_rate: float | Schedule,
        batch_size: int,
        tau: float = 0.005,
        gamma: float = 0.99,
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Unpack[AlgorithmArguments],
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not (0.0 < tau <= 1.0 and 0.0 <= gamma <= 1.0):
            raise ValueError(f"tau lies in (0, 1] and gamma in [0, 1], got {tau} and {gamma}")
        super().__init__(
            policy,
            env,
            learning_rate,
            policy_kwargs=policy_kwargs,
            support_multi_env=True,
            supported_action_spaces=self.supported_action_spaces,
            **kwargs,
        )
        self.batch_size, self.tau, self.gamma = batch_size, tau, gamma
        self.transitions: LoggedTransitions | None = None
        self._tensors: TensorBatch | None = None
        self._returns = (-np.inf, np.inf)
        if env is None and transitions is not None:
            # Stable-Baselines3 has only checked the action space of an environment.
            if not isinstance(transitions.action_space, self.supported_action_spaces):
                names = " or ".join(space.__name__ for space in self.supported_action_spaces)
                raise ValueError(
                    f"{type(self).__name__} acts in a {names}, the transitions in {transitions.action_space}"
                )
            self.observation_space = transitions.observation_space
            self.action_space = transitions.action_space
            self.n_envs = 1
        self._initial_transitions = transitions
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):
            raise ValueError(f"{type(self).__name__} needs an environment or transitions, for their spaces")
        if not isinstance(self.observation_space, spaces.Box):
            raise ValueError(
                f"{type(self).__name__} observes a Box (observation_mode='state'), not {self.observation_space}"
            )
        if self._vec_normalize_env is not None:
            raise ValueError("logged transitions are not normalised; leave VecNormalize out")
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        # A loaded model keeps the seed that it drew.
        if not hasattr(self, "_batch_seed"):
            self._batch_seed = _random_seed() if self.seed is None else self.seed
        self.policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)
        if self._initial_transitions is not None:
            self.set_transitions(self._initial_transitions)
            self._initial_transitions = None

    def set_transitions(self, transitions: LoggedTransitions) -> None:
        """Sets what to learn from; a loaded model needs it before it can learn on.

        Raises:
            MismatchError: If they are of other items.
            ValueError: If the transitions' spaces are not those of the algorithm.
        """
        if transitions.observation_space.shape != self.observation_space.shape:
            raise ValueError(
                f"transitions observe {transitions.observation_space}, the algorithm {self.observation_space}"
            )
        check_catalogues(self.observation_space, transitions.observation_space)
        self._check_actions(transitions)
        self.transitions = transitions
        actions = scaled_actions(transitions.actions, transitions.action_space)
        if isinstance(transitions.action_space, spaces.Discrete):
            actions = actions[:, None]
        self._tensors = TensorBatch(
            self._tensor(transitions.observations),
            self._tensor(actions),
            self._tensor(transitions.rewards[:, None]),
            self._tensor(transitions.next_observations),
            self._tensor(~transitions.terminated[:, None]).float(),
            None if transitions.slot_rewards is None else self._tensor(transitions.slot_rewards),
        )
        rewards = transitions.rewards if transitions.slot_rewards is None else transitions.slot_rewards
        low, high = min(0.0, float(rewards.min(initial=0.0))), max(0.0, float(rewards.max(initial=0.0)))
        horizon = 1.0 / (1.0 - self.gamma) if self.gamma < 1.0 else np.inf
        self._returns = (low * horizon if low else 0.0, high * horizon if high else 0.0)

    def possible(self, values: Tensor) -> Tensor:
        """Returns values limited to what logged rewards can sum up to, discounted.

        A maximum over actions that the log does not have feeds on its own errors: without a limit values grow to
        thousands of times the largest return.
        """
        return values.clamp(*self._returns)

    def learn(
        self: SelfOffline,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1_000,
        tb_log_name: str = "offline",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOffline:
        """Takes ``total_timesteps`` gradient steps; see Stable-Baselines3.

        Callbacks see one step for each gradient step, with its losses in ``locals["losses"]``; there are no rollouts.
        ``log_interval`` counts gradient steps.

        Raises:
            ValueError: If there are no transitions.
        """
        if self._tensors is None:
            raise ValueError(
                f"{type(self).__name__} has nothing to learn from; call set_transitions(transitions) first"
            )
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            # Before the step, because an earlier call of learn may have left another value.
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            losses = self.train()
            self.num_timesteps += 1
            for name, value in losses.items():
                self.logger.record_mean(f"train/{name}", value)
            if log_interval is not None and self.num_timesteps % log_interval == 0:
                self._dump_logs()
            callback.update_locals(locals())
            if not callback.on_step():
                break
        callback.on_training_end()
        return self

    def train(self) -> Mapping[str, float]:
        """Takes one gradient step and returns its losses by name."""
        assert self._tensors is not None and self.transitions is not None
        if not self.policy.training:
            self.policy.set_training_mode(True)
        self._update_learning_rate(self._optimizers())
        rng = np.random.default_rng((self._batch_seed, self.num_timesteps))
        rows = torch.from_numpy(rng.integers(0, len(self.transitions), self.batch_size)).to(self.device)
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        losses = self._update(self._tensors.take(rows), noise)
        self._n_updates += 1
        return losses

    @abstractmethod
    def _update(self, batch: TensorBatch, noise: torch.Generator) -> Mapping[str, float]:
        """Takes a gradient step on a batch; all randomness comes from the (CPU) generator."""

    @abstractmethod
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns the optimisers whose learning rate follows the schedule."""

    @abstractmethod
    def _check_actions(self, transitions: LoggedTransitions) -> None:
        """Raises a ``ValueError`` if the algorithm cannot learn from such actions."""

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        # Stable-Baselines3's own version would reset the environment.
        self.start_time = time.time_ns()
        self.num_timesteps = 0 if reset_num_timesteps else self.num_timesteps
        self._num_timesteps_at_start = self.num_timesteps
        self._total_timesteps = self.num_timesteps + total_timesteps
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        return self._total_timesteps, self._init_callback(callback, progress_bar)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not progress_bar:
            return super()._init_callback(callback)
        if isinstance(callback, list):
            callback = CallbackList(callback)
        if not isinstance(callback, BaseCallback):
            callback = ConvertCallback(callback)
        return super()._init_callback(CallbackList([callback, _GradientStepsBar()]))

    def _dump_logs(self) -> None:
        seconds = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        steps = self.num_timesteps - self._num_timesteps_at_start
        self.logger.record("time/gradient_steps_per_second", int(steps / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def _tensor(self, values: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "transitions", "_tensors", "_returns", "_initial_transitions"]


class _GradientStepsBar(ProgressBarCallback):
    """Stable-Baselines3's progress bar for gradient steps, of which each counts once whatever ``n_envs``."""

    def _on_step(self) -> bool:
        self.pbar.update(1)
        return True


def minimize(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Takes one optimiser step against the gradient of a loss."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def _random_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1)[0])
