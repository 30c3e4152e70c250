"""What both levels know of the items, and what an observation says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kuaifair_env.worlds import World

if TYPE_CHECKING:
    from hrl_policies.baselines.scoring import ClickScorer

CONTEXT = 5


class ItemTable(nn.Module):
    """Item tables as buffers, so that a saved policy needs no environment to be loaded.

    Inside, items are in an order of their own, the popular group first, so that each group is a slice; ``order`` and
    ``place`` lead from there to the environment's items and back.

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
        """Takes the tables of a world.

        Args:
            world: The training world; its embeddings, popularity groups and training exposures are read.
            scorer: The click model to start from; None starts from similarity alone.
        """
        popular = world.groups.popular
        order = np.argsort(~popular, kind="stable")
        embeddings = world.embeddings[: world.n_items][order]
        norms = np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
        logs = np.log1p(world.data.train.exposures(len(world.data.items))[: world.n_items])
        standardised = (logs - logs.mean()) / max(float(logs.std()), 1e-6)
        counts = np.arange(self.slate_size + 1)
        tail = self.items - int(popular.sum())
        feasible = (counts <= popular.sum()) & (self.slate_size - counts <= tail)
        prior = np.zeros(self.items, np.float32) if scorer is None else scorer.item_scores
        for buffer, values in (
            (self.order, order),
            (self.place, np.argsort(order)),
            (self.feasible, feasible),
            (self.units, (embeddings / norms).astype(np.float32)),
            (self.popularity, standardised[order].astype(np.float32)),
            (self.popular, popular[order]),
            (self.prior, prior[order]),
        ):
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        if scorer is not None:
            # Directions are unit embeddings times the coefficient, whose sign a norm would lose.
            along = np.einsum("dn,nd->n", scorer.directions[:, order], embeddings / norms)
            self.similarity.fill_(float(along[np.abs(along).argmax()]))

    def best(self, scores: Tensor, count: int) -> Tensor:
        """Returns the best items of each group, half of ``count`` from either, or all of a smaller group.

        Args:
            scores: ``(B, N)``.
            count: How many; 0 takes all items.

        Returns:
            ``int64 (B, C)``, places in the table's own order.
        """
        if count == 0 or count >= self.items:
            return torch.arange(self.items, device=scores.device).expand(len(scores), -1)
        heads, half = int(self.popular.sum()), self._half(count)
        parts = []
        for low, part in ((0, scores[:, :heads]), (heads, scores[:, heads:])):
            if part.shape[1]:
                parts.append(low + part.topk(min(half, part.shape[1]), dim=1, sorted=False).indices)
        return torch.cat(parts, dim=1)

    def offers(self, scores: Tensor, count: int = 0) -> Tensor:
        """Returns the mean of the best scores of both groups, half a slate of each, ``float32 (B, 2)``.

        Args:
            scores: ``(B, N)``, or ``(B, C)`` of the candidates that :meth:`best` names, which hold the same best ones.
            count: What :meth:`best` was given for those.
        """
        heads = int(self.popular.sum())
        if scores.shape[1] < self.items:
            heads = min(heads, self._half(count))
        half = max(self.slate_size // 2, 1)
        parts = [
            part.topk(min(half, part.shape[1]), dim=1).values.mean(dim=1)
            if part.shape[1]
            else scores.new_zeros(len(scores))
            for part in (scores[:, :heads], scores[:, heads:])
        ]
        return torch.stack(parts, dim=1)

    def _half(self, count: int) -> int:
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

    def add(self, scores: Tensor, of_click: Tensor, of_skip: Tensor) -> Tensor:
        """Returns scores ``(B, N)`` plus a weight for each click on an item and one for each skip."""
        return scores.scatter_add(1, self._rows, of_click * self._clicks + of_skip * self._skips)

    def counts(self, candidates: Tensor) -> Tensor:
        """Returns clicks and skips of candidates ``int64 (B, C)``, ``float32 (B, C, 2)``."""
        same = (candidates[:, :, None] == self._rows[:, None, :]).to(torch.float32)
        return torch.stack(
            [torch.einsum("bch,bh->bc", same, part) for part in (self._clicks, self._skips)], 2
        )

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
    """An observation as both levels take it: state and, where there is one, the window.

    Args:
        observation: ``float32 (B, d_out)``, or a dict with ``state``, ``history_items`` and ``history_clicks``.
        table: Items; its device is where everything goes.
    """

    def __init__(self, observation: Any, table: ItemTable) -> None:
        device = table.units.device

        def tensor(part: Any) -> Tensor:
            return torch.as_tensor(part, device=device)

        self.window: Window | None = None
        if isinstance(observation, dict):
            self.state = tensor(observation["state"]).to(torch.float32)
            if "history_items" in observation:
                items = tensor(observation["history_items"]).to(torch.int64)
                clicks = tensor(observation["history_clicks"]).to(torch.float32)
                self.window = Window(items, clicks, table)
        else:
            self.state = tensor(observation).to(torch.float32)
        context = self.state.new_zeros(len(self.state), CONTEXT)
        self.context = context if self.window is None else self.window.context()

    def __len__(self) -> int:
        return len(self.state)
