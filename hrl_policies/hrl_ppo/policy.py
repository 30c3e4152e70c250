"""The policy of ``HierarchicalPPO``: both levels, their optimisers, ``predict``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from hrl_policies.common.slates import QuotaSlateDistribution, SlateDistribution
from hrl_policies.hrl_ppo.networks import ItemTable, Manager, Observed, Worker
from hrl_policies.hrl_ppo.settings import HierarchySettings
from kuaifair_env.spaces import stack_observations, state_of

_ADAM_EPSILON = 1e-5


@dataclass
class Decision:
    """What both levels decided for a batch, and what is needed to evaluate it again.

    Attributes:
        slates: ``int64 (B, K)``, the environment's items.
        slots: ``int64 (B, K)``, places of those among the candidates.
        candidates: ``int64 (B, C)``, in the table's own order.
        counts: ``float32 (B, C, 2)``, clicks and skips of the candidates in the window.
        scale: ``float32 (B, 2)``, mean and deviation by which accuracy was standardised.
        manager_features: ``float32 (B, F_h)``.
        worker_features: ``float32 (B, F_l)``; holds ``x``.
        actions: ``float32 (B, size)``, the manager's ``x``.
        manager_log_probs: ``float32 (B,)``.
        worker_log_probs: ``float32 (B, K)``, one for each slot.
        values: ``float32 (B, 3)``, ``V_h``, ``V_l``, ``V_c``.
        entropies: ``float32 (B,)``, of the worker's first slot.
    """

    slates: Tensor
    slots: Tensor
    candidates: Tensor
    counts: Tensor
    scale: Tensor
    manager_features: Tensor
    worker_features: Tensor
    actions: Tensor
    manager_log_probs: Tensor
    worker_log_probs: Tensor
    values: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class Held:
    """A manager's action that still holds.

    Attributes:
        actions: ``float32 (B, size)``.
        fresh: ``bool (B,)``, where the manager must decide anew.
    """

    actions: Tensor
    fresh: Tensor


class HierarchicalPolicy(BasePolicy):
    """Manager and worker over slates.

    Args:
        observation_space: ``Box`` of states, or ``Dict`` with ``state`` and the window
        (``observation_mode="history"``).
        action_space: ``MultiDiscrete`` of ``K`` times ``N`` (``action_mode="slate"``).
        lr_schedule: Learning rate of the worker.
        hierarchy: Arguments of :class:`~hrl_policies.hrl_ppo.settings.HierarchySettings`.
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
        self.hierarchy = HierarchySettings.of(hierarchy)
        self.slate_size, items = len(action_space.nvec), int(action_space.nvec[0])
        state = (
            observation_space["state"] if isinstance(observation_space, spaces.Dict) else observation_space
        )
        if not isinstance(state, spaces.Box):
            raise ValueError(f"HierarchicalPPO needs a state of real numbers, got {state}")
        if self.hierarchy.memory and not isinstance(observation_space, spaces.Dict):
            raise ValueError(
                "memory=True needs the window: make the environment with observation_mode='history'"
            )
        self.state_size = int(state.shape[0])
        self.dimension = self.state_size if dimension is None else dimension
        self._hierarchy = hierarchy
        self.table = ItemTable(items, self.dimension, self.slate_size)
        self.manager = Manager(self.hierarchy, self.state_size, self.slate_size)
        self.worker = Worker(self.hierarchy, self.state_size, self.table)
        manager_rate = lr_schedule if manager_lr_schedule is None else manager_lr_schedule
        self.manager_optimizer = torch.optim.Adam(
            self.manager.parameters(), lr=manager_rate(1), eps=_ADAM_EPSILON
        )
        self.worker_optimizer = torch.optim.Adam(
            self.worker.parameters(), lr=lr_schedule(1), eps=_ADAM_EPSILON
        )
        # Stable-Baselines3 saves and schedules "the" optimiser of a policy; ours are listed one by one.
        self.optimizer = self.worker_optimizer

    def decide(self, observation: Any, deterministic: bool = False, held: Held | None = None) -> Decision:
        """Lets the manager weigh and the worker rank.

        Args:
            observation: A batch, as the environment gives it.
            deterministic: Whether both levels take what is likeliest.
            held: The manager's action where it still holds; None decides anew everywhere.
        """
        seen = Observed(observation, self.table)
        base = self._base(seen)
        mean = base.mean(dim=1, keepdim=True)
        # torch.std takes several times as long as the norm.
        norm = torch.linalg.vector_norm(base - mean, dim=1, keepdim=True)
        deviation = (norm / math.sqrt(max(base.shape[1] - 1, 1))).clamp_min(1e-6)
        scale = torch.cat([mean, deviation], dim=1)
        wanted = self.hierarchy.candidates
        candidates = self.table.best(base, wanted)
        offers = (self.table.offers(base.gather(1, candidates), wanted) - mean) / deviation
        for_manager = torch.cat([seen.state, seen.context, offers], dim=1)
        actions, manager_logs = self._manager_acts(for_manager, deterministic, held)
        for_worker = torch.cat([seen.state, seen.context, actions], dim=1)
        counts = base.new_zeros(*candidates.shape, 2)
        if seen.window is not None and self.hierarchy.memory:
            counts = seen.window.counts(candidates)
        distribution = self._slates(for_worker, actions, candidates, counts, scale)
        slots = distribution.mode() if deterministic else distribution.sample()
        engagement, cost = self.worker.values(for_worker)
        return Decision(
            slates=self.table.order[candidates.gather(1, slots)],
            slots=slots,
            candidates=candidates,
            counts=counts,
            scale=scale,
            manager_features=for_manager,
            worker_features=for_worker,
            actions=actions,
            manager_log_probs=manager_logs,
            worker_log_probs=distribution.slot_log_probs(slots),
            values=torch.stack([self.manager.value(for_manager), engagement, cost], dim=1),
            entropies=distribution.entropy(),
        )

    def evaluate_worker(
        self,
        features: Tensor,
        candidates: Tensor,
        counts: Tensor,
        scale: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities of slots ``(B, K)`` and entropies ``(B,)`` under the present worker.

        The manager's ``x`` is data here, out of ``features``: no gradient of the worker reaches the manager.
        """
        actions = features[:, features.shape[1] - self.hierarchy.action_size :]
        distribution = self._slates(features, actions, candidates, counts, scale)
        return distribution.slot_log_probs(slots), distribution.entropy()

    def predict_values(self, observation: Any) -> Tensor:
        """Returns ``V_h``, ``V_l`` and ``V_c`` of a batch, ``float32 (B, 3)``."""
        return self.decide(observation, deterministic=True).values

    def forward(self, observation: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Returns slates, the values of both levels, and the log-probability of both actions together."""
        found = self.decide(observation, deterministic)
        return found.slates, found.values, found.manager_log_probs + found.worker_log_probs.sum(dim=1)

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
            state: What the last call returned; None at the start.
            episode_start: ``bool (B,)``, where a session begins.
            deterministic: Whether to take what is likeliest.
        """
        self.set_training_mode(False)
        single = np.ndim(state_of(observation)) == 1
        batch = stack_observations([observation]) if single else observation
        size = len(state_of(batch))
        with torch.inference_mode():
            if self.hierarchy.interval == 1:
                found = self.decide(batch, deterministic)
            else:
                held, left = self._held(state, episode_start, size)
                found = self.decide(batch, deterministic, held)
                left = np.where(held.fresh.cpu().numpy(), self.hierarchy.interval, left) - 1
                state = (found.actions.cpu().numpy(), left)
        slates = found.slates.cpu().numpy()
        return (slates[0] if single else slates), state

    def _held(
        self, state: tuple[NDArray[Any], ...] | None, episode_start: NDArray[np.bool_] | None, size: int
    ) -> tuple[Held, NDArray[np.int64]]:
        if state is None:
            state = (np.zeros((size, self.hierarchy.action_size), np.float32), np.zeros(size, np.int64))
        actions, left = state
        fresh = left <= 0
        if episode_start is not None:
            fresh = fresh | np.asarray(episode_start, np.bool_)
        device = self.table.units.device
        return Held(torch.as_tensor(actions, device=device), torch.as_tensor(fresh, device=device)), left

    def _base(self, seen: Observed) -> Tensor:
        """Returns the accuracy term of all items at the state itself, ``(B, N)``; candidates follow from it."""
        silent = seen.state.new_zeros(len(seen), self.hierarchy.action_size)
        with torch.no_grad():
            if self.hierarchy.worker == "her4if":
                features = torch.cat([seen.state, seen.context, silent], dim=1)
                base = self.worker.catalogue(features, self.table)
            else:
                state = seen.state[:, : self.dimension]
                base = self.table.accuracy(torch.nn.functional.normalize(state, dim=1, eps=1e-6))
            if self.hierarchy.memory and seen.window is not None:
                base = seen.window.add(base, *self.worker.memory.detach())
        return base

    def _manager_acts(
        self, features: Tensor, deterministic: bool, held: Held | None
    ) -> tuple[Tensor, Tensor]:
        if self.hierarchy.manager != "learned":
            constant = self.hierarchy.constant if self.hierarchy.manager == "constant" else 0.0
            actions = features.new_full((len(features), self.hierarchy.action_size), constant)
            return actions, features.new_zeros(len(features))
        actions, logs = self.manager.act(features, self.table.feasible, deterministic)
        if held is not None:
            actions = torch.where(held.fresh[:, None], actions, held.actions)
        return actions, logs

    def _slates(
        self, features: Tensor, actions: Tensor, candidates: Tensor, counts: Tensor, scale: Tensor
    ) -> SlateDistribution | QuotaSlateDistribution:
        scores = self.worker.accuracy(features, candidates, counts, self.table)
        scores = (scores - scale[:, :1]) / scale[:, 1:]
        popular = self.table.popular[candidates]
        logits = self.worker.logits(scores, actions, self.table.popularity[candidates], popular)
        if self.hierarchy.weights == "quota":
            count = actions[:, 0].round().to(torch.int64).clamp(0, self.slate_size)
            return QuotaSlateDistribution(logits, popular, count, self.slate_size)
        return SlateDistribution(logits, self.slate_size)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return self.decide(observation, deterministic).slates

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "hierarchy": self._hierarchy,
            "dimension": self.dimension,
        }
