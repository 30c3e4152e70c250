"""Training of denoisers: rounds of freshly drawn examples, early stopping, and resuming after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsrm.baselines import regress
from dsrm.diffusion import Denoiser, denoising_loss
from dsrm.model import Standardiser, TrainedDenoiser
from dsrm.targets import Examples, ExampleSource
from kuaifair_env.checks import need_number, need_whole
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import Family, open_artifact, save_artifact
from kuaifair_env.response.training import Trainer, cosine_decay

CHECKPOINTS = Family("kuaifair-pretraining", 3, "pretraining checkpoint", "remove it, and training begins anew")

_TRAINING_STREAM, _VALIDATION_STREAM = 11, 12
_VALIDATION_DRAW = 13
# Share of examples whose condition is dropped, for guidance.
_CONDITION_DROPOUT = 0.1


@dataclass(frozen=True)
class TrainingConfig:
    """Rounds, batches and optimizer.

    Attributes:
        rounds: Most rounds of fresh examples.
        examples: Examples of a round; fewer where the users are few (see :func:`dsrm.pretrain`).
        epochs: Passes over the examples of a round.
        batch_size: Examples of an optimizer step.
        learning_rate: First learning rate of AdamW; it falls to zero along a cosine over all rounds.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: Decay of the moving average of the weights, which is what is validated and kept.
        patience: Rounds without a better validation loss after which training stops.
        validation_examples: Examples of the validation users.
    """

    rounds: int = 6
    examples: int = 40_000
    epochs: int = 2
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    patience: int = 5
    validation_examples: int = 10_000

    def __post_init__(self) -> None:
        need_whole(1, rounds=self.rounds, examples=self.examples, epochs=self.epochs, batch_size=self.batch_size)
        need_whole(1, patience=self.patience, validation_examples=self.validation_examples)
        need_number("(0, inf)", learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        need_number("[0, inf)", weight_decay=self.weight_decay)
        need_number("[0, 1)", ema_decay=self.ema_decay)


Objective = Callable[[Denoiser, Tensor, Tensor, float, torch.Generator], Tensor]
"""``(network, standardised targets, standardised conditions, dropout rate, randomness) -> loss``."""


def denoising_objective(
    network: Denoiser,
    target: Tensor,
    condition: Tensor,
    dropout: float,
    generator: torch.Generator,
    noisiest_share: float = 0.0,
) -> Tensor:
    """Returns the denoising loss at uniformly drawn levels (eq. 7), a share of the examples at the noisiest instead."""
    level = torch.randint(1, len(network.alphas_bar), (len(target),), generator=generator)
    level[: int(noisiest_share * len(target))] = len(network.alphas_bar) - 1
    noise = torch.randn(target.shape, generator=generator)
    dropped = torch.rand(len(target), generator=generator) < dropout if dropout else None
    return denoising_loss(network, target, condition, noise, level, dropped)


top_heavy_objective = partial(denoising_objective, noisiest_share=0.5)
"""The posterior mean is read off the noisiest level, which at uniform levels would be the worst-trained of all."""


def regression_objective(
    network: Denoiser, target: Tensor, condition: Tensor, dropout: float, generator: torch.Generator
) -> Tensor:
    """Returns the mean squared error of the direct prediction, which draws and drops nothing."""
    return nn.functional.mse_loss(regress(network, condition), target)


def train_denoiser(
    make_network: Callable[[], Denoiser],
    objective: Objective,
    source: ExampleSource,
    config: TrainingConfig,
    *,
    seed: int,
    label: str,
    checkpoint: str | Path | None,
    progress: bool,
) -> tuple[TrainedDenoiser, dict[str, Any]]:
    """Trains a denoiser from the start, or from the checkpoint where there is one.

    A tenth of the users of the ``source`` is kept aside for early stopping. A round's examples and batches follow from
    seed and round, so that training can go on after any round and gives the same weights. ``checkpoint`` is written
    after each round; ``label`` names the training in it, and in the progress bar.

    Returns:
        The network with the averaged weights of the best round, and a JSON-able report of users, losses and settings.

    Raises:
        ArtifactError: If the checkpoint is damaged or of another training.
        FloatingPointError: If a loss is not finite.
    """
    from tqdm import tqdm

    users, validation_users = source.split()
    rounds = _Rounds(objective, source, users, validation_users, config, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network()
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    trainer = Trainer(
        network,
        optimizer,
        ema_decay=config.ema_decay,
        max_grad_norm=config.max_grad_norm,
        schedule=cosine_decay(config.rounds * rounds.steps),
    )
    counts = {"training_users": len(users), "validation_users": len(validation_users)}
    identity = {"label": label, "seed": seed, "config": asdict(config), **counts}
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        with open_artifact(path, "checkpoint", CHECKPOINTS) as (_, tensors, settings):
            if settings["identity"] != identity:
                raise ArtifactError(
                    f"{path} is the checkpoint of another training; remove it, or give the settings that it was made "
                    "with"
                )
            trainer.restore(tensors, settings["progress"])
    bar = tqdm(total=config.rounds, initial=trainer.rounds, desc=f"pretrain {label}", disable=not progress)

    def after_round(trainer: Trainer[Denoiser]) -> None:
        if path is not None:
            settings = {"identity": identity, "progress": trainer.progress()}
            save_artifact(path, "checkpoint", trainer.tensors(), settings, CHECKPOINTS)
        show_round(bar, trainer)

    with bar:
        best = trainer.fit(
            rounds.batches,
            rounds.loss,
            rounds.validation_loss,
            rounds=config.rounds,
            patience=config.patience,
            callback=after_round,
        )
        bar.total = trainer.rounds
    report = counts | trainer.report() | {"training": asdict(config)}
    return TrainedDenoiser(best, rounds.condition, rounds.state), report


def show_round(bar: Any, trainer: Trainer[Any]) -> None:
    """Moves a tqdm bar of rounds on, and shows the last losses and the best round so far beside it."""
    losses = {"loss": f"{trainer.losses[-1]:.4f}", "validation": f"{trainer.validation_losses[-1]:.4f}"}
    bar.set_postfix(**losses, best_round=trainer.best_round)
    bar.update()


_Batch = tuple[Tensor, Tensor, torch.Generator]


@dataclass(eq=False)
class _Rounds:
    """The rounds of one training: their examples, standardised as the first round's are, and the losses on them."""

    objective: Objective
    source: ExampleSource
    users: NDArray[np.int64]
    validation_users: NDArray[np.int64]
    config: TrainingConfig
    seed: int

    def __post_init__(self) -> None:
        config = self.config
        self._batches = max(config.examples // config.batch_size, 1)
        self.steps = config.epochs * self._batches
        self._first = self._draw(self.users, config.examples, _TRAINING_STREAM, 0)
        self.condition = Standardiser.fit(self._first.conditions)
        self.state = Standardiser.fit(self._first.targets)
        self._validation = self._tensors(
            self._draw(self.validation_users, config.validation_examples, _VALIDATION_STREAM, _VALIDATION_DRAW)
        )

    def batches(self, round_number: int) -> Iterator[_Batch]:
        """Yields the batches of a round: targets, conditions, and the source of the objective's random numbers."""
        examples = self._first
        if round_number:
            examples = self._draw(self.users, self.config.examples, _TRAINING_STREAM, round_number)
        targets, conditions = self._tensors(examples)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round_number)
        for _ in range(self.config.epochs):
            order = torch.randperm(len(targets), generator=generator)
            for rows in torch.split(order, self.config.batch_size)[: self._batches]:
                yield targets[rows], conditions[rows], generator

    def loss(self, network: Denoiser, batch: _Batch) -> Tensor:
        """Returns the training loss of a batch."""
        targets, conditions, generator = batch
        return self.objective(network, targets, conditions, _CONDITION_DROPOUT, generator)

    def validation_loss(self, network: Denoiser) -> float:
        """Returns the loss on the validation users, with the same random numbers each time."""
        generator = torch.Generator().manual_seed(self.seed)
        return float(self.objective(network, *self._validation, 0.0, generator))

    def _draw(self, users: NDArray[np.int64], count: int, stream: int, number: int) -> Examples:
        rng = np.random.default_rng([self.seed, stream, number])
        return self.source.draw(rng.choice(users, count), rng)

    def _tensors(self, examples: Examples) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(self.state.transform(examples.targets)),
            torch.from_numpy(self.condition.transform(examples.conditions)),
        )
