"""Pretraining of encoders: which item is clicked next, among sampled others."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsrm.encoder import Encoder, EncoderConfig, EncoderNet
from dsrm.pretraining import split_users
from dsrm.windows import windows_before
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.embeddings import svd_item_embeddings
from kuaifair_env.errors import DataError
from kuaifair_env.worlds import World

_VALIDATION_BATCHES = 8


def pretrain_encoder(world: World, config: EncoderConfig | None = None, progress: bool = False) -> Encoder:
    """Trains an encoder to rank the user's next click first.

    Training users only; a tenth of them is kept aside for early stopping.

    Args:
        world: The training world.
        config: What to train.
        progress: Whether to show a progress bar.

    Raises:
        DataError: If no user clicks twice.
        ValueError: If the world is not a training world.
    """
    from tqdm import tqdm

    chosen = EncoderConfig() if config is None else config
    if world.split != "train":
        raise ValueError("encoders are pretrained in the training world; the test world stays unseen")
    data = world.data
    start = svd_item_embeddings(data.train, len(data.users), len(data.items), chosen.dimension)
    features = np.concatenate([data.items.features.values, data.items.tags.astype(np.float32)], axis=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        net = EncoderNet(chosen, start, features, world.history_length)
    users, held = split_users(world, world.users)
    fit, check = _NextClicks(world, users, chosen), _NextClicks(world, held, chosen)
    rng = np.random.default_rng(chosen.seed)
    optimiser = torch.optim.Adam(net.parameters(), chosen.learning_rate)
    best, curve, best_check = copy.deepcopy(net.state_dict()), [], 0
    curve.append(_validation(net, check, chosen))
    bar = tqdm(range(1, chosen.steps + 1), desc=f"encoder {chosen.kind}", disable=not progress)
    for step in bar:
        loss = _loss(net, fit.batch(rng), chosen)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if step % chosen.check_every == 0:
            curve.append(_validation(net, check, chosen))
            bar.set_postfix(validation=f"{curve[-1]:.4f}")
            if curve[-1] <= min(curve):
                best, best_check = copy.deepcopy(net.state_dict()), len(curve) - 1
            elif len(curve) - 1 - best_check >= chosen.patience:
                break
    net.load_state_dict(best)
    report = {
        "data": data.provenance.as_dict(),
        "data_hash": data.data_hash,
        "test_log": "unread",
        "training_users": len(users),
        "validation_users": len(held),
        "curve": [round(value, 5) for value in curve],
        "best_check": best_check,
    }
    return Encoder(chosen, net, data.items.ids.copy(), report)


class _NextClicks:
    """Draws windows, the click that follows each, and negatives in proportion to their training clicks."""

    def __init__(self, world: World, users: NDArray[np.int64], config: EncoderConfig) -> None:
        log = world.data.train
        self._log: InteractionLog = log
        self._places = world.history_length
        self._config = config
        starts = log.offsets(len(world.data.users))[:-1]
        rows = np.flatnonzero(log.clicks & np.isin(log.users, users))
        before = np.concatenate([[0], np.cumsum(log.clicks)])
        self._rows = rows[before[rows] > before[starts[log.users[rows]]]]
        if len(self._rows) == 0:
            raise DataError("no user of the training log clicks twice; there is no next click to learn")
        self._lengths = np.minimum(self._rows - starts[log.users[self._rows]], self._places)
        clicks = log.click_counts(len(world.data.items))
        self._share = clicks / clicks.sum()
        self._cumulated = np.cumsum(self._share)

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Returns items, clicks, shown, the next clicks, negatives, and the log-shares of both."""
        picked = rng.integers(len(self._rows), size=self._config.batch_size)
        rows = self._rows[picked]
        window = windows_before(self._log, rows, self._lengths[picked], self._places)
        clicked = self._log.items[rows].astype(np.int64)
        drawn = np.searchsorted(self._cumulated, rng.random(self._config.negatives))
        drawn = np.minimum(drawn, len(self._share) - 1)
        log_share = np.log(np.maximum(self._share, 1e-12)).astype(np.float32)
        columns = (
            np.maximum(window.items, 0).astype(np.int64),
            window.clicks.astype(np.float32),
            window.items >= 0,
            clicked,
            drawn,
            log_share[clicked],
            log_share[drawn],
        )
        return tuple(torch.from_numpy(np.ascontiguousarray(column)) for column in columns)


def _loss(net: EncoderNet, batch: tuple[Tensor, ...], config: EncoderConfig) -> Tensor:
    """Sampled softmax over cosines; with ``log_q`` as in Yi et al., "Sampling-bias-corrected neural modeling", 2019."""
    items, clicks, shown, clicked, drawn, clicked_share, drawn_share = batch
    table = net.items()
    states = nn.functional.normalize(net.states(table, items, clicks, shown), dim=1)
    units = nn.functional.normalize(table, dim=1)
    positive = (states * units[clicked]).sum(1) / config.temperature
    negative = states @ units[drawn].T / config.temperature
    if config.log_q:
        positive = positive - clicked_share
        negative = negative - drawn_share
    negative = negative.masked_fill(drawn[None, :] == clicked[:, None], -torch.inf)
    scores = torch.cat([positive[:, None], negative], dim=1)
    return -torch.log_softmax(scores, dim=1)[:, 0].mean()


def _validation(net: EncoderNet, check: _NextClicks, config: EncoderConfig) -> float:
    rng = np.random.default_rng([config.seed, 17])
    with torch.inference_mode():
        losses = [float(_loss(net, check.batch(rng), config)) for _ in range(_VALIDATION_BATCHES)]
    return float(np.mean(losses))
