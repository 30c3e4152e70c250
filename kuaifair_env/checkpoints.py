"""Checkpoints: state as arrays and JSON, in folders that are whole or not there, from which a run goes on as it was.

Nothing that is read back can execute code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import file_hash, fits_checksum, remove_folder, temporary_beside, whole, with_checksum

Arrays = dict[str, NDArray[Any]]

START_ANEW = "remove it and start anew"

_FORMAT, _VERSION = "kuaifair-checkpoint", 2
_STATE, _ARRAYS = "state.json", "arrays.npz"
_AGENT = "agent"
_PREFIX = "checkpoint-"
_PLAIN = (bool, int, float, str, type(None))


class NotPlainError(TypeError):
    """A value is not made of numbers, texts, arrays, tensors and random generators alone."""


def encode(value: Any, arrays: Arrays, name: str) -> Any:
    """Returns a value as JSON-able data, with its arrays put aside under names of their own.

    Args:
        value: Numbers, texts, arrays, torch tensors, NumPy generators, or tuples, lists and dicts of these.
        arrays: Takes the arrays.
        name: How their names begin.

    Raises:
        NotPlainError: If there is something else in it.
    """
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.hasobject:
            raise NotPlainError(f"{name} is an array of Python objects")
        arrays[name] = np.array(value)
        return {"array": name}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.random.Generator):
        return {"generator": encode(value.bit_generator.state, arrays, name)}
    if isinstance(value, (tuple, list)):
        entries = [encode(entry, arrays, f"{name}.{place}") for place, entry in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": entries}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(entry, arrays, f"{name}.{key}") for key, entry in value.items()}}
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        arrays[name] = value.detach().cpu().numpy().copy()
        return {"tensor": name}
    raise NotPlainError(f"{name} is a {type(value).__name__}")


def decode(node: Any, arrays: Mapping[str, NDArray[Any]], like: Any = None) -> Any:
    """Returns what :func:`encode` took.

    Args:
        node: What it returned.
        arrays: The arrays that it put aside.
        like: The present value in this place, if there is any: tensors and generators of the same kind are set in
            place, since others may hold them, and named tuples keep their class.
    """
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "array":
        array = arrays[content]
        return array[()] if array.ndim == 0 else array.copy()
    if kind == "tensor":
        return _tensor(arrays[content], like)
    if kind == "generator":
        return _generator(decode(content, arrays), like)
    if kind == "dict":
        present = like if isinstance(like, dict) else {}
        return {name: decode(entry, arrays, present.get(name)) for name, entry in content.items()}
    alike = isinstance(like, (tuple, list)) and len(like) == len(content)
    entries = [decode(entry, arrays, like[place] if alike else None) for place, entry in enumerate(content)]
    if kind == "list":
        return entries
    return type(like)(*entries) if alike and hasattr(like, "_fields") else tuple(entries)


def plain_attributes(owner: Any) -> dict[str, Any]:
    """Returns the attributes of an object that :func:`encode` takes and that may change, by name."""
    plain = {}
    for name, value in vars(owner).items():
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            continue
        try:
            encode(value, {}, name)
        except NotPlainError:
            continue
        plain[name] = value
    return plain


def set_attributes(owner: Any, attributes: Mapping[str, Any]) -> None:
    """Sets attributes of an object; arrays of the same size in place, since others may hold them."""
    for name, value in attributes.items():
        present = getattr(owner, name, None)
        if isinstance(present, np.ndarray) and isinstance(value, np.ndarray) and present.shape == value.shape:
            present[...] = value
        else:
            setattr(owner, name, value)


def random_states() -> dict[str, Any]:
    """Returns the state of the random numbers that belong to no object: Python's, NumPy's and torch's."""
    torch = sys.modules.get("torch")
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (what Stable-Baselines3 draws from)
        "torch": None if torch is None else torch.get_rng_state(),
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Brings the random numbers that belong to no object into an earlier state."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    if states["torch"] is not None:
        import torch

        torch.set_rng_state(states["torch"])


class CheckpointFolder:
    """The checkpoints of one run; the newest takes the place of the one before.

    Args:
        folder: Where they are.
        identity: What the run is, JSON-able; checkpoints of another run are refused.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(dict(identity)))

    def write(self, number: int, state: Mapping[str, Any], save_agent: Callable[[Path], None]) -> None:
        """Writes a checkpoint and removes the others.

        Args:
            number: Larger than that of the one before.
            state: What :func:`encode` takes.
            save_agent: Writes the agent to the path that it is given, as a file or a folder.

        Raises:
            NotPlainError: If the state holds something else.
        """
        arrays: dict[str, Any] = {}
        encoded = encode(dict(state), arrays, "state")
        path = self.folder / f"{_PREFIX}{number:09d}"
        with temporary_beside(path) as temporary:
            temporary.mkdir()
            save_agent(temporary / _AGENT)
            np.savez(temporary / _ARRAYS, **arrays)
            header = {
                "format": _FORMAT,
                "version": _VERSION,
                "identity": self._identity,
                "files": {name: file_hash(temporary / name) for name in _files(temporary)},
                "state": encoded,
            }
            (temporary / _STATE).write_text(json.dumps(with_checksum(header)), encoding="utf-8")
            older = self._complete()
            os.replace(temporary, path)
        for old in older:
            remove_folder(old)

    def read(self) -> tuple[Any, Mapping[str, NDArray[Any]], Path] | None:
        """Returns the newest checkpoint: its state as :func:`decode` takes it, and where its agent is; None if none.

        Raises:
            ArtifactError: If it is damaged, or another run's.
        """
        complete = self._complete()
        if not complete:
            return None
        path = complete[-1]
        with whole(path, "checkpoint", START_ANEW):
            header = json.loads((path / _STATE).read_text(encoding="utf-8"))
            if (header["format"], header["version"]) != (_FORMAT, _VERSION):
                raise ArtifactError(f"{path} is no checkpoint that this version reads; {START_ANEW}")
            hashes = {_STATE: fits_checksum(header)} | {
                name: file_hash(path / name) == digest for name, digest in header["files"].items()
            }
            for name, fits in hashes.items():
                if not fits:
                    raise ArtifactError(f"{path / name} was altered after it was written; remove {path}")
            with np.load(path / _ARRAYS, allow_pickle=False) as stored:
                arrays = dict(stored)
            check_identity(path, header["identity"], self._identity)
            return header["state"], arrays, path / _AGENT

    def remove(self) -> None:
        """Removes all checkpoints, whole or not."""
        for path in [*self._complete(), *self.folder.glob(f".{_PREFIX}*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}*"))


def check_identity(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that a file belongs to the run at hand.

    Raises:
        ArtifactError: If it is another run's; says in what they differ.
    """
    for name in dict.fromkeys([*now, *stored]):
        if stored.get(name) != now.get(name):
            raise ArtifactError(
                f"{path} belongs to another run: {name} was {stored.get(name)!r} there and is {now.get(name)!r} here; "
                "choose another folder, or remove it"
            )


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _tensor(array: NDArray[Any], like: Any) -> Any:
    import torch

    value = torch.from_numpy(array.copy())
    if isinstance(like, torch.Tensor) and like.shape == value.shape:
        like.data.copy_(value)
        return like
    return value


def _generator(state: Mapping[str, Any], like: Any) -> np.random.Generator:
    if not isinstance(like, np.random.Generator):
        kind = getattr(np.random, str(state["bit_generator"]), None)
        if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
            raise ArtifactError(f"there is no random generator called {state['bit_generator']!r}")
        like = np.random.Generator(kind())
    generator: np.random.Generator = like
    generator.bit_generator.state = state
    return generator
