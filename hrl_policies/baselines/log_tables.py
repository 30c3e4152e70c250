"""What the training log says of items: exposure, quality, and which items are liked by the same users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.actions import top_k
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.worlds import World

NEIGHBOURS = 50
_ITEMS_AT_ONCE = 512


@dataclass(frozen=True)
class ItemTables:
    """Statistics of items in the training log of a world, and of nothing else.

    The first ``N`` of ``M`` items are the candidates, in the environment's order; ``item_ids`` says which they are.

    Attributes:
        item_ids: ``int64 (M,)``, raw ids.
        exposures: ``int64 (M,)``, how often each item was shown.
        clicks: ``int64 (M,)``, how often it was clicked.
        neighbours: ``int64 (M, S)``, the ``S`` candidates most similar to each item, best first, never the item itself.
        similarities: ``float32 (M, S)``, their item-CF cosine; 0 where no user clicked both.
    """

    item_ids: NDArray[np.int64]
    exposures: NDArray[np.int64]
    clicks: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    similarities: FloatArray

    @classmethod
    def of_world(cls, world: World, neighbours: int = NEIGHBOURS) -> ItemTables:
        """Counts a world's training log.

        Args:
            world: Either world of a pair; both hold the same training log.
            neighbours: Similar candidates ``S`` to keep of each item; fewer where there are not as many. 0 keeps
                none, and saves the time to find them.

        Raises:
            ValueError: If ``neighbours`` is negative.
        """
        if neighbours < 0:
            raise ValueError(f"neighbours must not be negative, got {neighbours}")
        log, items = world.data.train, len(world.data.items)
        near, similarities = _neighbours(world, min(neighbours, world.n_items - 1))
        return cls(world.data.items.ids, log.exposures(items), log.click_counts(items), near, similarities)

    @property
    def popularity(self) -> FloatArray:
        """``float32 (M,)``, exposures scaled to [0, 1]; 0 throughout if all items were shown as often."""
        spread = max(int(self.exposures.max() - self.exposures.min()), 1)
        scaled: FloatArray = ((self.exposures - self.exposures.min()) / spread).astype(np.float32)
        return scaled

    @property
    def quality(self) -> FloatArray:
        """``float32 (M,)``, the smoothed click rate ``(clicks + 1) / (exposures + 2)``."""
        rate: FloatArray = ((self.clicks + 1.0) / (self.exposures + 2.0)).astype(np.float32)
        return rate

    @property
    def novelty(self) -> FloatArray:
        """``float32 (M,)``, DNaIR's ``quality / log10(popularity + 1.1)``, divided by its maximum."""
        raw = self.quality / np.log10(self.popularity + 1.1)
        scaled: FloatArray = (raw / raw.max()).astype(np.float32)
        return scaled

    def inverse_exposures(self, power: float) -> FloatArray:
        """Returns ``float32 (M,)``, ``(mean exposure / exposure) ** power``; items never shown count as shown once."""
        shown = np.maximum(self.exposures, 1)
        weights: FloatArray = ((shown.mean() / shown) ** power).astype(np.float32)
        return weights


def _neighbours(world: World, count: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Returns the most similar candidates of every item by ``|U_i & U_j| / sqrt(|U_i| |U_j|)``, ``U`` who clicked."""
    from scipy import sparse

    if not count:
        return np.zeros((len(world.data.items), 0), np.int64), np.zeros(
            (len(world.data.items), 0), np.float32
        )
    log = world.data.train
    clicked = sparse.csr_matrix(
        (np.ones(int(log.clicks.sum()), np.float32), (log.items[log.clicks], log.users[log.clicks])),
        shape=(len(world.data.items), len(world.data.users)),
    )
    # Who clicked an item twice is one user.
    clicked.data[:] = 1.0
    norms = np.sqrt(np.maximum(np.asarray(clicked.sum(axis=1), np.float32)[:, 0], 1.0))
    scaled = sparse.diags(1.0 / norms).dot(clicked).tocsr().astype(np.float32)
    candidates = scaled[: world.n_items].T.tocsr()
    near = np.empty((scaled.shape[0], count), np.int64)
    similarities = np.empty(near.shape, np.float32)
    for low in range(0, len(near), _ITEMS_AT_ONCE):
        rows = slice(low, min(low + _ITEMS_AT_ONCE, len(near)))
        block = (scaled[rows] @ candidates).toarray()
        own = np.arange(rows.start, min(rows.stop, world.n_items))
        block[own - low, own] = -1.0
        near[rows] = top_k(block, count)
        similarities[rows] = np.take_along_axis(block, near[rows], axis=1)
    return near, similarities
