"""How fast and how small are the readers? Run: ``python benchmarks/read_speed.py kuairec`` (or ``kuairand``).

Writes a twin of the data set in the official format, reads it in a fresh process into a fresh cache, opens it again in
another, and prints seconds and peak resident memory of each. The files are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from twin_files import write_official

from kuaifair_env.synthetic.config import twin_config
from kuaifair_env.synthetic.twin import generate_twin

READ = """
import json, resource, sys, time
from kuaifair_env.data import load_kuairand, load_kuairec
load = {"kuairec": load_kuairec, "kuairand": load_kuairand}[sys.argv[1]]
start = time.perf_counter()
data = load(sys.argv[2], cache=sys.argv[3])
seconds = time.perf_counter() - start
data_hash = data.data_hash
cpu = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_gib": peak, "hash": data_hash, "report": data.report}))
"""


def measure(name: str, path: Path, cache: Path) -> dict[str, object]:
    """Reads in a fresh process."""
    command = [sys.executable, "-c", READ, name, str(path), str(cache)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("kuairec", "kuairand"))
    parser.add_argument("--share", type=float, default=1.0, help="share of the rows of the training log")
    parser.add_argument("--folder", type=Path, default=None, help="where the files are written meanwhile")
    options = parser.parse_args()
    config = twin_config(options.name)
    twin = generate_twin(replace(config, train_rows=round(options.share * config.train_rows)))
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        start = time.perf_counter()
        folder = write_official(twin, temporary)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"wrote {size / 1e9:.2f} GB ({time.perf_counter() - start:.0f} s)", flush=True)
        for what in ("read and cache", "open again"):
            result = measure(options.name, folder, Path(temporary) / "cache")
            if result["hash"] != twin.data.data_hash:
                raise SystemExit("the files do not read back as the twin's data")
            seconds, cpu, peak = (result[key] for key in ("seconds", "cpu", "peak_gib"))
            print(f"{what:15s} {seconds:6.2f} s, {cpu:6.2f} s CPU with imports, peak memory {peak:.2f} GiB")
        print(json.dumps(result["report"], indent=1))


if __name__ == "__main__":
    main()
