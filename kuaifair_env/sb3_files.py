"""Files of Stable-Baselines3's algorithms, read so that nothing in them can execute code."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.save_util import load_from_zip_file, recursive_setattr

from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import problem_of, whole

_BUFFER_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def restore_parameters(model: Any, path: Path) -> None:
    """Gives a freshly built model the parameters in a ``model.zip``.

    Only tensors are read (``torch.load(weights_only=True)``); the pickled settings in the file are not, so a file
    from a stranger cannot run code. Settings come from elsewhere.

    Raises:
        ArtifactError: If the file is missing, damaged, of another method or size, or holds NaN or infinity.
    """
    if not path.exists():
        raise ArtifactError(f"{path} is missing")
    try:
        _, parameters, variables = load_from_zip_file(path, device="cpu", load_data=False)
        check_finite([parameters, variables], path)
        model.set_parameters(parameters, exact_match=True, device="cpu")
        for name, value in (variables or {}).items():
            if value is not None:
                recursive_setattr(model, f"{name}.data", value.data)
    except ArtifactError:
        raise
    except Exception as error:
        # SB3, torch, zipfile and pickle raise a dozen different types here. Torch's advice would execute the file.
        foreign = isinstance(error, UnpicklingError)
        problem = "it holds other things than tensors, or is damaged" if foreign else problem_of(error)
        raise ArtifactError(f"{path} does not hold the parameters of this model: {problem}") from error


def check_finite(parameters: Any, source: Any) -> None:
    """Checks that nested parameters hold neither NaN nor infinity.

    Args:
        parameters: Tensors, and dicts and lists of them; other things are passed over.
        source: Where they come from, for the message.

    Raises:
        ArtifactError: If they do; names the tensor.
    """
    entries = enumerate(parameters) if isinstance(parameters, list) else parameters.items()
    for name, value in entries:
        if isinstance(value, (dict, list)):
            check_finite(value, source)
        elif isinstance(value, th.Tensor) and value.is_floating_point() and not th.isfinite(value).all():
            raise ArtifactError(f"{source}: '{name}' holds NaN or infinity; train it again")


def save_replay_buffer(buffer: Any, path: Path) -> None:
    """Writes what is in a replay buffer, as plain arrays."""
    filled = buffer.buffer_size if buffer.full else buffer.pos
    arrays: dict[str, Any] = {name: array[:filled] for name, array in buffer_arrays(buffer).items()}
    np.savez(path, position=buffer.pos, full=buffer.full, **arrays)


def restore_replay_buffer(buffer: Any, path: Path) -> None:
    """Fills a replay buffer of the same size with what :func:`save_replay_buffer` wrote.

    Raises:
        ArtifactError: If the file is missing or damaged.
    """
    with whole(path, "replay buffer", "train again"), np.load(path, allow_pickle=False) as arrays:
        filled = len(arrays["rewards"])
        for name, array in buffer_arrays(buffer).items():
            array[:filled] = arrays[name]
        buffer.pos, buffer.full = int(arrays["position"]), bool(arrays["full"])


def buffer_arrays(buffer: Any) -> dict[str, NDArray[Any]]:
    """Returns what a replay buffer holds: Stable-Baselines3's arrays, and the columns of a slate buffer."""
    arrays: dict[str, NDArray[Any]] = {}
    for name in _BUFFER_ARRAYS:
        content = getattr(buffer, name)
        entries = content if isinstance(content, dict) else {"": content}
        arrays |= {f"{name}.{key}" if key else name: array for key, array in entries.items()}
    return arrays | getattr(buffer, "columns", {})
