"""What manager and worker read: the table of items that both share, and observations with their windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.observations import state_of
from kuaifair_env.world import World

if TYPE_CHECKING:
    from dsrm.click_scorer import ClickScorer

CONTEXT = 5
"""Numbers by which the manager sees a window."""


class ItemTable(nn.Module):
    """Embeddings, popularity and click log-odds of the items, as buffers: a saved policy loads without an environment.

    The table's order of items puts the popular group first, so that each group is a slice; ``order`` and ``place`` lead
    from there to the environment's items and back.

    The accuracy term of an item is ``prior_i + cos(query, e_i) * similarity``: eq. 6's similarity alone without a click
    scorer, and the scorer's log-odds with one, which are what the greedy controls rank by.

    Args:
        items: Candidates ``N``.
        dimension: Size ``d`` of item embeddings.
        slate_size: Items ``K`` of a slate.
    """

    order: Tensor
    place: Tensor
    feasible: Tensor
    units: Tensor
    prior: Tensor
    similarity: Tensor
    popularity: Tensor
    popular: Tensor

    def __init__(self, items: int, dimension: int, slate_size: int) -> None:
        super().__init__()
        self.items, self.dimension, self.slate_size = items, dimension, slate_size
        self.register_buffer("order", torch.arange(items))
        self.register_buffer("place", torch.arange(items))
        self.register_buffer("feasible", torch.ones(slate_size + 1, dtype=torch.bool))
        self.register_buffer("units", torch.zeros(items, dimension))
        self.register_buffer("prior", torch.zeros(items))
        self.register_buffer("similarity", torch.ones(()))
        self.register_buffer("popularity", torch.zeros(items))
        self.register_buffer("popular", torch.zeros(items, dtype=torch.bool))

    def fill(self, world: World, scorer: ClickScorer | None) -> None:
        """Fills the table from a world.

        Args:
            world: The training world; its embeddings, popularity groups and training exposures are read.
            scorer: The click model to start from; None starts from similarity alone.
        """
        popular = world.groups.popular
        order = np.argsort(~popular, kind="stable")
        units = unit_rows(world.embeddings[: world.n_items][order])
        counts = np.arange(self.slate_size + 1)
        tail = self.items - int(popular.sum())
        feasible = (counts <= popular.sum()) & (self.slate_size - counts <= tail)
        prior = np.zeros(self.items, np.float32) if scorer is None else scorer.item_scores
        for buffer, values in (
            (self.order, order),
            (self.place, np.argsort(order)),
            (self.feasible, feasible),
            (self.units, units),
            (self.popularity, log_popularity(world.exposures)[order].astype(np.float32)),
            (self.popular, popular[order]),
            (self.prior, prior[order]),
        ):
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        if scorer is not None:
            # Directions are unit embeddings times the coefficient, whose sign a norm would lose.
            along = np.einsum("dn,nd->n", scorer.directions[:, order], units)
            self.similarity.fill_(float(along[np.abs(along).argmax()]))

    def accuracy(self, queries: Tensor) -> Tensor:
        """Returns the accuracy term of all items, ``(B, N)``, for queries ``(B, d)``: ``prior + cos * similarity``."""
        return torch.addmm(self.prior, queries * self.similarity, self.units.T)

    def best_candidates(self, scores: Tensor, count: int) -> Tensor:
        """Returns the best items of each group, half of ``count`` from either, or all of a smaller group.

        Args:
            scores: ``(B, N)``.
            count: How many; 0 takes all items.

        Returns:
            ``int64 (B, C)``, places in the table's own order.
        """
        if count == 0 or count >= self.items:
            return torch.arange(self.items, device=scores.device).expand(len(scores), -1)
        n_popular, half = int(self.popular.sum()), self._group_size(count)
        groups = []
        for low, group in ((0, scores[:, :n_popular]), (n_popular, scores[:, n_popular:])):
            if group.shape[1]:
                groups.append(low + group.topk(min(half, group.shape[1]), dim=1, sorted=False).indices)
        return torch.cat(groups, dim=1)

    def group_scores(self, scores: Tensor, count: int = 0) -> Tensor:
        """Returns the mean of the best scores of both groups, half a slate of each, ``float32 (B, 2)``.

        Args:
            scores: ``(B, N)``, or ``(B, C)`` of the candidates of :meth:`best_candidates`, which hold the same best.
            count: The number of candidates that :meth:`best_candidates` was asked for.
        """
        n_popular = int(self.popular.sum())
        if scores.shape[1] < self.items:
            n_popular = min(n_popular, self._group_size(count))
        half = max(self.slate_size // 2, 1)
        means = [
            group.topk(min(half, group.shape[1]), dim=1).values.mean(dim=1)
            if group.shape[1]
            else scores.new_zeros(len(scores))
            for group in (scores[:, :n_popular], scores[:, n_popular:])
        ]
        return torch.stack(means, dim=1)

    def _group_size(self, count: int) -> int:
        """Returns how many candidates of each group stand for half of ``count``: at least a slate."""
        return max(count // 2, self.slate_size)


class Window:
    """Clicks and skips of an observation's window, ready to be counted by item.

    Args:
        items: ``int64 (B, H)``, item + 1, 0 where there is none (the observation's own coding).
        clicks: ``float32 (B, H)``.
        table: Items.
    """

    def __init__(self, items: Tensor, clicks: Tensor, table: ItemTable) -> None:
        # Items of the log that are no candidates are counted nowhere.
        self._known = (items > 0) & (items <= table.items)
        self._rows = table.place[torch.where(self._known, items - 1, 0)]
        self._clicks = clicks * self._known
        self._skips = (1.0 - clicks) * self._known
        self._table = table

    def add_memory(self, scores: Tensor, memory: Tensor) -> Tensor:
        """Returns scores ``(B, N)`` plus ``memory[0]`` for each click on an item and ``memory[1]`` for each skip."""
        return scores.scatter_add(1, self._rows, memory[0] * self._clicks + memory[1] * self._skips)

    def counts(self, candidates: Tensor) -> Tensor:
        """Returns clicks and skips of candidates ``int64 (B, C)``, ``float32 (B, C, 2)``."""
        same = (candidates[:, :, None] == self._rows[:, None, :]).to(torch.float32)
        return torch.stack([torch.einsum("bch,bh->bc", same, part) for part in (self._clicks, self._skips)], 2)

    def context(self) -> Tensor:
        """Returns what the manager sees of the window, ``float32 (B, 5)``.

        Share of places filled; click rate; popular share of what was shown, and of what was clicked; click rate of
        popular minus long-tail items.
        """
        popular = self._table.popular[self._rows] * self._known.to(torch.float32)
        shown = self._known.sum(1).to(torch.float32)
        clicked, head = self._clicks.sum(1), popular.sum(1)
        head_clicks = (popular * self._clicks).sum(1)
        of_head = head_clicks / head.clamp_min(1.0)
        of_tail = (clicked - head_clicks) / (shown - head).clamp_min(1.0)
        parts = (
            shown / self._known.shape[1],
            clicked / shown.clamp_min(1.0),
            head / shown.clamp_min(1.0),
            head_clicks / clicked.clamp_min(1.0),
            of_head - of_tail,
        )
        return torch.stack(parts, dim=1)


class Observed:
    """An observation as both levels take it: the state and, where there is one, the window.

    Args:
        observation: ``float32 (B, d_out)``, or a dict with ``state``, ``history_items`` and ``history_clicks``.
        table: Items; its device is where everything goes.
    """

    def __init__(self, observation: Any, table: ItemTable) -> None:
        device = table.units.device
        self.state = torch.as_tensor(state_of(observation), dtype=torch.float32, device=device)
        self.window: Window | None = None
        if isinstance(observation, dict) and "history_items" in observation:
            items = torch.as_tensor(observation["history_items"], dtype=torch.int64, device=device)
            clicks = torch.as_tensor(observation["history_clicks"], dtype=torch.float32, device=device)
            self.window = Window(items, clicks, table)
        context = self.state.new_zeros(len(self.state), CONTEXT)
        self.context = context if self.window is None else self.window.context()

    def __len__(self) -> int:
        return len(self.state)
