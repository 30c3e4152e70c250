"""How much memory does reading KuaiRand-27K take? Run: ``python benchmarks/stream_memory.py --rows 4 12`` (millions).

Writes files in the format of KuaiRand-27K, drawn at random with as many users, rows of the random pool in the official
proportion, and a new video in every tenth row of the standard logs (as officially), reads them in a fresh process, and
prints seconds and peak resident memory. Only the standard logs and the tables of videos grow with the rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from kuaifair_env.data.clicks import Behaviour
from kuaifair_env.data.published import KUAIRAND_27K, STATISTICS, USER_CATEGORIES, USER_NUMBERS

USERS, POOL, RANDOM_ROWS = 27_285, 7_583, 1_186_059
POOL_SHARE = 1_436_609 / 322_278_385
CHUNK = 500_000

READ = """
import json, resource, sys, time
from kuaifair_env.data import read_kuairand
start = time.perf_counter()
data = read_kuairand(sys.argv[1], version="kuairand-27k")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
train = data.report["train"]
print(json.dumps({"seconds": seconds, "peak": peak, "items": len(data.items), "rows": train["rows"],
                  "left_out": train["rows_left_out"]}))
"""


def write_log(path: Path, rng: np.random.Generator, rows: int, n_videos: int, pool_share: float, is_rand: int) -> None:
    """Writes a log in time order."""
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, rows, CHUNK):
            size = min(CHUNK, rows - first)
            in_pool = rng.random(size) < pool_share
            columns = {
                "user_id": rng.integers(0, USERS, size),
                "video_id": np.where(in_pool, rng.integers(0, POOL, size), rng.integers(0, n_videos, size)),
                "date": 20220422,
                "hourmin": 1200,
                "time_ms": 1_650_000_000_000 + first + np.arange(size),
                **{signal: rng.integers(0, 2, size) for signal in (*get_args(Behaviour), "is_hate")},
                "play_time_ms": rng.integers(0, 10**5, size),
                "duration_ms": rng.integers(0, 10**5, size),
                "profile_stay_time": 0,
                "comment_stay_time": 0,
                "is_rand": is_rand,
                "tab": 1,
            }
            pd.DataFrame(columns).to_csv(file, index=False, header=first == 0)


def write_files(folder: Path, rows: int) -> None:
    """Writes all files; ``rows`` of the standard logs together."""
    rng = np.random.default_rng(0)
    n_videos = POOL + rows // 10
    random, *standard, users, basic = KUAIRAND_27K.files[:7]
    write_log(folder / random, rng, RANDOM_ROWS, POOL, 1.0, 1)
    for name in standard:
        write_log(folder / name, rng, rows // len(standard), n_videos, POOL_SHARE, 0)
    columns: dict[str, object] = {"user_id": np.arange(USERS), "user_active_degree": "full_active"}
    columns |= {name: rng.integers(0, 3, USERS) for name in (*USER_NUMBERS, *USER_CATEGORIES)}
    pd.DataFrame(columns).to_csv(folder / users, index=False)
    columns = {"video_id": np.arange(n_videos), "video_type": "NORMAL", "upload_type": "ShortImport"}
    columns |= {name: rng.integers(1, 10**5, n_videos) for name in ("video_duration", "server_width", "server_height")}
    columns |= {"music_type": 9.0, "tag": rng.integers(0, 60, n_videos).astype(str)}
    pd.DataFrame(columns).to_csv(folder / basic, index=False)
    for name, ids in zip(KUAIRAND_27K.files[7:], np.array_split(np.arange(n_videos), 3), strict=True):
        columns = {"video_id": ids} | {number: rng.random(len(ids)) for number in STATISTICS}
        pd.DataFrame(columns).to_csv(folder / name, index=False, float_format="%.3f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, nargs="+", default=[4.0, 12.0], help="million rows of the standard logs")
    parser.add_argument("--folder", type=Path, default=None, help="where the files are written meanwhile")
    options = parser.parse_args()
    for millions in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            write_files(Path(temporary), round(millions * 1e6))
            command = [sys.executable, "-c", READ, temporary]
            result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"{millions:g} M rows: {result['seconds']:.0f} s, peak {result['peak']:.2f} GiB; "
            f"{result['rows']:,} rows and {result['items']:,} videos kept, {result['left_out']:,} rows left out",
            flush=True,
        )


if __name__ == "__main__":
    main()
