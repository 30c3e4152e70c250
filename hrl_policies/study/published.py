"""The figures that the paper prints (arXiv:2603.03820, Tables 1 to 4), for showing beside ours.

They come from another world: the paper's simulators were never released, so a difference between its numbers and ours
says nothing about either method. The paper does not state what its ``±`` means; with three seeds, one of them 0.000,
it reads as a standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

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
_Row = tuple[str, str, int, float, float, float, float, float, float, float, float]

# Data, method, Max Len; then Len, R_each, R_cum and AD, each with its +-.
_TABLE_2: tuple[_Row, ...] = (
    ("KuaiRec", "A2C", 30, 13.433, 0.236, 0.620, 0.056, 8.339, 0.903, 0.498, 0.085),
    ("KuaiRec", "A2C", 50, 22.633, 0.386, 0.680, 0.057, 15.422, 1.727, 0.577, 0.137),
    ("KuaiRec", "TD3", 30, 15.567, 1.733, 0.801, 0.029, 12.007, 1.260, 0.428, 0.073),
    ("KuaiRec", "TD3", 50, 32.267, 6.712, 0.850, 0.022, 26.627, 6.444, 0.293, 0.081),
    ("KuaiRec", "BCQ", 30, 20.800, 0.616, 0.757, 0.004, 15.036, 0.314, 0.021, 0.003),
    ("KuaiRec", "BCQ", 50, 34.067, 0.759, 0.825, 0.003, 28.043, 0.343, 0.037, 0.007),
    ("KuaiRec", "MOFIR", 30, 13.733, 1.406, 0.577, 0.092, 7.852, 1.816, 0.668, 0.130),
    ("KuaiRec", "MOFIR", 50, 22.933, 1.901, 0.616, 0.093, 14.596, 3.295, 0.668, 0.120),
    ("KuaiRec", "DORL", 30, 14.700, 2.376, 0.579, 0.061, 7.490, 0.889, 0.466, 0.236),
    ("KuaiRec", "DORL", 50, 22.133, 0.939, 0.667, 0.100, 14.564, 3.407, 0.548, 0.041),
    ("KuaiRec", "DNaIR", 30, 21.733, 2.713, 0.809, 0.014, 17.699, 2.704, 0.083, 0.056),
    ("KuaiRec", "DNaIR", 50, 23.767, 0.330, 0.809, 0.023, 19.325, 0.440, 0.660, 0.026),
    ("KuaiRec", "SAC4IR", 30, 21.967, 0.450, 0.828, 0.026, 18.116, 1.236, 0.013, 0.003),
    ("KuaiRec", "SAC4IR", 50, 33.633, 5.329, 0.865, 0.029, 29.470, 5.577, 0.151, 0.196),
    ("KuaiRec", "Ours", 30, 26.600, 0.816, 0.917, 0.010, 23.752, 1.043, 0.008, 0.003),
    ("KuaiRec", "Ours", 50, 34.850, 0.350, 0.870, 0.001, 30.419, 0.485, 0.044, 0.011),
    ("KuaiRand-Pure", "A2C", 30, 13.667, 0.125, 0.730, 0.014, 9.813, 0.300, 0.923, 0.013),
    ("KuaiRand-Pure", "A2C", 50, 23.167, 0.125, 0.819, 0.008, 18.271, 0.671, 0.925, 0.011),
    ("KuaiRand-Pure", "TD3", 30, 16.233, 2.311, 0.810, 0.004, 12.468, 1.913, 0.344, 0.175),
    ("KuaiRand-Pure", "TD3", 50, 31.233, 7.811, 0.842, 0.019, 25.811, 7.307, 0.298, 0.208),
    ("KuaiRand-Pure", "BCQ", 30, 17.133, 0.330, 0.789, 0.004, 12.925, 0.117, 0.295, 0.035),
    ("KuaiRand-Pure", "BCQ", 50, 25.900, 2.974, 0.838, 0.008, 20.395, 2.474, 0.514, 0.215),
    ("KuaiRand-Pure", "MOFIR", 30, 13.900, 0.216, 0.745, 0.015, 10.172, 0.333, 0.813, 0.077),
    ("KuaiRand-Pure", "MOFIR", 50, 23.700, 0.920, 0.833, 0.009, 18.486, 0.487, 0.805, 0.088),
    ("KuaiRand-Pure", "DORL", 30, 13.700, 0.082, 0.727, 0.017, 9.724, 0.236, 0.946, 0.013),
    ("KuaiRand-Pure", "DORL", 50, 23.100, 0.082, 0.812, 0.003, 17.766, 0.236, 0.954, 0.015),
    ("KuaiRand-Pure", "DNaIR", 30, 16.267, 2.176, 0.815, 0.016, 12.832, 1.767, 0.559, 0.349),
    ("KuaiRand-Pure", "DNaIR", 50, 31.800, 7.105, 0.847, 0.013, 26.299, 6.319, 0.443, 0.286),
    ("KuaiRand-Pure", "SAC4IR", 30, 14.000, 0.000, 0.788, 0.001, 10.862, 0.069, 0.674, 0.009),
    ("KuaiRand-Pure", "SAC4IR", 50, 28.433, 6.557, 0.834, 0.006, 23.123, 5.776, 0.394, 0.265),
    ("KuaiRand-Pure", "Ours", 30, 24.067, 1.396, 0.849, 0.007, 19.750, 1.392, 0.011, 0.003),
    ("KuaiRand-Pure", "Ours", 50, 35.133, 0.858, 0.848, 0.001, 29.086, 0.505, 0.024, 0.009),
)

_TABLE_3: tuple[_Row, ...] = (
    ("KuaiRec", "FLAT", 30, 24.333, 0.741, 0.911, 0.003, 22.081, 1.008, 0.013, 0.005),
    ("KuaiRec", "FLAT", 50, 31.267, 4.658, 0.870, 0.045, 26.691, 2.693, 0.222, 0.291),
    ("KuaiRec", "HRL", 30, 23.167, 0.411, 0.895, 0.016, 19.942, 0.723, 0.013, 0.001),
    ("KuaiRec", "HRL", 50, 33.400, 0.566, 0.863, 0.005, 28.055, 0.396, 0.016, 0.002),
    ("KuaiRec", "+RCE", 30, 15.167, 0.386, 0.653, 0.004, 9.588, 0.184, 0.032, 0.001),
    ("KuaiRec", "+RCE", 50, 25.500, 0.852, 0.737, 0.002, 17.528, 0.104, 0.029, 0.004),
    ("KuaiRec", "+TCE", 30, 15.867, 0.403, 0.746, 0.007, 11.491, 0.353, 0.030, 0.002),
    ("KuaiRec", "+TCE", 50, 25.800, 0.497, 0.793, 0.012, 20.293, 0.444, 0.040, 0.005),
    ("KuaiRec", "+BOD", 30, 15.867, 1.793, 0.761, 0.033, 11.740, 2.156, 0.479, 0.303),
    ("KuaiRec", "+BOD", 50, 28.800, 3.910, 0.827, 0.049, 23.114, 3.816, 0.209, 0.252),
    ("KuaiRand-Pure", "FLAT", 30, 21.767, 2.816, 0.830, 0.005, 18.105, 2.531, 0.178, 0.128),
    ("KuaiRand-Pure", "FLAT", 50, 30.733, 2.444, 0.813, 0.003, 24.738, 2.083, 0.136, 0.127),
    ("KuaiRand-Pure", "HRL", 30, 19.200, 3.608, 0.841, 0.008, 15.678, 2.900, 0.311, 0.420),
    ("KuaiRand-Pure", "HRL", 50, 27.533, 4.997, 0.846, 0.010, 22.460, 4.351, 0.593, 0.409),
    ("KuaiRand-Pure", "+RCE", 30, 15.100, 0.082, 0.765, 0.002, 11.267, 0.020, 0.047, 0.006),
    ("KuaiRand-Pure", "+RCE", 50, 25.833, 0.377, 0.835, 0.001, 20.428, 0.208, 0.035, 0.005),
    ("KuaiRand-Pure", "+TCE", 30, 15.333, 0.262, 0.785, 0.005, 11.448, 0.074, 0.041, 0.004),
    ("KuaiRand-Pure", "+TCE", 50, 25.600, 0.216, 0.833, 0.003, 20.217, 0.165, 0.034, 0.005),
    ("KuaiRand-Pure", "+BOD", 30, 14.233, 0.170, 0.780, 0.011, 10.865, 0.179, 0.747, 0.055),
    ("KuaiRand-Pure", "+BOD", 50, 25.533, 1.112, 0.838, 0.005, 20.316, 1.355, 0.577, 0.167),
)


def _result(row: _Row, table: int) -> PublishedResult:
    data, name, max_len, *numbers = row
    return PublishedResult(
        data,
        name,
        max_len,
        table,
        dict(zip(_FIGURES, numbers[::2], strict=True)),
        dict(zip(_FIGURES, numbers[1::2], strict=True)),
    )


PUBLISHED_RESULTS = tuple(
    _result(row, table) for table, rows in ((2, _TABLE_2), (3, _TABLE_3)) for row in rows
)
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
