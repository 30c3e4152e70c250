"""Fits factorised response models: one function from a log to a calibrated model with a report on held-out rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import sigmoid
from kuaifair_env.response.calibration import assess, logit_slopes, within_user_auc
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.response.inputs import (
    InputConfig,
    LabelledRows,
    NegativeSampling,
    ResponseInputs,
    SplitConfig,
    labelled_rows,
    rate_correction,
    response_inputs,
)

_PARTS = ("user", "item", "personal")
_ITEM_PSEUDO_COUNT = 20.0


@dataclass(frozen=True)
class FactorisedConfig:
    """Settings of :func:`fit_factorised`; the defaults were chosen on held-out rows of partial KuaiRand-Pure.

    Precisions are those of normal priors around 0, in units of one row's log-likelihood: but for ``map_precision``
    they mean the same whatever the number of rows.

    Attributes:
        rank: Number of factors ``f``; 0 fits main effects alone.
        user_ids: Whether each user has an own bias ``b_u`` and factor ``p_u`` beside what the inputs say.
        inputs: How the context log is condensed.
        split: Which rows are held out for what.
        negatives: Used for logs of positives only.
        bias_precision: Prior precision of ``b_u`` and ``b_i``.
        factor_precision: Of ``p_u`` and ``q_i``.
        line_precision: Of ``w`` and ``v``.
        map_precision: Of ``P`` and ``Q``, times the square root of the number of fitted rows: with a product of two
            maps it is a nuclear-norm penalty, whose best weight grows as the noise does (Koltchinskii, Lounici and
            Tsybakov, "Nuclear-norm penalization and optimal rates", Annals of Statistics 2011).
        slope_prior: Standard deviation of the prior around 1 of the calibrating slopes.
        learning_rate: Of Adam, for factors, maps and lines.
        bias_learning_rate: Of Adam, for the biases.
        batch_size: Rows per step at most; small logs take smaller batches, see :func:`batch_size_for`.
        max_epochs: Passes at most.
        patience: Passes without a better held-out log loss before the end.
    """

    rank: int = 16
    user_ids: bool = True
    inputs: InputConfig = field(default_factory=InputConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    negatives: NegativeSampling = field(default_factory=NegativeSampling)
    bias_precision: float = 3.0
    factor_precision: float = 60.0
    line_precision: float = 50.0
    map_precision: float = 6.5
    slope_prior: float = 0.5
    learning_rate: float = 1e-3
    bias_learning_rate: float = 1e-2
    batch_size: int = 4096
    max_epochs: int = 40
    patience: int = 3


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
    rows = labelled_rows(log, len(data.items), config.split, config.negatives, seed, context_log)
    inputs = response_inputs(data, context_log, config.inputs, seed)
    parts, training = _train(rows, inputs, config, seed)
    model = FactorisedResponse(**parts)
    model, calibration = _calibrated(model, rows, config.slope_prior)
    report = {
        "fitted_on": rows.notes
        | {role: len(rows.where(role)) for role in ("fit", "stop", "calibrate", "report")},
        "context_rows": inputs.context_rows,
        "inputs": {"user": len(inputs.users.names), "item": len(inputs.items.names)},
        "config": asdict(config),
        "seed": seed,
        "training": training,
        "calibration": calibration,
        **_held_out_report(model, rows),
        "spread": _spread(model, rows),
        "data": data.provenance.name,
        "origin": data.provenance.origin,
        "data_hash": data.data_hash,
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
    from kuaifair_env.response.networks import train_factors

    return train_factors(
        rows.users,
        rows.items,
        rows.clicks,
        rows.where("fit"),
        rows.where("stop"),
        inputs.users.values,
        inputs.items.values,
        rank=config.rank,
        user_ids=config.user_ids,
        precisions={
            "bias": config.bias_precision,
            "factors": config.factor_precision,
            "lines": config.line_precision,
            "maps": config.map_precision * len(rows.where("fit")) ** 0.5,
        },
        learning_rate=config.learning_rate,
        bias_learning_rate=config.bias_learning_rate,
        batch_size=batch_size_for(len(rows.where("fit")), config.batch_size),
        max_epochs=config.max_epochs,
        patience=config.patience,
        seed=seed,
    )


def batch_size_for(examples: int, largest: int, steps: int = 50, smallest: int = 64) -> int:
    """Returns a batch size that makes at least ``steps`` steps per pass, within ``smallest..largest``.

    A pass of two steps over a small log would hardly move the weights between two looks at the held-out loss.
    """
    return min(largest, max(smallest, examples // steps))


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
    held = rows.where("calibrate")
    parts = logit_parts(model, rows.users[held], rows.items[held])
    slopes = logit_slopes(rows.clicks[held], parts, prior)
    # A slope below 0 would turn a part round: then it carries nothing, and goes.
    of_user, of_item, of_taste = np.maximum(slopes.values, 0.0)
    calibrated = FactorisedResponse(
        slopes.offset,
        model.user_bias * of_user,
        model.item_bias * of_item,
        model.user_factors * of_taste,
        model.item_factors,
    )
    return calibrated, {"offset": slopes.offset - model.offset} | dict(
        zip(_PARTS, slopes.values.tolist(), strict=True)
    )


def _held_out_report(model: FactorisedResponse, rows: LabelledRows) -> dict[str, Any]:
    held = rows.where("report")
    users, items, clicks = rows.users[held], rows.items[held], rows.clicks[held]
    parts = logit_parts(model, users, items)
    quality = shrunken_item_rate(rows, model.n_items)[items]
    main, full = (sigmoid(parts[:, :n].sum(axis=1) + np.float32(model.offset)) for n in (2, 3))
    slopes = logit_slopes(clicks, parts)
    of_quality, of_main, of_full = (
        within_user_auc(users, clicks, scores) for scores in (quality, main, full)
    )
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
        "slopes": {
            part: {"slope": float(slope), "error": float(error)}
            for part, slope, error in zip(_PARTS, slopes.values, slopes.errors, strict=True)
        },
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


def _spread(model: FactorisedResponse, rows: LabelledRows) -> dict[str, float]:
    fit = rows.where("fit")
    return model.parts_spread(np.unique(rows.users[fit]), np.unique(rows.items[fit]))


def without_user_ids(config: FactorisedConfig) -> FactorisedConfig:
    """Returns the settings with users known by their inputs alone, so that a history model adds what ids would."""
    return replace(config, user_ids=False)
