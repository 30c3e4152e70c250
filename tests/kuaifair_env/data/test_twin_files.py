"""Twin to official files to reader: the same logs, whatever the size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import twin_files
from twin_files import LONG_VIEW_MS, write_official

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.kuairand import read_kuairand
from kuaifair_env.data.kuairec import read_kuairec
from kuaifair_env.errors import DataError
from kuaifair_env.synthetic.twin import Twin

KUAIREC_FILES = {
    "big_matrix.csv": "user_id video_id play_duration video_duration time date timestamp watch_ratio",
    "small_matrix.csv": "user_id video_id play_duration video_duration time date timestamp watch_ratio",
    "item_categories.csv": "video_id feat",
    "social_network.csv": "user_id friend_list",
    "kuairec_caption_category.csv": "video_id manual_cover_text caption topic_tag first_level_category_id "
    "first_level_category_name second_level_category_id second_level_category_name third_level_category_id "
    "third_level_category_name",
}
KUAIRAND_LOG = (
    "user_id video_id date hourmin time_ms is_click is_like is_follow is_comment is_forward is_hate long_view "
    "play_time_ms duration_ms profile_stay_time comment_stay_time is_profile_enter is_rand tab"
)
KUAIRAND_FILES = {
    "log_standard_4_08_to_4_21_pure.csv": KUAIRAND_LOG,
    "log_standard_4_22_to_5_08_pure.csv": KUAIRAND_LOG,
    "log_random_4_22_to_5_08_pure.csv": KUAIRAND_LOG,
    "video_features_basic_pure.csv": "video_id author_id video_type upload_dt upload_type visible_status "
    "video_duration server_width server_height music_id music_type tag",
}
USER_COLUMNS = (
    "user_id user_active_degree is_lowactive_period is_live_streamer is_video_author follow_user_num "
    "follow_user_num_range fans_user_num fans_user_num_range friend_user_num friend_user_num_range register_days "
    "register_days_range " + " ".join(f"onehot_feat{number}" for number in range(18))
)


def assert_same_data(read: InteractionData, made: InteractionData) -> None:
    for name in ("train", "test"):
        for column in ("users", "items", "clicks", "times", "watch_ratios"):
            found, expected = (getattr(getattr(data, name), column) for data in (read, made))
            if expected is None:
                assert found is None
            else:
                assert np.array_equal(found, expected), f"{name}.{column}"
    assert read.data_hash == made.data_hash
    assert read.items.tag_names == made.items.tag_names
    assert np.array_equal(read.items.tags, made.items.tags)
    assert np.array_equal(read.items.shown, made.items.shown)
    for found, expected in (
        (read.items.features, made.items.features),
        (read.users.features, made.users.features),
    ):
        assert found.names == expected.names
        assert np.allclose(found.values, expected.values, atol=1e-5)


def header(path) -> list[str]:
    with path.open(encoding="utf-8") as stream:
        return stream.readline().rstrip("\n").split(",")


@pytest.fixture(scope="module")
def kuairand_folder(toy: Twin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's files, written in parts that are much shorter than its logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin_files, "PART_ROWS", 7_000)
        return write_official(toy, tmp_path_factory.mktemp("kuairand"))


@pytest.fixture(scope="module")
def kuairec_folder(panel: Twin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(panel, tmp_path_factory.mktemp("kuairec"))


def test_kuairand_files_read_back_as_the_same_data(toy, kuairand_folder):
    folder = kuairand_folder
    assert folder.parts[-2:] == ("KuaiRand-Pure", "data")
    for name, columns in (KUAIRAND_FILES | {"user_features_pure.csv": USER_COLUMNS}).items():
        assert header(folder / name) == columns.split()
    statistics = header(folder / "video_features_statistic_pure.csv")
    assert len(statistics) == 52
    assert {"show_user_num", "play_user_num", "outsite_share_all_cnt"} <= set(statistics)
    assert_same_data(read_kuairand(folder), toy.data)


def test_kuairec_files_read_back_as_the_same_data(panel, kuairec_folder):
    folder = kuairec_folder
    assert folder.parts[-2:] == ("KuaiRec 2.0", "data")
    for name, columns in (KUAIREC_FILES | {"user_features.csv": USER_COLUMNS}).items():
        assert header(folder / name) == columns.split()
    assert len(header(folder / "item_daily_features.csv")) == 58
    read = read_kuairec(folder, positive={"watch_ratio": 2.0})
    assert_same_data(read, panel.data)
    assert read.report["train"]["exact_duplicates_dropped"] == round(30_000 * 965_819 / 11_564_987)
    times = panel.data.test.times
    assert read.report["test"]["rows_without_time"] == np.count_nonzero(times == times.max()) > 100
    assert read.report["items"]["captions"] == 500
    assert read.report["items"]["captions_with_line_breaks"] > 0
    assert read.report["items"]["captions_unreadable"] == 0


def test_files_of_a_twin_are_never_taken_for_real_ones(kuairand_folder):
    provenance = read_kuairand(kuairand_folder).provenance
    assert provenance.origin == "twin"
    assert provenance.name == "Toy twin"
    assert provenance.settings["seed"] == 0


def test_kuairand_logs_hold_together(kuairand_folder):
    """Dates belong to their file and their time; long views and clicks to their play time."""
    for name, first, last in (
        ("log_standard_4_08_to_4_21_pure.csv", 20220408, 20220421),
        ("log_standard_4_22_to_5_08_pure.csv", 20220422, 20220508),
        ("log_random_4_22_to_5_08_pure.csv", 20220422, 20220508),
    ):
        log = pd.read_csv(kuairand_folder / name)
        assert log.date.between(first, last).all()
        local = pd.to_datetime(log.time_ms, unit="ms") + pd.Timedelta(hours=8)
        assert (local.dt.strftime("%Y%m%d").astype(int) == log.date).all()
        assert (local.dt.hour * 100 == log.hourmin).all()
        assert (log.is_rand == ("random" in name)).all()
        whole = log.duration_ms.where(log.duration_ms > 0, 10**9)
        assert ((log.play_time_ms >= whole.clip(upper=7_000)) == (log.is_click == 1)).all()
        assert ((log.play_time_ms >= whole.clip(upper=LONG_VIEW_MS)) == (log.long_view == 1)).all()
        assert (log.is_click >= log.is_like).all()


def test_kuairec_times_agree_with_each_other(kuairec_folder):
    for name in ("big_matrix.csv", "small_matrix.csv"):
        log = pd.read_csv(kuairec_folder / name)
        assert (log.time.isna() == log.timestamp.isna()).all()
        assert (log.time.isna() == log.date.isna()).all()
        log = log.dropna()
        local = pd.to_datetime(log.timestamp.mul(1000).round(), unit="ms") + pd.Timedelta(hours=8)
        assert (local.dt.strftime("%Y%m%d").astype(int) == log.date).all()
        assert (local == pd.to_datetime(log.time)).all()
        assert np.allclose(log.watch_ratio, log.play_duration / log.video_duration)


def test_an_existing_folder_is_left_alone(toy, tmp_path):
    folder = tmp_path / "KuaiRand-Pure" / "data"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="exists already"):
        write_official(toy, tmp_path)
    assert [entry.name for entry in folder.iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_a_failed_write(toy, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(twin_files.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write_official(toy, tmp_path)
    assert list((tmp_path / "KuaiRand-Pure").iterdir()) == []
