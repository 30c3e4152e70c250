"""The training loop of every network that is fitted by gradients: minibatches, early stopping, averaged weights.

Imports torch; modules that simulate must not import it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kuaifair_env.files import Tensors

Network = TypeVar("Network", bound=nn.Module)
Batch = TypeVar("Batch")


class Trainer(Generic[Network]):
    """Minimises a loss in rounds, and keeps the weights of the round with the lowest validation loss.

    A round is what the caller says it is: a pass over fixed examples, passes over freshly drawn ones, or a number of
    steps. :meth:`fit` runs rounds until the validation loss has stopped falling; with :meth:`tensors`,
    :meth:`progress` and :meth:`restore` it goes on after an interruption.

    Args:
        network: Trained in place.
        optimizer: Over the network's parameters.
        ema_decay: Decay of an exponential moving average of the weights, which is then what is validated and kept; it
            grows as ``n / (n + 9)`` over the first averaged weights, because the mean would else consist of the
            untrained ones. None validates and keeps the weights themselves.
        ema_start: How many weights the average counts for before the first step: 1 counts the untrained ones.
        max_grad_norm: Gradients are clipped to this norm; None never clips.
        schedule: ``step -> factor`` of the optimizer's learning rates; steps count from 0.
        min_improvement: How far the validation loss must fall below the lowest one for a round to count as better.

    Attributes:
        rounds: Rounds that are done.
        steps: Optimizer steps that are done.
        losses: Mean training loss of each round.
        validation_losses: In the order of the calls of :meth:`validate`.
        best_round: Number of rounds after which the validation loss was lowest.
    """

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        *,
        ema_decay: float | None = None,
        ema_start: int = 0,
        max_grad_norm: float | None = None,
        schedule: Callable[[int], float] | None = None,
        min_improvement: float = 0.0,
    ) -> None:
        self.network = network
        self.rounds = 0
        self.steps = 0
        self.losses: list[float] = []
        self.validation_losses: list[float] = []
        self.best_round = 0
        self._optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._ema_decay = ema_decay
        self._ema_start = ema_start
        self._average = None if ema_decay is None else copy.deepcopy(network).requires_grad_(False)
        self._max_grad_norm = max_grad_norm
        self._schedule = schedule
        self._min_improvement = min_improvement
        self._best: dict[str, Tensor] = copy.deepcopy(self.candidate.state_dict())
        self._best_loss = float("inf")

    @property
    def candidate(self) -> Network:
        """The network to validate and keep: the averaged one, or the trained one where nothing is averaged."""
        return self.network if self._average is None else self._average

    def fit(
        self,
        batches: Callable[[int], Iterable[Batch]],
        loss: Callable[[Network, Batch], Tensor],
        validation_loss: Callable[[Network], float] | None = None,
        *,
        rounds: int,
        patience: int | None = None,
        callback: Callable[[Trainer[Network]], None] | None = None,
    ) -> Network:
        """Trains until ``rounds`` are done or the validation loss has not fallen for ``patience`` rounds.

        Args:
            batches: ``number of rounds done -> batches of the next round``. Seeded generators of order and examples
                belong in here; one that is seeded by the round lets training go on after an interruption.
            loss: ``(network, batch) -> mean loss``.
            validation_loss: ``network -> mean loss`` on examples that are not trained on; None keeps the last weights.
            rounds: Largest number of rounds, those before :meth:`restore` included.
            patience: Rounds without a better validation loss before training stops; None never stops early.
            callback: Called with the trainer after each round, to show progress or to write a checkpoint.

        Returns:
            :meth:`best`.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        while self.rounds < rounds:
            if patience is not None and self.validation_losses and self.rounds - self.best_round >= patience:
                break
            self.train_round(batches(self.rounds), loss)
            if validation_loss is not None:
                self.validate(validation_loss)
            if callback is not None:
                callback(self)
        return self.best()

    def train_round(self, batches: Iterable[Batch], loss: Callable[[Network, Batch], Tensor]) -> None:
        """Takes one optimizer step per batch."""
        self.network.train()
        losses = []
        for batch in batches:
            value = loss(self.network, batch)
            self._step(value)
            losses.append(value.detach())
        self.rounds += 1
        self.losses.append(self._finite(float(torch.stack(losses).mean()), "training"))

    def validate(self, validation_loss: Callable[[Network], float]) -> None:
        """Records the validation loss, and the weights if it is the lowest so far.

        :meth:`fit` calls this after each round; call it before the first round to let the initial weights compete.
        """
        with torch.no_grad():
            value = self._finite(validation_loss(self.candidate.eval()), "validation")
        self.validation_losses.append(value)
        if value < self._best_loss - self._min_improvement:
            self._best = copy.deepcopy(self.candidate.state_dict())
            self._best_loss, self.best_round = value, self.rounds

    def best(self) -> Network:
        """Returns the candidate in eval mode, with its best weights, or the last ones where nothing was validated."""
        if self.validation_losses:
            self.candidate.load_state_dict(self._best)
        return self.candidate.eval()

    def report(self) -> dict[str, Any]:
        """Returns counts and rounded losses, JSON-able."""
        return {
            "rounds": self.rounds,
            "best_round": self.best_round,
            "steps": self.steps,
            "losses": [round(value, 6) for value in self.losses],
            "validation_losses": [round(value, 6) for value in self.validation_losses],
        }

    def tensors(self) -> Tensors:
        """Returns copies of all weights and of the optimizer's state, for a checkpoint."""
        tensors = network_tensors(self.network, "network.")
        tensors |= {f"best.{key}": value.numpy().copy() for key, value in self._best.items()}
        if self._average is not None:
            tensors |= network_tensors(self._average, "average.")
        for number, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value.numpy().copy() for key, value in state.items()}
        return tensors

    def progress(self) -> dict[str, Any]:
        """Returns counts and losses, JSON-able, for a checkpoint."""
        return {
            "rounds": self.rounds,
            "steps": self.steps,
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            "best_round": self.best_round,
            "best_loss": self._best_loss if self.validation_losses else None,
        }

    def restore(self, tensors: Tensors, progress: dict[str, Any]) -> None:
        """Goes back to what :meth:`tensors` and :meth:`progress` returned for a trainer of the same settings.

        Raises:
            KeyError: If something is missing.
        """
        load_network(self.network, tensors, "network.")
        if self._average is not None:
            load_network(self._average, tensors, "average.")
        self._best = {key: torch.tensor(tensors[f"best.{key}"]) for key in self.network.state_dict()}
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                optimizer_state.setdefault(int(number), {})[key] = torch.tensor(value)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
        self.rounds, self.steps = int(progress["rounds"]), int(progress["steps"])
        self.losses = [float(value) for value in progress["losses"]]
        self.validation_losses = [float(value) for value in progress["validation_losses"]]
        self.best_round = int(progress["best_round"])
        if self.validation_losses:
            self._best_loss = float(progress["best_loss"])

    def _step(self, loss: Tensor) -> None:
        if self._schedule is not None:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self._schedule(self.steps)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self.steps += 1
        self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None or self._ema_decay is None:
            return
        count = self._ema_start + self.steps
        decay = min(self._ema_decay, count / (count + 9.0))
        for mean, current in zip(self._average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(current, 1.0 - decay)

    def _finite(self, value: float, kind: str) -> float:
        if not np.isfinite(value):
            raise FloatingPointError(
                f"training diverged: the {kind} loss is {value} in round {self.rounds}; lower the learning rate"
            )
        return value


def network_tensors(network: nn.Module, prefix: str = "network.") -> Tensors:
    """Returns copies of a network's weights and buffers as arrays, each under its name after a prefix."""
    return {f"{prefix}{name}": value.numpy().copy() for name, value in network.state_dict().items()}


def load_network(network: nn.Module, tensors: Tensors, prefix: str = "network.") -> None:
    """Fills a network with what :func:`network_tensors` returned; other arrays are left alone.

    Raises:
        KeyError: If an array is missing.
        RuntimeError: If an array has another shape.
    """
    network.load_state_dict({name: torch.tensor(tensors[prefix + name]) for name in network.state_dict()})


def fit_epochs(
    network: Network,
    optimizer: torch.optim.Optimizer,
    examples: int,
    loss: Callable[[Network, Tensor], Tensor],
    validation_loss: Callable[[Network], float],
    *,
    batch_size: int,
    max_epochs: int,
    patience: int,
    generator: torch.Generator,
) -> tuple[Network, dict[str, Any]]:
    """Fits a network to fixed examples by shuffled passes, with averaged weights and early stopping.

    Args:
        network: Trained in place.
        optimizer: Over the network's parameters.
        examples: Number of training examples.
        loss: ``(network, positions of a batch in range(examples)) -> mean loss``.
        validation_loss: ``network -> mean loss`` on examples that are not trained on.
        batch_size: Examples of a step.
        max_epochs: Passes at most.
        patience: Passes without a better validation loss before training stops.
        generator: Source of the examples' order.

    Returns:
        The averaged network of the best epoch, and :meth:`Trainer.report`.
    """
    trainer = Trainer(network, optimizer, ema_decay=0.99, ema_start=1, min_improvement=1e-5)
    best = trainer.fit(
        lambda _: shuffled_batches(examples, batch_size, generator),
        loss,
        validation_loss,
        rounds=max_epochs,
        patience=patience,
    )
    return best, trainer.report()


def cosine_decay(steps: int) -> Callable[[int], float]:
    """Returns a schedule that falls from 1 to 0 along half a cosine, over a number of optimizer steps."""
    return lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))


def shuffled_batches(examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields the positions ``0..examples - 1`` in random order, ``int64 (batch_size,)`` at a time, the rest last."""
    yield from torch.split(torch.randperm(examples, generator=generator), batch_size)


def batch_size_for(examples: int, largest: int, steps: int = 50, smallest: int = 64) -> int:
    """Returns a batch size that makes at least ``steps`` steps per pass, within ``smallest..largest``.

    A pass of two steps over a small log would hardly move the weights between two looks at the held-out loss.
    """
    return min(largest, max(smallest, examples // steps))
