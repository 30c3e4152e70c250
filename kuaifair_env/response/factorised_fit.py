"""Fits factorised response models: one function from a log to a calibrated model with a report on held-out rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import sigmoid
from kuaifair_env.response.calibration import assess, logit_slopes, within_user_auc
from kuaifair_env.response.factorised import FactorisedConfig, FactorisedResponse
from kuaifair_env.response.inputs import ResponseInputs, response_inputs
from kuaifair_env.response.rows import LabelledRows, labelled_rows, rate_correction
from kuaifair_env.response.training import batch_size_for, fit_epochs

_BIASES = ("offset", "user_bias", "item_bias")
_PARTS = ("user", "item", "personal")
_ITEM_PSEUDO_COUNT = 20.0


class FactorNetwork(nn.Module):
    """``mu + b_u + b_i + w x_u + v y_i + <p_u + P x_u, q_i + Q y_i>`` with trainable everything.

    ``x`` and ``y`` are the inputs of all users and items. Without ``user_ids``, ``b_u`` and ``p_u`` stay 0: users are
    known by their inputs alone.
    """

    def __init__(self, x: Tensor, y: Tensor, rank: int, user_ids: bool, generator: torch.Generator) -> None:
        super().__init__()

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(*shape, generator=generator))

        self.user_ids = user_ids
        self.offset = nn.Parameter(torch.zeros(()))
        self.user_bias = nn.Parameter(torch.zeros(len(x)), requires_grad=user_ids)
        self.item_bias = nn.Parameter(torch.zeros(len(y)))
        self.user_line = nn.Parameter(torch.zeros(x.shape[1]))
        self.item_line = nn.Parameter(torch.zeros(y.shape[1]))
        self.user_map = normal(x.shape[1], rank)
        self.item_map = normal(y.shape[1], rank)
        if user_ids:
            self.user_factors = normal(len(x), rank)
        else:
            self.user_factors = nn.Parameter(torch.zeros(len(x), rank), requires_grad=False)
        self.item_factors = normal(len(y), rank)

    def forward(self, users: Tensor, items: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Returns logits ``(R,)`` for rows of users with inputs ``x`` and items with inputs ``y``."""
        p = x @ self.user_map
        q = self.item_factors[items] + y @ self.item_map
        main = self.offset + self.item_bias[items] + x @ self.user_line + y @ self.item_line
        if self.user_ids:
            p = p + self.user_factors[users]
            main = main + self.user_bias[users]
        return main + (p * q).sum(1)

    def parameter_groups(self, bias_rate: float, other_rate: float) -> list[dict[str, Any]]:
        """Returns groups for an optimizer: the offset and the biases, and everything else."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        biases = [p for name, p in trained.items() if name in _BIASES]
        others = [p for name, p in trained.items() if name not in _BIASES]
        return [{"params": biases, "lr": bias_rate}, {"params": others, "lr": other_rate}]

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

    def __init__(self, users: Tensor, items: Tensor, network: FactorNetwork, config: FactorisedConfig) -> None:
        self._per_user = 1.0 / torch.bincount(users, minlength=len(network.user_bias)).clamp(min=1).float()
        self._per_item = 1.0 / torch.bincount(items, minlength=len(network.item_bias)).clamp(min=1).float()
        self._rows = len(users)
        self._bias, self._factors = config.bias_precision, config.factor_precision
        self._lines = config.line_precision
        self._maps = config.map_precision * len(users) ** 0.5

    def __call__(self, network: FactorNetwork, users: Tensor, items: Tensor) -> Tensor:
        """Returns the penalty to add to the mean loss of a batch."""
        of_item = self._bias * network.item_bias[items].square()
        of_item = of_item + self._factors * network.item_factors[items].square().sum(1)
        penalty = (self._per_item[items] * of_item).mean()
        if network.user_ids:
            of_user = self._bias * network.user_bias[users].square()
            of_user = of_user + self._factors * network.user_factors[users].square().sum(1)
            penalty = penalty + (self._per_user[users] * of_user).mean()
        lines = network.user_line.square().sum() + network.item_line.square().sum()
        maps = network.user_map.square().sum() + network.item_map.square().sum()
        total: Tensor = 0.5 * (penalty + (self._lines * lines + self._maps * maps) / self._rows)
        return total


def fit_factorised(
    log: InteractionLog,
    data: InteractionData,
    *,
    context_log: InteractionLog | None = None,
    config: FactorisedConfig | None = None,
    seed: int = 0,
) -> FactorisedResponse:
    """Fits ``logit P(click) = mu + b_u + b_i + w x_u + v y_i + <p_u + P x_u, q_i + Q y_i>`` to a log.

    The inputs ``x_u`` and ``y_i`` hold features, tags and what the context log says (see
    :mod:`kuaifair_env.response.inputs`). Training stops on held-out log loss; then, on further rows, an offset and one
    slope each for the user, item and personal part are fitted (Platt's scaling, part by part), so that the strength of
    taste is neither over- nor understated; every reported figure comes from rows that took no part in any of this.

    Args:
        log: What is fitted: ``data.test`` for a test world, (a part of) ``data.train`` for a training world.
        data: Users, items, features, tags.
        context_log: A log that shares no row with ``log`` and describes users and items; None uses features alone.
        config: Settings; None takes the defaults.
        seed: Seed of splits, draws, starting values and the SVD.

    Returns:
        The model; :meth:`FactorisedResponse.describe` holds the report.

    Raises:
        DataError: If the log is ``context_log`` itself or too small to fit and evaluate a model.
    """
    config = config or FactorisedConfig()
    if context_log is log:
        raise DataError("context_log must not be the log that is fitted: each row would predict itself")
    rows = labelled_rows(log, len(data.items), config.split, config.negatives or data.negatives, seed, context_log)
    inputs = response_inputs(data, context_log, config.inputs, seed)
    parts, training = _train(rows, inputs, config, seed)
    model = FactorisedResponse(**parts)
    model, calibration = _calibrated(model, rows, config.slope_prior)
    report = {
        "fitted_on": rows.notes | {role: len(rows.where(role)) for role in ("fit", "stop", "calibrate", "report")},
        "context_rows": inputs.context_rows,
        "inputs": {"user": len(inputs.users.names), "item": len(inputs.items.names)},
        "config": asdict(config),
        "seed": seed,
        "training": training,
        "calibration": calibration,
        **_held_out_report(model, rows),
        "spread": model.parts_spread(*(np.unique(column[rows.where("fit")]) for column in (rows.users, rows.items))),
        **data.identity(),
    }
    shift = rate_correction(rows.notes)
    return FactorisedResponse(
        model.offset + shift,
        model.user_bias,
        model.item_bias,
        model.user_factors,
        model.item_factors,
        report | {"rate_correction": shift},
    )


def _train(
    rows: LabelledRows, inputs: ResponseInputs, config: FactorisedConfig, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fits a :class:`FactorNetwork` by minibatch Adam; returns effective offset, biases and factors, and a report."""
    generator = torch.Generator().manual_seed(seed)
    fit, stop = rows.where("fit"), rows.where("stop")
    x, y = torch.tensor(inputs.users.values), torch.tensor(inputs.items.values)
    network = FactorNetwork(x, y, config.rank, config.user_ids, generator)
    rate = float(np.clip(rows.clicks[fit].mean(), 1e-4, 1 - 1e-4))
    with torch.no_grad():
        network.offset.fill_(float(np.log(rate / (1 - rate))))
    # Copies: columns of a cached log are read-only maps of a file, which torch does not know.
    users, items = torch.tensor(rows.users), torch.tensor(rows.items)
    clicks = torch.tensor(rows.clicks).float()
    fit_rows, stop_rows = torch.from_numpy(fit), torch.from_numpy(stop)
    penalty = FactorPenalty(users[fit_rows], items[fit_rows], network, config)

    def logits(model: FactorNetwork, rows: Tensor) -> Tensor:
        value: Tensor = model(users[rows], items[rows], x[users[rows]], y[items[rows]])
        return value

    def loss(model: FactorNetwork, batch: Tensor) -> Tensor:
        chosen = fit_rows[batch]
        log_loss = functional.binary_cross_entropy_with_logits(logits(model, chosen), clicks[chosen])
        return log_loss + penalty(model, users[chosen], items[chosen])

    def held_out_loss(model: FactorNetwork) -> float:
        total = 0.0
        for block in torch.split(stop_rows, 1 << 15):
            total += float(
                functional.binary_cross_entropy_with_logits(logits(model, block), clicks[block], reduction="sum")
            )
        return total / len(stop_rows)

    best, report = fit_epochs(
        network,
        torch.optim.Adam(network.parameter_groups(config.bias_learning_rate, config.learning_rate)),
        len(fit_rows),
        loss,
        held_out_loss,
        batch_size=batch_size_for(len(fit_rows), config.batch_size),
        max_epochs=config.max_epochs,
        patience=config.patience,
        generator=generator,
    )
    return best.effective(x, y), report


def logit_parts(model: FactorisedResponse, users: NDArray[Any], items: NDArray[Any]) -> FloatArray:
    """Returns ``float32 (R, 3)``: user, item and personal part of the logit of each row, without the offset."""
    parts = np.empty((len(users), 3), np.float32)
    parts[:, 0] = model.user_bias[users]
    parts[:, 1] = model.item_bias[items]
    for start in range(0, len(users), 1 << 16):
        block = slice(start, start + (1 << 16))
        parts[block, 2] = model.personal_logits(users[block], items[block][:, None])[:, 0]
    return parts


def _calibrated(
    model: FactorisedResponse, rows: LabelledRows, prior: float
) -> tuple[FactorisedResponse, dict[str, Any]]:
    chosen = rows.where("calibrate")
    parts = logit_parts(model, rows.users[chosen], rows.items[chosen])
    slopes = logit_slopes(rows.clicks[chosen], parts, prior)
    # A slope below 0 would turn a part round: then it carries nothing, and goes.
    of_user, of_item, of_taste = np.maximum(slopes.values, 0.0)
    calibrated = FactorisedResponse(
        slopes.offset,
        model.user_bias * of_user,
        model.item_bias * of_item,
        model.user_factors * of_taste,
        model.item_factors,
    )
    return calibrated, {"offset": slopes.offset - model.offset} | dict(zip(_PARTS, slopes.values.tolist(), strict=True))


def _held_out_report(model: FactorisedResponse, rows: LabelledRows) -> dict[str, Any]:
    chosen = rows.where("report")
    users, items, clicks = rows.users[chosen], rows.items[chosen], rows.clicks[chosen]
    parts = logit_parts(model, users, items)
    quality = shrunken_item_rate(rows, model.n_items)[items]
    main, full = (sigmoid(parts[:, :n].sum(axis=1) + np.float32(model.offset)) for n in (2, 3))
    slopes = logit_slopes(clicks, parts)
    of_quality, of_main, of_full = (within_user_auc(users, clicks, scores) for scores in (quality, main, full))
    over_quality, over_main = of_full.gain_over(of_quality), of_full.gain_over(of_main)
    return {
        "held_out": assess(users, clicks, full),
        "controls": {
            "item_quality": assess(users, clicks, quality),
            "main_effects": assess(users, clicks, main),
        },
        "personal": {
            "gain_over_item_quality": {"within_user_auc": over_quality[0], "interval": list(over_quality[1])},
            "gain_over_main_effects": {"within_user_auc": over_main[0], "interval": list(over_main[1])},
        },
        "slopes": slopes.describe(_PARTS),
    }


def shrunken_item_rate(
    rows: LabelledRows, n_items: int, pseudo_count: float = _ITEM_PSEUDO_COUNT
) -> NDArray[np.float64]:
    """Returns each item's click rate among the fitted rows, with ``pseudo_count`` exposures at the mean rate added."""
    fit = rows.where("fit")
    clicks, items = rows.clicks[fit], rows.items[fit]
    shown = np.bincount(items, minlength=n_items)
    clicked = np.bincount(items, clicks, minlength=n_items)
    rate: NDArray[np.float64] = (clicked + pseudo_count * clicks.mean()) / (shown + pseudo_count)
    return rate
