"""Distributions over slates of distinct items: Plackett-Luce, freely or with a quota of popular items."""

from __future__ import annotations

import torch
from torch import Tensor

# Finite, so that what is masked has probability 0 and gradient 0, and never an undefined difference of infinities.
MASKED = -1e30


class SlateDistribution:
    """Plackett-Luce: items are drawn one after another, each in proportion to ``exp(logit)`` among those left.

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
            generator: Source of randomness; None takes torch's own.
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
        return chosen - _left(self.logits.scatter(1, slates, MASKED), chosen)

    def log_prob(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of ordered slates, ``float32 (B,)``."""
        return self.slot_log_probs(slates).sum(dim=1)

    def entropy(self) -> Tensor:
        """Returns the exact entropy of the first slot, ``float32 (B,)``."""
        return _entropy(self.logits)


class QuotaSlateDistribution:
    """A given number of popular items by Plackett-Luce among the popular, the rest by it among the long tail.

    This is eq. 6 with the price of popularity that makes the slate meet its constraint: within a group the price is a
    constant, which Plackett-Luce does not see.

    Args:
        logits: ``float32 (B, N)``.
        popular: ``bool (B, N)``.
        counts: ``int64 (B,)``, popular items in each slate.
        slate_size: Items ``K`` of a slate; each group holds as many, or no count asks for more.
    """

    def __init__(self, logits: Tensor, popular: Tensor, counts: Tensor, slate_size: int) -> None:
        self.slate_size = slate_size
        self._counts = counts[:, None]
        self._groups = (torch.where(popular, logits, MASKED), torch.where(popular, MASKED, logits))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws slates, popular items first, ``int64 (B, K)``; see :class:`SlateDistribution`."""
        return self._joined(*(group + gumbel(group, generator) for group in self._groups))

    def mode(self) -> Tensor:
        """Returns the likeliest slates, popular items first."""
        return self._joined(*self._groups)

    def slot_log_probs(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of each slot given those before it, ``float32 (B, K)``."""
        first = torch.arange(self.slate_size, device=slates.device) < self._counts
        found = []
        for group, inside in zip(self._groups, (first, ~first), strict=True):
            chosen = torch.where(inside, group.gather(1, slates), MASKED)
            left = _left(group.scatter(1, slates, MASKED), chosen)
            found.append(torch.where(inside, chosen - left, 0.0))
        return found[0] + found[1]

    def log_prob(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of slates, ordered within each group, ``float32 (B,)``."""
        return self.slot_log_probs(slates).sum(dim=1)

    def entropy(self) -> Tensor:
        """Returns the mean entropy of the first slot of both groups, ``float32 (B,)``."""
        return (_entropy(self._groups[0]) + _entropy(self._groups[1])) / 2

    def _joined(self, popular: Tensor, tail: Tensor) -> Tensor:
        places = torch.arange(self.slate_size, device=popular.device).expand(len(popular), -1)
        head = popular.topk(self.slate_size, dim=1).indices
        rest = tail.topk(self.slate_size, dim=1).indices
        behind = (places - self._counts).clamp_min(0)
        return torch.where(places < self._counts, head, rest.gather(1, behind))


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns standard Gumbel noise of the shape of ``like``."""
    return -torch.empty_like(like).exponential_(generator=generator).clamp_min(1e-20).log()


def _left(rest: Tensor, chosen: Tensor) -> Tensor:
    """Returns, for each slot, the log of the mass that is left: its own and all later slots' and what is never shown.

    Summing up from the last slot adds positive terms only; subtracting prefixes from the whole would cancel.

    Args:
        rest: ``(B, N)``, logits of what the slate does not hold.
        chosen: ``(B, K)``, logits of the slots.
    """
    outside = rest.logsumexp(dim=1, keepdim=True)
    backwards = torch.cat([outside, chosen.flip(1)], dim=1).logcumsumexp(dim=1)
    return backwards[:, 1:].flip(1)


def _entropy(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs.clamp_min(MASKED / 10)).sum(dim=1)
