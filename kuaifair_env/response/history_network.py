"""The torch side of the history model; imported inside functions only, so that simulating never needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kuaifair_env.response.base import PADDING
from kuaifair_env.response.sequences import Chunks
from kuaifair_env.response.sequential import HistoryTransformer, TransformerShape
from kuaifair_env.response.training import fit_epochs


@dataclass(frozen=True)
class Regularisation:
    """What keeps the history model small.

    Attributes:
        dropout: Share of token and hidden units dropped while training; never while simulating.
        weight_decay: Of AdamW, for all matrices.
    """

    dropout: float
    weight_decay: float


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
            items: ``(C, H)``, items of the chunks.
            clicks: ``(C, H)``.
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


@dataclass(frozen=True)
class TrainingRows:
    """Rows with what the network needs to know of them; chunks index into these."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: NDArray[np.bool_]
    static_logits: NDArray[np.float32]


class ChunkBatches:
    """Hands out the tensors of a batch of chunks."""

    def __init__(self, chunks: Chunks, rows: TrainingRows) -> None:
        self._items = torch.tensor(chunks.history.items).long()
        self._clicks = torch.tensor(chunks.history.clicks)
        self._offsets = chunks.offsets
        self._places = torch.tensor(chunks.places)
        order = chunks.rows
        self._users = torch.tensor(rows.users[order])
        self._targets = torch.tensor(rows.items[order])
        self._labels = torch.tensor(rows.clicks[order]).float()
        self._static = torch.tensor(rows.static_logits[order])

    def __len__(self) -> int:
        return len(self._items)

    def loss(self, network: nn.Module, batch: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the log loss of the rows of a batch of chunks."""
        chosen = batch.numpy()
        counts = self._offsets[chosen + 1] - self._offsets[chosen]
        chunk = np.repeat(np.arange(len(chosen)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = torch.from_numpy(np.repeat(self._offsets[chosen], counts) + within)
        added = network(
            self._items[batch],
            self._clicks[batch],
            torch.from_numpy(chunk),
            self._places[rows],
            self._users[rows],
            self._targets[rows],
        )
        logits = self._static[rows] + added
        return functional.binary_cross_entropy_with_logits(logits, self._labels[rows], reduction=reduction)

    def mean_loss(self, network: nn.Module, size: int) -> float:
        """Returns the mean log loss over all rows."""
        batches = torch.split(torch.arange(len(self)), size)
        return sum(float(self.loss(network, batch, "sum")) for batch in batches) / len(self._labels)


def train_history(
    fit: tuple[Chunks, TrainingRows],
    stop: tuple[Chunks, TrainingRows],
    user_inputs: NDArray[np.float32],
    item_inputs: NDArray[np.float32],
    shape: TransformerShape,
    regularisation: Regularisation,
    learning_rate: float,
    *,
    batch_size: int,
    max_epochs: int,
    patience: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains a :class:`HistoryNetwork` on top of static logits.

    Returns:
        What :meth:`HistoryNetwork.exported` returns, and a report.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        # Dropout draws from the global generator.
        torch.manual_seed(seed)
        network = HistoryNetwork(
            shape,
            torch.tensor(user_inputs),
            torch.tensor(item_inputs),
            regularisation.dropout,
            generator,
        )
        fit_batches, stop_batches = ChunkBatches(*fit), ChunkBatches(*stop)
        matrices = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]
        optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": regularisation.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=learning_rate,
        )
        best, report = fit_epochs(
            network,
            optimiser,
            len(fit_batches),
            fit_batches.loss,
            lambda model: stop_batches.mean_loss(model, batch_size),
            batch_size=batch_size,
            max_epochs=max_epochs,
            patience=patience,
            generator=generator,
        )
    return best.exported(), report
