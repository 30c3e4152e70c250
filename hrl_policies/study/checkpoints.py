"""Checkpoints: models and replay buffers in files, read without executing anything that is stored in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file, recursive_setattr

from hrl_policies.study.store import MODEL
from kuaifair_env.errors import ArtifactError

REPLAY = "replay.npz"
_BUFFER_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def save_model(model: Any, folder: Path) -> None:
    """Writes ``model.zip`` in Stable-Baselines3's own format."""
    model.save(folder / MODEL)


def save_checkpoint(model: Any, folder: Path) -> None:
    """Writes ``model.zip`` and, for off-policy methods, the replay buffer as plain arrays."""
    save_model(model, folder)
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(model, OffPolicyAlgorithm) and buffer is not None:
        filled = buffer.buffer_size if buffer.full else buffer.pos
        arrays: dict[str, Any] = {name: array[:filled] for name, array in _buffer_arrays(buffer).items()}
        np.savez(folder / REPLAY, position=buffer.pos, full=buffer.full, **arrays)


def restore_parameters(model: Any, path: Path) -> None:
    """Gives a freshly built model the parameters in a ``model.zip``.

    Only tensors are read (``torch.load(weights_only=True)``); the pickled settings in the file are not, so a file
    from a stranger cannot run code. Settings come from the run's ``config.json``.

    Raises:
        ArtifactError: If the file is missing, damaged, or of another method or size.
    """
    if not path.exists():
        raise ArtifactError(f"{path} is missing")
    try:
        _, parameters, variables = load_from_zip_file(path, device="cpu", load_data=False)
        model.set_parameters(parameters, exact_match=True, device="cpu")
    except Exception as error:
        # SB3, torch and zipfile raise a dozen different types here.
        raise ArtifactError(f"{path} does not hold the parameters of this model: {error}") from error
    for name, value in (variables or {}).items():
        if value is not None:
            recursive_setattr(model, f"{name}.data", value.data)


def restore_checkpoint(model: Any, folder: Path, steps_done: int) -> None:
    """Brings a freshly built model to the state that :func:`save_checkpoint` wrote.

    Raises:
        ArtifactError: If a file is missing or damaged.
    """
    restore_parameters(model, folder / MODEL)
    model.num_timesteps = steps_done
    buffer = getattr(model, "replay_buffer", None)
    if not isinstance(model, OffPolicyAlgorithm) or buffer is None:
        return
    try:
        with np.load(folder / REPLAY, allow_pickle=False) as arrays:
            filled = len(arrays["rewards"])
            for name, array in _buffer_arrays(buffer).items():
                array[:filled] = arrays[name]
            buffer.pos, buffer.full = int(arrays["position"]), bool(arrays["full"])
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder / REPLAY} is missing or damaged: {error}") from error


def _buffer_arrays(buffer: Any) -> dict[str, np.ndarray]:
    """Returns what a replay buffer holds: Stable-Baselines3's arrays, and the columns of a slate buffer."""
    arrays = {name: getattr(buffer, name) for name in _BUFFER_ARRAYS}
    return arrays | getattr(buffer, "columns", {})
