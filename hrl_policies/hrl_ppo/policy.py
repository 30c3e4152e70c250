"""Manager and worker over states and windows: the paper's forms, and earlier ones of this library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from dsrm.click_scorer import ClickScorer
from hrl_policies.common.slates import MASKED, QuotaSlateDistribution, SlateDistribution, slate_shape, state_space
from hrl_policies.common.yaml_files import validated
from hrl_policies.hrl_ppo.items import ItemTable, Observed
from hrl_policies.hrl_ppo.levels import LevelActions, ManagerState, TwoLevelPolicy
from hrl_policies.hrl_ppo.networks import HierarchySettings, Manager, Worker, mean_and_deviation, omegas
from kuaifair_env.world import World


@dataclass(frozen=True)
class HierarchicalActions(LevelActions):
    """The actions of both levels for a batch of observations, with what is needed to evaluate them again.

    Attributes:
        slots: ``int64 (B, K)``, places of the slate's items among the candidates.
        candidates: ``int64 (B, C)``, in the table's own order.
        present: ``bool (B, C)``, whether each may be shown.
        window_counts: ``float32 (B, C, 2)``, clicks and skips of the candidates in the window.
        scale: ``float32 (B, 2)``, mean and deviation by which accuracy was standardised.
        feasible: ``bool (B, K + 1)``, numbers of popular items that the candidates can fill.
        manager_features: ``float32 (B, F_h)``.
        worker_features: ``float32 (B, F_l)``; holds ``x``.
    """

    slots: Tensor
    candidates: Tensor
    present: Tensor
    window_counts: Tensor
    scale: Tensor
    feasible: Tensor
    manager_features: Tensor
    worker_features: Tensor


class HierarchicalPolicy(TwoLevelPolicy):
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

    manager: Manager
    worker: Worker

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
        super().__init__(observation_space, action_space, use_sde)
        self.hierarchy = validated(HierarchySettings, hierarchy or {}, "hierarchy")
        items, self.slate_size = slate_shape(action_space)
        if self.hierarchy.memory and not isinstance(observation_space, spaces.Dict):
            raise ValueError("memory=True needs the window: make the environment with observation_mode='history'")
        self.state_size = int(state_space(observation_space).shape[0])
        self.dimension = self.state_size if dimension is None else dimension
        self.table = ItemTable(items, self.dimension, self.slate_size)
        self._make_levels(
            Manager(self.hierarchy, self.state_size, self.slate_size),
            Worker(self.hierarchy, self.state_size, self.table),
            lr_schedule,
            manager_lr_schedule,
        )

    @property
    def interval(self) -> int:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        return self.hierarchy.interval

    @property
    def manager_learns(self) -> bool:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        return self.hierarchy.manager == "learned"

    @property
    def flat(self) -> bool:  # type: ignore[override]
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        return self.hierarchy.manager == "flat"

    def read_items(self, world: World, scorer: ClickScorer | Literal["fit"] | None) -> None:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        self.table.fill(world, ClickScorer.fit(world) if scorer == "fit" else scorer)

    def act(
        self,
        observation: Any,
        deterministic: bool = False,
        manager_state: ManagerState | None = None,
        allowed: Tensor | None = None,
    ) -> HierarchicalActions:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        observed = Observed(observation, self.table)
        accuracy = self.worker.catalogue_accuracy(observed, self.table)
        scale = mean_and_deviation(accuracy)
        n_candidates = self.hierarchy.candidates
        if allowed is None:
            candidates = self.table.best_candidates(accuracy, n_candidates)
            present = torch.ones_like(candidates, dtype=torch.bool)
        else:
            allowed = allowed[:, self.table.order]
            candidates = self.table.best_candidates(torch.where(allowed, accuracy, MASKED), n_candidates)
            present = allowed.gather(1, candidates)
        candidate_accuracy = accuracy.gather(1, candidates)
        group_scores = self.table.group_scores(candidate_accuracy, n_candidates)
        manager_features = torch.cat(
            [observed.state, observed.context, (group_scores - scale[:, :1]) / scale[:, 1:]], dim=1
        )
        feasible = self._feasible(candidates, present)
        actions, manager_log_probs = self._manager_actions(manager_features, feasible, deterministic)
        actions, decided, steps_left = self._hold(actions, manager_state)
        worker_features = torch.cat([observed.state, observed.context, actions], dim=1)
        if self.hierarchy.weights == "paper":
            scale = mean_and_deviation(candidate_accuracy)
        window_counts = accuracy.new_zeros(*candidates.shape, 2)
        if observed.window is not None and self.hierarchy.memory:
            window_counts = observed.window.counts(candidates)
        distribution = self._slate_distribution(worker_features, candidates, present, window_counts, scale)
        slots = distribution.mode() if deterministic else distribution.sample()
        engagement, cost = self.worker.values(worker_features)
        return HierarchicalActions(
            slates=self.table.order[candidates.gather(1, slots)],
            slots=slots,
            candidates=candidates,
            present=present,
            window_counts=window_counts,
            scale=scale,
            feasible=feasible,
            manager_features=manager_features,
            worker_features=worker_features,
            manager_actions=actions,
            decided=decided,
            steps_left=steps_left,
            manager_log_probs=manager_log_probs,
            worker_log_probs=distribution.slot_log_probs(slots),
            values=torch.stack([self.manager.value(manager_features), engagement, cost], dim=1),
            entropies=distribution.entropy(),
        )

    def evaluate_worker(self, actions: HierarchicalActions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`; ``x`` is among the worker's features."""
        distribution = self._slate_distribution(
            actions.worker_features, actions.candidates, actions.present, actions.window_counts, actions.scale
        )
        values = self.worker.values(actions.worker_features)
        return distribution.slot_log_probs(actions.slots), distribution.entropy(), *values

    def evaluate_manager(self, actions: HierarchicalActions, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        features = actions.manager_features[rows]
        evaluated = self.manager.evaluate_actions(features, actions.feasible[rows], actions.manager_actions[rows])
        return *evaluated, self.manager.value(features)

    def _feasible(self, candidates: Tensor, present: Tensor) -> Tensor:
        """Says which numbers of popular items the candidates can fill, ``bool (B, K + 1)``."""
        low, high = self._count_limits(candidates, present)
        counts = torch.arange(self.slate_size + 1, device=candidates.device)
        return (counts >= low[:, None]) & (counts <= high[:, None])

    def _count_limits(self, candidates: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the smallest and the largest number of popular items that the candidates can fill, ``(B,)`` each."""
        popular = (self.table.popular[candidates] & present).sum(1)
        return self.slate_size - (present.sum(1) - popular), popular

    def _manager_actions(self, features: Tensor, feasible: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
        """Returns the manager's actions as if it decided everywhere, and their log-probabilities."""
        if self.hierarchy.manager == "learned":
            return self.manager.act(features, feasible, deterministic)
        constant = self.hierarchy.constant if self.hierarchy.manager == "constant" else 0.0
        actions = features.new_full((len(features), self.hierarchy.action_size), constant)
        return actions, features.new_zeros(len(features))

    def _slate_distribution(
        self, features: Tensor, candidates: Tensor, present: Tensor, window_counts: Tensor, scale: Tensor
    ) -> SlateDistribution | QuotaSlateDistribution:
        actions = features[:, features.shape[1] - self.hierarchy.action_size :]
        accuracy = self.worker.accuracy(features, candidates, window_counts, self.table)
        accuracy = (accuracy - scale[:, :1]) / scale[:, 1:]
        popular = self.table.popular[candidates]
        logits = self.worker.logits(accuracy, actions, self.table.popularity[candidates], popular)
        logits = torch.where(present, logits, MASKED)
        if self.hierarchy.weights == "quota":
            low, high = self._count_limits(candidates, present)
            # What a constant manager asks for, and what holds for several steps, may be more than is left of a group.
            count = torch.minimum(torch.maximum(actions[:, 0].round().to(torch.int64), low.clamp_min(0)), high)
            count = count.clamp_max(self.slate_size)
            return QuotaSlateDistribution(logits, popular, count, self.slate_size)
        return SlateDistribution(logits, self.slate_size)

    def forms(self) -> str:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
        chosen = self.hierarchy
        names = ("manager", "weights", "worker", "memory")
        return ", ".join(f"{name}={getattr(chosen, name)!r}" for name in names)

    def diagnostics(self, manager_actions: Tensor) -> dict[str, float]:
        """See :class:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy`."""
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

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "hierarchy": self.hierarchy.model_dump(),
            "dimension": self.dimension,
        }
