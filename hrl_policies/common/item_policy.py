"""Policies that score every item and show the best, or draw them: what the discrete baselines have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from hrl_policies.common.buffers import state_space
from hrl_policies.common.slates import slate_shape
from kuaifair_env.spaces import stack_observations, state_of
from kuaifair_env.world import World

HeadKind = Literal["embedding", "linear"]


class LinearHead(nn.Module):
    """A row of weights and a bias for each item; item embeddings are not used.

    Args:
        features: Inputs ``F``.
        n_items: Items ``N``.
    """

    def __init__(self, features: int, n_items: int) -> None:
        super().__init__()
        self.rows = nn.Linear(features, n_items)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Returns one score for each item, ``float32 (B, N)``, for features ``float32 (B, F)``."""
        scores: Tensor = self.rows(features)
        return scores

    def score_items(self, features: Tensor, embeddings: Tensor, items: Tensor) -> Tensor:
        """Returns the scores ``float32 (B, K)`` of some items ``int64 (B, K)``, at a cost independent of ``N``."""
        return torch.einsum("bf,bkf->bk", features, self.rows.weight[items]) + self.rows.bias[items]


class EmbeddingHead(nn.Module):
    """The inner product of a query with fixed item embeddings, and a bias for each item: ``<q(features), e_i> + b_i``.

    What is learnt about an item is learnt about items that resemble it, and no ``(F, N)`` matrix is updated.

    Args:
        features: Inputs ``F``.
        n_items: Items ``N``.
        dimension: Size ``d`` of item embeddings.
    """

    def __init__(self, features: int, n_items: int, dimension: int) -> None:
        super().__init__()
        self.query = nn.Linear(features, dimension)
        self.bias = nn.Parameter(torch.zeros(n_items))

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Returns one score for each item, ``float32 (B, N)``, for embeddings ``float32 (N, d)``."""
        return torch.addmm(self.bias, self.query(features), embeddings.T)

    def score_items(self, features: Tensor, embeddings: Tensor, items: Tensor) -> Tensor:
        """Returns the scores ``float32 (B, K)`` of some items ``int64 (B, K)``, at a cost independent of ``N``."""
        return torch.einsum("bd,bkd->bk", self.query(features), embeddings[items]) + self.bias[items]


class ItemNet(nn.Module):
    """Hidden layers with ReLU, and a head over the catalogue.

    Args:
        state_size: Size of a state.
        net_arch: Units of the hidden layers.
        n_items: Items ``N``.
        dimension: Size ``d`` of item embeddings.
        head: ``"embedding"`` or ``"linear"``.

    Raises:
        ValueError: If the head is unknown, or there are no embeddings for it.
    """

    def __init__(
        self, state_size: int, net_arch: Sequence[int], n_items: int, dimension: int, head: HeadKind
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
            LinearHead(net_arch[-1], n_items)
            if head == "linear"
            else EmbeddingHead(net_arch[-1], n_items, dimension)
        )

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Returns one score for each item, ``float32 (B, N)``.

        Args:
            states: ``float32 (B, state_size)``.
            embeddings: ``float32 (N, d)``.
        """
        scores: Tensor = self.head(self.hidden(states), embeddings)
        return scores

    def score_items(self, states: Tensor, embeddings: Tensor, items: Tensor) -> Tensor:
        """Returns the scores of some items ``int64 (B, K)`` alone, ``float32 (B, K)``."""
        return self.head.score_items(self.hidden(states), embeddings, items)


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
        embeddings = world.embeddings[: world.n_items]
        norms = np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
        self.embeddings.copy_(torch.from_numpy((embeddings / norms).astype(np.float32)))

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
        masks = np.atleast_2d(np.asarray(action_masks, np.bool_))
        if masks.shape[1] not in (self.n_items, self.n_items * self.slate_size):
            raise ValueError(f"action masks hold {self.n_items} items, got shape {masks.shape}")
        masks = masks[:, : self.n_items]
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
