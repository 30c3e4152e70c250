"""How fast and how small is the KuaiRec reader? Run: ``python benchmarks/read_speed.py --rows 12530806``.

Writes a synthetic ``big_matrix.csv`` of the official format (and a small matrix with the published share of rows
without time), reads it in a fresh process into a fresh cache, opens it again in another, and prints seconds and
peak resident memory of each. The files are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

USERS, ITEMS = 7_176, 10_728
SMALL_USERS, SMALL_ITEMS = 1_411, 3_327
DUPLICATE_SHARE = 965_819 / 12_530_806
WITHOUT_TIME_SHARE = 181_992 / 4_676_570

READ = """
import json, resource, sys, time
from kuaifair_env.data import load_kuairec
start = time.perf_counter()
data = load_kuairec(sys.argv[1], cache=sys.argv[2])
seconds = time.perf_counter() - start
data_hash = data.data_hash
cpu = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_gib": peak, "hash": data_hash, "report": data.report}))
"""


def write_matrix(
    path: Path, rows: int, users: int, items: int, without_time: float, duplicates: float
) -> None:
    """Writes a matrix with the official columns and digits, by user and time; repeats end each chunk."""
    rng = np.random.default_rng(rows)
    chunk = 500_000
    for begin in range(0, rows, chunk):
        size = min(chunk, rows - begin)
        user = (begin + np.arange(size)) * users // rows
        seconds = np.round(1_593_878_903 + rng.random(size) * 5.4e6, 3)
        played, duration = rng.integers(0, 30_000, size), rng.integers(5_000, 20_000, size)
        frame = pd.DataFrame(
            {
                "user_id": user,
                "video_id": rng.integers(0, items, size),
                "play_duration": played,
                "video_duration": duration,
                "time": pd.to_datetime(seconds, unit="s").strftime("%Y-%m-%d %H:%M:%S.%f").str[:-3],
                "date": 20200705.0,
                "timestamp": seconds,
                "watch_ratio": played / duration,
            }
        )
        frame = frame.sort_values(["user_id", "timestamp"])
        copies = int(duplicates * size)
        frame = pd.concat([frame.iloc[: size - copies], frame.iloc[:copies]])
        frame.loc[rng.random(size) < without_time, ["time", "date", "timestamp"]] = np.nan
        frame.to_csv(path, index=False, mode="w" if begin == 0 else "a", header=begin == 0)


def write_tables(folder: Path) -> None:
    """Writes the tables of items and users."""
    pd.DataFrame({"video_id": range(ITEMS), "feat": [f"[{item % 31}]" for item in range(ITEMS)]}).to_csv(
        folder / "item_categories.csv", index=False
    )
    users: dict[str, object] = {"user_id": np.arange(USERS), "user_active_degree": "full_active"}
    names = ("is_lowactive_period", "is_live_streamer", "is_video_author", "follow_user_num", "fans_user_num")
    rng = np.random.default_rng(0)
    for name in (*names, "friend_user_num", "register_days", *(f"onehot_feat{n}" for n in range(18))):
        users[name] = rng.integers(0, 10, USERS)
    pd.DataFrame(users).to_csv(folder / "user_features.csv", index=False)


def measure(path: Path, cache: Path) -> dict[str, object]:
    """Reads in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(cache)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=12_530_806, help="rows of the big matrix")
    parser.add_argument("--small-rows", type=int, default=4_676_570, help="rows of the small matrix")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the files are written for the time being"
    )
    parser.add_argument("--zip", action="store_true", help="read from a zip archive instead of a folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "KuaiRec 2.0" / "data"
        folder.mkdir(parents=True)
        start = time.perf_counter()
        write_tables(folder)
        write_matrix(folder / "big_matrix.csv", options.rows, USERS, ITEMS, 0.0, DUPLICATE_SHARE)
        small = folder / "small_matrix.csv"
        write_matrix(small, options.small_rows, SMALL_USERS, SMALL_ITEMS, WITHOUT_TIME_SHARE, 0.0)
        size = (folder / "big_matrix.csv").stat().st_size
        seconds = time.perf_counter() - start
        print(
            f"wrote big_matrix.csv, {options.rows:,} rows, {size / 1e9:.2f} GB ({seconds:.0f} s)", flush=True
        )
        source = folder
        if options.zip:
            source = Path(temporary) / "KuaiRec.zip"
            with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
                for path in sorted(folder.iterdir()):
                    archive.write(path, f"KuaiRec 2.0/data/{path.name}")
            print(f"packed into {source.stat().st_size / 1e9:.2f} GB")
        for name in ("read and cache", "open again"):
            result = measure(source, Path(temporary) / "cache")
            seconds, cpu, peak = (result[key] for key in ("seconds", "cpu", "peak_gib"))
            print(f"{name:15s} {seconds:6.2f} s, {cpu:6.2f} s CPU with imports, peak memory {peak:.2f} GiB")
        print(json.dumps(result["report"], indent=1))


if __name__ == "__main__":
    main()
