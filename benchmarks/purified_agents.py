"""Agents and controls with and without purified states and item terms, in the test world (see the paper's Fig. 3).

    python benchmarks/purified_agents.py kuairand --data ../shared/data --purifiers runs/purifiers --store runs/purified

Purifiers are those that benchmarks/purifiers.py left (seed 0). Writes docs/results/purified_agents_WORLD.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from purifiers import pair_of

from dsrm.baselines import IdentityPurifier
from dsrm.pretrain import noise_like
from dsrm.purifier import load_purifier, save_purifier
from hrl_policies.study import (
    STUDY_SEEDS,
    PurifierIdentity,
    RunConfig,
    plan_run,
    plan_runs,
    result_tables,
    run_study,
)
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.tables import write_records
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig
from kuaifair_env.files import write_text_atomically

AGENTS = ("a2c", "ppo")
CONTROLS = ("random", "greedy-ctr", "quota-greedy", "quality-oracle", "oracle")
PURIFIERS = ("profile", "regression", "ips", "unbiased", "regression_unbiased")
ITEM_TERMS = ("log", "ips", "features", "unbiased")


def files(folder: Path, pair: WorldPair) -> dict[str, Path]:
    """Returns the files of the purifiers to compare; identity and noise controls are made here."""
    found = {name: folder / f"{name}-seed0.safetensors" for name in PURIFIERS}
    made = {"identity": folder / "identity.safetensors", "noise": folder / "noise.safetensors"}
    if not made["identity"].exists():
        save_purifier(IdentityPurifier(), made["identity"])
    if not made["noise"].exists():
        save_purifier(noise_like(load_purifier(found["profile"]), pair.train), made["noise"])
    return made | found


def named(path: Path, name: str) -> PurifierIdentity:
    """Names a purifier as the tables call it."""
    return PurifierIdentity(name, PurifierIdentity.of_file(path).hash)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--purifiers", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--agents", nargs="*", default=list(AGENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(STUDY_SEEDS))
    parser.add_argument("--steps", type=int, default=200_000, help="training steps of each agent")
    arguments = parser.parse_args()
    single_threaded()
    pair = pair_of(arguments.world, arguments.data)
    stem = arguments.world.removeprefix("KuaiFair-").removesuffix("-v0").lower()
    paths = files(arguments.purifiers / stem, pair)
    identities = {name: named(path, name) for name, path in paths.items()}
    purifiers = {identities[name]: path for name, path in paths.items()}
    session = SessionConfig(max_len=30)
    cells: list[RunConfig] = [plan_run(name, pair.name, session=session) for name in CONTROLS]
    cells += [
        plan_run("quota-greedy", pair.name, session=session, purifier=identity) for identity in purifiers
    ]
    steps = dict.fromkeys(arguments.agents, arguments.steps)
    agents = ("identity", "noise", "profile", "regression", "unbiased")
    cells += plan_runs(
        arguments.agents,
        pair.name,
        seeds=arguments.seeds,
        max_lens=(30,),
        total_steps=steps,
        purifiers=[None, *(identities[name] for name in agents)],
    )
    records = (
        run_study(cells, arguments.store, {pair.name: pair}, purifiers=purifiers).raise_for_failures().records
    )
    for term in ITEM_TERMS:
        given = pair.given_mode(term)
        cells = [
            plan_run(name, pair.name, session=session, item_term=term)
            for name in ("greedy-ctr", "quota-greedy")
        ]
        cells += plan_runs(
            arguments.agents[:1],
            pair.name,
            seeds=arguments.seeds,
            max_lens=(30,),
            total_steps=steps,
            item_term=term,
        )
        records += run_study(cells, arguments.store, {pair.name: given}).raise_for_failures().records
    command = f"python benchmarks/purified_agents.py {arguments.world} --purifiers PURIFIERS --store STORE"
    text = "\n\n".join(table.markdown() for table in result_tables(records, command)) + "\n"
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / f"purified_agents_{stem}.md", text)
        write_records(arguments.results / f"purified_agents_{stem}.csv", records)


if __name__ == "__main__":
    main()
