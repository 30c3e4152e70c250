"""The training loop of purifiers: rounds of fresh windows, early stopping, and going on after a kill."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsrm.baselines import answers
from dsrm.denoiser import Denoiser, Standardiser, denoising_loss
from dsrm.targets import Examples, ExampleSource
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import Family, Tensors, load_artifact, save_artifact

CHECKPOINTS = Family("kuaifair-pretraining", 1, "pretraining checkpoint")

_ROUND_STREAM, _VALIDATION_STREAM = 11, 13


@dataclass(frozen=True)
class TrainingConfig:
    """Rounds, batches and optimiser.

    Attributes:
        rounds: Most rounds of fresh examples.
        examples: Examples of a round.
        epochs: Passes over the examples of a round.
        batch_size: Examples of an optimiser step.
        learning_rate: First learning rate of AdamW; it falls to zero along a cosine over all rounds.
        weight_decay: Of AdamW.
        gradient_norm: Where the gradient's norm is cut off.
        average: Decay of the moving average of the weights, which is what is kept.
        condition_dropout: Share of examples whose condition is dropped, for guidance.
        patience: Rounds without a better validation loss after which training stops.
        validation_examples: Examples of held-out users.
    """

    rounds: int = 6
    examples: int = 40_000
    epochs: int = 2
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    gradient_norm: float = 1.0
    average: float = 0.998
    condition_dropout: float = 0.1
    patience: int = 5
    validation_examples: int = 10_000

    def __post_init__(self) -> None:
        counts = (self.rounds, self.examples, self.epochs, self.batch_size, self.patience)
        if min(counts) < 1 or self.validation_examples < 1:
            raise ValueError("rounds, examples, epochs, batch size and patience must be at least 1")
        if not 0.0 <= self.condition_dropout < 1.0 or not 0.0 <= self.average < 1.0:
            raise ValueError("condition_dropout and average must lie in [0, 1)")


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes:
        net: With the averaged weights of the best round.
        condition: Standardisation of conditions.
        state: Standardisation of states.
        report: Curve and settings, JSON-able.
    """

    net: Denoiser
    condition: Standardiser
    state: Standardiser
    report: dict[str, Any]


Objective = Callable[[Denoiser, Tensor, Tensor, float, torch.Generator], Tensor]
"""Loss of a net for standardised targets and conditions, with a dropout rate and a source of noise."""


def denoising_objective(
    net: Denoiser, target: Tensor, condition: Tensor, dropout: float, generator: torch.Generator
) -> Tensor:
    """The denoising loss at uniformly drawn levels (eq. 7)."""
    level = torch.randint(1, len(net.alphas_bar), (len(target),), generator=generator)
    return _denoising(net, target, condition, level, dropout, generator)


def top_heavy_objective(
    net: Denoiser, target: Tensor, condition: Tensor, dropout: float, generator: torch.Generator
) -> Tensor:
    """The denoising loss with half of the examples at the noisiest level, where the posterior mean is read off.

    At uniform levels that level would see one example in ``K``, and the mean would be the worst-trained answer.
    """
    half = len(target) // 2
    level = torch.randint(1, len(net.alphas_bar), (len(target),), generator=generator)
    level[:half] = len(net.alphas_bar) - 1
    return _denoising(net, target, condition, level, dropout, generator)


def _denoising(
    net: Denoiser,
    target: Tensor,
    condition: Tensor,
    level: Tensor,
    dropout: float,
    generator: torch.Generator,
) -> Tensor:
    noise = torch.randn(target.shape, generator=generator)
    dropped = torch.rand(len(target), generator=generator) < dropout if dropout else None
    return denoising_loss(net, target, condition, noise, level, dropped)


def regression_objective(
    net: Denoiser, target: Tensor, condition: Tensor, dropout: float, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the direct answer; there is nothing to drop."""
    return nn.functional.mse_loss(answers(net, condition), target)


class Trainer:
    """Trains one net on examples of one source.

    Args:
        source: Where examples come from.
        users: User rows to learn from.
        held: User rows for early stopping.
        config: Rounds, batches, optimiser.
        seed: Seed; a round's examples and batches follow from seed and round, so training can go on after any round.
        checkpoint: File that is written after each round, or None.
        label: What the progress bar and the checkpoint call this training.
    """

    def __init__(
        self,
        source: ExampleSource,
        users: NDArray[np.int64],
        held: NDArray[np.int64],
        config: TrainingConfig,
        seed: int,
        checkpoint: str | Path | None,
        label: str,
    ) -> None:
        self._source = source
        self._users = users
        self._held = held
        self._config = config
        self._seed = seed
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._label = label

    def run(self, make: Callable[[], Denoiser], objective: Objective, progress: bool) -> Trained:
        """Trains from the start, or from the checkpoint where there is one.

        Args:
            make: Makes the untrained net.
            objective: What to minimise.
            progress: Whether to show a progress bar.

        Raises:
            ArtifactError: If the checkpoint is damaged or of another training.
        """
        from tqdm import tqdm

        first = self._draw(self._users, self._config.examples, 0)
        condition, state = Standardiser.fit(first.conditions), Standardiser.fit(first.targets)
        held = self._draw(self._held, self._config.validation_examples, _VALIDATION_STREAM, stream=1)
        validation = _tensors(held, condition, state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            run = _Run(make(), self._config)
        if self._checkpoint is not None and self._checkpoint.exists():
            run.restore(self._checkpoint, self._identity())
        bar = tqdm(
            total=self._config.rounds,
            initial=run.rounds,
            desc=f"pretrain {self._label}",
            disable=not progress,
        )
        with bar:
            while run.rounds < self._config.rounds and not run.stale(self._config.patience):
                examples = (
                    first if run.rounds == 0 else self._draw(self._users, self._config.examples, run.rounds)
                )
                loss = self._round(run, _tensors(examples, condition, state), objective)
                run.evaluated(loss, self._validation(run.average, validation, objective))
                if self._checkpoint is not None:
                    run.save(self._checkpoint, self._identity())
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", validation=f"{run.curve[-1][1]:.4f}")
        if self._checkpoint is not None:
            self._checkpoint.unlink(missing_ok=True)
        return Trained(run.best, condition, state, self._report(run))

    def _round(self, run: _Run, data: tuple[Tensor, Tensor], objective: Objective) -> float:
        config = self._config
        targets, conditions = data
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + run.rounds)
        batches = max(len(targets) // config.batch_size, 1)
        total = config.rounds * config.epochs * batches
        losses = []
        for epoch in range(config.epochs):
            order = torch.randperm(len(targets), generator=generator)
            for number, rows in enumerate(torch.split(order, config.batch_size)[:batches]):
                done = (run.rounds * config.epochs + epoch) * batches + number
                run.set_rate(config.learning_rate * 0.5 * (1.0 + np.cos(np.pi * done / total)))
                loss = objective(
                    run.net, targets[rows], conditions[rows], config.condition_dropout, generator
                )
                run.step(loss)
                losses.append(loss.detach())
        run.rounds += 1
        return float(torch.stack(losses).mean())

    def _validation(self, net: Denoiser, data: tuple[Tensor, Tensor], objective: Objective) -> float:
        generator = torch.Generator().manual_seed(self._seed)
        with torch.inference_mode():
            return float(objective(net, *data, 0.0, generator))

    def _draw(self, users: NDArray[np.int64], count: int, number: int, stream: int = 0) -> Examples:
        rng = np.random.default_rng([self._seed, _ROUND_STREAM + stream, number])
        return self._source.draw(rng.choice(users, count), rng)

    def _identity(self) -> dict[str, Any]:
        """Returns what two trainings must share to go on with each other's checkpoint."""
        return {
            "label": self._label,
            "seed": self._seed,
            "config": asdict(self._config),
            "users": len(self._users),
            "held": len(self._held),
        }

    def _report(self, run: _Run) -> dict[str, Any]:
        return {
            "rounds": run.rounds,
            "best_round": run.best_round + 1,
            "steps": run.steps,
            "curve": [[round(loss, 6), round(held, 6)] for loss, held in run.curve],
            "training": asdict(self._config),
        }


class _Run:
    """A net in training: weights, their moving average, the best so far, and the optimiser."""

    def __init__(self, net: Denoiser, config: TrainingConfig) -> None:
        self.net = net
        self.average = copy.deepcopy(net).requires_grad_(False)
        self.best = copy.deepcopy(self.average)
        self.curve: list[tuple[float, float]] = []
        self.best_round = 0
        self.rounds = 0
        self.steps = 0
        self._config = config
        self._optimiser = torch.optim.AdamW(
            net.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def stale(self, patience: int) -> bool:
        """Whether the last ``patience`` rounds brought nothing."""
        return bool(self.curve) and len(self.curve) - 1 - self.best_round >= patience

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate."""
        for group in self._optimiser.param_groups:
            group["lr"] = float(rate)

    def step(self, loss: Tensor) -> None:
        """Takes one step of the optimiser and of the moving average."""
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.net.parameters(), self._config.gradient_norm)
        self._optimiser.step()
        self.steps += 1
        # Early on an average over many steps would mostly hold the first weights.
        decay = min(self._config.average, self.steps / (self.steps + 9.0))
        with torch.no_grad():
            for averaged, present in zip(self.average.parameters(), self.net.parameters(), strict=True):
                averaged.lerp_(present, 1.0 - decay)

    def evaluated(self, loss: float, validation: float) -> None:
        """Notes the losses of a round and keeps the averaged weights if they are the best so far."""
        if not np.isfinite([loss, validation]).all():
            raise ValueError(f"training diverged in round {self.rounds}: losses {loss}, {validation}")
        self.curve.append((loss, validation))
        if validation <= min(held for _, held in self.curve):
            self.best_round = len(self.curve) - 1
            self.best.load_state_dict(self.average.state_dict())

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Writes everything that training needs to go on."""
        tensors: Tensors = {}
        for name, net in (("net", self.net), ("average", self.average), ("best", self.best)):
            tensors |= {f"{name}.{key}": value.numpy() for key, value in net.state_dict().items()}
        for number, state in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{key}": value.numpy() for key, value in state.items()}
        progress = {
            "curve": self.curve,
            "best_round": self.best_round,
            "rounds": self.rounds,
            "steps": self.steps,
        }
        save_artifact(path, "checkpoint", tensors, {"identity": identity, "progress": progress}, CHECKPOINTS)

    def restore(self, path: Path, identity: dict[str, Any]) -> None:
        """Goes back to what :meth:`save` wrote."""
        _, tensors, settings = load_artifact(path, "checkpoint", CHECKPOINTS)
        if settings["identity"] != identity:
            raise ArtifactError(
                f"{path} is the checkpoint of another training; remove it, or give the settings that it was made with"
            )
        for name, net in (("net", self.net), ("average", self.average), ("best", self.best)):
            net.load_state_dict({key: torch.from_numpy(tensors[f"{name}.{key}"]) for key in net.state_dict()})
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, number, key = name.split(".", 2)
                states.setdefault(int(number), {})[key] = torch.from_numpy(value)
        content = self._optimiser.state_dict()
        self._optimiser.load_state_dict({"state": states, "param_groups": content["param_groups"]})
        progress = settings["progress"]
        self.curve = [(float(loss), float(held)) for loss, held in progress["curve"]]
        self.best_round, self.rounds = int(progress["best_round"]), int(progress["rounds"])
        self.steps = int(progress["steps"])


def _tensors(examples: Examples, condition: Standardiser, state: Standardiser) -> tuple[Tensor, Tensor]:
    return (
        torch.from_numpy(state.to(examples.targets)),
        torch.from_numpy(condition.to(examples.conditions)),
    )
