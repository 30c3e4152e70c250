"""Fits DORL's world model to the training log of a world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrl_policies.baselines.world_model import FEWEST_ROWS, WorldModel, WorldModelSettings, columns_of
from kuaifair_env.data.schema import BoolArray, FloatArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.networks import Training, minimise
from kuaifair_env.worlds import World


def fit_world_model(
    model: WorldModel, world: World, settings: WorldModelSettings, seed: int
) -> dict[str, Any]:
    """Fits an ensemble to the training log of a world, in place.

    Rows of users without sessions in the world are left out. The loss of a pair is ``(r - y)^2 exp(-s) + s`` with mean
    ``r`` and log variance ``s``; members see the rows in different orders.

    Args:
        model: The ensemble.
        world: Whose training log, features and tags are read; its response never is.
        settings: See :class:`WorldModelSettings`.
        seed: Of held-out rows, drawn negatives and order.

    Returns:
        A report, JSON-able: rows, epochs, held-out loss, and AUC, mean prediction and click rate of held-out exposures.

    Raises:
        DataError: If the log is too small, or has one kind of feedback only and nothing is drawn.
    """
    rng = np.random.default_rng((seed, 0xD0E1))
    pairs = _pairs(world, settings, rng)
    stop = rng.random(len(pairs.users)) < settings.held_out
    fit, held = np.flatnonzero(~stop), np.flatnonzero(stop)
    exposed = held[pairs.logged[held]]
    if not len(fit) or not len(exposed):
        raise DataError(f"{len(pairs.users)} rows are too few to hold out a share of {settings.held_out:g}")
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(fit), generator=generator) for _ in range(model.members)])
    places = torch.from_numpy(fit)
    judge = _Loss(model, world, pairs, settings)
    best, training = minimise(
        model,
        torch.optim.Adam(model.parameters(), lr=settings.learning_rate),
        len(fit),
        lambda network, batch: judge.penalised(network, places[orders[:, batch]]),
        lambda network: judge.held_out(network, held),
        Training(settings.batch_size, settings.max_epochs, settings.patience),
        generator,
    )
    model.load_state_dict(best.state_dict())
    model.fitted.fill_(True)
    means = judge.means(model, exposed)
    return {
        "epochs": training["epochs"],
        "held_out_loss": training["held_out_loss"],
        "rows": len(fit),
        "drawn_negatives": int((~pairs.logged).sum()),
        "held_out_exposures": len(exposed),
        "held_out_auc": _auc(pairs.clicks[exposed], means),
        "held_out_mean": float(means.mean()),
        "held_out_click_rate": float(pairs.clicks[exposed].mean()),
    }


@dataclass(frozen=True)
class _Pairs:
    """Pairs to learn from; ``logged`` says which are rows of the log, not drawn."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: BoolArray
    logged: BoolArray


def _pairs(world: World, settings: WorldModelSettings, rng: np.random.Generator) -> _Pairs:
    log = world.data.train
    playing = np.zeros(len(world.data.users), np.bool_)
    playing[world.users] = True
    rows = np.flatnonzero(playing[log.users])
    if len(rows) > settings.max_rows:
        rows = np.sort(rng.choice(rows, settings.max_rows, replace=False))
    if len(rows) < FEWEST_ROWS:
        raise DataError(
            f"a world model needs at least {FEWEST_ROWS} training-log rows of users with sessions, got {len(rows)}"
        )
    clicks = log.clicks[rows]
    drawn_users, drawn_items = _negatives(
        log, rows[clicks], len(world.data.items), settings.drawn_for(log), rng
    )
    if not clicks.any() or (clicks.all() and not len(drawn_users)):
        raise DataError(
            "the training log's rows are all of one kind of feedback; a log of positives only needs negatives above 0"
        )
    drawn = np.zeros(len(drawn_users), np.bool_)
    return _Pairs(
        np.concatenate([log.users[rows].astype(np.int64), drawn_users]),
        np.concatenate([log.items[rows].astype(np.int64), drawn_items]),
        np.concatenate([clicks, drawn]),
        np.concatenate([np.ones(len(rows), np.bool_), drawn]),
    )


def _negatives(
    log: InteractionLog, positives: NDArray[np.int64], items: int, each: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws items uniformly for the users of some clicks and keeps the pairs that the log does not hold."""
    count = round(each * len(positives))
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    users = log.users[rng.choice(positives, count)].astype(np.int64)
    drawn = rng.integers(items, size=count)
    seen = np.unique(log.users.astype(np.int64) * items + log.items)
    free = ~np.isin(users * items + drawn, seen)
    return users[free], drawn[free]


class _Loss:
    """Losses of an ensemble on some pairs."""

    def __init__(self, model: WorldModel, world: World, pairs: _Pairs, settings: WorldModelSettings) -> None:
        self._users, self._items = torch.from_numpy(pairs.users), torch.from_numpy(pairs.items)
        self._clicks = torch.from_numpy(pairs.clicks.astype(np.float32))
        self._columns = [torch.from_numpy(part) for part in columns_of(world)]
        self._members = model.members
        self._block = 8 * settings.batch_size
        self._precision = settings.l2
        self._shares = [
            1.0 / torch.bincount(rows, minlength=len(columns)).clamp(min=1).to(torch.float32)
            for rows, columns in zip((self._users, self._items), self._columns, strict=True)
        ]

    def penalised(self, model: Any, places: Tensor) -> Tensor:
        """Returns the members' summed mean loss on pairs ``int64 (E, R)`` with the prior's share of it."""
        mean, log_variance = self._predicted(model, places)
        loss = _gaussian(mean, log_variance, self._clicks[places])
        if self._precision:
            parts = ((model.users, self._users), (model.items, self._items))
            for share, (network, rows) in zip(self._shares, parts, strict=True):
                chosen = rows[places]
                own, line = network.embedded(chosen)
                loss = loss + self._precision * share[chosen] * (own.square().sum(-1) + line.square())
        return loss.mean(1).sum()

    def held_out(self, model: Any, rows: NDArray[np.int64]) -> float:
        """Returns the mean loss on some pairs, over members too."""
        total = 0.0
        for block in torch.split(torch.from_numpy(rows), self._block):
            places = block.expand(self._members, -1)
            total += float(_gaussian(*self._predicted(model, places), self._clicks[places]).mean(0).sum())
        return total / len(rows)

    def means(self, model: WorldModel, rows: NDArray[np.int64]) -> FloatArray:
        """Returns the ensemble's mean on some pairs, ``float32 (R,)``."""
        with torch.no_grad():
            parts = [
                self._predicted(model, block.expand(self._members, -1))[0].mean(0)
                for block in torch.split(torch.from_numpy(rows), self._block)
            ]
        return np.asarray(torch.cat(parts).numpy()) if parts else np.zeros(0, np.float32)

    def _predicted(self, model: Any, places: Tensor) -> tuple[Tensor, Tensor]:
        users, items = self._users[places], self._items[places]
        found: tuple[Tensor, Tensor] = model.combined(
            model.users(users, self._columns[0][users]), model.items(items, self._columns[1][items])
        )
        return found


def _gaussian(mean: Tensor, log_variance: Tensor, clicks: Tensor) -> Tensor:
    return (mean - clicks).square() * torch.exp(-log_variance) + log_variance


def _auc(clicks: BoolArray, scores: FloatArray) -> float | None:
    if clicks.all() or not clicks.any():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(clicks, scores))
