"""Synthetic twins: data sets whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kuaifair_env.data.cache import cached
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import Provenance
from kuaifair_env.synthetic.config import (
    KUAIRAND,
    KUAIREC,
    TOY,
    QuantileDistribution,
    TasteStrength,
    TwinConfig,
    twin_config,
)
from kuaifair_env.synthetic.log import draw_test, draw_train
from kuaifair_env.synthetic.tables import TwinTables, build_tables, catalogue_of, users_of
from kuaifair_env.synthetic.truth import TruePreference, TwinTruth, TwinWorld, build_world
from kuaifair_env.synthetic.watching import calendars

VERSION = 1
"""Raised whenever the same configuration would give another twin; part of the cache key."""


@dataclass(frozen=True)
class Twin:
    """A synthetic data set with the truth behind it.

    Attributes:
        config: Its configuration.
        world: The truth and the hidden causes of the logs.
        data: What an agent, a reader or a response model may see.
    """

    config: TwinConfig
    world: TwinWorld
    data: InteractionData

    @property
    def truth(self) -> TwinTruth:
        """The true distribution of clicks, for test worlds, oracles and measures of recovery."""
        return self.world.truth

    @cached_property
    def tables(self) -> TwinTables:
        """The raw tables of users and items."""
        return build_tables(self.config, self.world)


def generate_twin(config: TwinConfig) -> Twin:
    """Generates a twin from scratch.

    Args:
        config: Sizes, distributions, strengths and seed; see :func:`twin_config`.

    Returns:
        The twin. Its training log comes from a platform that favours popular items and what it believes a
        user likes, clicked with conformity; its test log from unbiased exposure, clicked by true preference
        alone.
    """
    world = build_world(config)
    return Twin(config, world, _draw_data(config, world))


def load_twin(config: TwinConfig, folder: str | Path | None = None) -> Twin:
    """Returns a twin whose logs come from the cache; the first use generates and stores them.

    Args:
        config: As for :func:`generate_twin`.
        folder: The cache folder; None takes the library's own.
    """
    world = build_world(config)
    key = {"name": f"{config.name}-twin", "version": VERSION, "config": config.as_dict()}
    return Twin(config, world, cached(key, lambda: _draw_data(config, world), folder))


def _draw_data(config: TwinConfig, world: TwinWorld) -> InteractionData:
    tables = build_tables(config, world)
    durations = tables.durations_ms
    train_calendar, test_calendar = calendars(config.layout)
    train = draw_train(config, world, durations, train_calendar)
    test = draw_test(config, world, durations, test_calendar)
    return InteractionData(
        users=users_of(config, tables),
        items=catalogue_of(config, world, tables),
        train=train.log,
        test=test,
        provenance=provenance(config),
        report={"feed_lift": train.feed_lift},
    )


def provenance(config: TwinConfig) -> Provenance:
    """Returns the provenance of a twin."""
    unbiased = "a fully observed panel" if config.layout == "kuairec" else "uniformly random exposures"
    return Provenance(
        name=f"{config.name} twin",
        origin="twin",
        description=f"synthetic twin of {config.name}: biased training log, {unbiased} as the test log",
        settings={"version": VERSION, **config.as_dict()},
    )


__all__ = [
    "KUAIRAND",
    "KUAIREC",
    "TOY",
    "QuantileDistribution",
    "TasteStrength",
    "TruePreference",
    "Twin",
    "TwinConfig",
    "TwinTables",
    "TwinTruth",
    "TwinWorld",
    "generate_twin",
    "load_twin",
    "provenance",
    "twin_config",
]
