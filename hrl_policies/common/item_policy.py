"""Policies that score every item and show the best, or draw them: what the discrete baselines have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from hrl_policies.common.buffers import state_space
from kuaifair_env.spaces import stack_observations, state_of
from kuaifair_env.world import World

HeadKind = Literal["embedding", "linear"]


class ItemHead(Protocol):
    """Turns features into one number for each item."""

    def __call__(self, features: Tensor, units: Tensor) -> Tensor:
        """Returns ``float32 (B, N)``.

        Args:
            features: ``float32 (B, F)``.
            units: ``float32 (N, d)``, unit item embeddings.
        """
        ...

    def of(self, features: Tensor, units: Tensor, items: Tensor) -> Tensor:
        """Returns the numbers of some items alone, ``float32 (B, K)``, at a price that does not grow with ``N``.

        Args:
            features: ``float32 (B, F)``.
            units: ``float32 (N, d)``.
            items: ``int64 (B, K)``.
        """
        ...


class LinearHead(nn.Module):
    """A row of weights and a bias for each item, which nothing is known of beforehand.

    Args:
        features: Inputs ``F``.
        items: Items ``N``.
    """

    def __init__(self, features: int, items: int) -> None:
        super().__init__()
        self.rows = nn.Linear(features, items)

    def forward(self, features: Tensor, units: Tensor) -> Tensor:
        """See :class:`ItemHead`; ``units`` is not used."""
        scores: Tensor = self.rows(features)
        return scores

    def of(self, features: Tensor, units: Tensor, items: Tensor) -> Tensor:
        """See :class:`ItemHead`."""
        return torch.einsum("bf,bkf->bk", features, self.rows.weight[items]) + self.rows.bias[items]


class EmbeddingHead(nn.Module):
    """A query that meets frozen item embeddings, and a bias for each item: ``<q(features), e_i> + b_i``.

    What is learnt of an item is learnt of those that resemble it, and there is no ``(F, N)`` matrix to update.

    Args:
        features: Inputs ``F``.
        items: Items ``N``.
        dimension: Size ``d`` of item embeddings.
    """

    def __init__(self, features: int, items: int, dimension: int) -> None:
        super().__init__()
        self.query = nn.Linear(features, dimension)
        self.bias = nn.Parameter(torch.zeros(items))

    def forward(self, features: Tensor, units: Tensor) -> Tensor:
        """See :class:`ItemHead`."""
        return torch.addmm(self.bias, self.query(features), units.T)

    def of(self, features: Tensor, units: Tensor, items: Tensor) -> Tensor:
        """See :class:`ItemHead`."""
        return torch.einsum("bd,bkd->bk", self.query(features), units[items]) + self.bias[items]


class ItemNet(nn.Module):
    """Hidden layers with ReLU, and a head over the catalogue.

    Args:
        state_size: Size of a state.
        net_arch: Units of the hidden layers.
        items: Items ``N``.
        dimension: Size ``d`` of item embeddings.
        head: ``"embedding"`` or ``"linear"``.

    Raises:
        ValueError: If the head is unknown, or there are no embeddings for it.
    """

    def __init__(
        self, state_size: int, net_arch: Sequence[int], items: int, dimension: int, head: HeadKind
    ) -> None:
        super().__init__()
        if head not in get_args(HeadKind):
            raise ValueError(f"head must be one of {get_args(HeadKind)}, got {head!r}")
        if head == "embedding" and not dimension:
            raise ValueError("head='embedding' needs item embeddings, which only KuaiFair environments have")
        if not net_arch or min(net_arch) < 1:
            raise ValueError(f"net_arch must name the units of one hidden layer or more, got {net_arch!r}")
        layers: list[nn.Module] = []
        for before, after in zip((state_size, *net_arch), net_arch, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.head: LinearHead | EmbeddingHead = (
            LinearHead(net_arch[-1], items)
            if head == "linear"
            else EmbeddingHead(net_arch[-1], items, dimension)
        )

    def forward(self, states: Tensor, units: Tensor) -> Tensor:
        """Returns one number for each item, ``float32 (B, N)``.

        Args:
            states: ``float32 (B, state_size)``.
            units: ``float32 (N, d)``, unit item embeddings.
        """
        scores: Tensor = self.head(self.hidden(states), units)
        return scores

    def of(self, states: Tensor, units: Tensor, items: Tensor) -> Tensor:
        """Returns the numbers of ``items``, ``int64 (B, K)``, alone: ``float32 (B, K)``."""
        return self.head.of(self.hidden(states), units, items)


class ItemPolicy(BasePolicy):
    """States in, slates of distinct items out.

    Args:
        observation_space: ``Box`` of states, or ``Dict`` with a ``Box`` called ``state``.
        action_space: ``MultiDiscrete`` of ``K`` times ``N`` (``action_mode="slate"``), or ``Discrete``.
        lr_schedule: Learning rate.
        net_arch: Units of hidden layers.
        head: ``"embedding"`` or ``"linear"``; see :mod:`hrl_policies.common.item_policy`.
        dimension: Size ``d`` of item embeddings; 0 where there are none.

    Raises:
        ValueError: If a space or setting does not fit.
    """

    units: Tensor

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
        self.items, self.slate_size = catalogue_of(action_space)
        self.state_size = int(state_space(observation_space).shape[0])
        self.net_arch, self.head, self.dimension = tuple(net_arch), head, dimension
        self.register_buffer("units", torch.zeros(self.items, dimension))

    def fill(self, world: World) -> None:
        """Takes the item embeddings of the training world."""
        embeddings = world.embeddings[: world.n_items]
        norms = np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
        self.units.copy_(torch.from_numpy((embeddings / norms).astype(np.float32)))

    def net(self) -> ItemNet:
        """Returns a new network over the catalogue."""
        return ItemNet(self.state_size, self.net_arch, self.items, self.dimension, self.head)

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
        """Returns slates ``(B, K)`` as the action space wants them: ``(B,)`` if it is ``Discrete``."""
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

    def masks(self, given: NDArray[np.bool_] | None) -> Tensor | None:
        """Returns masks as :meth:`choose` takes them; see :meth:`predict`."""
        if given is None:
            return None
        masks = np.atleast_2d(np.asarray(given, np.bool_))
        if masks.shape[1] not in (self.items, self.items * self.slate_size):
            raise ValueError(f"action masks hold {self.items} items, got shape {masks.shape}")
        masks = masks[:, : self.items]
        if (np.count_nonzero(masks, axis=1) < self.slate_size).any():
            raise ValueError(
                f"fewer than {self.slate_size} items are allowed; use a smaller slate or repeats='allow'"
            )
        return torch.as_tensor(masks, device=self.device)

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


def catalogue_of(action_space: spaces.Space[Any]) -> tuple[int, int]:
    """Returns items ``N`` and slate size ``K`` of an action space.

    Raises:
        ValueError: If its actions are not items.
    """
    if isinstance(action_space, spaces.Discrete):
        if action_space.start != 0:
            raise ValueError(f"actions must be numbered from 0, got {action_space}")
        return int(action_space.n), 1
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim == 1:
        size, items = len(action_space.nvec), int(action_space.nvec[0])
        if size <= items and (action_space.nvec == items).all():
            return items, size
    raise ValueError(
        f"this agent names items; make the environment with action_mode='slate' or 'item' (got {action_space})"
    )
