"""Which items resemble what a session liked last, by item-CF similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hrl_policies.baselines.log_tables import ItemTables
from hrl_policies.hierarchical.slate_distribution import MASKED

LIKED = 10
_DECAY = 0.9
# Small against any similarity: it only orders items that none of the liked ones resembles.
_QUALITY = 1e-6


class SimilarItems(nn.Module):
    """Scores candidates ``a`` by ``sum_i 0.9^i sim(s_i, a)`` over the last ten items ``s_i`` that were clicked.

    Tables are buffers, so that a saved policy needs no environment to be loaded. Similarities beyond an item's nearest
    neighbours count as 0; of items that nothing liked resembles those of better quality come first.

    Args:
        items: Candidates ``N``.
        known: Items ``M`` of the window, candidates first.
        neighbours: Neighbours ``S`` of each item.
    """

    near: Tensor
    similarities: Tensor
    quality: Tensor

    def __init__(self, items: int, known: int, neighbours: int) -> None:
        super().__init__()
        self.register_buffer("near", torch.zeros(known, neighbours, dtype=torch.int32))
        self.register_buffer("similarities", torch.zeros(known, neighbours))
        self.register_buffer("quality", torch.zeros(items))

    def fill(self, tables: ItemTables) -> None:
        """Takes similarities and quality from a training log."""
        self.near.copy_(torch.from_numpy(tables.neighbours))
        self.similarities.copy_(torch.from_numpy(tables.similarities))
        self.quality.copy_(torch.from_numpy(tables.quality[: len(self.quality)]))

    def scores(self, observation: Any) -> Tensor:
        """Returns the similarity of every candidate, ``float32 (B, N)``.

        Args:
            observation: A batch of dicts with ``history_items`` and ``history_clicks``.
        """
        device = self.near.device
        items = torch.as_tensor(np.asarray(observation["history_items"]), device=device).to(torch.int64)
        clicks = torch.as_tensor(np.asarray(observation["history_clicks"]), device=device) > 0
        places = torch.arange(1, items.shape[1] + 1, device=device)
        newest = torch.where(clicks & (items > 0), places, 0).topk(min(LIKED, items.shape[1]), dim=1)
        liked = (items.gather(1, newest.indices) - 1).clamp_min(0)
        weights = _DECAY ** torch.arange(liked.shape[1], device=device) * (newest.values > 0)
        values = self.similarities[liked] * weights[:, :, None]
        found = values.new_zeros(len(items), len(self.quality))
        return found.scatter_add_(1, self.near[liked].to(torch.int64).flatten(1), values.flatten(1))

    def best(self, observation: Any, count: int, allowed: Tensor | None = None) -> Tensor:
        """Returns the most similar candidates, ``int64 (B, min(count, N))``; items not allowed come last.

        Args:
            observation: See :meth:`scores`.
            count: How many.
            allowed: ``bool (B, N)``; None allows all.
        """
        ranked = self.scores(observation).add_(self.quality, alpha=_QUALITY)
        if allowed is not None:
            ranked = torch.where(allowed, ranked, MASKED)
        return ranked.topk(min(count, ranked.shape[1]), dim=1).indices
