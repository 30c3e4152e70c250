"""Q values over items, with DNaIR's action generator: similar candidates, and random items at times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from hrl_policies.common.item_policy import HeadKind, ItemNet, ItemPolicy
from hrl_policies.common.slates import MASKED
from hrl_policies.dnair.item_tables import NEIGHBOURS, SimilarItems


class QItemPolicy(ItemPolicy):
    """``Q(s, .)`` and its target network; each slot of a slate is greedy, or at times random.

    Args:
        observation_space: See :class:`~hrl_policies.common.item_policy.ItemPolicy`, like what follows; with candidates
            a ``Dict`` that holds the window (``observation_mode="history"``).
        action_space: ``MultiDiscrete`` of ``K`` times ``N``, or ``Discrete``.
        lr_schedule: Learning rate.
        net_arch: Units of hidden layers.
        head: ``"embedding"`` or ``"linear"``.
        dimension: Size of item embeddings.
        candidates: Items ``M``, at least ``K``, that greedy slots choose from: those that resemble what was liked last
            (see :class:`~hrl_policies.dnair.item_tables.SimilarItems`); 0 takes the whole catalogue.
        explore: Probability that a slot of a non-deterministic slate shows a uniformly random item.

    Raises:
        ValueError: If a setting does not fit.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: Sequence[int] = (256, 256),
        head: HeadKind = "embedding",
        dimension: int = 0,
        candidates: int = 0,
        explore: float = 0.05,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, net_arch, head, dimension)
        if not 0.0 <= explore <= 1.0:
            raise ValueError(f"explore is a probability from 0 to 1, got {explore}")
        if candidates and not self.slate_size <= candidates:
            raise ValueError(f"candidates must be 0, or fill a slate of {self.slate_size}, got {candidates}")
        self.candidates, self.explore = min(candidates, self.n_items), explore
        self.q_net, self.target_net = self.make_net(), self.make_net().requires_grad_(False)
        self.target_net.load_state_dict(self.q_net.state_dict())
        self.optimizer = torch.optim.Adam(self.q_net.parameters(), lr=lr_schedule(1))
        self.similar: SimilarItems | None = None
        if candidates:
            known = _window_items(observation_space)
            self.similar = SimilarItems(self.n_items, known, min(NEIGHBOURS, self.n_items - 1))

    def near(self, observation: Any, allowed: Tensor | None = None) -> Tensor | None:
        """Returns the candidates of a batch of observations, ``int64 (B, M)``; None for the whole catalogue."""
        return None if self.similar is None else self.similar.best(observation, self.candidates, allowed)

    def best(
        self, net: ItemNet, states: Tensor, near: Tensor | None, allowed: Tensor | None = None
    ) -> Tensor:
        """Returns the slates of the largest values ``int64 (B, K)``, out of candidates."""
        embeddings = self.embeddings
        values = net(states, embeddings) if near is None else net.score_items(states, embeddings, near)
        if allowed is not None:
            values = torch.where(allowed if near is None else allowed.gather(1, near), values, MASKED)
        best = values.topk(self.slate_size, dim=1).indices
        return best if near is None else near.gather(1, best)

    def choose(self, observation: Any, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        """See :class:`~hrl_policies.common.item_policy.ItemPolicy`."""
        states = self.states(observation)
        best = self.best(self.q_net, states, self.near(observation, allowed), allowed)
        if deterministic or not self.explore:
            return best
        keys = torch.rand(len(states), self.n_items, device=best.device)
        keys = keys if allowed is None else torch.where(allowed, keys, -1.0)
        random = keys.topk(self.slate_size, dim=1).indices
        return mixed(best, random, torch.rand(best.shape, device=best.device) < self.explore)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {
            "candidates": self.candidates,
            "explore": self.explore,
        }


def mixed(best: Tensor, random: Tensor, explore: Tensor) -> Tensor:
    """Returns slates whose slots take the first item not yet shown, of ``random`` where they explore, else of ``best``.

    Args:
        best: ``int64 (B, K)``, distinct items, best first.
        random: ``int64 (B, K)``, distinct items.
        explore: ``bool (B, K)``.
    """
    slates = torch.full_like(best, -1)
    for slot in range(best.shape[1]):
        source = torch.where(explore[:, slot, None], random, best)
        # At most K - 1 of the K items were shown, so one is left.
        fresh = (source[:, :, None] != slates[:, None, :]).all(dim=2)
        first = fresh.to(torch.int8).argmax(dim=1, keepdim=True)
        slates[:, slot] = source.gather(1, first)[:, 0]
    return slates


def _window_items(observation_space: spaces.Space[Any]) -> int:
    """Returns the number of items ``M`` that the window of an observation may hold."""
    if isinstance(observation_space, spaces.Dict) and "history_items" in observation_space.spaces:
        window = observation_space["history_items"]
        assert isinstance(window, spaces.MultiDiscrete)
        return int(window.nvec[0]) - 1
    raise ValueError(
        "candidates resemble what was liked, which is in the window: make the environment with "
        "observation_mode='history', or set candidates=0"
    )
