"""Settings of HierarchicalPPO, compared in a twin that no result is reported in; writes hierarchical_settings.md.

    python benchmarks/hierarchical_settings.py --store runs/settings --results docs/results

The twin is drawn with another seed than ``KuaiFair-KuaiRandTwin-v0``: other users, other items, other tastes. Each line
is the shipped ``hrl`` (DSRM-HRL on raw states) with something changed. Runs are kept in the store; several processes
may share the work with ``--seeds``, and a last call with all seeds writes the page. With ``--item-term unbiased`` every
line and every control is given the item term that calibration users make.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from hrl_policies.study import RunConfig, RunRecord, plan_run, run_study
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.statistics import student_interval
from hrl_policies.study.store import machine
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import parse_overrides
from kuaifair_env.batch import SessionConfig
from kuaifair_env.files import write_text_atomically
from kuaifair_env.response.fitting import cached_response
from kuaifair_env.response.synthetic import TwinResponse
from kuaifair_env.synthetic.twin import load_twin, twin_config
from kuaifair_env.world import build_world, cached_embeddings

TWIN_SEED = 1
SEEDS = (11, 15, 19)
LINES: Mapping[str, str] = {
    "shipped": "",
    "query, reach .3": "hierarchy.worker=query",
    "query, reach 1": "hierarchy.worker=query hierarchy.reach=1",
    "no memory": "hierarchy.memory=false",
    "simplex weights": "hierarchy.weights=simplex",
    "no taste noise": "taste_noise=0",
    "taste noise .5": "taste_noise=0.5",
    "taste noise 1": "taste_noise=1",
    "taste noise 2": "taste_noise=2",
    "taste noise 4": "taste_noise=4",
    "learning rate .0003": "learning_rate=0.0003",
    "learning rate .003": "learning_rate=0.003",
    "twice the steps": "total_steps=300000",
    "one advantage per slate": "slot_credit=0",
    "manager entropy .01": "manager_ent_coef=0.01",
}
CONTROLS = ("quota-greedy", "session-quota", "oracle")


def twin_pair(seed: int) -> WorldPair:
    """Returns both worlds of a KuaiRand twin drawn with a seed."""
    twin = load_twin(twin_config("KuaiRand", seed=seed))
    data, embeddings = twin.data, cached_embeddings(twin.data, 64)
    train = build_world(data, "train", cached_response(data, "train"), embeddings=embeddings)
    truth = TwinResponse(twin.truth, 0.0, data.provenance.as_dict())
    return WorldPair(
        f"KuaiRand twin, seed {seed}", train, build_world(data, "test", truth, embeddings=embeddings)
    )


def cell(world: str, line: str, seed: int, item_term: str) -> RunConfig:
    """Returns one run: ``hrl`` with the overrides of a line."""
    overrides = parse_overrides(line.split())
    noise, steps = overrides.pop("taste_noise", None), overrides.pop("total_steps", None)
    config = plan_run(
        "hrl",
        world,
        seed=seed,
        session=SessionConfig(max_len=30),
        total_steps=steps,
        overrides=overrides,
        item_term=item_term,
    )
    return config if noise is None else replace(config, taste_noise=float(noise))


def row(name: str, records: list[RunRecord]) -> str:
    """Returns a line of the page."""
    cells = []
    for measure, digits in (("len", 2), ("r_each", 3), ("r_cum", 2), ("violation_rate", 3)):
        values = np.asarray([record.summary[measure] for record in records])
        half = f" ± {student_interval(values).half_width:.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{values.mean():.{digits}f}{half}")
    return f"| {name} | " + " | ".join(cells) + f" | {len(records)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--item-term", default="", choices=["", "unbiased"])
    parser.add_argument("--lines", nargs="+", choices=list(LINES), default=list(LINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    single_threaded()
    term = arguments.item_term
    pair = twin_pair(TWIN_SEED)
    pair = pair.given_mode(term) if term else pair
    store = arguments.store / (term or "none")
    worlds = {pair.name: pair}
    page = [
        f"### HierarchicalPPO's settings, {pair.name}, Max Len 30"
        + (f", item term '{term}'" if term else ""),
        "",
        "| `hrl` with | Len | R_each | R_cum | violation rate | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in arguments.lines:
        cells = [cell(pair.name, LINES[name], seed, term) for seed in arguments.seeds]
        records = run_study(cells, store / name.replace(" ", "_"), worlds).raise_for_failures().records
        page.append(row(name + (f" (`{LINES[name]}`)" if LINES[name] else ""), records))
        print(page[-1], flush=True)
    for name in CONTROLS:
        config = plan_run(name, pair.name, session=SessionConfig(max_len=30), item_term=term)
        page.append(row(f"control: {name}", run_study([config], store / "controls", worlds).records))
    page += [
        "",
        f"Twin (synthetic), hash {pair.test.data.data_hash}; 1,000 held-out users; ± is half the 95 % Student interval "
        "over training seeds. This twin is for choosing settings; nothing is claimed in it.",
        "",
        "Made by: `python benchmarks/hierarchical_settings.py --store STORE --results RESULTS"
        + (f" --item-term {term}" if term else "")
        + f"` ({machine()}).",
    ]
    text = "\n".join(page) + "\n"
    print(text)
    if arguments.results:
        stem = "hierarchical_settings" + (f"_{term}" if term else "")
        write_text_atomically(arguments.results / f"{stem}.md", text)


if __name__ == "__main__":
    main()
