"""Published facts of the official data sets: archives, files, columns, numbers of rows, licences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kuaifair_env.errors import DataError

UNKNOWN_CODE = -124
"""All data sets write an unknown integer category as -124."""

USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
"""Numbers in the user tables of all data sets."""

USER_CATEGORIES = (
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    *(f"onehot_feat{number}" for number in range(18)),
)
"""Coded columns in the user tables of all data sets."""

DAILY_NUMBERS = ("video_duration", "show_user_num", "play_user_num", "like_user_num", "play_progress")
"""Numbers of KuaiRec's daily table that describe an item."""

STATISTICS = (
    "counts",
    "show_user_num",
    "play_user_num",
    "valid_play_user_num",
    "long_time_play_user_num",
    "complete_play_user_num",
    "like_user_num",
    "comment_user_num",
    "follow_user_num",
    "share_user_num",
    "collect_user_num",
    "play_progress",
)
"""Numbers of KuaiRand's statistic table that describe an item."""

KuaiRandName = Literal["kuairand", "kuairand-1k", "kuairand-27k"]
DatasetName = Literal["kuairec", "kuairand", "kuairand-1k", "kuairand-27k"]


@dataclass(frozen=True)
class OfficialDataset:
    """Published facts of an official data set.

    Attributes:
        name: Name on the command line.
        title: Name for people.
        archive: File name of the official archive.
        url: Folder of the archive on the publisher's site.
        md5: The publisher's MD5 of the archive (the Zenodo record's checksum).
        size: Bytes of the archive.
        folders: Paths of the data folder after unpacking.
        files: Files that a reader needs; the first one identifies the data set.
        rows: Published number of rows of each log.
        licence: Licence of the data.
        citation: How to cite it.
    """

    name: DatasetName
    title: str
    archive: str
    url: str
    md5: str
    size: int
    folders: tuple[str, ...]
    files: tuple[str, ...]
    rows: dict[str, int]
    licence: str
    citation: str


KUAIREC = OfficialDataset(
    name="kuairec",
    title="KuaiRec 2.0",
    archive="KuaiRec.zip",
    url="https://zenodo.org/records/18164998/files",
    md5="261550d472c48eff4990fb13c0e5bcf7",
    size=431_964_858,
    folders=("KuaiRec 2.0/data", "KuaiRec/data", "data"),
    files=("big_matrix.csv", "small_matrix.csv", "item_categories.csv", "user_features.csv"),
    rows={"big_matrix.csv": 12_530_806, "small_matrix.csv": 4_676_570},
    licence="CC BY-SA 4.0 (attribution, share alike)",
    citation="Gao et al., KuaiRec: A Fully-observed Dataset and Insights for Evaluating Recommender Systems, "
    "CIKM 2022, doi:10.1145/3511808.3557220",
)

KUAIRAND = OfficialDataset(
    name="kuairand",
    title="KuaiRand-Pure",
    archive="KuaiRand-Pure.tar.gz",
    url="https://zenodo.org/records/10439422/files",
    md5="0820331067a3784d9691136f772b35a7",
    size=47_432_272,
    folders=("KuaiRand-Pure/data", "data"),
    files=(
        "log_random_4_22_to_5_08_pure.csv",
        "log_standard_4_08_to_4_21_pure.csv",
        "log_standard_4_22_to_5_08_pure.csv",
        "user_features_pure.csv",
        "video_features_basic_pure.csv",
        "video_features_statistic_pure.csv",
    ),
    rows={
        "log_standard_4_08_to_4_21_pure.csv": 1_141_112,
        "log_standard_4_22_to_5_08_pure.csv": 295_497,
        "log_random_4_22_to_5_08_pure.csv": 1_186_059,
    },
    licence="CC BY-SA 4.0 (attribution, share alike)",
    citation="Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed "
    "Videos, CIKM 2022, doi:10.1145/3511808.3557624",
)

KUAIRAND_1K = replace(
    KUAIRAND,
    name="kuairand-1k",
    title="KuaiRand-1K",
    archive="KuaiRand-1K.tar.gz",
    md5="6b0b9c8222d67fcd4c676218edca3f1f",
    size=1_135_436_720,
    folders=("KuaiRand-1K/data", "data"),
    files=(
        "log_random_4_22_to_5_08_1k.csv",
        "log_standard_4_08_to_4_21_1k.csv",
        "log_standard_4_22_to_5_08_1k.csv",
        "user_features_1k.csv",
        "video_features_basic_1k.csv",
        "video_features_statistic_1k.csv",
    ),
    rows={
        "log_standard_4_08_to_4_21_1k.csv": 5_055_984,
        "log_standard_4_22_to_5_08_1k.csv": 6_657_061,
        "log_random_4_22_to_5_08_1k.csv": 43_028,
    },
)

KUAIRAND_27K = replace(
    KUAIRAND,
    name="kuairand-27k",
    title="KuaiRand-27K",
    archive="KuaiRand-27K.tar.gz",
    md5="3e3c799a24e2d23a4d2c757fbf9adf59",
    size=9_892_191_178,
    folders=("KuaiRand-27K/data", "data"),
    files=(
        "log_random_4_22_to_5_08_27k.csv",
        "log_standard_4_08_to_4_21_27k_part1.csv",
        "log_standard_4_08_to_4_21_27k_part2.csv",
        "log_standard_4_22_to_5_08_27k_part1.csv",
        "log_standard_4_22_to_5_08_27k_part2.csv",
        "user_features_27k.csv",
        "video_features_basic_27k.csv",
        "video_features_statistic_27k_part1.csv",
        "video_features_statistic_27k_part2.csv",
        "video_features_statistic_27k_part3.csv",
    ),
    rows={
        "log_standard_4_08_to_4_21_27k_part1.csv": 68_148_288,
        "log_standard_4_08_to_4_21_27k_part2.csv": 68_148_288,
        "log_standard_4_22_to_5_08_27k_part1.csv": 93_062_020,
        "log_standard_4_22_to_5_08_27k_part2.csv": 92_919_789,
        "log_random_4_22_to_5_08_27k.csv": 1_186_059,
    },
)

DATASETS: dict[str, OfficialDataset] = {facts.name: facts for facts in (KUAIREC, KUAIRAND, KUAIRAND_1K, KUAIRAND_27K)}


def dataset(name: str) -> OfficialDataset:
    """Returns the facts of an official data set.

    Raises:
        DataError: For a name that is not in :data:`DATASETS`.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]
