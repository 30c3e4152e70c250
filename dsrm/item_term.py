"""The item side: what an item is worth to users who did not choose to see it, as one number for every item.

A biased log hides the worth of items as it hides the taste of users. The item term ``q_i`` estimates the log-odds of a
click under uniformly random exposure. It is offered to every agent and every control alike, as one more coordinate of
the item embeddings; a comparison in which only one side has it is void.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dsrm.calibration import DEFAULT_SHARE, calibration_users
from dsrm.item_estimates import (
    Counts,
    boosted,
    calibrated,
    similarity_slope,
    smoothed_logits,
    training_counts,
    user_corrected,
)
from dsrm.purifier import MismatchError
from kuaifair_env.artifacts import Family, Tensors, load_artifact, save_artifact, take_setting
from kuaifair_env.data.schema import FloatArray, InteractionData
from kuaifair_env.errors import ArtifactError
from kuaifair_env.worlds import World

ItemTermMode = Literal["log", "ips", "features", "unbiased"]
ITEM_TERM_MODES: tuple[ItemTermMode, ...] = get_args(ItemTermMode)
ITEM_TERMS = Family("kuaifair-item-term", 1, "item term")


def item_term_mode(name: str) -> ItemTermMode:
    """Returns the mode of a name.

    Raises:
        ValueError: If there is none.
    """
    for mode in ITEM_TERM_MODES:
        if mode == name:
            return mode
    raise ValueError(f"an item term is one of {ITEM_TERM_MODES}, got {name!r}")


@dataclass(frozen=True)
class ItemTerm:
    """Estimated log-odds of a click on every item under random exposure.

    Attributes:
        mode: ``"log"`` (click rate of the training log), ``"ips"`` (corrected for who saw the item), ``"features"``
            (predicted from item features as well), or ``"unbiased"`` (calibrated on the random exposures of declared
            calibration users).
        item_ids: ``int64 (M,)``, raw ids.
        values: ``float32 (M,)``, log-odds.
        similarity: Log-odds per unit of ``cos(s~, e_i)`` on the calibration users' random exposures, or None where
            none were read.
        provenance: Data, users and rows that were read, JSON-able.
    """

    mode: ItemTermMode
    item_ids: NDArray[np.int64]
    values: FloatArray
    similarity: float | None
    provenance: Mapping[str, Any]

    def of(self, data: InteractionData) -> FloatArray:
        """Returns the values in the item order of a data set, ``float32 (M,)``.

        Raises:
            MismatchError: If the data set has other items, or is not the one that the term was fitted on.
        """
        made = self.provenance["data_hash"]
        if made != data.data_hash:
            raise MismatchError(f"the item term was fitted on data {made}, this is {data.data_hash}")
        order = np.argsort(self.item_ids)
        place = np.minimum(np.searchsorted(self.item_ids, data.items.ids, sorter=order), len(order) - 1)
        rows = order[place]
        if len(rows) != len(order) or not np.array_equal(self.item_ids[rows], data.items.ids):
            raise MismatchError("the item term was fitted on another catalogue")
        return self.values[rows]

    def save(self, path: str | Path) -> None:
        """Writes the term to one safetensors file, atomically."""
        settings = {"similarity": self.similarity, "provenance": dict(self.provenance)}
        tensors: Tensors = {"item_ids": self.item_ids, "values": self.values}
        save_artifact(path, self.mode, tensors, settings, ITEM_TERMS)

    @classmethod
    def load(cls, path: str | Path) -> ItemTerm:
        """Reads a term.

        Raises:
            ArtifactError: If the file is missing, damaged or foreign.
        """
        mode, tensors, settings = load_artifact(path, family=ITEM_TERMS)
        if mode not in ITEM_TERM_MODES or not {"item_ids", "values"} <= set(tensors):
            raise ArtifactError(f"{path} is not a whole item term")
        similarity = take_setting(path, settings, "similarity")
        provenance = take_setting(path, settings, "provenance")
        return cls(item_term_mode(mode), tensors["item_ids"], tensors["values"], similarity, provenance)


def fit_item_term(
    world: World, mode: ItemTermMode, *, calibration_share: float = DEFAULT_SHARE, seed: int = 0
) -> ItemTerm:
    """Estimates the item term.

    Users of the test world take no part. Settings (trees, shrinkage) are fixed or chosen by cross-validation over
    calibration users.

    Args:
        world: Either world of a pair; read are its data and its embeddings.
        mode: See :class:`ItemTerm`.
        calibration_share: Share of the test log's users who are calibration users (``unbiased``).
        seed: Seed of trees and folds.

    Raises:
        ValueError: If the mode is unknown, or nobody can calibrate.
    """
    item_term_mode(mode)
    data = world.data
    counts = training_counts(data)
    provenance: dict[str, Any] = {
        "data": data.provenance.name,
        "origin": data.provenance.origin,
        "data_hash": data.data_hash,
        "mode": mode,
        "test_log": "unread",
    }
    similarity = None
    if mode == "log":
        values = smoothed_logits(counts)
    elif mode == "ips":
        values = user_corrected(data)
    elif mode == "features":
        values = boosted(
            item_features(data, counts, with_rates=False), user_corrected(data), counts.shown, seed
        )
    else:
        users = calibration_users(data, calibration_share)
        log = data.test.take(np.isin(data.test.users, users))
        features = item_features(data, counts, with_rates=True)
        fit = calibrated(features, log, seed)
        values = fit.values
        similarity = similarity_slope(world, features, log, fit.prior, seed)
        provenance |= {
            "test_log": f"{len(log):,} rows of {len(users):,} calibration users, who are never judged",
            "prior_rows": fit.prior,
            "log_loss_by_prior": fit.losses,
        }
    return ItemTerm(mode, data.items.ids.copy(), values.astype(np.float32), similarity, provenance)


def with_item_term(world: World, term: ItemTerm) -> World:
    """Returns a world whose item embeddings have the item term as one more coordinate.

    The coordinate is standardised over the candidates, of the order of the others. An agent that acts in embedding
    space then has a weight for it, the observed state holds its mean over the clicked items, and purifiers, scorers and
    policies find it where they find everything else about items. ``world.item_term`` has the log-odds themselves.

    Args:
        world: The world; its embeddings must not hold a term yet.
        term: See :func:`fit_item_term`.

    Raises:
        MismatchError: If the term was fitted on other data, or the world has a term.
    """
    if world.item_term is not None:
        raise MismatchError("the world has an item term already")
    values = term.of(world.data)
    candidates = values[: world.n_items]
    standardised = (values - candidates.mean()) / max(float(candidates.std()), 1e-6)
    # Items that nobody clicked have a zero embedding, by which they are known; they get no coordinate either.
    standardised = np.where(world.embeddings.any(axis=1), standardised, 0.0)
    embeddings = np.column_stack([world.embeddings, standardised]).astype(np.float32)
    return replace(world, embeddings=embeddings, item_term=values)


def item_features(data: InteractionData, counts: Counts, with_rates: bool) -> NDArray[np.float64]:
    """Returns what a tree may look at: the catalogue's features and tags, log exposures, and on request click rates.

    Args:
        data: The data set.
        counts: Training exposures and clicks.
        with_rates: Whether the item's own click rates are among the features.
    """
    columns = [data.items.features.values, data.items.tags, np.log1p(counts.shown)[:, None]]
    if with_rates:
        columns += [smoothed_logits(counts)[:, None], user_corrected(data)[:, None]]
    return np.concatenate([np.asarray(column, np.float64) for column in columns], axis=1)
