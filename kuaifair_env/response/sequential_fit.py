"""Fits history-dependent response models, and evaluates them beside the factor model on the same rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import sigmoid
from kuaifair_env.response.calibration import assess, logit_slopes, within_user_auc
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.response.factorised_fit import (
    FactorisedConfig,
    batch_size_for,
    fit_factorised,
    without_user_ids,
)
from kuaifair_env.response.inputs import LabelledRows, labelled_rows, response_inputs
from kuaifair_env.response.sequences import (
    Chunks,
    HistorySource,
    Stream,
    history_chunks,
    history_stream,
    windows,
)
from kuaifair_env.response.sequential import SequentialResponse, TransformerShape

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class SequentialConfig:
    """Settings of :func:`fit_sequential`.

    Attributes:
        shape: Sizes of the transformer.
        history_from: ``"log"`` when the log's order is the order in which users saw things; ``"context"`` when its
            order is unknown, so that histories hold context rows only.
        dropout: While training.
        weight_decay: Of AdamW.
        learning_rate: Of AdamW.
        batch_size: Pieces of history per step at most.
        max_epochs: Passes at most.
        patience: Passes without a better held-out log loss before the end.
        slope_prior: Standard deviation of the prior around 1 of the slope of the history's part.
    """

    shape: TransformerShape = field(default_factory=TransformerShape)
    history_from: HistorySource = "log"
    dropout: float = 0.1
    weight_decay: float = 0.01
    learning_rate: float = 1e-3
    batch_size: int = 128
    max_epochs: int = 8
    patience: int = 2
    slope_prior: float = 0.5


def fit_sequential(
    log: InteractionLog,
    data: InteractionData,
    *,
    context_log: InteractionLog | None = None,
    config: SequentialConfig | None = None,
    static: FactorisedConfig | None = None,
    reference: FactorisedResponse | None = None,
    seed: int = 0,
) -> SequentialResponse:
    """Fits a factor model without user ids, and on top of it a transformer over what each user saw before each row.

    Users' levels and tastes beyond their inputs are then learned from the history, which is what makes the model react.
    Rows have the same roles as in :func:`~kuaifair_env.response.factorised_fit.fit_factorised` with the same seed;
    static and history part get one calibrating slope each.

    Args:
        log: What is fitted; must hold non-clicks.
        data: Users, items, features, tags.
        context_log: A log that shares no row with ``log``: earlier history, and inputs of users and items.
        config: Settings; None takes the defaults.
        static: Settings of the static part; ``user_ids`` is turned off.
        reference: A factor model fitted on the same log with the same seed, to be evaluated on the same rows.
        seed: Seed of everything.

    Returns:
        The model; :meth:`SequentialResponse.describe` holds the report.

    Raises:
        DataError: If the log lists positives only, or is too small.
    """
    config, static = config or SequentialConfig(), without_user_ids(static or FactorisedConfig())
    if log.positives_only or (context_log is not None and context_log.positives_only):
        raise DataError(
            "a history model needs logs that hold non-clicks too; fit a factorised response instead"
        )
    base = fit_factorised(log, data, context_log=context_log, config=static, seed=seed)
    rows = labelled_rows(log, len(data.items), static.split, static.negatives, seed, context_log)
    stream = history_stream(log, context_log, len(data.users), config.history_from)
    exported, training = _train(log, data, context_log, base, rows, stream, config, static, seed)
    model = SequentialResponse(base, config.shape, **exported)
    model, calibration = _calibrated(model, exported, rows, stream, config)
    report = {
        "fitted_on": base.describe()["fitted_on"],
        "context_rows": 0 if context_log is None else len(context_log),
        "config": asdict(config),
        "seed": seed,
        "training": training,
        "calibration": calibration,
        **_held_out_report(model, rows, stream, reference),
        "data": data.provenance.name,
        "origin": data.provenance.origin,
        "data_hash": data.data_hash,
    }
    return SequentialResponse(model.static, config.shape, **_parts_of(model, exported), report=report)


def _train(
    log: InteractionLog,
    data: InteractionData,
    context: InteractionLog | None,
    base: FactorisedResponse,
    rows: LabelledRows,
    stream: Stream,
    config: SequentialConfig,
    static: FactorisedConfig,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    from kuaifair_env.response.history_network import Regularisation, TrainingRows, train_history

    inputs = response_inputs(data, context, static.inputs, seed)

    def of(role: str) -> tuple[Chunks, TrainingRows]:
        held = rows.where(role)
        users, items = rows.users[held], rows.items[held]
        known = TrainingRows(users, items, rows.clicks[held], _static_logits(base, users, items))
        return history_chunks(stream, rows.positions[held], config.shape.length), known

    fit = of("fit")
    batch_size = batch_size_for(len(fit[0].offsets) - 1, config.batch_size, smallest=16)
    return train_history(
        fit,
        of("stop"),
        inputs.users.values,
        inputs.items.values,
        config.shape,
        Regularisation(config.dropout, config.weight_decay),
        config.learning_rate,
        batch_size=batch_size,
        max_epochs=config.max_epochs,
        patience=config.patience,
        seed=seed,
    )


def _static_logits(model: FactorisedResponse, users: NDArray[Any], items: NDArray[Any]) -> FloatArray:
    return model.logits(users, items[:, None])[:, 0]


def _history_logits(
    model: SequentialResponse, rows: LabelledRows, held: NDArray[np.int64], stream: Stream
) -> FloatArray:
    """Evaluates the model as a simulator does: each row with the window that stood before it."""
    added = np.empty(len(held), np.float32)
    for start in range(0, len(held), _ROWS_AT_ONCE):
        part = held[start : start + _ROWS_AT_ONCE]
        window = windows(stream, rows.positions[part], model.shape.length)
        added[start : start + len(part)] = model.history_logits(
            rows.users[part], rows.items[part][:, None], window
        )[:, 0]
    return added


def _logit_parts(
    model: SequentialResponse, rows: LabelledRows, held: NDArray[np.int64], stream: Stream
) -> FloatArray:
    users, items = rows.users[held], rows.items[held]
    static = _static_logits(model.static, users, items)
    return np.column_stack(
        [static - np.float32(model.static.offset), _history_logits(model, rows, held, stream)]
    )


def _calibrated(
    model: SequentialResponse,
    exported: dict[str, Any],
    rows: LabelledRows,
    stream: Stream,
    config: SequentialConfig,
) -> tuple[SequentialResponse, dict[str, Any]]:
    held = rows.where("calibrate")
    slopes = logit_slopes(rows.clicks[held], _logit_parts(model, rows, held, stream), config.slope_prior)
    of_static, of_history = np.maximum(slopes.values, 0.0)
    base = model.static
    scaled = FactorisedResponse(
        slopes.offset,
        base.user_bias * of_static,
        base.item_bias * of_static,
        base.user_factors * of_static,
        base.item_factors,
        base.describe(),
    )
    weights = dict(exported["weights"])
    for name in ("head_out", "head_out_bias"):
        weights[name] = (weights[name] * of_history).astype(np.float32)
    calibrated = SequentialResponse(
        scaled, config.shape, exported["item_codes"], exported["user_codes"], weights
    )
    return calibrated, {
        "offset": slopes.offset - base.offset,
        "static": float(slopes.values[0]),
        "history": float(slopes.values[1]),
    }


def _parts_of(model: SequentialResponse, exported: dict[str, Any]) -> dict[str, Any]:
    return exported | {"weights": model.weights}


def _held_out_report(
    model: SequentialResponse, rows: LabelledRows, stream: Stream, reference: FactorisedResponse | None
) -> dict[str, Any]:
    held = rows.where("report")
    users, items, clicks = rows.users[held], rows.items[held], rows.clicks[held]
    parts = _logit_parts(model, rows, held, stream)
    static = sigmoid(parts[:, 0] + np.float32(model.static.offset))
    full = sigmoid(parts.sum(axis=1) + np.float32(model.static.offset))
    slopes = logit_slopes(clicks, parts)
    gain = within_user_auc(users, clicks, full).gain_over(within_user_auc(users, clicks, static))
    controls = {"static_part": assess(users, clicks, static)}
    if reference is not None:
        controls["factorised"] = assess(users, clicks, sigmoid(_static_logits(reference, users, items)))
    return {
        "held_out": assess(users, clicks, full),
        "controls": controls,
        "history": {
            "gain_over_static_part": {"within_user_auc": gain[0], "interval": list(gain[1])},
            "spread_of_logit": float(parts[:, 1].std()),
        },
        "slopes": {
            part: {"slope": float(slope), "error": float(error)}
            for part, slope, error in zip(("static", "history"), slopes.values, slopes.errors, strict=True)
        },
    }
