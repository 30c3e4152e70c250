"""The torch side of fitting; imported inside functions only, so that simulating never needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kuaifair_env.response.training import fit_epochs


@dataclass(frozen=True)
class FactorSizes:
    """Sizes of a :class:`FactorNetwork`."""

    users: int
    items: int
    user_inputs: int
    item_inputs: int
    rank: int
    user_ids: bool


class FactorNetwork(nn.Module):
    """``mu + b_u + b_i + w x_u + v y_i + <p_u + P x_u, q_i + Q y_i>`` with trainable everything.

    Without ``user_ids``, ``b_u`` and ``p_u`` stay 0: users are known by their inputs alone.
    """

    def __init__(self, sizes: FactorSizes, generator: torch.Generator) -> None:
        super().__init__()

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(*shape, generator=generator))

        self.sizes = sizes
        self.offset = nn.Parameter(torch.zeros(()))
        self.user_bias = nn.Parameter(torch.zeros(sizes.users), requires_grad=sizes.user_ids)
        self.item_bias = nn.Parameter(torch.zeros(sizes.items))
        self.user_line = nn.Parameter(torch.zeros(sizes.user_inputs))
        self.item_line = nn.Parameter(torch.zeros(sizes.item_inputs))
        self.user_map = normal(sizes.user_inputs, sizes.rank)
        self.item_map = normal(sizes.item_inputs, sizes.rank)
        if sizes.user_ids:
            self.user_factors = normal(sizes.users, sizes.rank)
        else:
            self.user_factors = nn.Parameter(torch.zeros(sizes.users, sizes.rank), requires_grad=False)
        self.item_factors = normal(sizes.items, sizes.rank)

    def forward(self, users: Tensor, items: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Returns logits ``(R,)`` for rows of users with inputs ``x`` and items with inputs ``y``."""
        p = x @ self.user_map
        q = self.item_factors[items] + y @ self.item_map
        main = self.offset + self.item_bias[items] + x @ self.user_line + y @ self.item_line
        if self.sizes.user_ids:
            p = p + self.user_factors[users]
            main = main + self.user_bias[users]
        return main + (p * q).sum(1)

    def effective(self, x: Tensor, y: Tensor) -> dict[str, NDArray[np.float64]]:
        """Returns offset, biases and factors of all users and items, ids and inputs summed."""
        with torch.no_grad():
            parts = {
                "user_bias": self.user_bias + x @ self.user_line,
                "item_bias": self.item_bias + y @ self.item_line,
                "user_factors": self.user_factors + x @ self.user_map,
                "item_factors": self.item_factors + y @ self.item_map,
            }
            return {name: part.numpy().astype(np.float64) for name, part in parts.items()} | {
                "offset": self.offset.numpy().astype(np.float64)
            }


class FactorPenalty:
    """Minus the log of a normal prior on every parameter, per row of the log, for one batch.

    Each user's and item's own term is charged once per pass over the rows, whatever their number of rows.
    """

    def __init__(
        self,
        users: Tensor,
        items: Tensor,
        sizes: FactorSizes,
        *,
        bias: float,
        factors: float,
        lines: float,
        maps: float,
    ) -> None:
        self._per_user = 1.0 / torch.bincount(users, minlength=sizes.users).clamp(min=1).float()
        self._per_item = 1.0 / torch.bincount(items, minlength=sizes.items).clamp(min=1).float()
        self._rows = len(users)
        self._bias, self._factors, self._lines, self._maps = bias, factors, lines, maps

    def __call__(self, network: FactorNetwork, users: Tensor, items: Tensor) -> Tensor:
        """Returns the penalty to add to the mean loss of a batch."""
        of_item = self._bias * network.item_bias[items].square()
        of_item = of_item + self._factors * network.item_factors[items].square().sum(1)
        penalty = (self._per_item[items] * of_item).mean()
        if network.sizes.user_ids:
            of_user = self._bias * network.user_bias[users].square()
            of_user = of_user + self._factors * network.user_factors[users].square().sum(1)
            penalty = penalty + (self._per_user[users] * of_user).mean()
        lines = network.user_line.square().sum() + network.item_line.square().sum()
        maps = network.user_map.square().sum() + network.item_map.square().sum()
        return 0.5 * (penalty + (self._lines * lines + self._maps * maps) / self._rows)


def train_factors(
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    clicks: NDArray[np.bool_],
    fit: NDArray[np.int64],
    stop: NDArray[np.int64],
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    *,
    rank: int,
    user_ids: bool,
    precisions: dict[str, float],
    learning_rate: float,
    bias_learning_rate: float,
    batch_size: int,
    max_epochs: int,
    patience: int,
    seed: int,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
    """Fits a :class:`FactorNetwork` by minibatch Adam; see :func:`kuaifair_env.response.factorised_fit.fit_factorised`.

    Returns:
        Effective offset, biases and factors, and a report.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = FactorSizes(len(x), len(y), x.shape[1], y.shape[1], rank, user_ids)
    network = FactorNetwork(sizes, generator)
    rate = float(np.clip(clicks[fit].mean(), 1e-4, 1 - 1e-4))
    with torch.no_grad():
        network.offset.fill_(float(np.log(rate / (1 - rate))))
    # Copies: columns of a cached log are read-only maps of a file, which torch does not know.
    u, i, x_all, y_all = (torch.tensor(column) for column in (users, items, x, y))
    c = torch.tensor(clicks).float()
    fit_rows, stop_rows = torch.from_numpy(fit), torch.from_numpy(stop)
    penalty = FactorPenalty(u[fit_rows], i[fit_rows], sizes, **precisions)
    quick = {"offset", "user_bias", "item_bias"}
    groups = [
        {
            "params": [
                p for name, p in network.named_parameters() if (name in quick) == fast and p.requires_grad
            ],
            "lr": bias_learning_rate if fast else learning_rate,
        }
        for fast in (True, False)
    ]

    def loss(model: FactorNetwork, batch: Tensor) -> Tensor:
        rows = fit_rows[batch]
        ub, ib = u[rows], i[rows]
        logits = model(ub, ib, x_all[ub], y_all[ib])
        return functional.binary_cross_entropy_with_logits(logits, c[rows]) + penalty(model, ub, ib)

    def held_out_loss(model: FactorNetwork) -> float:
        total = 0.0
        for rows in torch.split(stop_rows, 1 << 15):
            logits = model(u[rows], i[rows], x_all[u[rows]], y_all[i[rows]])
            total += float(functional.binary_cross_entropy_with_logits(logits, c[rows], reduction="sum"))
        return total / len(stop_rows)

    best, report = fit_epochs(
        network,
        torch.optim.Adam(groups),
        len(fit_rows),
        loss,
        held_out_loss,
        batch_size=batch_size,
        max_epochs=max_epochs,
        patience=patience,
        generator=generator,
    )
    return best.effective(x_all, y_all), report
