"""The policy of ``HierarchicalPPO``: both levels, their optimisers, ``predict``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from hrl_policies.common.slates import QuotaSlateDistribution, SlateDistribution, state_space
from hrl_policies.common.yaml_files import validated
from hrl_policies.hrl_ppo.networks import (
    HierarchySettings,
    ItemTable,
    Manager,
    Observed,
    Worker,
    mean_and_deviation,
    omegas,
)
from kuaifair_env.observations import stack_observations, state_of

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
class HierarchicalActions:
    """The actions of both levels for a batch of observations, with what is needed to evaluate them again.

    Attributes:
        slates: ``int64 (B, K)``, the environment's items.
        slots: ``int64 (B, K)``, places of those among the candidates.
        candidates: ``int64 (B, C)``, in the table's own order.
        window_counts: ``float32 (B, C, 2)``, clicks and skips of the candidates in the window.
        scale: ``float32 (B, 2)``, mean and deviation by which accuracy was standardised.
        manager_features: ``float32 (B, F_h)``.
        worker_features: ``float32 (B, F_l)``; holds ``x``.
        manager_actions: ``float32 (B, size)``, the manager's ``x``.
        decided: ``bool (B,)``, whether the manager decided now; elsewhere its last action holds.
        steps_left: ``int64 (B,)``, for how many more steps the manager's actions hold.
        manager_log_probs: ``float32 (B,)``.
        worker_log_probs: ``float32 (B, K)``, one for each slot.
        values: ``float32 (B, 3)``, ``V_h``, ``V_l``, ``V_c``.
        entropies: ``float32 (B,)``, of the worker's first slot.
    """

    slates: Tensor
    slots: Tensor
    candidates: Tensor
    window_counts: Tensor
    scale: Tensor
    manager_features: Tensor
    worker_features: Tensor
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


class HierarchicalPolicy(BasePolicy):
    """Manager and worker over slates.

    An observation becomes a slate in :meth:`act`: the worker scores all items at the state, the best of both groups
    become candidates, the manager weighs accuracy against fairness, and the worker ranks the candidates by eq. 6
    (:func:`~hrl_policies.hrl_ppo.networks.item_scores`).

    Args:
        observation_space: ``Box`` of states, or ``Dict`` with ``state`` and the window, as
            ``observation_mode="history"`` gives it.
        action_space: ``MultiDiscrete`` of ``K`` times ``N`` (``action_mode="slate"``).
        lr_schedule: Learning rate of the worker.
        hierarchy: Arguments of :class:`~hrl_policies.hrl_ppo.networks.HierarchySettings`.
        dimension: Size ``d`` of item embeddings; None takes the size of the state.
        manager_lr_schedule: Learning rate of the manager; None takes the worker's.
        use_sde: Must be False.

    Raises:
        ValueError: If a setting is not valid, or the spaces are not those above.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        hierarchy: dict[str, Any] | None = None,
        dimension: int | None = None,
        manager_lr_schedule: Schedule | None = None,
        use_sde: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=False)
        if use_sde:
            raise ValueError("slates are discrete; there is no state-dependent exploration of them")
        if not isinstance(action_space, spaces.MultiDiscrete):
            raise ValueError(
                f"HierarchicalPPO shows slates; make the environment with action_mode='slate' (got {action_space})"
            )
        self.hierarchy = validated(HierarchySettings, hierarchy or {}, "hierarchy")
        self.slate_size, items = len(action_space.nvec), int(action_space.nvec[0])
        if self.hierarchy.memory and not isinstance(observation_space, spaces.Dict):
            raise ValueError("memory=True needs the window: make the environment with observation_mode='history'")
        self.state_size = int(state_space(observation_space).shape[0])
        self.dimension = self.state_size if dimension is None else dimension
        self.table = ItemTable(items, self.dimension, self.slate_size)
        self.manager = Manager(self.hierarchy, self.state_size, self.slate_size)
        self.worker = Worker(self.hierarchy, self.state_size, self.table)
        manager_rate = lr_schedule if manager_lr_schedule is None else manager_lr_schedule
        self.manager_optimizer = torch.optim.Adam(self.manager.parameters(), lr=manager_rate(1), eps=_ADAM_EPSILON)
        self.worker_optimizer = torch.optim.Adam(self.worker.parameters(), lr=lr_schedule(1), eps=_ADAM_EPSILON)
        # Stable-Baselines3 saves and schedules "the" optimiser of a policy; ours are listed one by one.
        self.optimizer = self.worker_optimizer

    def level(self, name: Literal["manager", "worker"]) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns the networks of a level and their optimiser."""
        return (self.manager, self.manager_optimizer) if name == "manager" else (self.worker, self.worker_optimizer)

    def act(
        self, observation: Any, deterministic: bool = False, manager_state: ManagerState | None = None
    ) -> HierarchicalActions:
        """Returns the actions of both levels.

        Args:
            observation: A batch, as the environment gives it.
            deterministic: Whether both levels take what is likeliest.
            manager_state: The manager's last actions; None lets it decide everywhere.
        """
        observed = Observed(observation, self.table)
        accuracy = self.worker.catalogue_accuracy(observed, self.table)
        scale = mean_and_deviation(accuracy)
        n_candidates = self.hierarchy.candidates
        candidates = self.table.best_candidates(accuracy, n_candidates)
        candidate_accuracy = accuracy.gather(1, candidates)
        group_scores = self.table.group_scores(candidate_accuracy, n_candidates)
        manager_features = torch.cat(
            [observed.state, observed.context, (group_scores - scale[:, :1]) / scale[:, 1:]], dim=1
        )
        actions, manager_log_probs = self._manager_actions(manager_features, deterministic)
        decided = torch.ones(len(actions), dtype=torch.bool, device=actions.device)
        steps_left = torch.zeros(len(actions), dtype=torch.int64, device=actions.device)
        if manager_state is not None:
            decided, steps_left = manager_state.steps_left <= 0, manager_state.steps_left
            actions = torch.where(decided[:, None], actions, manager_state.actions)
        worker_features = torch.cat([observed.state, observed.context, actions], dim=1)
        if self.hierarchy.weights == "paper":
            scale = mean_and_deviation(candidate_accuracy)
        window_counts = accuracy.new_zeros(*candidates.shape, 2)
        if observed.window is not None and self.hierarchy.memory:
            window_counts = observed.window.counts(candidates)
        distribution = self._slate_distribution(worker_features, candidates, window_counts, scale)
        slots = distribution.mode() if deterministic else distribution.sample()
        engagement, cost = self.worker.values(worker_features)
        return HierarchicalActions(
            slates=self.table.order[candidates.gather(1, slots)],
            slots=slots,
            candidates=candidates,
            window_counts=window_counts,
            scale=scale,
            manager_features=manager_features,
            worker_features=worker_features,
            manager_actions=actions,
            decided=decided,
            steps_left=torch.where(decided, self.hierarchy.interval, steps_left) - 1,
            manager_log_probs=manager_log_probs,
            worker_log_probs=distribution.slot_log_probs(slots),
            values=torch.stack([self.manager.value(manager_features), engagement, cost], dim=1),
            entropies=distribution.entropy(),
        )

    def evaluate_worker_actions(self, actions: HierarchicalActions) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities of slots ``(B, K)`` and entropies ``(B,)`` under the present worker.

        The manager's ``x`` is data here, out of the worker's features: no gradient of the worker reaches the manager.
        """
        distribution = self._slate_distribution(
            actions.worker_features, actions.candidates, actions.window_counts, actions.scale
        )
        return distribution.slot_log_probs(actions.slots), distribution.entropy()

    def evaluate_manager_actions(self, features: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities and entropies ``(B,)`` of the manager's actions under the present manager."""
        return self.manager.evaluate_actions(features, self.table.feasible, actions)

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
    ) -> tuple[NDArray[np.int64], tuple[NDArray[Any], ...] | None]:
        """Returns slates for one observation or a batch.

        Where the manager's action holds for several steps it travels in ``state``, as a recurrent policy's does:
        actions ``(B, size)`` and steps left ``(B,)``.

        Args:
            observation: One observation or a batch.
            state: The state that the last call returned; None at the start.
            episode_start: ``bool (B,)``, where a session begins.
            deterministic: Whether to take what is likeliest.
        """
        self.set_training_mode(False)
        single = np.ndim(state_of(observation)) == 1
        batch = stack_observations([observation]) if single else observation
        with torch.inference_mode():
            actions = self.act(batch, deterministic, self._manager_state(state, episode_start))
        if self.hierarchy.interval > 1:
            state = tuple(tensor.cpu().numpy() for tensor in actions.manager_state)
        slates = actions.slates.cpu().numpy()
        return (slates[0] if single else slates), state

    def _manager_state(
        self, state: tuple[NDArray[Any], ...] | None, episode_start: NDArray[np.bool_] | None
    ) -> ManagerState | None:
        if state is None or self.hierarchy.interval == 1:
            return None
        actions, steps_left = (torch.as_tensor(array, device=self.table.units.device) for array in state)
        if episode_start is not None:
            steps_left = steps_left.masked_fill(torch.as_tensor(episode_start, device=steps_left.device).bool(), 0)
        return ManagerState(actions, steps_left)

    def _manager_actions(self, features: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
        """Returns the manager's actions as if it decided everywhere, and their log-probabilities."""
        if self.hierarchy.manager == "learned":
            return self.manager.act(features, self.table.feasible, deterministic)
        constant = self.hierarchy.constant if self.hierarchy.manager == "constant" else 0.0
        actions = features.new_full((len(features), self.hierarchy.action_size), constant)
        return actions, features.new_zeros(len(features))

    def _slate_distribution(
        self, features: Tensor, candidates: Tensor, window_counts: Tensor, scale: Tensor
    ) -> SlateDistribution | QuotaSlateDistribution:
        actions = features[:, features.shape[1] - self.hierarchy.action_size :]
        accuracy = self.worker.accuracy(features, candidates, window_counts, self.table)
        accuracy = (accuracy - scale[:, :1]) / scale[:, 1:]
        popular = self.table.popular[candidates]
        logits = self.worker.logits(accuracy, actions, self.table.popularity[candidates], popular)
        if self.hierarchy.weights == "quota":
            count = actions[:, 0].round().to(torch.int64).clamp(0, self.slate_size)
            return QuotaSlateDistribution(logits, popular, count, self.slate_size)
        return SlateDistribution(logits, self.slate_size)

    def diagnostics(self, manager_actions: Tensor) -> dict[str, float]:
        """Returns what the manager asked for and what the worker has learned, by name, for the logger.

        Args:
            manager_actions: ``float32 (n, size)``, of a rollout.
        """
        values = {"temperature": self.worker.temperature}
        if self.hierarchy.memory:
            values["memory_click"], values["memory_skip"] = self.worker.memory
        form = self.hierarchy.weights
        varying = {}
        if form == "quota":
            varying["popular_count"] = manager_actions
        elif self.hierarchy.manager != "flat" and form != "her4if":
            varying["omega_acc"], varying["omega_fair"] = omegas(manager_actions, form)
        for name, value in varying.items():
            values |= {f"{name}_mean": value.mean(), f"{name}_std": value.std()}
        return {name: float(value.detach()) for name, value in values.items()}

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.act(observation, deterministic).slates

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "hierarchy": self.hierarchy.model_dump(),
            "dimension": self.dimension,
        }
