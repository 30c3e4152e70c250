"""Fits factorised response models: one function from a log to a calibrated model with a report on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import sigmoid
from kuaifair_env.response.calibration import assess, logit_slopes, within_user_auc
from kuaifair_env.response.factorised import FactorisedConfig, FactorisedResponse
from kuaifair_env.response.inputs import ResponseInputs, response_inputs
from kuaifair_env.response.rows import LabelledRows, labelled_rows, rate_correction

_PARTS = ("user", "item", "personal")
_ITEM_PSEUDO_COUNT = 20.0
_BATCHES = 24
_REFERENCE_BATCH = 256
_WARM_UP = 0.1
_MIN_IMPROVEMENT = 1e-5

Parameters = dict[str, FloatArray]


class FactorModel:
    """``mu + b_u + b_i + w x_u + v y_i + <p_u + P x_u, q_i + Q y_i>`` and the gradient of its penalised log loss.

    Parameters by name: ``users`` ``(U, f + 1)`` of ``(p_u, b_u)``, ``items`` of ``(q_i, b_i)``,
    ``user_map`` of ``(P, w)``, ``item_map`` of ``(Q, v)``, ``offset``. Without ``user_ids``, ``users`` stays 0: users
    are known by their inputs.

    The penalty is minus the log of a normal prior on every parameter, per row of the log.
    """

    def __init__(self, inputs: ResponseInputs, config: FactorisedConfig, rows: int, rate: float, seed: int) -> None:
        rng = np.random.default_rng((seed, 0xFAC7))
        self._x, self._y = inputs.users.values, inputs.items.values
        sizes = {"users": self._x, "items": self._y, "user_map": self._x.T, "item_map": self._y.T}
        self.parameters: Parameters = {"offset": np.array([np.log(rate / (1 - rate))], np.float32)}
        for name, table in sizes.items():
            start = np.zeros((len(table), config.rank + 1), np.float32)
            start[:, :-1] = 0.02 * rng.standard_normal((len(table), config.rank))
            self.parameters[name] = start
        self._fixed = () if config.user_ids else ("users",)
        for name in self._fixed:
            self.parameters[name][:] = 0.0
        of_ids = _per_row(config.rank, config.factor_precision, config.bias_precision, rows)
        of_maps = _per_row(config.rank, config.map_precision * rows**0.5, config.line_precision, rows)
        self._precisions = {"users": of_ids, "items": of_ids, "user_map": of_maps, "item_map": of_maps}

    def tables(self) -> tuple[FloatArray, FloatArray]:
        """Returns ``float32 (U, f + 1)`` and ``(N, f + 1)``: factors and biases of all users and items, effective."""
        p = self.parameters
        return p["users"] + self._x @ p["user_map"], p["items"] + self._y @ p["item_map"]

    def logits(self, tables: tuple[FloatArray, FloatArray], users: IntArray, items: IntArray) -> FloatArray:
        """Returns ``float32 (R,)`` logits of rows, by what :meth:`tables` returned."""
        of_users, of_items = (table.take(rows, axis=0) for table, rows in zip(tables, (users, items), strict=True))
        logits: FloatArray = np.einsum("rf,rf->r", of_users[:, :-1], of_items[:, :-1])
        logits += of_users[:, -1] + of_items[:, -1] + self.parameters["offset"]
        return logits

    def loss(self, users: IntArray, items: IntArray, clicks: BoolArray) -> float:
        """Returns the mean log loss of rows, without the penalty."""
        logits = self.logits(self.tables(), users, items)
        return float((np.logaddexp(np.float32(0), logits) - clicks * logits).mean(dtype=np.float64))

    def gradient(self, users: IntArray, items: IntArray, clicks: BoolArray) -> Parameters:
        """Returns the gradient of the penalised mean log loss of rows, which must be sorted by user."""
        import scipy.sparse as sp

        tables = self.tables()
        residuals = (sigmoid(self.logits(tables, users, items)) - clicks) / np.float32(len(clicks))
        starts = np.searchsorted(users, np.arange(len(self._x) + 1)).astype(np.int32)
        by_pair = sp.csr_matrix((residuals, items, starts), shape=(len(self._x), len(self._y)))
        # A bias is the weight of a factor that is 1 on the other side.
        of_users, of_items = (np.column_stack([t[:, :-1], np.ones(len(t), np.float32)]) for t in tables)
        gradient = {
            "offset": residuals.sum(keepdims=True),
            "users": by_pair @ of_items,
            "items": by_pair.T @ of_users,
        }
        gradient["user_map"] = self._x.T @ gradient["users"]
        gradient["item_map"] = self._y.T @ gradient["items"]
        for name, precision in self._precisions.items():
            gradient[name] = gradient[name] + precision * self.parameters[name]
        return {name: part for name, part in gradient.items() if name not in self._fixed}


def _per_row(rank: int, factors: float, bias: float, rows: int) -> FloatArray:
    return np.asarray(np.r_[np.full(rank, factors), bias] / rows, np.float32)


class Adam:
    """Adam (Kingma and Ba, ICLR 2015) over arrays by name."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._means = {name: np.zeros_like(values) for name, values in parameters.items()}
        self._squares = {name: np.zeros_like(values) for name, values in parameters.items()}
        self._steps = 0

    def step(self, gradient: Parameters, rates: Mapping[str, FloatArray | float]) -> None:
        """Moves each parameter that has a gradient against it, by its rate."""
        self._steps += 1
        bias_1, bias_2 = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        for name, slope in gradient.items():
            mean, square = self._means[name], self._squares[name]
            mean += np.float32(0.1) * (slope - mean)
            square += np.float32(0.001) * (slope * slope - square)
            move = mean / (np.sqrt(square / np.float32(bias_2)) + np.float32(1e-8))
            self._parameters[name] -= move * np.asarray(rates[name] / bias_1, np.float32)


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
    rows = labelled_rows(
        log,
        len(data.items),
        config.split,
        config.negatives or data.negatives,
        seed,
        context_log,
        f"{data.identity(log)['split']} log of {data.provenance.name}",
    )
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
        "spread": model.parts_spread(
            *(np.flatnonzero(np.bincount(column[rows.where("fit")])) for column in (rows.users, rows.items))
        ),
        **data.identity(log),
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
    """Fits a :class:`FactorModel` by minibatches; returns effective offset, biases and factors, and a report.

    Learning rates rise for a tenth of the steps and then fall along half a cosine. That of factors and maps grows with
    the square root of the batch size (Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient
    Algorithms", NeurIPS 2022).
    """
    fit, stop = rows.take(rows.where("fit")), rows.take(rows.where("stop"))
    n_rows = len(fit)
    model = FactorModel(inputs, config, n_rows, float(np.clip(fit.clicks.mean(), 1e-4, 1 - 1e-4)), seed)
    batches = min(_BATCHES, max(n_rows // 64, 1))
    rate = config.learning_rate * (n_rows / batches / _REFERENCE_BATCH) ** 0.5
    ids = np.r_[np.full(config.rank, rate), config.bias_learning_rate]
    rates = {"offset": config.bias_learning_rate, "users": ids, "items": ids, "user_map": rate, "item_map": rate}
    optimizer, rng = Adam(model.parameters), np.random.default_rng((seed, 0x0DE2))
    losses: list[float] = []
    best, best_loss, best_pass = model.parameters, np.inf, 0
    while len(losses) < config.max_epochs and len(losses) - best_pass < config.patience:
        for number, batch in enumerate(_shuffled_batches(rng, n_rows, batches)):
            factor = _schedule((len(losses) + number / batches) / config.max_epochs)
            gradient = model.gradient(fit.users[batch], fit.items[batch], fit.clicks[batch])
            optimizer.step(gradient, {name: factor * value for name, value in rates.items()})
        losses.append(model.loss(stop.users, stop.items, stop.clicks))
        if losses[-1] < best_loss - _MIN_IMPROVEMENT:
            best = {name: values.copy() for name, values in model.parameters.items()}
            best_loss, best_pass = losses[-1], len(losses)
    if not np.isfinite(best_loss):
        raise FloatingPointError(f"training diverged: the held-out losses are {losses}; lower the learning rate")
    model.parameters = best
    of_users, of_items = model.tables()
    effective = {
        "offset": float(best["offset"][0]),
        "user_bias": of_users[:, -1],
        "item_bias": of_items[:, -1],
        "user_factors": of_users[:, :-1],
        "item_factors": of_items[:, :-1],
    }
    return effective, {
        "rounds": len(losses),
        "best_round": best_pass,
        "steps": len(losses) * batches,
        "validation_losses": [round(loss, 6) for loss in losses],
    }


def _shuffled_batches(rng: np.random.Generator, rows: int, batches: int) -> Iterator[NDArray[np.int64]]:
    """Yields every row's position once, each in a random batch, increasing within a batch."""
    batch_of = rng.integers(0, batches, rows, np.uint8)
    order = np.argsort(batch_of, kind="stable")
    yield from np.split(order, np.cumsum(np.bincount(batch_of, minlength=batches))[:-1])


def _schedule(progress: float) -> float:
    """Returns the factor of the learning rates after a share of the steps."""
    return float(min(1.0, (progress + 1e-3) / _WARM_UP) * 0.5 * (1.0 + np.cos(np.pi * progress)))


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
