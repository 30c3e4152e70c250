"""Purifiers as files: one safetensors file each, with everything that is needed to use and to judge it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dsrm.purifier import StatePurifier
from kuaifair_env.artifacts import Family, Tensors, load_artifact, save_artifact
from kuaifair_env.data.files import file_hash
from kuaifair_env.errors import ArtifactError

PURIFIERS = Family("kuaifair-purifier", 1, "state purifier")

_CLASSES: dict[str, tuple[str, str]] = {
    "identity": ("dsrm.controls", "IdentityPurifier"),
    "ips": ("dsrm.controls", "IPSPurifier"),
    "noise": ("dsrm.controls", "NoisePurifier"),
    "linear_debias": ("dsrm.controls", "LinearDebiasPurifier"),
    "regression": ("dsrm.regression", "RegressionPurifier"),
    "diffusion": ("dsrm.model", "DSRM"),
    "tce": ("dsrm.click_denoisers", "ClickDenoiser"),
    "rce": ("dsrm.click_denoisers", "ClickDenoiser"),
    "bod": ("dsrm.click_denoisers", "ClickDenoiser"),
}


@runtime_checkable
class SavablePurifier(StatePurifier, Protocol):
    """A purifier that can be written to a file."""

    kind: str

    def parts(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns tensors and JSON-able settings from which the class's ``from_parts`` restores it."""
        ...


def save_purifier(purifier: StatePurifier, path: str | Path) -> None:
    """Writes a purifier of this library to one safetensors file, atomically.

    Raises:
        ArtifactError: If it is none of this library's, or the path is a folder.
    """
    if not isinstance(purifier, SavablePurifier) or purifier.kind not in _CLASSES:
        raise ArtifactError(
            f"{type(purifier).__name__} cannot be saved: it needs a kind that this library can load and parts()"
        )
    tensors, settings = purifier.parts()
    save_artifact(path, purifier.kind, tensors, settings, PURIFIERS)


def load_purifier(path: str | Path) -> StatePurifier:
    """Reads what :func:`save_purifier` wrote. Nothing in the file is executed.

    Raises:
        ArtifactError: If the file is missing, truncated, altered, foreign or of another version.
    """
    kind, tensors, settings = load_artifact(path, family=PURIFIERS)
    if kind not in _CLASSES:
        raise ArtifactError(f"{path} holds a purifier of the unknown kind '{kind}'")
    module, name = _CLASSES[kind]
    restore: Callable[[Tensors, Mapping[str, Any]], StatePurifier]
    restore = getattr(import_module(module), name).from_parts
    try:
        return restore(tensors, settings)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not a whole purifier of kind '{kind}' ({error})") from error


def purifier_hash(path: str | Path) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a purifier's file: what a run's configuration names it by."""
    return file_hash(path)[:16]
