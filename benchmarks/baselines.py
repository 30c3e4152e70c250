"""The paper's baselines beside all controls in the test world (Table 2); writes docs/results/paper/WORLD.md.

    python benchmarks/baselines.py kuairand --data ../shared/data --store runs/baselines --results docs/results/paper
    python benchmarks/baselines.py KuaiFair-KuaiRandTwin-v0 --store runs/baselines --results docs/results/paper

Every method trains with the zoo's settings. Runs are kept in the store; several processes may share the work with
``--methods`` and ``--seeds``. ``--stored`` runs nothing and makes the page of what the store holds. Runs of DSRM-HRL
and A2C + fairness in the same store (benchmarks/ablation.py) stand beside; their parts have pages of their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from partial_worlds import NAMES
from purifiers import pair_of

from hrl_policies.study import STUDY_SEEDS, plan_runs, run_study
from hrl_policies.study.outputs import study_tables
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import RunRecord, stored_runs
from hrl_policies.study.tables import write_records
from hrl_policies.zoo import controls, method
from kuaifair_env.files import write_text_atomically

METHODS = ("a2c", "td3", "bcq", "bcq-discrete", "mofir", "dorl", "dnair", "sac4ir")
BESIDE = ("dsrm-hrl", "a2c+fair")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", help="environment id, kuairand or kuairec")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *controls()])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(STUDY_SEEDS))
    parser.add_argument("--max-lens", nargs="+", type=int, default=[30, 50])
    parser.add_argument("--stored", action="store_true")
    arguments = parser.parse_args()
    name = NAMES.get(arguments.world, arguments.world)
    if not arguments.stored:
        single_threaded()
        pair = pair_of(arguments.world, arguments.data)
        cells = plan_runs(arguments.methods, name, seeds=arguments.seeds, max_lens=arguments.max_lens)
        run_study(cells, arguments.store, {name: pair}).raise_for_failures()
    runs = [
        run
        for run in stored_runs(arguments.store)
        if run.config.world == name
        and not run.config.item_term
        and run.config.session.max_len in arguments.max_lens
        and run.config.method in (*METHODS, *BESIDE, *controls())
        and (run.config.purifier is None or method(run.config.method).purifier)
    ]
    command = f"python benchmarks/baselines.py {arguments.world} --store STORE --results RESULTS"
    tables = study_tables(runs, compare=True, base="quota-greedy", average="iqm", command=command)
    text = "\n\n".join(table.markdown() for table in tables.values()) + "\n"
    print(text)
    if arguments.results:
        stem = arguments.world.removeprefix("KuaiFair-").removesuffix("-v0").lower()
        write_text_atomically(arguments.results / f"{stem}.md", text)
        write_records(arguments.results / f"{stem}.csv", [RunRecord.of_run(run) for run in runs])


if __name__ == "__main__":
    main()
