"""Action spaces: how actions become slates."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.ranking import top_k, top_k_products

ActionMode = Literal["embedding", "slate", "item"]
Duplicates = Literal["error", "replace"]


class SlateSpace(spaces.MultiDiscrete):
    """Ordered slates of ``slate_size`` distinct items out of ``n_items``.

    A ``MultiDiscrete`` whose samples and members have no item twice, so that code which knows ``MultiDiscrete``
    works and random actions are valid.

    Args:
        n_items: Number of candidates ``N``.
        slate_size: Items per slate ``K``, at most ``N``.
        batch: Number of slates in one element, or None for a single slate.
        seed: Seed or generator of :meth:`sample`.
    """

    def __init__(
        self,
        n_items: int,
        slate_size: int,
        batch: int | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        if slate_size > n_items:
            raise ValueError(f"slate_size {slate_size} is larger than the {n_items} candidates")
        self.n_items = n_items
        self.slate_size = slate_size
        self.batch = batch
        shape = (slate_size,) if batch is None else (batch, slate_size)
        super().__init__(np.full(shape, n_items, np.int64), seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> NDArray[np.int64]:
        """Draws distinct items uniformly; ``mask`` is an optional ``bool (n_items,)`` of allowed items."""
        if probability is not None:
            raise ValueError("SlateSpace.sample draws uniformly; it takes a mask, no probability")
        allowed = self.n_items if mask is None else np.flatnonzero(np.asarray(mask))
        if np.size(allowed) < self.slate_size and mask is not None:
            raise ValueError(f"the mask allows {np.size(allowed)} items, too few for slates of {self.slate_size}")
        slates = [self.np_random.choice(allowed, self.slate_size, replace=False) for _ in range(self.batch or 1)]
        return np.asarray(slates, np.int64).reshape(self.shape)

    def contains(self, x: Any) -> bool:
        """Says whether ``x`` holds valid ids of the right shape, none of them twice in a slate."""
        if not super().contains(x):
            return False
        ordered = np.sort(np.asarray(x), axis=-1)
        return not bool((ordered[..., 1:] == ordered[..., :-1]).any())

    def __repr__(self) -> str:
        batch = "" if self.batch is None else f", batch={self.batch}"
        return f"SlateSpace(n_items={self.n_items}, slate_size={self.slate_size}{batch})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlateSpace) and (self.n_items, self.slate_size, self.batch) == (
            other.n_items,
            other.slate_size,
            other.batch,
        )

    __hash__ = None  # type: ignore[assignment]


@batch_space.register(SlateSpace)
def _batch_slate_space(space: SlateSpace, n: int = 1) -> SlateSpace:
    return SlateSpace(space.n_items, space.slate_size, n, seed=deepcopy(space.np_random))


@iterate.register(SlateSpace)
def _iterate_slate_space(space: SlateSpace, items: NDArray[Any]) -> Iterator[NDArray[Any]]:  # type: ignore[misc]
    return iter(items)


class EmbeddingActions:
    """``Box(-1, 1, (d,))``, executed as the top-K items by inner product with the item embeddings.

    Embeddings have one length, so that an item's own embedding, scaled into the box, ranks that item first.

    Args:
        embeddings: ``float32 (N, d)`` of the candidates.
        slate_size: Items per slate ``K``.
    """

    def __init__(self, embeddings: FloatArray, slate_size: int) -> None:
        self._embeddings = np.ascontiguousarray(embeddings.T)
        self._slate_size = slate_size
        self.space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (embeddings.shape[1],), np.float32)

    def decode(self, actions: NDArray[Any], allowed: BoolArray | None) -> NDArray[np.int64]:
        """Returns slates of distinct items.

        Args:
            actions: ``(B, d)``.
            allowed: ``bool (B, N)``, items that may be shown, or None for all.

        Returns:
            ``int64 (B, K)``.

        Raises:
            ValueError: If an action has the wrong shape or type, or NaN.
        """
        dimension = self._embeddings.shape[0]
        if actions.dtype.kind not in "fiu":
            raise ValueError(f"an embedding action holds numbers, got {actions.dtype}")
        actions = actions.astype(np.float32, copy=False)
        if actions.ndim != 2 or actions.shape[1] != dimension:
            raise ValueError(f"an embedding action has shape ({dimension},), got {actions.shape[1:]}")
        if not np.isfinite(actions).all():
            row = int(np.argwhere(~np.isfinite(actions))[0, 0])
            raise ValueError(f"action of session {row} holds NaN or infinity")
        return top_k_products(actions, self._embeddings, self._slate_size, allowed)


class SlateActions:
    """``K`` distinct item ids in order (see :class:`SlateSpace`); ``K = 1`` in ``item`` mode is ``Discrete(N)``.

    Args:
        n_items: Number of candidates ``N``.
        slate_size: Items per slate ``K``.
        single: Whether an action is one plain id.
    """

    def __init__(self, n_items: int, slate_size: int, single: bool = False) -> None:
        self._n_items = n_items
        self._end = np.asarray(n_items, np.uint64)
        self._slate_size = slate_size
        self._single = single
        self.space: spaces.Space[Any] = spaces.Discrete(n_items) if single else SlateSpace(n_items, slate_size)

    def decode(self, actions: NDArray[Any], allowed: BoolArray | None) -> NDArray[np.int64]:
        """Returns the actions as slates; see :meth:`EmbeddingActions.decode`.

        Raises:
            ValueError: If an action has the wrong shape or type, or unknown, repeated or forbidden items.
        """
        items = self._known_items(np.asarray(actions))
        if self._slate_size > 1:
            _refuse_repeated(items)
        if allowed is not None and not np.take_along_axis(allowed, items, axis=1).all():
            row, slot = np.argwhere(~np.take_along_axis(allowed, items, axis=1))[0]
            raise ValueError(
                f"session {row} may not be shown item {items[row, slot]}: it was shown before, and repeats='forbid', "
                "or it is none of the user's own candidates; see action_masks()"
            )
        return items

    def _known_items(self, actions: NDArray[Any]) -> NDArray[np.int64]:
        """Returns actions as ``int64 (B, K)``, a copy: outcomes keep their items, and callers may reuse an array."""
        items = actions[:, None] if self._single and actions.ndim == 1 else actions
        if items.ndim != 2 or items.shape[1] != self._slate_size:
            raise ValueError(f"a slate holds {self._slate_size} item ids, got shape {items.shape[1:]}")
        if items.dtype.kind not in "iu":
            raise ValueError(f"item ids are integers, got {items.dtype}")
        items = items.astype(np.int64)
        # Read as unsigned, a negative id is larger than any item: one comparison checks both ends.
        outside = items.view(np.uint64) >= self._end
        if np.count_nonzero(outside):
            row = int(np.argwhere(outside)[0, 0])
            raise ValueError(f"slate {items[row].tolist()} of session {row} leaves 0..{self._n_items - 1}")
        return items


def _refuse_repeated(slates: NDArray[np.int64]) -> None:
    ordered = slates.astype(np.int32)
    ordered.sort(axis=1)
    in_a_line = ordered.ravel()
    if not np.count_nonzero(in_a_line[1:] == in_a_line[:-1]):
        return
    # What is equal may be the last item of one slate and the first of the next.
    repeated = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if len(repeated):
        row = int(repeated[0, 0])
        raise ValueError(
            f"slate {slates[row].tolist()} of session {row} holds an item twice; duplicates='replace' fills it up"
        )


class FilledSlateActions(SlateActions):
    """``MultiDiscrete`` of ``K`` times ``N``, executed with what cannot be shown replaced.

    The first place of an item in a slate stands. An item that the slate holds already, or that the session may not be
    shown again (``repeats="forbid"``), gives way to the next best: the item most alike by embedding (cosine; the
    smaller row among equals) that may be shown and is not in the slate. A slate follows from the action without chance.

    Args:
        embeddings: ``float32 (N, d)`` of the candidates.
        slate_size: Items per slate ``K``.
    """

    def __init__(self, embeddings: FloatArray, slate_size: int) -> None:
        super().__init__(len(embeddings), slate_size)
        self._units = unit_rows(embeddings)
        self.space = spaces.MultiDiscrete(np.full(slate_size, len(embeddings), np.int64))

    def decode(self, actions: NDArray[Any], allowed: BoolArray | None) -> NDArray[np.int64]:
        """Returns the actions as slates of distinct items; see :meth:`EmbeddingActions.decode`.

        Raises:
            ValueError: If an action has the wrong shape or type, or unknown items, or fewer than ``K`` are allowed.
        """
        slates = self._known_items(np.asarray(actions))
        earlier = np.tril(np.ones((self._slate_size, self._slate_size), np.bool_), -1)
        replaced = ((slates[:, :, None] == slates[:, None, :]) & earlier).any(axis=2)
        if allowed is not None:
            replaced |= ~np.take_along_axis(allowed, slates, axis=1)
        for row in np.flatnonzero(replaced.any(axis=1)):
            free = np.ones(self._n_items, np.bool_) if allowed is None else allowed[row].copy()
            free[slates[row, ~replaced[row]]] = False
            for slot in np.flatnonzero(replaced[row]):
                # One product for each, so that a slate does not depend on the batch it is in.
                likeness = self._units @ self._units[slates[row, slot]]
                slates[row, slot] = top_k(likeness[None], 1, free)[0, 0]
                free[slates[row, slot]] = False
        return slates


def action_decoder(
    mode: ActionMode, embeddings: FloatArray, slate_size: int, duplicates: Duplicates = "error"
) -> EmbeddingActions | SlateActions:
    """Returns the decoder of a mode.

    Args:
        mode: ``"embedding"``, ``"slate"`` or ``"item"``.
        embeddings: ``float32 (N, d)`` of the candidates.
        slate_size: Items per slate; must be 1 in ``item`` mode.
        duplicates: Whether ``slate`` mode refuses a slate with an item twice (``"error"``) or replaces it (see
            :class:`FilledSlateActions`).

    Raises:
        ValueError: If the mode is unknown, or the slate does not fit the mode or the candidates.
    """
    n_items = len(embeddings)
    if not 1 <= slate_size <= n_items:
        raise ValueError(f"slate_size must lie in 1..{n_items} (the number of candidates), got {slate_size}")
    if mode == "embedding":
        return EmbeddingActions(embeddings, slate_size)
    if mode == "slate":
        filled = duplicates == "replace"
        return FilledSlateActions(embeddings, slate_size) if filled else SlateActions(n_items, slate_size)
    if mode == "item":
        if slate_size != 1:
            raise ValueError(f"action_mode='item' shows one item a step; give slate_size=1, not {slate_size}")
        return SlateActions(n_items, 1, single=True)
    raise ValueError(f"action_mode must be one of {get_args(ActionMode)}, got {mode!r}")
