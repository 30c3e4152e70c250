"""A2C that looks one slate ahead only, as in public KuaiSim code; writes docs/results/one_slate_ahead_WORLD.md.

python benchmarks/one_slate_ahead.py kuairand --data DATA --results docs/results
python benchmarks/one_slate_ahead.py KuaiFair-KuaiRandTwin-v0 --results docs/results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from purifiers import pair_of

from hrl_policies.study import STUDY_SEEDS, plan_run, train
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.table import ResultTable
from kuaifair_env.files import write_text_atomically

MEASURES = ("len", "r_each", "r_cum", "ad", "violation_rate")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", help="environment id, kuairand or kuairec")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    single_threaded()
    pair = pair_of(arguments.world, arguments.data)
    rows = []
    for seed in STUDY_SEEDS:
        result = train(plan_run("a2c", pair.name, seed=seed, overrides={"gamma": 0.0}), pair)
        assert result.evaluation is not None
        found = result.evaluation.summary()
        rows.append((str(seed), *(f"{found[name]:.3f}" for name in MEASURES)))
    table = ResultTable(
        title=f"A2C with gamma 0, {pair.name}, Max Len 30",
        header=("seed", "Len", "R_each", "R_cum", "AD", "violation rate"),
        rows=tuple(rows),
        notes=(
            "1,000 held-out users of the test world; the zoo's settings but for gamma; as shipped: docs/results/paper.",
            f"Made by: python benchmarks/one_slate_ahead.py {arguments.world} --results RESULTS",
        ),
    )
    print(table.markdown())
    if arguments.results:
        stem = arguments.world.removeprefix("KuaiFair-").removesuffix("-v0").lower()
        write_text_atomically(arguments.results / f"one_slate_ahead_{stem}.md", table.markdown() + "\n")


if __name__ == "__main__":
    main()
