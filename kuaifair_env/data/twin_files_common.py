"""What both official formats of a twin share: the user table, and CSV files written in parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.twin_tables import UNKNOWN_CODE, Columns

if TYPE_CHECKING:
    import pandas as pd

    from kuaifair_env.data.twin import Twin

PART_ROWS = 500_000
BEIJING_MS = 8 * 3_600_000

# Upper ends and names of the ranges in the official user tables; the first range is exactly 0 where it begins so.
_RANGES: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "follow_user_num": (
        (0, 10, 50, 100, 150, 250, 500),
        ("0", "(0,10]", "(10,50]", "(50,100]", "(100,150]", "(150,250]", "(250,500]", "500+"),
    ),
    "fans_user_num": (
        (0, 9, 99, 999, 4_999, 9_999, 99_999, 999_999),
        (
            *("0", "[1,10)", "[10,100)", "[100,1k)", "[1k,5k)", "[5k,1w)", "[1w,10w)"),
            *("[10w,100w)", "[100w,1000w)"),
        ),
    ),
    "friend_user_num": (
        (0, 4, 29, 59, 119, 249),
        ("0", "[1,5)", "[5,30)", "[30,60)", "[60,120)", "[120,250)", "250+"),
    ),
    "register_days": (
        (14, 30, 60, 90, 180, 365, 730),
        ("8-14", "15-30", "31-60", "61-90", "91-180", "181-365", "366-730", "730+"),
    ),
}


def words(text: str) -> tuple[str, ...]:
    """Returns the words of a text: long headers stay legible this way."""
    return tuple(text.split())


def user_table(twin: Twin) -> pd.DataFrame:
    """Returns the official table of users, 31 columns."""
    import pandas as pd

    users = twin.tables.users
    columns: dict[str, Any] = {"user_id": twin.data.users.ids}
    for name in ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"):
        columns[name] = users[name]
    for name, (ends, labels) in _RANGES.items():
        columns[name] = users[name]
        columns[f"{name}_range"] = np.asarray(labels)[np.searchsorted(ends, users[name])]
    return pd.DataFrame(columns | {name: users[name] for name in users if name.startswith("onehot_feat")})


def write_parts(path: Path, parts: Iterator[pd.DataFrame]) -> None:
    """Writes tables one below the other into one CSV file."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        for number, part in enumerate(parts):
            part.to_csv(stream, index=False, header=number == 0, lineterminator="\n")


def parts_of(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Cuts row numbers into parts of :data:`PART_ROWS`."""
    for start in range(0, len(rows), PART_ROWS):
        yield rows[start : start + PART_ROWS]


def local_dates(times_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns days in Beijing as numbers such as 20220408."""
    days = ((times_ms + BEIJING_MS) // 86_400_000).astype("datetime64[D]")
    months = days.astype("datetime64[M]")
    years = days.astype("datetime64[Y]").astype(np.int64) + 1970
    month = months.astype(np.int64) % 12 + 1
    day = (days - months).astype(np.int64) + 1
    dates: NDArray[np.int64] = years * 10_000 + month * 100 + day
    return dates


def known_code(values: NDArray[Any]) -> Columns:
    """Splits a column with :data:`UNKNOWN_CODE` into codes and names."""
    names = np.where(values == UNKNOWN_CODE, "UNKNOWN", np.char.add("category ", values.astype(str)))
    return {"id": values, "name": names}
