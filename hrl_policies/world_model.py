"""The world model of DORL: an ensemble of Gaussian click models, fitted on the training log alone.

Five DeepFM-like networks (Guo et al., IJCAI 2017) of user id, user features, item id and item features; each gives a
mean and a variance of the click (Gao et al., Alleviating Matthew Effect of Offline Reinforcement Learning in
Interactive Recommendation, SIGIR 2023). All members are one network with a leading axis, so that a batch of pairs is a
few batched products.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog, among
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import BernoulliFeedback, History
from kuaifair_env.response.calibration import auc
from kuaifair_env.response.training import fit_epochs
from kuaifair_env.world import World

MAX_VARIANCE = 1.0
"""Largest variance of a click that a member can predict: four times the largest of a Bernoulli variable."""

MIN_ROWS = 20
"""Smallest number of log rows that a world model is fitted to."""

_MIN_VARIANCE = 1e-3
_LOG_VARIANCE_BOUNDS = (float(np.log(_MIN_VARIANCE)), float(np.log(MAX_VARIANCE)))
_INITIAL_VARIANCE = 0.2
_NEGATIVES_OF_POSITIVES = 3.0


class WorldModelSettings(BaseModel):
    """How the ensemble is built and fitted.

    Attributes:
        members: Networks in the ensemble.
        hidden: Units of both hidden layers.
        factors: Size of an id's or a feature's embedding.
        l2: Precision of a normal prior on the embeddings and linear terms of ids, applied once per epoch to each id.
        learning_rate: Learning rate of Adam.
        batch_size: Pairs of a batch.
        max_epochs: Largest number of epochs.
        patience: Epochs without a better held-out loss before training stops.
        negatives: Pairs drawn for each click among those that the log does not hold, which count as no click: 3 in the
            source for KuaiRec, 5 for KuaiRand. A log of exposures has negatives of its own; with drawn ones
            predictions fall below the click rate. None draws 3 for a log of positives only, and none otherwise.
        held_out: Share of the rows that early stopping and the report use.
        max_rows: Largest number of log rows to use, drawn uniformly.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    members: PositiveInt = 5
    hidden: PositiveInt = 128
    factors: PositiveInt = 8
    l2: NonNegativeFloat = 0.1
    learning_rate: PositiveFloat = 1e-3
    batch_size: PositiveInt = 1024
    max_epochs: PositiveInt = 5
    patience: PositiveInt = 1
    negatives: NonNegativeFloat | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_rows: Annotated[int, Field(ge=MIN_ROWS)] = 200_000

    def drawn_for(self, log: InteractionLog) -> float:
        """Returns how many pairs are drawn for each click of a log."""
        if self.negatives is None:
            return _NEGATIVES_OF_POSITIVES if log.positives_only else 0.0
        return self.negatives


@dataclass(frozen=True)
class WorldModelSizes:
    """Sizes of an ensemble's tables: users and items of the data set, columns of their features (and tags)."""

    users: int
    items: int
    user_columns: int
    item_columns: int

    @classmethod
    def of(cls, world: World) -> WorldModelSizes:
        """Returns the sizes of a world."""
        users, items = columns_of(world)
        return cls(len(users), len(items), users.shape[1], items.shape[1])


def columns_of(world: World) -> tuple[FloatArray, FloatArray]:
    """Returns the columns of users ``(U, F)``, their features, and of items ``(M, G)``, their features and tags."""
    items = world.data.items
    # Copies, because torch takes no read-only arrays.
    users = np.array(world.data.users.features.values, np.float32)
    return users, np.hstack([items.features.values, items.tags]).astype(np.float32)


class Side(NamedTuple):
    """A user's, or an item's, contribution to a pair; the first axis of every tensor is the members ``E``.

    Attributes:
        factors: ``(E, R, f)``, sum of its embeddings.
        line: ``(E, R)``, its linear term in the mean.
        hidden: ``(E, R, h)``, its part of the first hidden layer.
    """

    factors: Tensor
    line: Tensor
    hidden: Tensor

    def rows(self, rows: Tensor) -> Side:
        """Returns some of the rows, in the shape of ``rows``."""
        return Side(self.factors[:, rows], self.line[:, rows], self.hidden[:, rows])

    def spread(self) -> Side:
        """Returns the same with an axis for the items of a slate."""
        return Side(self.factors[:, :, None], self.line[:, :, None], self.hidden[:, :, None])


class SideNetwork(nn.Module):
    """Embeddings and linear terms of users, or of items: of their ids and of their columns, for all members."""

    def __init__(
        self, members: int, rows: int, columns: int, settings: WorldModelSettings, generator: torch.Generator
    ) -> None:
        super().__init__()

        def normal(scale: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(members, *shape, generator=generator))

        factors, hidden = settings.factors, settings.hidden
        self.ids = normal(0.05, rows, factors)
        self.columns = normal(0.05, columns, factors)
        self.id_line = nn.Parameter(torch.zeros(members, rows, 1))
        self.column_line = nn.Parameter(torch.zeros(members, columns, 1))
        self.layer = normal((2 * factors) ** -0.5, 2 * factors, hidden)

    def forward(self, rows: Tensor, columns: Tensor) -> Side:
        """Returns the side of ids ``int64 (E, R)`` with columns ``(E, R, F)``."""
        own, line = self.embedded(rows)
        described = columns @ self.columns
        line = line + (columns @ self.column_line)[..., 0] + (own * described).sum(-1)
        return Side(own + described, line, torch.cat([own, described], dim=-1) @ self.layer)

    def embedded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns embeddings ``(E, R, f)`` and linear terms ``(E, R)`` of ids."""
        members, count, factors = self.ids.shape
        flat = rows + count * torch.arange(members, device=rows.device)[:, None]
        own = functional.embedding(flat, self.ids.reshape(-1, factors))
        return own, functional.embedding(flat, self.id_line.reshape(-1, 1))[..., 0]


class WorldModel(nn.Module):
    """The ensemble; all its state is in tensors, which Stable-Baselines3 saves."""

    fitted: Tensor

    def __init__(self, sizes: WorldModelSizes, settings: WorldModelSettings, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        members, hidden = settings.members, settings.hidden
        self.members = members
        self.users = SideNetwork(members, sizes.users, sizes.user_columns, settings, generator)
        self.items = SideNetwork(members, sizes.items, sizes.item_columns, settings, generator)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(members, *shape, generator=generator) * shape[0] ** -0.5)

        self.first_bias = nn.Parameter(torch.zeros(members, 1, hidden))
        self.second = normal(hidden, hidden)
        self.second_bias = nn.Parameter(torch.zeros(members, 1, hidden))
        self.last = normal(hidden, 2)
        low, high = _LOG_VARIANCE_BOUNDS
        share = (np.log(_INITIAL_VARIANCE) - low) / (high - low)
        self.last_bias = nn.Parameter(
            torch.tensor([0.0, float(np.log(share / (1 - share)))]).expand(members, 1, 2).clone()
        )
        with torch.no_grad():
            self.last.mul_(0.1)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def combined(self, user: Side, item: Side) -> tuple[Tensor, Tensor]:
        """Returns mean and log variance of the click of each pair, in the shape that both sides broadcast to."""
        hidden = user.hidden + item.hidden
        shape = hidden.shape[:-1]
        hidden = torch.relu(hidden.reshape(self.members, -1, hidden.shape[-1]) + self.first_bias)
        hidden = torch.relu(torch.baddbmm(self.second_bias, hidden, self.second))
        deep = torch.baddbmm(self.last_bias, hidden, self.last).reshape(*shape, 2)
        mean = user.line + item.line + (user.factors * item.factors).sum(-1) + deep[..., 0]
        low, high = _LOG_VARIANCE_BOUNDS
        return mean, low + (high - low) * torch.sigmoid(deep[..., 1])

    def tables(self, world: World) -> tuple[Side, Side]:
        """Returns the sides of all users and of all items of a world."""
        sides = []
        with torch.no_grad():
            for network, columns in zip((self.users, self.items), columns_of(world), strict=True):
                rows = torch.arange(len(columns)).expand(self.members, -1)
                sides.append(network(rows, torch.from_numpy(columns).expand(self.members, -1, -1)))
        return sides[0], sides[1]


def fit_world_model(model: WorldModel, world: World, settings: WorldModelSettings, seed: int) -> dict[str, Any]:
    """Fits an ensemble to the training log of a world, in place.

    Rows of users without sessions in the world are left out. The loss of a pair is ``(r - y)^2 exp(-s) + s`` with mean
    ``r`` and log variance ``s``; members see the rows in different orders.

    Args:
        model: The ensemble.
        world: Its training log, features and tags are read; its response is not.
        settings: See :class:`WorldModelSettings`.
        seed: Seed of held-out rows, drawn negatives and order.

    Returns:
        A report, JSON-able: rows, the training, and AUC, mean prediction and click rate of held-out exposures.

    Raises:
        DataError: If the log is too small, or has one kind of feedback only and nothing is drawn.
    """
    rng = np.random.default_rng((seed, 0xD0E1))
    pairs = _pairs(world, settings, rng)
    is_held_out = rng.random(len(pairs.users)) < settings.held_out
    fit, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    exposed = held_out[pairs.logged[held_out]]
    if not len(fit) or not len(exposed):
        raise DataError(f"{len(pairs.users)} rows are too few to hold out a share of {settings.held_out:g}")
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(fit), generator=generator) for _ in range(model.members)])
    places = torch.from_numpy(fit)
    loss = _Loss(model, world, pairs, settings)
    best, training = fit_epochs(
        model,
        torch.optim.Adam(model.parameters(), lr=settings.learning_rate),
        len(fit),
        lambda network, batch: loss.penalised(network, places[orders[:, batch]]),
        lambda network: loss.held_out(network, held_out),
        batch_size=settings.batch_size,
        max_epochs=settings.max_epochs,
        patience=settings.patience,
        generator=generator,
    )
    model.load_state_dict(best.state_dict())
    model.fitted.fill_(True)
    means, clicks = loss.means(model, exposed), pairs.clicks[exposed]
    return {
        "training": training,
        "rows": len(fit),
        "drawn_negatives": int((~pairs.logged).sum()),
        "held_out_exposures": len(exposed),
        "held_out_auc": auc(clicks, means) if clicks.any() and not clicks.all() else None,
        "held_out_mean": float(means.mean()),
        "held_out_click_rate": float(clicks.mean()),
    }


@dataclass(frozen=True)
class _Pairs:
    """Pairs to learn from; ``logged`` marks rows of the log, others are drawn negatives."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: BoolArray
    logged: BoolArray


def _pairs(world: World, settings: WorldModelSettings, rng: np.random.Generator) -> _Pairs:
    """Returns log rows of users with sessions, and drawn negatives."""
    log = world.data.train
    rows = np.flatnonzero(np.isin(log.users, world.users))
    if len(rows) > settings.max_rows:
        rows = np.sort(rng.choice(rows, settings.max_rows, replace=False))
    if len(rows) < MIN_ROWS:
        raise DataError(
            f"a world model needs at least {MIN_ROWS} training-log rows of users with sessions, got {len(rows)}"
        )
    clicks = log.clicks[rows]
    drawn_users, drawn_items = _negatives(log, rows[clicks], len(world.data.items), settings.drawn_for(log), rng)
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
    log: InteractionLog, positives: NDArray[np.int64], items: int, per_positive: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws items uniformly for the users of some clicks and keeps the pairs that the log does not hold."""
    count = round(per_positive * len(positives))
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    users = log.users[rng.choice(positives, count)].astype(np.int64)
    drawn = rng.integers(items, size=count)
    free = ~among(users * items + drawn, np.sort(log.users.astype(np.int64) * items + log.items))
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
        """Returns the sum over members of the mean loss on pairs ``int64 (E, R)``, with the prior's share."""
        mean, log_variance = self._predicted(model, places)
        loss = _gaussian(mean, log_variance, self._clicks[places])
        if self._precision:
            sides = ((model.users, self._users), (model.items, self._items))
            for share, (network, rows) in zip(self._shares, sides, strict=True):
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
            means = [
                self._predicted(model, block.expand(self._members, -1))[0].mean(0)
                for block in torch.split(torch.from_numpy(rows), self._block)
            ]
        return np.asarray(torch.cat(means).numpy())

    def _predicted(self, model: Any, places: Tensor) -> tuple[Tensor, Tensor]:
        users, items = self._users[places], self._items[places]
        prediction: tuple[Tensor, Tensor] = model.combined(
            model.users(users, self._columns[0][users]), model.items(items, self._columns[1][items])
        )
        return prediction


def _gaussian(mean: Tensor, log_variance: Tensor, clicks: Tensor) -> Tensor:
    return (mean - clicks).square() * torch.exp(-log_variance) + log_variance


class Prediction(NamedTuple):
    """A world model's prediction for pairs of users and items.

    Attributes:
        mean: ``float32 (B, K)``, ensemble mean of the click, within 0..1.
        variance: ``float32 (B, K)``, the largest variance over the members.
    """

    mean: FloatArray
    variance: FloatArray


class LearnedResponse(BernoulliFeedback):
    """Clicks with the probability that an ensemble predicts; the world's own response model is not used.

    Attributes:
        latest: The prediction of the last call of :meth:`expected`, from which rewards are computed; None before it.
    """

    uses_history = False

    def __init__(self, model: WorldModel, world: World) -> None:
        self._model = model
        self._users, self._items = model.tables(world)
        self.n_users, self.n_items = self._users.line.shape[1], self._items.line.shape[1]
        self.latest: Prediction | None = None

    def predict(self, users: IntArray, items: IntArray) -> Prediction:
        """Returns the prediction for users ``(B,)`` with items ``(B, K)``."""
        return self._predicted(users, self._items.rows(_rows(items)))

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """Returns the predicted means, ``float32 (B, K)``; ``history`` is not read."""
        self.latest = self.predict(users, items)
        return self.latest.mean

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """Returns the predicted means on items ``0 .. n_items - 1``, ``float32 (B, n_items)``."""
        side = Side(*(part[:, None, :n_items] for part in self._items))
        return np.concatenate([self._predicted(users[row : row + 1], side).mean for row in range(len(users))])

    def rearranged(self, items: IntArray) -> LearnedResponse:
        """Returns the same model for the catalogue ``old_items[items]``."""
        other = copy.copy(self)
        other._items, other.n_items, other.latest = self._items.rows(_rows(items)), len(items), None
        return other

    def save(self, path: str | Path) -> None:
        """Refuses: an ensemble is saved with the agent that fitted it.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a learned response is saved with its agent; call DORL.save")

    def describe(self) -> dict[str, Any]:
        """Returns kind and sizes, JSON-able."""
        return {"kind": "learned", "users": self.n_users, "items": self.n_items, "members": self._model.members}

    def _predicted(self, users: IntArray, items: Side) -> Prediction:
        user = self._users.rows(_rows(users)).spread()
        with torch.inference_mode():
            mean, log_variance = self._model.combined(user, items)
            return Prediction(
                mean.mean(0).clamp(0.0, 1.0).numpy(), log_variance.amax(0).exp().numpy().astype(np.float32)
            )


def _rows(rows: IntArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, np.int64))
