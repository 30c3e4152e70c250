"""How slates are drawn from scores of items: Plackett-Luce, alone or with a quota of popular items."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

MASKED = -1e30
"""Logit of items that are not allowed: finite, because differences of infinities are undefined."""


def slate_shape(action_space: spaces.Space[Any]) -> tuple[int, int]:
    """Returns the number of items ``N`` and the slate size ``K`` of an action space of item ids.

    Raises:
        ValueError: If its actions are not item ids from 0 to ``N - 1``.
    """
    if isinstance(action_space, spaces.Discrete) and action_space.start == 0:
        return int(action_space.n), 1
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim == 1:
        size, items = len(action_space.nvec), int(action_space.nvec[0])
        if size <= items and (action_space.nvec == items).all():
            return items, size
    raise ValueError(
        f"this agent names items; make the environment with action_mode='slate' or 'item' (got {action_space})"
    )


class SlateDistribution:
    """The Plackett-Luce distribution over slates.

    Items are drawn one after another, each with probability proportional to ``exp(logit)`` among those left:
    ``log p(a_1 .. a_K) = sum_j [psi_{a_j} - log sum_{i not in a_1 .. a_{j-1}} exp(psi_i)]`` (Luce, 1959; Plackett,
    1975).

    Args:
        logits: ``float32 (B, N)``, scores ``Psi``.
        slate_size: Items ``K`` of a slate.
        mask: ``bool (B, N)`` or ``(N,)``, items that may be shown; None allows all.

    Raises:
        ValueError: If there are fewer than ``K`` items.
    """

    def __init__(self, logits: Tensor, slate_size: int, mask: Tensor | None = None) -> None:
        if not 1 <= slate_size <= logits.shape[1]:
            raise ValueError(f"a slate has 1 to {logits.shape[1]} items, got {slate_size}")
        self.slate_size = slate_size
        self.logits = logits if mask is None else torch.where(mask, logits, MASKED)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws slates exactly, as the ``K`` largest of logits plus Gumbel noise, ``int64 (B, K)`` in order of drawing.

        Args:
            generator: Source of randomness; None takes torch's global generator.
        """
        return (self.logits + gumbel(self.logits, generator)).topk(self.slate_size, dim=1).indices

    def mode(self) -> Tensor:
        """Returns the likeliest slates: the ``K`` largest logits, largest first."""
        return self.logits.topk(self.slate_size, dim=1).indices

    def slot_log_probs(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of each slot given those before it, ``float32 (B, K)``.

        Args:
            slates: ``int64 (B, K)``, distinct items.
        """
        chosen = self.logits.gather(1, slates)
        return chosen - _log_remaining_mass(self.logits.scatter(1, slates, MASKED), chosen)

    def log_prob(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of ordered slates, ``float32 (B,)``."""
        return self.slot_log_probs(slates).sum(dim=1)

    def entropy(self) -> Tensor:
        """Returns the exact entropy of the first slot, ``float32 (B,)``."""
        return _entropy(self.logits)


class QuotaSlateDistribution:
    """Slates with a given number of popular items: Plackett-Luce among the popular items, and among the others.

    This is eq. 6 of the paper with the price of popularity at which the slate meets its constraint: within a group the
    price is a constant, which does not change Plackett-Luce probabilities.

    Args:
        logits: ``float32 (B, N)``.
        popular: ``bool (B, N)``.
        counts: ``int64 (B,)``, popular items in each slate.
        slate_size: Items ``K`` of a slate; no count may ask for more items than its group holds.
    """

    def __init__(self, logits: Tensor, popular: Tensor, counts: Tensor, slate_size: int) -> None:
        self.slate_size = slate_size
        self._counts = counts[:, None]
        self._groups = (torch.where(popular, logits, MASKED), torch.where(popular, MASKED, logits))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws slates, popular items first, ``int64 (B, K)``; see :class:`SlateDistribution`."""
        return self._merge(*(group + gumbel(group, generator) for group in self._groups))

    def mode(self) -> Tensor:
        """Returns the likeliest slates, popular items first."""
        return self._merge(*self._groups)

    def slot_log_probs(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of each slot given those before it, ``float32 (B, K)``."""
        first = torch.arange(self.slate_size, device=slates.device) < self._counts
        log_probs = []
        for group, inside in zip(self._groups, (first, ~first), strict=True):
            chosen = torch.where(inside, group.gather(1, slates), MASKED)
            remaining = _log_remaining_mass(group.scatter(1, slates, MASKED), chosen)
            log_probs.append(torch.where(inside, chosen - remaining, 0.0))
        return log_probs[0] + log_probs[1]

    def log_prob(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of slates, ordered within each group, ``float32 (B,)``."""
        return self.slot_log_probs(slates).sum(dim=1)

    def entropy(self) -> Tensor:
        """Returns the mean entropy of the first slot of both groups, ``float32 (B,)``."""
        return (_entropy(self._groups[0]) + _entropy(self._groups[1])) / 2

    def _merge(self, popular: Tensor, tail: Tensor) -> Tensor:
        """Returns slates of the best popular items, as many as the counts say, and the best others behind them."""
        slots = torch.arange(self.slate_size, device=popular.device).expand(len(popular), -1)
        best_popular = popular.topk(self.slate_size, dim=1).indices
        best_tail = tail.topk(self.slate_size, dim=1).indices
        tail_rank = (slots - self._counts).clamp_min(0)
        return torch.where(slots < self._counts, best_popular, best_tail.gather(1, tail_rank))


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns standard Gumbel noise of the shape of ``like``."""
    return -torch.empty_like(like).exponential_(generator=generator).clamp_min(1e-20).log()


def _log_remaining_mass(rest: Tensor, chosen: Tensor) -> Tensor:
    """Returns the log of the mass left at each slot ``(B, K)``: of this and all later slots, and of items not shown.

    Summing from the last slot on adds positive terms only; subtracting prefixes from the total would cancel.

    Args:
        rest: ``(B, N)``, logits of items not shown; others masked.
        chosen: ``(B, K)``, logits of the slots.
    """
    outside = rest.logsumexp(dim=1, keepdim=True)
    backwards = torch.cat([outside, chosen.flip(1)], dim=1).logcumsumexp(dim=1)
    return backwards[:, 1:].flip(1)


def _entropy(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs.clamp_min(MASKED / 10)).sum(dim=1)
