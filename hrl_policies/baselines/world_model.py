"""The world model of DORL: an ensemble of Gaussian click models, fitted on the training log alone.

Five DeepFM-like networks (Guo et al., IJCAI 2017) of user id, user features, item id and item features; each gives a
mean and a variance of the click (Gao et al., Alleviating Matthew Effect of Offline Reinforcement Learning in
Interactive Recommendation, SIGIR 2023). All members are one network with a leading axis, so that a batch of pairs is a
few batched products.

Profiled in a world of 5,000 items (64 sessions, slates of 10): fitting spends two fifths of its time in backward
passes; a training step of DORL spends half of it here, as much on gathering rows of the first layer (linear, so
tabulated once for every user and item) as on the second layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.worlds import World

MAX_VARIANCE = 1.0
"""Largest variance of a click that a member can give: four times the most that a 0 or 1 has."""

FEWEST_ROWS = 20
"""Rows of a log below which nothing is fitted."""

_MIN_VARIANCE = 1e-3
_LOGS = (float(np.log(_MIN_VARIANCE)), float(np.log(MAX_VARIANCE)))
_START_VARIANCE = 0.2
_OF_POSITIVES = 3.0


@dataclass(frozen=True)
class WorldModelSettings:
    """How the ensemble is built and fitted.

    Attributes:
        members: Networks in the ensemble.
        hidden: Units of both hidden layers.
        factors: Size of an id's or a feature's embedding.
        l2: Precision of a normal prior on the embeddings and lines of ids, charged once a pass for each id.
        learning_rate: Of Adam.
        batch_size: Pairs of a batch.
        max_epochs: Passes at most.
        patience: Passes without a better held-out loss before the end.
        negatives: Pairs drawn for each click among those that the log does not hold, and taken for no click: 3 in the
            source for KuaiRec, 5 for KuaiRand. A log of exposures has negatives of its own, and drawn ones say that
            what was not exposed is disliked: predictions fall below the click rate. None draws 3 for a log of positives
            only, which needs them, and none for a log of exposures.
        held_out: Share of the rows that decide when to stop and that the report is about.
        max_rows: At most so many rows of the log are used, drawn uniformly.
    """

    members: int = 5
    hidden: int = 128
    factors: int = 8
    l2: float = 0.1
    learning_rate: float = 1e-3
    batch_size: int = 1024
    max_epochs: int = 5
    patience: int = 1
    negatives: float | None = None
    held_out: float = 0.1
    max_rows: int = 200_000

    def __post_init__(self) -> None:
        counts = (self.members, self.hidden, self.factors, self.batch_size, self.max_epochs, self.patience)
        if min(counts) < 1:
            raise ValueError(f"all numbers of a world model must be at least 1, got {self}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")
        if not (self.negatives is None or self.negatives >= 0):
            raise ValueError(f"negatives must not be negative, got {self.negatives}")
        if not (self.l2 >= 0 and self.learning_rate > 0):
            raise ValueError(f"l2 must not be negative, learning_rate positive, got {self}")
        if self.max_rows < FEWEST_ROWS:
            raise ValueError(f"a world model needs at least {FEWEST_ROWS} rows, got max_rows={self.max_rows}")

    def drawn_for(self, log: InteractionLog) -> float:
        """Returns how many pairs are drawn for each click of a log."""
        if self.negatives is None:
            return _OF_POSITIVES if log.positives_only else 0.0
        return self.negatives


@dataclass(frozen=True)
class WorldModelSizes:
    """What an ensemble must have room for.

    Attributes:
        users: Users of the data set.
        items: Items of the data set.
        user_columns: Columns of the users' features.
        item_columns: Columns of the items' features and tags.
    """

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
    """Returns what is known of users and items beside their ids: ``(U, F)`` features, ``(M, G)`` features and tags."""
    items = world.data.items
    # Copies: torch wants to be able to write, and tables of a data set are read-only.
    users = np.array(world.data.users.features.values, np.float32)
    return users, np.hstack([items.features.values, items.tags]).astype(np.float32)


class Side(NamedTuple):
    """What a user, or an item, brings to a pair; every tensor has the members as its first axis.

    Attributes:
        factors: ``(E, R, f)``, sum of its embeddings.
        line: ``(E, R)``, its own part of the mean.
        hidden: ``(E, R, h)``, its part of the first layer.
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
    """Embeddings and lines of one kind of id and of its columns, for all members.

    Args:
        members: Networks ``E``.
        rows: Ids.
        columns: Columns.
        settings: Sizes.
        generator: Where parameters start.
    """

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
        """Returns embeddings ``(E, R, f)`` and lines ``(E, R)`` of ids."""
        members, count, factors = self.ids.shape
        flat = rows + count * torch.arange(members, device=rows.device)[:, None]
        own = functional.embedding(flat, self.ids.reshape(-1, factors))
        return own, functional.embedding(flat, self.id_line.reshape(-1, 1))[..., 0]


class WorldModel(nn.Module):
    """The ensemble; all state is in its tensors, so that a saved one needs no settings but its sizes.

    Args:
        sizes: Users, items and columns.
        settings: See :class:`WorldModelSettings`.
        seed: Where the parameters start.
    """

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
        low, high = _LOGS
        share = (np.log(_START_VARIANCE) - low) / (high - low)
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
        low, high = _LOGS
        return mean, low + (high - low) * torch.sigmoid(deep[..., 1])

    def tables(self, world: World) -> tuple[Side, Side]:
        """Returns the sides of all users and of all items of a world."""
        found = []
        with torch.no_grad():
            for network, columns in zip((self.users, self.items), columns_of(world), strict=True):
                rows = torch.arange(len(columns)).expand(self.members, -1)
                found.append(network(rows, torch.from_numpy(columns).expand(self.members, -1, -1)))
        return found[0], found[1]
