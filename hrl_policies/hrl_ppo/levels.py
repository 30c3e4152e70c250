"""What policies of ``HierarchicalPPO`` have in common: two levels, their optimisers, actions that hold, ``predict``."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from dsrm.click_scorer import ClickScorer
from hrl_policies.common.slates import item_masks, slate_shape
from kuaifair_env.observations import stack_observations, state_of
from kuaifair_env.world import World

_ADAM_EPSILON = 1e-5


class ManagerState(NamedTuple):
    """The manager's last actions, which hold for several steps; what a recurrent policy keeps in its LSTM states.

    Attributes:
        actions: ``float32 (B, size)``.
        steps_left: ``int64 (B,)``, for how many more steps they hold.
    """

    actions: Tensor
    steps_left: Tensor


@dataclass(frozen=True)
class LevelActions:
    """The actions of both levels for a batch of observations; subclasses add what is needed to evaluate them again.

    Attributes:
        slates: ``int64 (B, K)``, the environment's items.
        manager_actions: ``float32 (B, size)``, the manager's ``x``.
        decided: ``bool (B,)``, whether the manager decided now; elsewhere its last action holds.
        steps_left: ``int64 (B,)``, for how many more steps the manager's actions hold.
        manager_log_probs: ``float32 (B,)``.
        worker_log_probs: ``float32 (B, K)``, one for each slot.
        values: ``float32 (B, 3)``, ``V_h``, ``V_l``, ``V_c``.
        entropies: ``float32 (B,)``, of the worker's first slot.
    """

    slates: Tensor
    manager_actions: Tensor
    decided: Tensor
    steps_left: Tensor
    manager_log_probs: Tensor
    worker_log_probs: Tensor
    values: Tensor
    entropies: Tensor

    @property
    def manager_state(self) -> ManagerState:
        """What the manager's next actions depend on."""
        return ManagerState(self.manager_actions, self.steps_left)


class TwoLevelPolicy(BasePolicy):
    """A manager and a worker, which share nothing that is trained.

    Subclasses call :meth:`_make_levels` at the end of their constructor.

    Args:
        observation_space: Space of an observation.
        action_space: ``MultiDiscrete`` of ``K`` times ``N`` (``action_mode="slate"``).
        use_sde: Must be False.

    Attributes:
        manager: The manager's networks.
        worker: The worker's networks.
        slate_size: Items ``K`` of a slate.
        flat: Whether there is one level alone, which earns the fairness reward too.
        reads_masks: Whether it must be told which items may be shown.

    Raises:
        ValueError: If the actions are not slates.
    """

    manager: nn.Module
    worker: nn.Module
    slate_size: int
    flat = False
    reads_masks = True

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], use_sde: bool) -> None:
        super().__init__(observation_space, action_space, squash_output=False)
        if use_sde:
            raise ValueError("slates are discrete; there is no state-dependent exploration of them")
        if not isinstance(action_space, spaces.MultiDiscrete):
            raise ValueError(
                f"HierarchicalPPO shows slates; make the environment with action_mode='slate' (got {action_space})"
            )

    def _make_levels(
        self, manager: nn.Module, worker: nn.Module, lr_schedule: Schedule, manager_lr_schedule: Schedule | None
    ) -> None:
        """Takes the networks of both levels, and makes their optimisers."""
        self.manager, self.worker = manager, worker
        manager_rate = lr_schedule if manager_lr_schedule is None else manager_lr_schedule
        self.manager_optimizer = torch.optim.Adam(manager.parameters(), lr=manager_rate(1), eps=_ADAM_EPSILON)
        self.worker_optimizer = torch.optim.Adam(worker.parameters(), lr=lr_schedule(1), eps=_ADAM_EPSILON)
        # Stable-Baselines3 saves and schedules "the" optimiser of a policy; ours are listed one by one.
        self.optimizer = self.worker_optimizer

    def _hold(
        self, actions: Tensor, manager_state: ManagerState | None, possible: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps the manager's last actions where they still hold.

        Args:
            actions: ``float32 (B, size)``, as if it decided everywhere.
            manager_state: Its last actions; None lets it decide everywhere.
            possible: ``bool (B,)``, where the last action can still be carried out; None is everywhere.

        Returns:
            The actions that hold, ``bool (B,)`` where it decided, and ``int64 (B,)`` for how many more steps they hold.
        """
        decided = torch.ones(len(actions), dtype=torch.bool, device=actions.device)
        steps_left = torch.full_like(decided, self.interval, dtype=torch.int64)
        if manager_state is not None:
            decided = manager_state.steps_left <= 0
            if possible is not None:
                decided = decided | ~possible
            actions = torch.where(decided[:, None], actions, manager_state.actions)
            steps_left = torch.where(decided, steps_left, manager_state.steps_left)
        return actions, decided, steps_left - 1

    @property
    @abstractmethod
    def interval(self) -> int:
        """Steps for which the manager's action holds."""

    @property
    @abstractmethod
    def manager_learns(self) -> bool:
        """Whether the manager has anything to learn."""

    @abstractmethod
    def act(
        self,
        observation: Any,
        deterministic: bool = False,
        manager_state: ManagerState | None = None,
        allowed: Tensor | None = None,
    ) -> LevelActions:
        """Returns the actions of both levels.

        Args:
            observation: A batch, as the environment gives it.
            deterministic: Whether both levels take what is likeliest.
            manager_state: The manager's last actions; None lets it decide everywhere.
            allowed: ``bool (B, N)``, items that may be shown, for policies that read masks; None allows all.
        """

    @abstractmethod
    def evaluate_worker(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Evaluates the worker's actions anew under the present worker.

        The manager's ``x`` is data here: no gradient of the worker reaches the manager.

        Returns:
            Log-probabilities of slots ``(B, K)``; entropies, ``V_l`` and ``V_c``, ``(B,)`` each.
        """

    @abstractmethod
    def evaluate_manager(self, actions: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluates the manager's actions anew under the present manager, in some rows ``bool (B,)``.

        Returns:
            Log-probabilities, entropies and ``V_h``, ``(n,)`` each.
        """

    @abstractmethod
    def forms(self) -> str:
        """Returns the forms of both levels, for people."""

    @abstractmethod
    def diagnostics(self, manager_actions: Tensor) -> dict[str, float]:
        """Returns what the manager asked for and what the worker has learned, by name, for the logger.

        Args:
            manager_actions: ``float32 (n, size)``, of a rollout.
        """

    def read_items(self, world: World, scorer: ClickScorer | Literal["fit"] | None) -> None:
        """Takes from the training world what the policy may know of single items; nothing by default.

        Args:
            world: The training world.
            scorer: The click model, or ``"fit"``.
        """

    def level(self, name: Literal["manager", "worker"]) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns the networks of a level and their optimiser."""
        return (self.manager, self.manager_optimizer) if name == "manager" else (self.worker, self.worker_optimizer)

    def predict_values(self, observation: Any) -> Tensor:
        """Returns ``V_h``, ``V_l`` and ``V_c`` of a batch, ``float32 (B, 3)``."""
        return self.act(observation, deterministic=True).values

    def forward(self, observation: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Returns slates, the values of both levels, and the log-probability of both actions together."""
        actions = self.act(observation, deterministic)
        return actions.slates, actions.values, actions.manager_log_probs + actions.worker_log_probs.sum(dim=1)

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
        action_masks: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], tuple[NDArray[Any], ...] | None]:
        """Returns slates for one observation or a batch.

        Where the manager's action holds for several steps it travels in ``state``, as a recurrent policy's does:
        actions ``(B, size)`` and steps left ``(B,)``.

        Args:
            observation: One observation or a batch.
            state: The state that the last call returned; None at the start.
            episode_start: ``bool (B,)``, where a session begins.
            deterministic: Whether to take what is likeliest.
            action_masks: ``bool (B, N)``, items that may be shown; or such masks once for each slot, ``(B, K N)``.

        Raises:
            ValueError: If the masks do not fit, or allow fewer than ``K`` items.
        """
        self.set_training_mode(False)
        single = np.ndim(state_of(observation)) == 1
        batch = stack_observations([observation]) if single else observation
        with torch.inference_mode():
            actions = self.act(
                batch, deterministic, self._manager_state(state, episode_start), self.masks(action_masks)
            )
        if self.interval > 1:
            state = tuple(tensor.cpu().numpy() for tensor in actions.manager_state)
        slates = actions.slates.cpu().numpy()
        return (slates[0] if single else slates), state

    def masks(self, action_masks: NDArray[np.bool_] | None) -> Tensor | None:
        """Returns action masks as :meth:`act` takes them; see :meth:`predict`."""
        if action_masks is None or not self.reads_masks:
            return None
        return torch.as_tensor(item_masks(action_masks, *slate_shape(self.action_space)), device=self.device)

    def _manager_state(
        self, state: tuple[NDArray[Any], ...] | None, episode_start: NDArray[np.bool_] | None
    ) -> ManagerState | None:
        if state is None or self.interval == 1:
            return None
        actions, steps_left = (torch.as_tensor(array, device=self.device) for array in state)
        if episode_start is not None:
            steps_left = steps_left.masked_fill(torch.as_tensor(episode_start, device=steps_left.device).bool(), 0)
        return ManagerState(actions, steps_left)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.act(observation, deterministic).slates
