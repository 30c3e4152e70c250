"""Purifiers that denoise click vectors: training on the users of a log, and states from reconstructed vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from dsrm.click_denoisers import ItemModelPurifier
from dsrm.click_vectors import CDAE, AnyClickVectorConfig, CDAEConfig, ClickVectorNetwork, DiffRec, DiffRecConfig
from dsrm.purifier import WorldKey
from dsrm.training import show_round
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.errors import DataError
from kuaifair_env.files import parse_as
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.response.training import Trainer
from kuaifair_env.splits import early_stopping_split
from kuaifair_env.world import World

_VALIDATION_STREAM = 19
_VALIDATION_USERS = 2_000
_CHECK_EVERY = 50
_PATIENCE = 6
_RECALL_AT = 20


class ClickVectorPurifier(ItemModelPurifier):
    """The mean embedding of the items of which the denoised click vector holds more than that of an empty one does.

    The observed state is the window's click vector, divided by its sum, times the item embeddings. The purified state
    is the same of the denoised vector, so that it lies in the same space and has about the same size. A denoised vector
    says something of every item, and most of the popular ones, whoever the user is; so what the model makes of an empty
    vector is taken away first, and ``top`` items are kept: :func:`top_weights`, which have no jump where two items
    change places. A window without clicks gives the zero state.

    Args:
        config: Of the model.
        key: The world that it was trained on.
        item_ids: ``int64 (M,)``, the items' keys in the order of the model's rows.
        model: The trained model.
        report: Provenance, JSON-able.
    """

    config: AnyClickVectorConfig
    _model: ClickVectorNetwork

    def __init__(
        self,
        config: AnyClickVectorConfig,
        key: WorldKey,
        item_ids: NDArray[np.int64],
        model: ClickVectorNetwork,
        report: Mapping[str, Any],
    ) -> None:
        super().__init__(config, key, item_ids, model, report)
        self.kind = config.kind
        with torch.inference_mode():
            self._of_nobody = self._model.reconstruct(torch.zeros(1, len(item_ids)))

    @classmethod
    def fit(cls, world: World, config: AnyClickVectorConfig, progress: bool = False) -> ClickVectorPurifier:
        """Trains the model of a training world and returns the purifier."""
        model, training = train_click_vectors(world, config, progress)
        report = {"mode": config.kind, "data": world.data.provenance.as_dict(), "test_log": "unread", **training}
        return cls(config, WorldKey.of_world(world), world.data.items.keys, model, report)

    @torch.inference_mode()
    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        vectors = click_vectors(window, len(self._item_ids))
        weights = top_weights(self._model.reconstruct(vectors) - self._of_nobody, self.config.top)
        weights *= vectors.any(dim=1, keepdim=True)
        purified: FloatArray = (weights @ torch.from_numpy(self.builder.embeddings)).numpy()
        return purified

    @classmethod
    def untrained(cls, items: int, settings: Mapping[str, Any]) -> tuple[AnyClickVectorConfig, ClickVectorNetwork]:
        """See :class:`~dsrm.click_denoisers.ItemModelPurifier`."""
        if settings["kind"] == "cdae":
            cdae = parse_as(CDAEConfig, settings)
            return cdae, CDAE(items, cdae)
        diffrec = parse_as(DiffRecConfig, settings)
        return diffrec, DiffRec(items, diffrec)


def click_vectors(window: HistoryWindow, items: int) -> Tensor:
    """Returns the click vectors of windows, ``(B, M)``: 1 where an item was clicked, else 0."""
    vectors = np.zeros((len(window.items), items), np.float32)
    rows, places = window.clicks.nonzero()
    vectors[rows, window.items[rows, places]] = 1.0
    return torch.from_numpy(vectors)


def top_weights(scores: Tensor, top: int) -> Tensor:
    """Returns weights ``(B, M)`` that sum to 1: of the ``top`` largest scores, what exceeds the next largest.

    They are zero where all scores are the same.
    """
    count = min(top, scores.shape[1] - 1)
    excess = (scores - scores.topk(count + 1, dim=1).values[:, -1:]).clamp_min(0.0)
    weights: Tensor = excess / excess.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return weights


def train_click_vectors(
    world: World, config: AnyClickVectorConfig, progress: bool = False
) -> tuple[ClickVectorNetwork, dict[str, Any]]:
    """Trains a model on the click vectors of a world's users in the training log.

    A tenth of the users is kept aside: half of their clicks is hidden, and training stops when the recall of these
    among 20 items, which is what DiffRec's paper stops by, has stopped rising.

    Returns:
        The model, and counts and losses of the training, JSON-able.

    Raises:
        DataError: If fewer than two users clicked two items.
        ValueError: If the world is not a training world.
    """
    from tqdm import tqdm

    if world.split != "train":
        raise ValueError("click models are trained in the training world; the test world stays unseen")
    clicks = _clicks_of_users(world)
    users = np.intersect1d(world.users, np.flatnonzero(np.diff(clicks.indptr) >= 2))
    if len(users) < 2:
        raise DataError("fewer than two users of the training log clicked two items; there is nothing to learn from")
    users, validation_users = early_stopping_split(world.data, users)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        items = clicks.shape[1]
        network = CDAE(items, config) if isinstance(config, CDAEConfig) else DiffRec(items, config)
    trainer = Trainer(network, network.optimizer())
    generator = torch.Generator().manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    halves = _Halves.of_users(
        clicks[validation_users[:_VALIDATION_USERS]], np.random.default_rng([config.seed, _VALIDATION_STREAM])
    )

    def batches(round_number: int) -> Iterator[Tensor]:
        steps = min(_CHECK_EVERY, config.steps - round_number * _CHECK_EVERY)
        return (_dense(clicks[rng.choice(users, config.batch_size)]) for _ in range(steps))

    rounds = -(-config.steps // _CHECK_EVERY)
    with tqdm(total=rounds, desc=f"train {config.kind}", disable=not progress) as bar:
        best = trainer.fit(
            batches,
            lambda network, vectors: network.loss(vectors, generator),
            lambda network: 1.0 - halves.recall(network),
            rounds=rounds,
            patience=_PATIENCE,
            callback=lambda trainer: show_round(bar, trainer),
        )
    counts = {"training_users": len(users), "validation_users": len(validation_users)}
    return best, counts | trainer.report()


@dataclass(frozen=True)
class _Halves:
    """Click vectors of users, divided into what a model is shown and what it is to find; ``(B, M)`` both."""

    shown: sparse.csr_matrix
    hidden: sparse.csr_matrix

    @classmethod
    def of_users(cls, clicks: sparse.csr_matrix, rng: np.random.Generator) -> _Halves:
        rows = np.repeat(np.arange(clicks.shape[0]), np.diff(clicks.indptr))
        order = np.lexsort((rng.random(clicks.nnz), rows))
        place = np.arange(clicks.nnz) - clicks.indptr[rows]
        hide = place < (np.diff(clicks.indptr) // 2)[rows]
        items = clicks.indices[order]

        def vectors(chosen: NDArray[np.bool_]) -> sparse.csr_matrix:
            ones = np.ones(int(chosen.sum()), np.float32)
            return sparse.csr_matrix((ones, (rows[chosen], items[chosen])), shape=clicks.shape)

        return cls(vectors(~hide), vectors(hide))

    def recall(self, network: ClickVectorNetwork) -> float:
        """Returns the mean share of the hidden clicks (at most 20) among the 20 best items that were not shown."""
        recalls = []
        for part in np.array_split(np.arange(self.shown.shape[0]), 8):
            shown, hidden = _dense(self.shown[part]), _dense(self.hidden[part])
            scores = network.reconstruct(shown).masked_fill(shown > 0, -torch.inf)
            best = scores.topk(min(_RECALL_AT, scores.shape[1]), dim=1).indices
            recalls.append(hidden.gather(1, best).sum(dim=1) / hidden.sum(dim=1).clamp_max(_RECALL_AT))
        return float(torch.cat(recalls).mean())


def _clicks_of_users(world: World) -> sparse.csr_matrix:
    """Returns what each user clicked in the training log, ``float32 (users, M)`` of zeros and ones."""
    log = world.data.train
    users, items = log.users[log.clicks], log.items[log.clicks]
    shape = (len(world.data.users), len(world.data.items))
    clicks = sparse.csr_matrix((np.ones(len(users), np.float32), (users, items)), shape=shape)
    clicks.data[:] = 1.0
    return clicks


def _dense(vectors: sparse.csr_matrix) -> Tensor:
    return torch.from_numpy(vectors.toarray())
