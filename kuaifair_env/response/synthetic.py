"""The truth of a synthetic twin as a response model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import load_artifact, save_artifact, take_setting, take_tensors
from kuaifair_env.response.base import BernoulliFeedback, HistoryWindow, sigmoid
from kuaifair_env.synthetic.truth import TruePreference, TwinTruth

KIND = "twin"


class TwinResponse(BernoulliFeedback):
    """Clicks by the true distribution of a twin; the history does not matter.

    Args:
        truth: The distribution.
        conformity: Share of conformity in the clicks: 0 is true preference (the twin's test world), 1 what people do
            in the training world.
        provenance: What the truth belongs to, JSON-able, such as ``twin.data.provenance.as_dict()``.
    """

    uses_history = False

    def __init__(
        self, truth: TwinTruth, conformity: float = 0.0, provenance: Mapping[str, Any] | None = None
    ) -> None:
        if not np.isfinite(conformity):
            raise ValueError(f"conformity must be a finite number, got {conformity}")
        self.truth = truth
        self.conformity = float(conformity)
        self.provenance = dict(provenance or {})
        self.n_users = truth.n_users
        self.n_items = truth.n_items

    @property
    def true_preference(self) -> TruePreference:
        """The latent taste of users and items, for measuring recovery; agents never see it."""
        return self.truth.true_preference

    @cached_property
    def _users(self) -> FloatArray:
        """User sides of one inner product that holds taste, both effects and conformity."""
        truth = self.truth
        columns = (np.ones(self.n_users), truth.user_effects, self.conformity * truth.herding)
        parts = [truth.user_vectors * truth.taste_strength, *(column[:, None] for column in columns)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    @cached_property
    def _items(self) -> FloatArray:
        truth = self.truth
        columns = (truth.item_effects, np.ones(self.n_items), truth.popularity)
        parts = [truth.item_vectors, *(column[:, None] for column in columns)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def expected(self, users: IntArray, items: IntArray, history: HistoryWindow | None = None) -> FloatArray:
        """Returns ``float32 (B, K)`` click probabilities for ``users (B,)`` and ``items (B, K)``."""
        return sigmoid(np.einsum("bd,bkd->bk", self._users[users], self._items[items]))

    def expected_catalogue(
        self, users: IntArray, n_items: int, history: HistoryWindow | None = None
    ) -> FloatArray:
        """Returns ``float32 (B, n_items)`` click probabilities of items ``0 .. n_items - 1``."""
        return sigmoid(self._users[users] @ self._items[:n_items].T)

    def rearranged(self, items: IntArray) -> TwinResponse:
        """Returns the same users for the catalogue ``old_items[items]``."""
        return TwinResponse(self.truth.rearranged(items), self.conformity, self.provenance)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically."""
        truth = self.truth
        tensors = {
            "user_vectors": truth.user_vectors,
            "item_vectors": truth.item_vectors,
            "item_effects": truth.item_effects,
            "user_effects": truth.user_effects,
            "herding": truth.herding,
            "popularity": truth.popularity,
        }
        settings = {
            "taste_strength": truth.taste_strength,
            "conformity": self.conformity,
            "provenance": self.provenance,
        }
        save_artifact(path, KIND, tensors, settings)

    @classmethod
    def load(cls, path: str | Path) -> TwinResponse:
        """Reads what :meth:`save` wrote.

        Raises:
            ArtifactError: If the file is missing, damaged or something else.
        """
        _, tensors, settings = load_artifact(path, KIND)
        users, dimensions = np.shape(tensors.get("user_vectors", np.zeros((0, 0))))
        items = len(tensors.get("item_effects", ()))
        shapes = {
            "user_vectors": (users, dimensions),
            "item_vectors": (items, dimensions),
            "item_effects": (items,),
            "user_effects": (users,),
            "herding": (users,),
            "popularity": (items,),
        }
        take_tensors(path, tensors, shapes)
        strength = take_setting(path, settings, "taste_strength")
        conformity = take_setting(path, settings, "conformity")
        if not all(isinstance(value, (int, float)) for value in (strength, conformity)):
            raise ArtifactError(f"{path}: taste_strength and conformity must be numbers")
        truth = TwinTruth(**{name: tensors[name] for name in shapes}, taste_strength=float(strength))
        return cls(truth, float(conformity), settings.get("provenance"))

    def describe(self) -> dict[str, Any]:
        """Returns kind, sizes and strengths, JSON-able."""
        return {
            "kind": KIND,
            "users": self.n_users,
            "items": self.n_items,
            "taste_strength": self.truth.taste_strength,
            "conformity": self.conformity,
            "fitted": False,
            "provenance": self.provenance,
        }
