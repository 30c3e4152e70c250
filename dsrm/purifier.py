"""The protocol of state purifiers, the worlds that they fit, what they read of a window, and their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from kuaifair_env.catalogue import ids_hash, same_sums, signed_sum
from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.errors import ArtifactError, MismatchError
from kuaifair_env.files import Family, Tensors, file_hash, open_artifact, save_artifact
from kuaifair_env.observations import StateObserver, StateSpace
from kuaifair_env.pooling import embedding_sums, mean_embeddings
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

Mode = Literal[
    "belief",
    "closed_form",
    "candidates",
    "gaussian",
    "mixture",
    "belief_regression",
    "profile",
    "paper",
    "unbiased",
    "paired",
    "regression",
    "linear_debias",
    "ips",
    "identity",
    "noise",
    "tce",
    "rce",
    "bod",
    "cdae",
    "diffrec",
]
MODES: tuple[Mode, ...] = get_args(Mode)
"""How purifiers are made; see :class:`dsrm.pretraining.PretrainConfig`."""

BELIEF_MODES: tuple[Mode, ...] = ("belief", "closed_form", "candidates", "gaussian", "mixture", "belief_regression")
"""Those whose purifiers follow sessions; see :class:`dsrm.belief_purifier.BeliefPurifier`."""

Target = Literal["profile", "unbiased", "paired"]

ItemQuality = Literal["log", "features"]
"""Targets that the regression control learns."""

PURIFIERS = Family("kuaifair-purifier", 4, "state purifier", "pretrain it again (kuaifair pretrain)")

_PROPENSITY_EXPONENT, _CLIP_QUANTILE = 0.5, 0.95
_CLASSES: dict[str, tuple[str, str]] = {
    "identity": ("dsrm.baselines", "IdentityPurifier"),
    "ips": ("dsrm.baselines", "IPSPurifier"),
    "noise": ("dsrm.baselines", "NoisePurifier"),
    "linear_debias": ("dsrm.baselines", "LinearDebiasPurifier"),
    "regression": ("dsrm.baselines", "RegressionPurifier"),
    "diffusion": ("dsrm.model", "DSRM"),
    "tce": ("dsrm.click_denoisers", "ClickDenoiser"),
    "rce": ("dsrm.click_denoisers", "ClickDenoiser"),
    "bod": ("dsrm.click_denoisers", "ClickDenoiser"),
    "belief": ("dsrm.belief_purifier", "BeliefPurifier"),
    "candidates": ("dsrm.candidates", "CandidatePurifier"),
    "cdae": ("dsrm.click_vector_purifier", "ClickVectorPurifier"),
    "diffrec": ("dsrm.click_vector_purifier", "ClickVectorPurifier"),
}

STATISTICS = (
    "clicked_popularity_mean",
    "clicked_popularity_spread",
    "clicked_popular_share",
    "shown_popularity_mean",
    "shown_popular_share",
    "window_length",
    "mean_feedback",
)
"""The statistics of a window that a condition holds, in this order."""


@runtime_checkable
class StatePurifier(Protocol):
    """Turns observed states ``s~`` into purified states ``s^`` (the paper's ``Pi_theta``).

    Purifying is a pure function of one row: the same state and window give the same purified state in any batch,
    process and order. A purifier that draws random numbers keys them by its seed and the bytes of the state.
    """

    def bind(self, world: World) -> spaces.Box:
        """Checks that the purifier fits a world, and returns the space of purified states.

        Args:
            world: Whose states are to be purified.

        Raises:
            MismatchError: If the purifier was made for another dimension, catalogue or data set.
        """
        ...

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """Returns the purified states.

        Args:
            states: ``float32 (B, d)``, observed states ``s~_t``.
            window: The items and feedback behind them (see :func:`history_length_of`).

        Returns:
            ``float32 (B, d_out)``, within the space that :meth:`bind` returned.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Returns kind, configuration and provenance, JSON-able."""
        ...


def history_length_of(purifier: StatePurifier, world: World) -> int | None:
    """Returns how many places of what users saw a purifier takes: its attribute ``history_length``, if it has one.

    Others take the world's ``H`` places. With None a purifier takes the log context and the whole session.
    """
    length: int | None = getattr(purifier, "history_length", world.history_length)
    return length


class BasePurifier(StatePurifier):
    """Base class of this library's purifiers: what a :class:`StatePurifier` needs to be saved and loaded.

    Attributes:
        kind: Under which :func:`load_purifier` finds the class.
    """

    kind: str

    def settings(self) -> dict[str, Any]:
        """Returns the JSON-able part of the purifier: configuration, world and provenance."""
        return {}

    def tensors(self) -> Tensors:
        """Returns the arrays of the purifier by name."""
        return {}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> BasePurifier:
        """Makes a purifier from what :meth:`tensors` and :meth:`settings` returned."""
        return cls(**settings)

    def describe(self) -> dict[str, Any]:
        """See :class:`StatePurifier`."""
        return {"kind": self.kind, **self.settings()}


def state_space(bound: float, dimension: int) -> spaces.Box:
    """Returns the space of states whose components lie within ``[-bound, bound]``."""
    return spaces.Box(-float(bound), float(bound), (dimension,), np.float32)


def purified_space(purifier: StatePurifier, world: World) -> StateSpace:
    """Binds a purifier to a world and returns the space of its states, which says by which purifier."""
    space = purifier.bind(world)
    if isinstance(space, StateSpace):
        return space
    description = purifier.describe()
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:8]
    states = f"purified by {description.get('kind')} {digest}"
    return StateSpace(space.low, space.high, space.shape, states, world.catalogue)


def observed_bound(world: World) -> float:
    """Returns the largest absolute value of a component of an observed state ``s~``."""
    return float(cast(spaces.Box, StateObserver(world).space).high.max())


@dataclass(frozen=True)
class WorldKey:
    """What identifies the data, the catalogue and the item embeddings that a purifier was trained on.

    Attributes:
        data_name: Name of the data set.
        data_origin: ``"real"``, ``"partial"``, ``"twin"`` or ``"own"``.
        data_hash: Hash of ids and logs.
        items: Number of items ``M``.
        items_hash: Hash of the item ids, in increasing order.
        dimension: Size ``d`` of an embedding.
        fingerprint: ``d`` numbers that change with any embedding; see :func:`~kuaifair_env.catalogue.signed_sum`.
    """

    data_name: str
    data_origin: str
    data_hash: str
    items: int
    items_hash: str
    dimension: int
    fingerprint: tuple[float, ...]

    @classmethod
    def of_world(cls, world: World) -> WorldKey:
        """Returns the key of a world; both worlds of a pair have the same."""
        provenance = world.data.provenance
        return cls(
            provenance.name,
            provenance.origin,
            world.data.data_hash,
            len(world.data.items),
            ids_hash(np.sort(world.data.items.keys)),
            world.dimension,
            tuple(float(f"{value:.6g}") for value in signed_sum(world.data.items.keys, world.embeddings)),
        )

    def check(self, world: World) -> None:
        """Checks that a world is the one.

        Raises:
            MismatchError: If it is not; says what differs.
        """
        now = WorldKey.of_world(world)
        for what, expected, actual in (
            ("states of dimension", self.dimension, now.dimension),
            ("a catalogue of", f"{self.items} items", f"{now.items} items"),
            ("the item ids with hash", self.items_hash, now.items_hash),
            (
                "the data with hash",
                f"{self.data_hash} ({self.data_name}, {self.data_origin})",
                f"{now.data_hash} ({now.data_name}, {now.data_origin})",
            ),
        ):
            if expected != actual:
                raise MismatchError(
                    f"the purifier was made for {what} {expected}, but this environment has {actual}; pretrain one for "
                    "this environment (kuaifair pretrain)"
                )
        if not same_sums(self.fingerprint, now.fingerprint):
            raise MismatchError(
                "the purifier was made for other item embeddings (same catalogue, same dimension, other vectors); "
                "use the encoder that it was trained with, or pretrain one for these"
            )


def propensity_weights(exposures: NDArray[np.int64]) -> FloatArray:
    """Returns inverse-propensity weights of items, ``w_j = min(e_j ** -0.5, w_max)``, with mean 1, ``float32 (M,)``.

    The propensity ``e_j`` of an item is its share of the training ``exposures``, with one exposure added to each, and
    ``w_max`` the 95 % quantile of the weights of *exposed* items.
    """
    propensity = (exposures + 1.0) / (exposures.sum() + len(exposures))
    weights = propensity**-_PROPENSITY_EXPONENT
    exposed = exposures > 0
    if exposed.any():
        weights = np.minimum(weights, np.quantile(weights[exposed], _CLIP_QUANTILE))
    return np.asarray(weights / weights.mean(), np.float32)


def condition_size(dimension: int) -> int:
    """Returns the size of a condition, ``2 d + 7``, for states of size ``d``."""
    return 2 * dimension + len(STATISTICS)


@dataclass(frozen=True)
class ConditionBuilder:
    """Computes conditions ``c_t`` from observed states and windows.

    A condition holds the observed state ``s~_t``, the inverse-propensity mean of the window's clicked items (the same
    mean with rare items counting more), and seven statistics of the window: mean and standard deviation of the
    log-popularity of the clicked items, share of popular items among them, mean log-popularity and popular share of
    the shown items, share of places filled, and click rate.

    Attributes:
        embeddings: ``float32 (M, d)``, agent-side item embeddings.
        weights: ``float32 (M,)``, inverse-propensity weights.
        popularity: ``float32 (M,)``, standardised ``log(1 + exposures)`` of the training log.
        popular: ``bool (M,)``, whether an item is popular. Items that are no candidates count as popular from the
            least exposed popular candidate on.
    """

    embeddings: FloatArray
    weights: FloatArray
    popularity: FloatArray
    popular: BoolArray

    @classmethod
    def of_world(cls, world: World) -> ConditionBuilder:
        """Builds the tables from the data of a world; both worlds of a pair give the same tables."""
        exposures = world.data.train.exposures(len(world.data.items))
        min_exposures = exposures[: world.n_items][world.groups.popular].min()
        popular = exposures >= min_exposures
        popular[: world.n_items] = world.groups.popular
        weights = propensity_weights(exposures)
        return cls(world.embeddings, weights, log_popularity(exposures).astype(np.float32), popular)

    @property
    def dimension(self) -> int:
        """Size ``d`` of the observed state."""
        return int(self.embeddings.shape[1])

    def weighted_sums(self, window: HistoryWindow) -> tuple[FloatArray, FloatArray]:
        """Returns sums over the clicked items: of weighted embeddings, ``float32 (B, d)``, and of weights, ``(B,)``."""
        weights = self._click_weights(window)
        return embedding_sums(self.embeddings, window.items, weights), weights.sum(axis=1)

    def ips_state(self, window: HistoryWindow) -> FloatArray:
        """Returns the self-normalised inverse-propensity mean of the clicked items' embeddings, ``float32 (B, d)``."""
        return mean_embeddings(self.embeddings, window.items, self._click_weights(window))

    def statistics(self, window: HistoryWindow) -> FloatArray:
        """Returns :data:`STATISTICS`, ``float32 (B, 7)``; zero where nothing was shown or clicked."""
        shown = window.items >= 0
        length = np.maximum(shown.sum(axis=1), 1).astype(np.float32)
        clicks = np.maximum(window.clicks.sum(axis=1), 1).astype(np.float32)
        popularity = self.popularity.take(window.items)
        popular = self.popular.take(window.items)
        result = np.empty((len(window.items), len(STATISTICS)), np.float32)
        mean = (popularity * window.clicks).sum(axis=1) / clicks
        square = (popularity * popularity * window.clicks).sum(axis=1) / clicks
        result[:, 0] = mean
        result[:, 1] = np.sqrt(np.maximum(square - mean * mean, 0.0))
        result[:, 2] = (popular & window.clicks).sum(axis=1) / clicks
        result[:, 3] = (popularity * shown).sum(axis=1) / length
        result[:, 4] = (popular & shown).sum(axis=1) / length
        result[:, 5] = shown.mean(axis=1)
        result[:, 6] = window.clicks.sum(axis=1) / length
        return result

    def build(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """Returns the conditions, ``float32 (B, 2 d + 7)``, of states ``(B, d)`` and the windows behind them."""
        return np.concatenate([states, self.ips_state(window), self.statistics(window)], axis=1)

    def _click_weights(self, window: HistoryWindow) -> FloatArray:
        return window.clicks * self.weights.take(window.items)


class WorldPurifier(BasePurifier):
    """Base class of purifiers that read the tables of a world's items, and mostly fit that world alone.

    Args:
        key: The world that the purifier was trained on; None fits any.
        report: Quality of the training and provenance, JSON-able.

    Attributes:
        config: A dataclass of settings.
    """

    config: Any

    def __init__(self, key: WorldKey | None, report: Mapping[str, Any]) -> None:
        self.key = key
        self.report = dict(report)
        self._builder: ConditionBuilder | None = None
        self._ids: NDArray[np.int64] | None = None

    def bind(self, world: World) -> spaces.Box:
        """See :class:`StatePurifier`; worlds with the same items in the same order share the tables."""
        if self.key is not None:
            self.key.check(world)
        ids = world.data.items.keys
        if self._ids is not None and not np.array_equal(ids, self._ids):
            raise MismatchError(
                "the purifier is in use in an environment with other items, or in another order; load it a second time"
            )
        if self._builder is None:
            self._builder, self._ids = ConditionBuilder.of_world(world), ids
        return state_space(observed_bound(world), world.dimension)

    @property
    def builder(self) -> ConditionBuilder:
        """The tables of the world.

        Raises:
            MismatchError: If the purifier is not bound.
        """
        if self._builder is None:
            raise MismatchError("the purifier is bound to no world; wrap an environment with it, or call bind(world)")
        return self._builder

    def settings(self) -> dict[str, Any]:
        """See :class:`BasePurifier`."""
        world = None if self.key is None else asdict(self.key)
        return {"config": asdict(self.config), "world": world, "report": self.report}


def save_purifier(purifier: StatePurifier, path: str | Path) -> None:
    """Writes a purifier of this library to one safetensors file, atomically.

    Raises:
        ArtifactError: If it is none of this library's, or the path is a folder.
    """
    if not isinstance(purifier, BasePurifier) or purifier.kind not in _CLASSES:
        raise ArtifactError(f"{type(purifier).__name__} is none of this library's purifiers and cannot be saved")
    save_artifact(path, purifier.kind, purifier.tensors(), purifier.settings(), PURIFIERS)


def load_purifier(path: str | Path) -> StatePurifier:
    """Reads what :func:`save_purifier` wrote. Nothing in the file is executed.

    Raises:
        ArtifactError: If the file is missing, truncated, altered, foreign or of another version.
    """
    with open_artifact(path, family=PURIFIERS) as (kind, tensors, settings):
        if kind not in _CLASSES:
            raise ValueError(f"the kind '{kind}' is unknown; known are {', '.join(_CLASSES)}")
        module, name = _CLASSES[kind]
        purifier_class: type[BasePurifier] = getattr(import_module(module), name)
        return purifier_class.restore(tensors, settings)


def pretraining_checkpoint(path: str | Path) -> Path:
    """Returns where the pretraining of a purifier is kept until the purifier has its file."""
    return Path(path).with_name(Path(path).name + ".partial")


def forget_pretraining(path: str | Path) -> None:
    """Removes the checkpoint that a kill left beside a purifier's file; beside anything else it stays."""
    checkpoint = pretraining_checkpoint(path)
    with suppress(ArtifactError):
        if checkpoint.exists():
            load_purifier(path)
            checkpoint.unlink(missing_ok=True)


def purifier_hash(path: str | Path) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a purifier's file; configurations of runs hold them."""
    return file_hash(path)[:16]
