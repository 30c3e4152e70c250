"""Networks from a state to one number for each item of a catalogue: Q values, or logits of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

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
