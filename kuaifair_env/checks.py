"""Checks of numerical settings; the error names the setting and says what would be right."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def need_whole(least: int, /, **numbers: Any) -> None:
    """Checks that settings, by name, are whole numbers of at least ``least``.

    Raises:
        ValueError: If one is smaller, not whole, or a truth value.
    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or int(number) < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")


def need_seed(seed: Any) -> None:
    """Checks that a seed is one that NumPy, torch and Stable-Baselines3 all take: 0 to 2^32 - 1.

    Raises:
        ValueError: If it is not.
    """
    need_whole(0, seed=seed)
    if seed >= 2**32:
        raise ValueError(f"seed must be at most 4294967295 (2^32 - 1), got {seed}")


def need_number(interval: str, /, **numbers: Any) -> None:
    """Checks that settings, by name, lie in an interval; NaN lies in none, infinity in none that is open there.

    Args:
        interval: As in mathematics, such as ``"[0, 1)"`` or ``"(0, inf)"``.
        numbers: The settings.

    Raises:
        ValueError: If one lies outside, is no number, or a truth value.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, number in numbers.items():
        value = float(number) if isinstance(number, Real) and not isinstance(number, bool) else float("nan")
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} must be a number in {interval}, got {number!r}")
