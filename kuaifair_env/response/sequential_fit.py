"""Fits history-dependent response models, and evaluates them on held-out rows beside their static part."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import PADDING, sigmoid
from kuaifair_env.response.calibration import assess, logit_slopes, within_user_auc
from kuaifair_env.response.factorised import FactorisedConfig, FactorisedResponse
from kuaifair_env.response.factorised_fit import fit_factorised
from kuaifair_env.response.inputs import ResponseInputs, response_inputs
from kuaifair_env.response.rows import (
    LabelledRows,
    Stream,
    history_chunks,
    history_stream,
    labelled_rows,
)
from kuaifair_env.response.sequential import SequentialConfig, SequentialResponse
from kuaifair_env.response.training import batch_size_for, fit_epochs
from kuaifair_env.response.transformer import HistoryTransformer, TransformerShape

_CHUNKS_AT_ONCE = 32


class HistoryNetwork(nn.Module):
    """The trainable form of what :class:`~kuaifair_env.response.sequential.SequentialResponse` evaluates in numpy."""

    def __init__(
        self,
        shape: TransformerShape,
        user_inputs: Tensor,
        item_inputs: Tensor,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        # Not buffers: a deep copy for the moving average shares them.
        self._inputs = (user_inputs, item_inputs)
        d = shape.dimension

        def normal(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator) * max(size[0], 1) ** -0.5)

        self.weights = nn.ParameterDict()
        for name, size in shape.weight_shapes().items():
            if name.endswith("scale"):
                value = nn.Parameter(torch.ones(size))
            elif len(size) == 2 and "distance" not in name:
                value = normal(*size)
            else:
                value = nn.Parameter(torch.zeros(size))
            self.weights[name.replace(".", "_")] = value
        with torch.no_grad():
            # The model starts as its static part: the history adds nothing until it has learned to.
            self.weights["head_out"].mul_(0.1)
            self.weights["head_out"][:, d] = 0.0
        self.item_ids = nn.Parameter(0.1 * torch.randn(len(item_inputs), d, generator=generator))
        self.item_map = normal(item_inputs.shape[1], d)
        self.user_map = normal(user_inputs.shape[1], d)

    def __deepcopy__(self, memo: dict[int, Any]) -> HistoryNetwork:
        twin = HistoryNetwork(self.shape, *self._inputs, self.dropout, torch.Generator())
        twin.load_state_dict(self.state_dict())
        return twin

    def item_codes(self) -> Tensor:
        """Returns ``(N, d)``, ``e_i`` from id and inputs."""
        return self.item_ids + self._inputs[1] @ self.item_map

    def user_codes(self, users: Tensor) -> Tensor:
        """Returns ``(R, d)`` from the users' inputs."""
        return self._inputs[0][users] @ self.user_map

    def forward(
        self, items: Tensor, clicks: Tensor, chunk: Tensor, place: Tensor, user: Tensor, item: Tensor
    ) -> Tensor:
        """Returns what the history adds to the static logit of each row, ``(T,)``.

        Args:
            items: ``(C, n)``, items of the chunks.
            clicks: ``(C, n)``.
            chunk: ``(T,)``, the chunk of each row.
            place: ``(T,)``, how many places of it the row sees.
            user: ``(T,)``.
            item: ``(T,)``, the item to be evaluated.
        """
        codes = self.item_codes()
        transformer = HistoryTransformer(self.shape, self.named_weights(), torch, self._dropped)
        states = transformer.states(codes[items.clamp(min=0)], clicks.long(), items != PADDING)
        directions, levels = transformer.head(states[chunk, place], self.user_codes(user))
        added: Tensor = (directions * codes[item]).sum(1) + levels
        return added

    def named_weights(self) -> dict[str, Tensor]:
        """Returns the weights by the names of :meth:`TransformerShape.weight_shapes`."""
        return {name: self.weights[name.replace(".", "_")] for name in self.shape.weight_shapes()}

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)

    def exported(self) -> dict[str, Any]:
        """Returns numpy copies of ``item_codes``, ``user_codes`` and ``weights``."""
        with torch.no_grad():
            return {
                "item_codes": self.item_codes().numpy().copy(),
                "user_codes": (self._inputs[0] @ self.user_map).numpy().copy(),
                "weights": {name: weight.numpy().copy() for name, weight in self.named_weights().items()},
            }


class ChunkBatches:
    """The ``chosen`` rows, batched by the pieces of history that they are predicted from.

    A piece holds ``2 H`` places, so that most rows see as many as their newest place attends to, and older ones do too.
    """

    def __init__(
        self,
        stream: Stream,
        rows: LabelledRows,
        chosen: NDArray[np.int64],
        static: FactorisedResponse,
        length: int,
    ) -> None:
        chunks = history_chunks(stream, rows.positions[chosen], 2 * length, length // 2)
        order = chosen[chunks.rows]
        users, items = rows.users[order], rows.items[order]
        self._history_items = torch.tensor(chunks.history.items).long()
        self._history_clicks = torch.tensor(chunks.history.clicks)
        self._offsets = chunks.offsets
        self._lengths = torch.from_numpy(np.maximum.reduceat(chunks.places, chunks.offsets[:-1]))
        self._places = torch.tensor(chunks.places)
        self._users, self._items = torch.tensor(users), torch.tensor(items)
        self._clicks = torch.tensor(rows.clicks[order]).float()
        self._static = torch.tensor(_static_logits(static, users, items))

    def __len__(self) -> int:
        return len(self._history_items)

    def loss(self, network: HistoryNetwork, batch: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the log loss of the rows of a batch of chunks."""
        # In groups of about the same length, so that little padding is computed.
        groups = torch.split(batch[torch.argsort(self._lengths[batch])], _CHUNKS_AT_ONCE)
        logits, clicks = zip(*(self._predicted(network, group) for group in groups), strict=True)
        return functional.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(clicks), reduction=reduction)

    def _predicted(self, network: HistoryNetwork, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and clicks of the rows of some chunks."""
        chunks = batch.numpy()
        counts = self._offsets[chunks + 1] - self._offsets[chunks]
        chunk_of_row = np.repeat(np.arange(len(chunks)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = torch.from_numpy(np.repeat(self._offsets[chunks], counts) + within)
        longest = int(self._lengths[batch].max())
        added = network(
            self._history_items[batch, :longest],
            self._history_clicks[batch, :longest],
            torch.from_numpy(chunk_of_row),
            self._places[rows],
            self._users[rows],
            self._items[rows],
        )
        return self._static[rows] + added, self._clicks[rows]

    def mean_loss(self, network: HistoryNetwork, size: int) -> float:
        """Returns the mean log loss over all rows, ``size`` chunks at a time."""
        batches = torch.split(torch.arange(len(self)), size)
        return sum(float(self.loss(network, batch, "sum")) for batch in batches) / len(self._clicks)


def fit_sequential(
    log: InteractionLog,
    data: InteractionData,
    *,
    context_log: InteractionLog | None = None,
    config: SequentialConfig | None = None,
    static: FactorisedConfig | None = None,
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
        seed: Seed of everything.

    Returns:
        The model; :meth:`SequentialResponse.describe` holds the report.

    Raises:
        DataError: If the log lists positives only, or is too small.
    """
    config, static = config or SequentialConfig(), replace(static or FactorisedConfig(), user_ids=False)
    if log.positives_only or (context_log is not None and context_log.positives_only):
        raise DataError("a history model needs logs that hold non-clicks too; fit a factorised response instead")
    base = fit_factorised(log, data, context_log=context_log, config=static, seed=seed)
    rows = labelled_rows(
        log,
        len(data.items),
        static.split,
        data.negatives,
        seed,
        context_log,
        f"{data.identity(log)['split']} log of {data.provenance.name}",
    )
    stream = history_stream(log, context_log, len(data.users), config.history_from)
    exported, training = _train(
        response_inputs(data, context_log, static.inputs, seed), base, rows, stream, config, seed
    )
    model = SequentialResponse(base, config.shape, **exported)
    model, calibration = _calibrated(model, exported, rows, stream, config)
    report = {
        "fitted_on": base.describe()["fitted_on"],
        "context_rows": 0 if context_log is None else len(context_log),
        "config": asdict(config),
        "seed": seed,
        "training": training,
        "calibration": calibration,
        **_held_out_report(model, rows, stream),
        **data.identity(log),
    }
    return SequentialResponse(model.static, config.shape, **(exported | {"weights": model.weights}), report=report)


def _train(
    inputs: ResponseInputs,
    base: FactorisedResponse,
    rows: LabelledRows,
    stream: Stream,
    config: SequentialConfig,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains a :class:`HistoryNetwork` on top of static logits; returns what it exports, and a report."""
    fit, stop = (ChunkBatches(stream, rows, rows.where(role), base, config.shape.length) for role in ("fit", "stop"))
    batch_size = batch_size_for(len(fit), config.batch_size, smallest=16)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout draws from the global generator
        users, items = torch.tensor(inputs.users.values), torch.tensor(inputs.items.values)
        network = HistoryNetwork(config.shape, users, items, config.dropout, generator)
        matrices = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        best, report = fit_epochs(
            network,
            torch.optim.AdamW(groups, lr=config.learning_rate),
            len(fit),
            fit.loss,
            lambda model: stop.mean_loss(model, batch_size),
            batch_size=batch_size,
            max_epochs=config.max_epochs,
            patience=config.patience,
            generator=generator,
        )
    return best.exported(), report


def _static_logits(model: FactorisedResponse, users: NDArray[Any], items: NDArray[Any]) -> FloatArray:
    return model.logits(users, items[:, None])[:, 0]


def _history_logits(
    model: SequentialResponse, rows: LabelledRows, chosen: NDArray[np.int64], stream: Stream
) -> FloatArray:
    """Evaluates the model as a simulator does: each row after all that its state depends on."""
    added = np.empty(len(chosen), np.float32)
    reach = model.shape.reach
    chunks = history_chunks(stream, rows.positions[chosen], 2 * reach, reach)
    for first in range(0, len(chunks.offsets) - 1, _CHUNKS_AT_ONCE):
        part = np.arange(first, min(first + _CHUNKS_AT_ONCE, len(chunks.offsets) - 1))
        here = slice(chunks.offsets[part[0]], chunks.offsets[part[-1] + 1])
        chunk, places = np.repeat(part - first, np.diff(chunks.offsets)[part]), chunks.places[here]
        states = model.states_along(chunks.history.take(part), places.max())[chunk, places]
        row = chosen[chunks.rows[here]]
        added[chunks.rows[here]] = model.logits_after(states, rows.users[row], rows.items[row][:, None])[:, 0]
    return added


def _logit_parts(
    model: SequentialResponse, rows: LabelledRows, chosen: NDArray[np.int64], stream: Stream
) -> FloatArray:
    users, items = rows.users[chosen], rows.items[chosen]
    static = _static_logits(model.static, users, items)
    return np.column_stack([static - np.float32(model.static.offset), _history_logits(model, rows, chosen, stream)])


def _calibrated(
    model: SequentialResponse,
    exported: dict[str, Any],
    rows: LabelledRows,
    stream: Stream,
    config: SequentialConfig,
) -> tuple[SequentialResponse, dict[str, Any]]:
    chosen = rows.where("calibrate")
    slopes = logit_slopes(rows.clicks[chosen], _logit_parts(model, rows, chosen, stream), config.slope_prior)
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
    calibrated = SequentialResponse(scaled, config.shape, exported["item_codes"], exported["user_codes"], weights)
    return calibrated, {
        "offset": slopes.offset - base.offset,
        "static": float(slopes.values[0]),
        "history": float(slopes.values[1]),
    }


def _held_out_report(model: SequentialResponse, rows: LabelledRows, stream: Stream) -> dict[str, Any]:
    chosen = rows.where("report")
    users, clicks = rows.users[chosen], rows.clicks[chosen]
    parts = _logit_parts(model, rows, chosen, stream)
    static = sigmoid(parts[:, 0] + np.float32(model.static.offset))
    full = sigmoid(parts.sum(axis=1) + np.float32(model.static.offset))
    slopes = logit_slopes(clicks, parts)
    gain = within_user_auc(users, clicks, full).gain_over(within_user_auc(users, clicks, static))
    return {
        "held_out": assess(users, clicks, full),
        "controls": {"static_part": assess(users, clicks, static)},
        "history": {
            "gain_over_static_part": {"within_user_auc": gain[0], "interval": list(gain[1])},
            "spread_of_logit": float(parts[:, 1].std()),
        },
        "slopes": slopes.describe(("static", "history")),
    }
