"""Models of click vectors: a collaborative denoising autoencoder (CDAE) and DiffRec."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dsrm.diffusion import level_sinusoids
from kuaifair_env.checks import need_number, need_seed, need_whole
from kuaifair_env.data.schema import FloatArray

_TIME_SIZE = 10
_REMEMBERED_LOSSES = 10
_UNIFORM_SHARE = 1e-3


@dataclass(frozen=True)
class ClickVectorConfig:
    """What both models share.

    Attributes:
        top: Items that a state is a mean of.
        hidden: Width of the hidden layer.
        steps: Most optimizer steps.
        batch_size: Users of a step.
        learning_rate: Of the optimizer.
        seed: Seed of weights, batches and noise.
    """

    top: int = 50
    hidden: int = 50
    steps: int = 1_500
    batch_size: int = 128
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        need_whole(1, top=self.top, hidden=self.hidden, steps=self.steps, batch_size=self.batch_size)
        need_seed(self.seed)
        need_number("(0, inf)", learning_rate=self.learning_rate)


@dataclass(frozen=True)
class CDAEConfig(ClickVectorConfig):
    """A collaborative denoising autoencoder; the defaults were found by a search, the paper's are 50 units at .1.

    Attributes:
        corruption: Share ``q`` of a user's clicks that are masked; the others count ``1 / (1 - q)``.
        negatives: Drawn items for each click.
    """

    top: int = 20
    hidden: int = 100
    learning_rate: float = 0.0824
    kind: Literal["cdae"] = "cdae"
    corruption: float = 0.2
    negatives: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        need_whole(1, negatives=self.negatives)
        need_number("[0, 1)", corruption=self.corruption)


@dataclass(frozen=True)
class DiffRecConfig(ClickVectorConfig):
    """DiffRec; the defaults were found by a search, ranges of the paper stand in brackets.

    The learning rate is larger than the reference's (1e-5 to 1e-3), which takes hundreds of passes over the users.

    Attributes:
        levels: Noise levels ``T`` (2 to 100).
        noise_scale: ``s`` (1e-5 to .1); the variance at level ``t`` is ``s`` times a line from ``min_noise`` (5e-4 to
            5e-3) to ``max_noise`` (5e-3, .01).
        min_noise: See ``noise_scale``.
        max_noise: See ``noise_scale``.
        elbo_weights: Whether a level's loss is weighted as in the evidence lower bound. Both are the reference's.
        dropout: Share of the network's inputs that are dropped in training.
    """

    kind: Literal["diffrec"] = "diffrec"
    top: int = 20
    hidden: int = 100
    learning_rate: float = 2.57e-3
    levels: int = 5
    noise_scale: float = 0.1
    min_noise: float = 1e-3
    max_noise: float = 0.01
    elbo_weights: bool = True
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        need_whole(1, levels=self.levels)
        need_number("[0, 1)", dropout=self.dropout)
        need_number("(0, inf)", noise_scale=self.noise_scale, min_noise=self.min_noise, max_noise=self.max_noise)
        if not self.min_noise < self.max_noise < 1.0 / self.noise_scale:
            raise ValueError(
                f"need min_noise < max_noise < 1 / noise_scale, got {self.min_noise}, {self.max_noise} and "
                f"a noise_scale of {self.noise_scale}"
            )


AnyClickVectorConfig: TypeAlias = CDAEConfig | DiffRecConfig


class ClickVectorNetwork(nn.Module):
    """Base class of networks that reconstruct click vectors."""

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Returns a score of every item, ``(B, M)``, for click vectors ``(B, M)`` of zeros and ones."""
        raise NotImplementedError

    def loss(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the mean loss over users; noise comes from the generator."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the reference."""
        raise NotImplementedError


class CDAE(ClickVectorNetwork):
    """A collaborative denoising autoencoder (Wu et al., WSDM 2016, eq. 8 to 11): ``y^ = f(W' h(W y~ + b) + b')``.

    ``h`` and ``f`` are sigmoids, ``W`` and ``W'`` are not tied, and the loss is logistic over a user's clicks and a few
    drawn items for each. The paper adds an input for each user; there is none here, since users on whom purifiers are
    evaluated were not trained on.
    """

    def __init__(self, items: int, config: CDAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(items, config.hidden)
        self.decoder = nn.Linear(config.hidden, items)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """See :class:`ClickVectorNetwork`; click probabilities."""
        scores: Tensor = self.decoder(self.encoder(vectors).sigmoid()).sigmoid()
        return scores

    def loss(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`ClickVectorNetwork`."""
        users, items = vectors.nonzero(as_tuple=True)
        hidden = self.encoder(self.corrupted(vectors, generator)).sigmoid()
        drawn_users = users.repeat(self.config.negatives)
        drawn = torch.randint(vectors.shape[1], drawn_users.shape, generator=generator)
        negative = vectors[drawn_users, drawn] == 0
        clicked = functional.softplus(-self._logits(hidden, users, items)).sum()
        unclicked = functional.softplus(self._logits(hidden, drawn_users[negative], drawn[negative])).sum()
        return (clicked + unclicked) / len(vectors)

    def corrupted(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        """Returns click vectors ``y~``, a random share ``q`` of whose clicks is masked; their mean stays as it is."""
        users, items = vectors.nonzero(as_tuple=True)
        kept = torch.rand(len(users), generator=generator) >= self.config.corruption
        corrupted = torch.zeros_like(vectors)
        corrupted[users[kept], items[kept]] = 1.0 / (1.0 - self.config.corruption)
        return corrupted

    def optimizer(self) -> torch.optim.Optimizer:
        """See :class:`ClickVectorNetwork`."""
        return torch.optim.Adagrad(self.parameters(), self.config.learning_rate)

    def _logits(self, hidden: Tensor, users: Tensor, items: Tensor) -> Tensor:
        return torch.einsum("nk,nk->n", hidden[users], self.decoder.weight[items]) + self.decoder.bias[items]


@dataclass(frozen=True)
class NoiseVariances:
    """DiffRec's forward process: at level ``t`` a vector is ``sqrt(1 - v_t) x_0 + sqrt(v_t) eps``.

    Attributes:
        values: ``float64 (T + 1,)``, ``v_t = 1 - abar_t``, increasing from 0.
    """

    values: NDArray[np.float64]

    @classmethod
    def linear(cls, levels: int, scale: float, low: float, high: float) -> NoiseVariances:
        """Returns ``v_t = s (low + (t - 1) / (T - 1) (high - low))``."""
        return cls(np.concatenate([[0.0], scale * np.linspace(low, high, levels)]))

    def posterior_mean(self, level: int) -> tuple[float, float]:
        """Returns the weights of ``x_0`` and ``x_t`` in the mean of ``x_{t-1}`` given both."""
        cleaner, noisier = self.values[level - 1], self.values[level]
        beta = (noisier - cleaner) / (1.0 - cleaner)
        clean_weight = np.sqrt(1.0 - cleaner) * beta / noisier
        return float(clean_weight), float(np.sqrt(1.0 - beta) * cleaner / noisier)

    def elbo_weights(self) -> FloatArray:
        """Returns the weights of ``|x^_0 - x_0|^2`` in the negative evidence lower bound, ``float32 (T,)``.

        Half the drop of the signal-to-noise ratio from each level to the next; 1 at the first level.
        """
        inverse = 1.0 / self.values[1:]
        return np.concatenate([[1.0], 0.5 * (inverse[:-1] - inverse[1:])]).astype(np.float32)


class ImportanceLevels:
    """Draws noise levels in proportion to the root mean square of their last losses (Nichol and Dhariwal, ICML 2021).

    Until each of the ``levels`` has ten losses they are equally probable.
    """

    def __init__(self, levels: int) -> None:
        self._losses: list[deque[float]] = [deque(maxlen=_REMEMBERED_LOSSES) for _ in range(levels)]

    def probabilities(self) -> Tensor:
        """Returns the probability of each level, ``(T,)``."""
        levels = len(self._losses)
        if min(map(len, self._losses)) < _REMEMBERED_LOSSES:
            return torch.full((levels,), 1.0 / levels)
        roots = torch.tensor([np.sqrt(np.mean(np.square(losses))) for losses in self._losses], dtype=torch.float32)
        return (1.0 - _UNIFORM_SHARE) * roots / roots.sum() + _UNIFORM_SHARE / levels

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns levels from 1 to ``T`` and by what to multiply their losses to keep the mean over levels."""
        probabilities = self.probabilities()
        drawn = torch.multinomial(probabilities, count, replacement=True, generator=generator)
        return drawn + 1, 1.0 / (len(probabilities) * probabilities[drawn])

    def record(self, levels: Tensor, losses: Tensor) -> None:
        """Remembers losses of levels, both ``(B,)``."""
        for level, loss in zip(levels.tolist(), losses.tolist(), strict=True):
            self._losses[level - 1].append(loss)


class DiffRec(ClickVectorNetwork):
    """DiffRec (Wang et al., SIGIR 2023): Gaussian diffusion of click vectors, by a network that predicts ``x_0``.

    Little noise is added, since vectors are to be corrected, not generated. The reverse process starts from the click
    vector itself and takes the mean of every step, so that no random number is drawn. The paper's variants in a latent
    space (L-DiffRec) and with weights by time (T-DiffRec) are left out.
    """

    level_features: Tensor
    variances: Tensor
    level_weights: Tensor

    def __init__(self, items: int, config: DiffRecConfig) -> None:
        super().__init__()
        self.config = config
        self.noise = NoiseVariances.linear(config.levels, config.noise_scale, config.min_noise, config.max_noise)
        weights = self.noise.elbo_weights() if config.elbo_weights else np.ones(config.levels, np.float32)
        self.register_buffer("level_features", level_sinusoids(config.levels), persistent=False)
        self.register_buffer("variances", torch.tensor(self.noise.values, dtype=torch.float32), persistent=False)
        self.register_buffer("level_weights", torch.from_numpy(weights), persistent=False)
        self.time = nn.Linear(self.level_features.shape[1], _TIME_SIZE)
        self.encoder = nn.Linear(items + _TIME_SIZE, config.hidden)
        self.decoder = nn.Linear(config.hidden, items)
        self._levels = ImportanceLevels(config.levels)

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        """Returns clean vectors ``x^_0``, ``(B, M)``, for noisy ones at levels ``(B,)`` from 1 to ``T``."""
        features = torch.cat([noisy, self.time(self.level_features[level])], dim=1)
        clean: Tensor = self.decoder(self.encoder(features).tanh())
        return clean

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """See :class:`ClickVectorNetwork`."""
        state = vectors
        for level in range(self.config.levels, 0, -1):
            clean_weight, noisy_weight = self.noise.posterior_mean(level)
            state = clean_weight * self(state, torch.full((len(state),), level)) + noisy_weight * state
        return state

    def loss(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`ClickVectorNetwork`."""
        level, importance = self._levels.draw(len(vectors), generator)
        variance = self.variances[level][:, None]
        noise = torch.randn(vectors.shape, generator=generator)
        noisy = (1.0 - variance).sqrt() * vectors + variance.sqrt() * noise
        kept = torch.rand(vectors.shape, generator=generator) >= self.config.dropout
        predicted = self(noisy * kept / (1.0 - self.config.dropout), level)
        losses = self.level_weights[level - 1] * ((predicted - vectors) ** 2).mean(dim=1)
        self._levels.record(level, losses.detach())
        mean: Tensor = (importance * losses).mean()
        return mean

    def optimizer(self) -> torch.optim.Optimizer:
        """See :class:`ClickVectorNetwork`."""
        return torch.optim.AdamW(self.parameters(), self.config.learning_rate, weight_decay=0.0)
