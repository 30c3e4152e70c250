"""The figures that the paper prints (arXiv:2603.03820, Tables 1 to 4), for showing beside ours.

They come from another world: the paper's simulators were never released, so a difference between its numbers and ours
says nothing about either method. The paper does not state what its ``±`` means; with three seeds, one of them 0.000,
it reads as a standard deviation.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from hrl_policies.study.labels import Task, Variant

PAPER_EPISODES = 20_000
"""Training sessions behind the paper's Table 4, as it counts them."""

_TIMED_MAX_LEN = 30


@dataclass(frozen=True)
class PublishedResult:
    """A row of the paper's Table 2 or 3 at one horizon.

    Attributes:
        data: ``"KuaiRec"`` or ``"KuaiRand-Pure"``.
        name: The method's name in the paper (SAC4IR, which its tables print as SAC4IF).
        max_len: Horizon.
        table: 2 or 3; the row "+DSRM" of Table 3 is "Ours" of Table 2, digit for digit, and not repeated.
        means: ``len``, ``r_each``, ``r_cum`` and ``ad``.
        spreads: Numbers behind ``±``, by the same names.
    """

    data: str
    name: str
    max_len: int
    table: int
    means: dict[str, float]
    spreads: dict[str, float]


@dataclass(frozen=True)
class PublishedLog:
    """A row of the paper's Table 1.

    Attributes:
        data: ``"KuaiRec"`` or ``"KuaiRand-Pure"``.
        split: ``"train"`` or ``"test"``.
        users: Number of users.
        items: Number of items.
        interactions: Number of interactions, rounded to hundreds.
    """

    data: str
    split: str
    users: int
    items: int
    interactions: int


_FIGURES = ("len", "r_each", "r_cum", "ad")


def _read_results() -> Iterator[PublishedResult]:
    text = resources.files("hrl_policies.study").joinpath("published.csv").read_text("utf-8")
    for row in csv.DictReader(text.splitlines()):
        yield PublishedResult(
            data=row["data"],
            name=row["method"],
            max_len=int(row["max_len"]),
            table=int(row["table"]),
            means={name: float(row[name]) for name in _FIGURES},
            spreads={name: float(row[f"{name}_spread"]) for name in _FIGURES},
        )


PUBLISHED_RESULTS = tuple(_read_results())
"""All 52 rows of Tables 2 and 3."""

PUBLISHED_LOGS = (
    PublishedLog("KuaiRec", "train", 7_176, 10_728, 12_530_800),
    PublishedLog("KuaiRec", "test", 1_411, 3_327, 4_676_500),
    PublishedLog("KuaiRand-Pure", "train", 26_285, 7_551, 1_436_600),
    PublishedLog("KuaiRand-Pure", "test", 27_285, 7_583, 1_186_100),
)
"""Table 1. The 26,285 training users of KuaiRand-Pure are likely a misprint: the log that it describes has 27,285."""

PUBLISHED_SECONDS = {
    "A2C": 7_512.144,
    "SAC4IR": 6_754.545,
    "DNaIR": 5_934.623,
    "HRL": 8_462.525,
    "+RCE": 29_919.296,
    "Ours": 15_909.175,
}
"""Table 4: training time in seconds on KuaiRec, Max Len 30, 20,000 episodes, on a machine that is not named."""


def paper_data(*names: str) -> str | None:
    """Returns the paper's name of the data set behind a world, or None if the paper has no such world.

    Args:
        *names: Names of the world and of its data; a twin counts as a world like its original's.
    """
    for data, mark in (("KuaiRec", "kuairec"), ("KuaiRand-Pure", "kuairand")):
        if any(mark in name.lower() for name in names):
            return data
    return None


def published_result(task: Task, variant: Variant, max_len: int) -> PublishedResult | None:
    """Returns the paper's row for a method in a world, or None if it has none.

    Args:
        task: The world; its horizon is ignored.
        variant: The method.
        max_len: Horizon.
    """
    key = (paper_data(task.world, task.data), variant.paper_name, max_len)
    return next((row for row in PUBLISHED_RESULTS if (row.data, row.name, row.max_len) == key), None)


def published_seconds(task: Task, variant: Variant) -> float | None:
    """Returns the paper's training time of a method; it has times for one world and one horizon only."""
    if paper_data(task.world, task.data) != "KuaiRec" or task.max_len != _TIMED_MAX_LEN:
        return None
    return PUBLISHED_SECONDS.get(variant.paper_name or "")
