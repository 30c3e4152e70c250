"""The protocol of response models, which say how users answer slates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.errors import DataError
from kuaifair_env.files import Tensors, open_artifact, save_artifact

# Arrays, since a small ufunc takes twice as long with a scalar.
_ZERO, _ONE, _LARGEST = (np.asarray(number, np.float32) for number in (0.0, 1.0, 80.0))


class BernoulliFeedback:
    """Feedback 1 with probability ``expected``, else 0; a 1 is a click."""

    def feedback(self, expected: FloatArray, uniforms: NDArray[np.float64]) -> FloatArray:
        """Returns ``float32 (B, K)``: 1 where ``uniforms < expected``, else 0."""
        return (uniforms < expected).astype(np.float32)

    def clicked(self, feedback: FloatArray) -> BoolArray:
        """Returns where feedback is positive, ``bool (B, K)``."""
        return feedback > _ZERO


def sigmoid_of_negated(negated: FloatArray, bounded: bool = False) -> FloatArray:
    """Returns ``1 / (1 + exp(negated))``, in place: the sigmoid of logits that come with their sign turned.

    Args:
        negated: Minus the logits, float32; overwritten.
        bounded: True where no entry can exceed 80 (above which float32 ``exp`` overflows), which saves a pass.
    """
    if not bounded:
        np.minimum(negated, _LARGEST, out=negated)
    np.exp(negated, out=negated)
    np.add(negated, _ONE, out=negated)
    np.reciprocal(negated, out=negated)
    return negated


def sigmoid(logits: NDArray[Any]) -> FloatArray:
    """Returns click probabilities, float32, without overflow at any logit."""
    return sigmoid_of_negated(np.negative(logits, dtype=np.float32))


PADDING = -1
"""Item number that marks an empty place in a history."""


@dataclass(frozen=True)
class HistoryWindow:
    """The last ``L`` items shown to each of ``B`` users, newest last.

    Attributes:
        items: ``int32 (B, L)``, item rows; ``PADDING`` (-1) where there is none, always at the front.
        clicks: ``bool (B, L)``, what was clicked; False at padding.
    """

    items: NDArray[np.int32]
    clicks: BoolArray

    def take(self, rows: IntArray | BoolArray | slice) -> HistoryWindow:
        """Returns the windows of some of the users."""
        return HistoryWindow(self.items[rows], self.clicks[rows])

    def last(self, length: int | None) -> HistoryWindow:
        """Returns the last ``length`` places, padded at the front where there are fewer; None returns all."""
        if length is None:
            return self
        n, width = self.items.shape
        if length <= width:
            return HistoryWindow(self.items[:, width - length :], self.clicks[:, width - length :])
        padding = HistoryWindow.empty(n, length - width)
        items = np.concatenate([padding.items, self.items], axis=1)
        return HistoryWindow(items, np.concatenate([padding.clicks, self.clicks], axis=1))

    @classmethod
    def empty(cls, n: int, length: int) -> HistoryWindow:
        """Returns ``n`` windows of users who saw nothing."""
        return cls(np.full((n, length), PADDING, np.int32), np.zeros((n, length), np.bool_))

    @classmethod
    def concatenate(cls, windows: Sequence[HistoryWindow]) -> HistoryWindow:
        """Returns the windows of all users, one group after the other."""
        return cls(
            np.concatenate([window.items for window in windows]),
            np.concatenate([window.clicks for window in windows]),
        )


class SessionMemory(Protocol):
    """What a response model has read of ``B`` running sessions, so that a step reads only what it adds.

    It stands for the whole history of the sessions wherever a model takes a history; see :func:`session_memory`.
    """

    def reset(self, rows: IntArray, history: HistoryWindow) -> None:
        """Starts new sessions in ``rows (n,)``, with what their users saw before, ``n`` windows."""
        ...

    def append(self, items: IntArray, clicks: BoolArray) -> None:
        """Adds what all sessions saw last, and what was clicked, both ``(B, K)``."""
        ...


History: TypeAlias = HistoryWindow | SessionMemory
"""What users saw before: windows, or the memory of a model for sessions (of all their users, in order)."""


@runtime_checkable
class ResponseModel(Protocol):
    """A batched, deterministic function from users, items and history to expected feedback.

    Randomness stays outside: the session draws uniforms and calls :meth:`feedback`.
    """

    n_users: int
    n_items: int
    uses_history: bool
    """Whether :meth:`expected` reads ``history``; a simulator may skip building it otherwise."""

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """Returns the expected feedback for each pair.

        Args:
            users: ``(B,)`` user rows.
            items: ``(B, K)`` item rows.
            history: What each user saw before; needed when ``uses_history``.

        Returns:
            ``float32 (B, K)``: click probabilities, or expected clipped watch ratios.
        """
        ...

    def feedback(self, expected: FloatArray, uniforms: NDArray[np.float64]) -> FloatArray:
        """Turns expected into realised feedback with the given uniforms in [0, 1), both ``(B, K)``."""
        ...

    def clicked(self, feedback: FloatArray) -> BoolArray:
        """Returns which realised feedback counts as a click in the history, ``bool (B, K)``."""
        ...

    def rearranged(self, items: IntArray) -> ResponseModel:
        """Returns the same model for the catalogue ``old_items[items]`` (see ``InteractionData.arranged``)."""
        ...

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """Returns ``float32 (B, n_items)``, the expected feedback on items ``0 .. n_items - 1`` (for oracles)."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes the model to a folder or file without pickle, atomically."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns kind, sizes, fit report and provenance, JSON-able."""
        ...


class StoredResponse(ABC):
    """Base class of response models that one safetensors file holds, each under the ``kind`` of its class."""

    kind: ClassVar[str]

    @abstractmethod
    def tensors(self) -> Tensors:
        """Returns the arrays of the model by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns the JSON-able part of the model."""

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> Self:
        """Makes a model from what :meth:`tensors` and :meth:`settings` returned.

        Raises:
            ValueError: If something does not fit; KeyError or TypeError, if something is missing or of another type.
        """

    def save(self, path: str | Path) -> None:
        """Writes the model to one safetensors file, atomically."""
        save_artifact(path, self.kind, self.tensors(), self.settings())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
            ArtifactError: If the file is missing, damaged, foreign, of another version or another kind.
        """
        with open_artifact(path, cls.kind) as (_, tensors, settings):
            return cls.restore(tensors, settings)


@runtime_checkable
class _WithMemory(Protocol):
    def session_memory(self, batch_size: int) -> SessionMemory | None: ...


def session_memory(response: ResponseModel, batch_size: int) -> SessionMemory | None:
    """Returns a response model's memory for ``B`` sessions, still empty; None if it has none and takes windows.

    A model has one if it has a method of this name, ``batch_size -> memory``.
    """
    return response.session_memory(batch_size) if isinstance(response, _WithMemory) else None


@runtime_checkable
class TasteResponse(ResponseModel, Protocol):
    """A response model whose users have vectors of taste, which may be exchanged."""

    def tastes(self, users: IntArray) -> FloatArray:
        """Returns ``float32 (B, m)``, the vectors of ``users (B,)``; over all users they are about centred."""
        ...

    def with_tastes(self, users: IntArray, tastes: FloatArray) -> ResponseModel:
        """Returns the same model of ``B`` users, rows ``0 .. B - 1``, who are ``users`` but for their vectors of taste.

        Args:
            users: ``(B,)`` user rows of this model.
            tastes: ``float32 (B, m)``.
        """
        ...


def response_with_tastes(response: ResponseModel) -> TasteResponse:
    """Returns a response model as one whose users have vectors of taste.

    Raises:
        DataError: If they have none.
    """
    if not isinstance(response, TasteResponse):
        raise DataError(
            f"{type(response).__name__} has no vectors of users' tastes that could drift; twins' test worlds and "
            "response='factorised' have"
        )
    return response
