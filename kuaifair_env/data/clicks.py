"""What counts as a click, and what feedback is worth: one definition for readers, twins and their truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.errors import DataError

Behaviour = Literal["is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_profile_enter"]
"""Feedback columns of KuaiRand's logs that can count as the click."""

Positive: TypeAlias = "str | Mapping[str, float]"
FeedbackKind = Literal["click", "watch_ratio"]

WATCH_RATIO = "watch_ratio"
DEFAULT_CLIP = 5.0
"""Largest watch ratio that counts as feedback, as in CIRS and EasyRL4Rec (Gao et al., 2023)."""


@dataclass(frozen=True)
class Clicks:
    """The definition of a click, and of feedback.

    KuaiRec: a view is a click where its watch ratio is at least a threshold. KuaiRand: a view is a click where a logged
    column is 1; with several columns, or a weight other than 1, feedback is the sum of the weights of the columns that
    are 1 (KuaiSim's multi-behaviour reward, Zhao et al., 2023), and a click is feedback above 0.

    Make one with :func:`kuairec_clicks` or :func:`kuairand_clicks`, which check it.

    Attributes:
        positive: ``("watch_ratio", threshold)``, or columns with their weights, sorted by name.
        feedback: ``"click"``, or ``"watch_ratio"`` where feedback is the watch ratio itself.
        clip: Largest watch ratio that feedback may be; None unless ``feedback`` is ``"watch_ratio"``.
    """

    positive: tuple[tuple[str, float], ...]
    feedback: FeedbackKind = "click"
    clip: float | None = None

    @property
    def threshold(self) -> float:
        """Watch ratio from which a view is a click."""
        return dict(self.positive)[WATCH_RATIO]

    @property
    def graded(self) -> bool:
        """Whether feedback is more than whether there was a click."""
        return self.feedback != "click" or any(
            column != WATCH_RATIO and (weight != 1.0 or len(self.positive) > 1) for column, weight in self.positive
        )

    @property
    def largest(self) -> float:
        """Largest feedback that there can be."""
        if self.clip is not None:
            return self.clip
        return math.fsum(weight for _, weight in self.positive) if self.graded else 1.0

    def of_watch_ratios(self, ratios: NDArray[Any]) -> tuple[BoolArray, FloatArray | None]:
        """Returns the clicks of views with these watch ratios, and their feedback where it is graded."""
        clicks = ratios >= ratios.dtype.type(self.threshold)
        return clicks, np.minimum(ratios, self.largest).astype(np.float32) if self.graded else None

    def of_columns(self, columns: Mapping[str, NDArray[Any]]) -> tuple[BoolArray, FloatArray | None]:
        """Returns the clicks of views with these columns of 0 and 1, and their feedback where it is graded."""
        worth = sum(weight * (columns[name] == 1) for name, weight in self.positive)
        return worth > 0, np.asarray(worth, np.float32) if self.graded else None

    def describe(self) -> dict[str, Any]:
        """Returns the settings as a user writes them, JSON-able."""
        return asdict(self) | {"positive": dict(self.positive)}


def kuairec_clicks(
    positive: Positive | None = None, feedback: FeedbackKind = "click", clip: float | None = None
) -> Clicks:
    """Returns what counts as a click in KuaiRec.

    Args:
        positive: ``{"watch_ratio": threshold}``; None takes a threshold of 1, the video watched to its end.
        feedback: ``"click"``: 1 for a click, else 0. ``"watch_ratio"``: the watch ratio, clipped.
        clip: Largest feedback with ``feedback="watch_ratio"``; None means 5.

    Raises:
        DataError: If it is none.
    """
    chosen = {WATCH_RATIO: 1.0} if positive is None else positive
    if not isinstance(chosen, Mapping) or set(chosen) != {WATCH_RATIO}:
        raise DataError(f"a click of KuaiRec is positive={{'watch_ratio': threshold}}, got {positive!r}")
    threshold = _number("the threshold of positive={'watch_ratio': ...}", chosen[WATCH_RATIO])
    if feedback not in get_args(FeedbackKind):
        raise DataError(f"feedback must be one of {', '.join(get_args(FeedbackKind))}, got {feedback!r}")
    if feedback == "click" and clip is not None:
        raise DataError("clip is a setting of feedback='watch_ratio'; drop it, or set that")
    if feedback == "click":
        return Clicks(((WATCH_RATIO, threshold),))
    largest = _number("clip", DEFAULT_CLIP if clip is None else clip)
    if largest < threshold:
        raise DataError(f"clip must be at least the watch ratio of a click, {threshold:g}, got {largest:g}")
    return Clicks(((WATCH_RATIO, threshold),), feedback, largest)


def kuairand_clicks(
    positive: Positive | None = None, feedback: FeedbackKind = "click", clip: float | None = None
) -> Clicks:
    """Returns what counts as a click in KuaiRand.

    Args:
        positive: A column, such as ``"long_view"``, or columns with weights; None takes ``"is_click"``.
        feedback: ``"click"``; there is no other.
        clip: None; there is no other.

    Raises:
        DataError: If it is none.
    """
    if feedback != "click" or clip is not None:
        raise DataError("feedback='watch_ratio' and clip are settings of KuaiRec; KuaiRand takes weights of columns")
    chosen = {positive: 1.0} if isinstance(positive, str) else {"is_click": 1.0} if positive is None else positive
    if not isinstance(chosen, Mapping) or not chosen or set(chosen) - set(get_args(Behaviour)):
        raise DataError(
            f"a click of KuaiRand is a column or weights of several, of {', '.join(get_args(Behaviour))}; "
            f"got {positive!r}"
        )
    return Clicks(tuple((name, _number(f"the weight of {name!r}", chosen[name])) for name in sorted(chosen)))


def parse_positive(settings: Iterable[str]) -> Positive | None:
    """Reads definitions as on the command line: ``watch_ratio=1.0``, ``long_view``, ``is_like=2``; None for none.

    Raises:
        ValueError: If a number is none, or a name stands twice.
    """
    positive: dict[str, float] = {}
    for setting in settings:
        name, _, number = setting.partition("=")
        try:
            value = float(number) if number else 1.0
        except ValueError:
            raise ValueError(f"--positive is NAME or NAME=NUMBER, got {setting!r}") from None
        if name in positive:
            raise ValueError(f"--positive names {name} twice")
        positive[name] = value
    return positive or None


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value < math.inf:
        raise DataError(f"{what} must be a finite number above 0, got {value!r}")
    return float(value)
