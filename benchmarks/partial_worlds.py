"""First agents and all controls in worlds of partial real data; writes the pages under docs/results.

    python benchmarks/partial_worlds.py kuairand --data ../shared/data --store runs/partial
    python benchmarks/partial_worlds.py kuairec  --data ../shared/data --store runs/partial

Training world: response model fitted on the training log. Test world: response model of the random exposures (partial
KuaiRand-Pure) or the full matrix of positives (partial KuaiRec). A study that was interrupted goes on where it stopped;
``--methods`` and ``--seeds`` let two processes share the work.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kuaifair_env.response.fitting import cached_response
from kuaifair_env.world import cached_embeddings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from partial_data import KUAIRAND_FOLDER, KUAIREC_FOLDER, partial_kuairand, partial_kuairec

from hrl_policies.study import STUDY_SEEDS, plan_runs, result_tables, run_study
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.tables import write_records
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import controls
from kuaifair_env import InteractionData, build_world
from kuaifair_env.files import write_text_atomically

NAMES = {"kuairand": "partial KuaiRand-Pure", "kuairec": "partial KuaiRec"}
AGENTS = ("a2c", "td3")


def load(name: str, data_folder: Path) -> InteractionData:
    """Reads one of the two partial data sets."""
    if name == "kuairand":
        return partial_kuairand(data_folder / KUAIRAND_FOLDER)
    return partial_kuairec(data_folder / KUAIREC_FOLDER)


def worlds_of(name: str, data: InteractionData) -> WorldPair:
    """Builds training and test world; fitted models and embeddings come from the cache when they are there."""
    embeddings = cached_embeddings(data, 64)
    train, test = (
        build_world(data, split, cached_response(data, split), embeddings=embeddings)
        for split in ("train", "test")
    )
    return WorldPair(NAMES[name], train, test)


def response_report(pair: WorldPair) -> dict[str, Any]:
    """Returns what the fits of both response models and of the controls' scorer say of themselves."""
    parts = ("kind", "fitted_on", "held_out", "controls", "personal", "slopes", "spread", "calibration")
    models = {
        world.split: {key: value for key, value in world.response.describe().items() if key in parts}
        for world in (pair.train, pair.test)
    }
    return {"worlds": pair.describe(), "responses": models, "scorer": pair.scorer.report.as_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", choices=NAMES)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds the two partial data sets"
    )
    parser.add_argument("--store", type=Path, required=True, help="folder for run folders")
    parser.add_argument("--results", type=Path, help="folder for the page; omit to only run")
    parser.add_argument("--methods", nargs="+", default=[*AGENTS, *controls()])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(STUDY_SEEDS))
    parser.add_argument("--max-lens", nargs="+", type=int, default=[30, 50])
    parser.add_argument("--users", type=int, default=1000)
    arguments = parser.parse_args()
    single_threaded()
    pair = worlds_of(arguments.world, load(arguments.world, arguments.data))
    cells = plan_runs(
        arguments.methods,
        pair.name,
        seeds=arguments.seeds,
        max_lens=arguments.max_lens,
        users=arguments.users,
    )
    records = run_study(cells, arguments.store, {pair.name: pair}).raise_for_failures().records
    command = (
        f"python benchmarks/partial_worlds.py {arguments.world} --data DATA --store STORE --results RESULTS"
    )
    tables = [table.markdown() for table in result_tables(records, command)]
    print("\n\n".join(tables))
    if arguments.results:
        stem = arguments.results / f"partial_{arguments.world}"
        write_text_atomically(stem.with_suffix(".tables.md"), "\n\n".join(tables) + "\n")
        write_records(stem.with_suffix(".csv"), records)
        report = json.dumps(response_report(pair), indent=1, sort_keys=True, default=str)
        write_text_atomically(stem.with_suffix(".models.json"), report + "\n")


if __name__ == "__main__":
    main()
