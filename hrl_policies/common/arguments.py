"""Arguments that algorithms hand on to their bases, by the names that Stable-Baselines3 gives them."""

from __future__ import annotations

from typing import TypedDict

import torch


class AlgorithmArguments(TypedDict, total=False):
    """What every algorithm takes; see Stable-Baselines3's ``BaseAlgorithm``.

    Attributes:
        stats_window_size: Episodes over which logged rewards and lengths are averaged.
        tensorboard_log: Folder of the TensorBoard log; None writes none.
        verbose: 0 prints nothing, 1 information, 2 debug messages.
        seed: Seed of everything random; None draws one.
        device: Device of the networks; ``"auto"`` takes a GPU if there is one.
    """

    stats_window_size: int
    tensorboard_log: str | None
    verbose: int
    seed: int | None
    device: torch.device | str


class OffPolicyArguments(AlgorithmArguments, total=False):
    """What every off-policy algorithm with a buffer of slates takes; see Stable-Baselines3's ``OffPolicyAlgorithm``.

    Attributes:
        tau: Step of the target networks, in ``(0, 1]``.
        train_freq: Steps between updates, or ``(number, "step" or "episode")``.
        gradient_steps: Gradient steps of an update; -1 takes as many as there were steps.
    """

    tau: float
    train_freq: int | tuple[int, str]
    gradient_steps: int
