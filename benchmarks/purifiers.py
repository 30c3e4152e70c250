"""Every purifier and control on held-out users, three seeds; writes the tables of docs/results/purification.md.

    python benchmarks/purifiers.py KuaiFair-KuaiRecTwin-v0 --store runs/purifiers --results docs/results
    python benchmarks/purifiers.py kuairand --data ../shared/data --store runs/purifiers --results docs/results
    python benchmarks/purifiers.py KuaiRand --conformity 1.5 --taste strong --modes profile regression ips paper \
        linear_debias --store runs/purifiers --results docs/results

A world is an environment id, one of the two partial data sets, or with ``--conformity`` a twin whose users click what
is popular more than the data sets' do: a world in which there is much to purify. Purifiers that the store holds are not
made again. Pages of some modes alone are called ``..._selected``.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from worlds import argument_parser, open_worlds, short_name, twin_worlds, write_page

from dsrm.diffusion import SamplerConfig
from dsrm.model import DSRM
from dsrm.pretraining import PretrainConfig, noise_like, pretrain
from dsrm.probe_data import probe_set
from dsrm.probes import RAW, ProbeReport, probe, purified_states
from dsrm.purifier import StatePurifier, load_purifier, save_purifier
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine
from hrl_policies.worlds import WorldPair
from kuaifair_env.files import write_text_atomically

MADE: dict[str, Callable[[int], PretrainConfig]] = {
    "profile": lambda seed: PretrainConfig(mode="profile", seed=seed),
    "regression": lambda seed: PretrainConfig(mode="regression", seed=seed),
    "paper": lambda seed: PretrainConfig(mode="paper", seed=seed),
    "paired": lambda seed: PretrainConfig(mode="paired", seed=seed),
    "linear_debias": lambda seed: PretrainConfig(mode="linear_debias", seed=seed),
    "ips": lambda seed: PretrainConfig(mode="ips", seed=seed),
    "tce": lambda seed: PretrainConfig(mode="tce", seed=seed),
    "rce": lambda seed: PretrainConfig(mode="rce", seed=seed),
    "bod": lambda seed: PretrainConfig(mode="bod", seed=seed),
    "cdae": lambda seed: PretrainConfig(mode="cdae", seed=seed),
    "diffrec": lambda seed: PretrainConfig(mode="diffrec", seed=seed),
    "unbiased*": lambda seed: PretrainConfig(mode="unbiased", seed=seed),
    "regression unbiased*": lambda seed: PretrainConfig(mode="regression", target="unbiased", seed=seed),
}
SAMPLERS = {
    "profile, DDIM 5": SamplerConfig("ddim", 5),
    "profile, DPM++ 3": SamplerConfig("dpm++", 3),
    "profile, one DDPM sample": SamplerConfig("ddpm", 20, start="noise"),
    "profile, mean of 8 samples": SamplerConfig("ddim", 10, eta=1.0, start="noise", samples=8),
    "profile, guidance 1": SamplerConfig("ddim", 5, guidance=1.0),
    "profile, from the state": SamplerConfig("ddim", 5, start="state", level=50),
}
WINDOWS = {"log": "last logged", "short": "short (last five exposures)", "policy": "policy-made"}
COLUMNS = {
    "recovery_cosine": "recovery cos",
    "recovery_mse": "recovery MSE",
    "taste_r2": "taste R2",
    "auc": "AUC",
    "top_click_rate": "top-10 rate",
    "ndcg": "NDCG@10",
    "interest": "interest acc.",
    "popularity_r2": "pop. R2",
    "popularity_knn_r2": "pop. kNN R2",
    "level_r2": "level R2",
    "effective_rank": "eff. rank",
    "raw_cosine": "cos to raw",
}


def made(pair: WorldPair, store: Path, seed: int, modes: Sequence[str]) -> dict[str, StatePurifier]:
    """Returns all purifiers of a seed, from the store or made now."""
    purifiers: dict[str, StatePurifier] = {}
    for name in modes:
        config = MADE[name]
        path = store / f"{name.replace(' ', '_').replace('*', '')}-seed{seed}.safetensors"
        if not path.exists():
            start = time.perf_counter()
            save_purifier(pretrain(pair.train, config(seed)), path)
            print(f"{pair.name}: {name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        purifiers[name] = load_purifier(path)
    if "profile" not in purifiers:
        return purifiers
    profile = purifiers["profile"]
    purifiers["noise"] = noise_like(profile, pair.train, seed)
    assert isinstance(profile, DSRM)
    return purifiers | {name: profile.with_sampler(sampler) for name, sampler in SAMPLERS.items()}


def table(reports: list[ProbeReport], title: str) -> str:
    """Returns the Markdown table of some seeds: mean over seeds of the value and of both ends of its interval."""
    names = list(reports[0].measures)
    columns = [key for key in COLUMNS if all(key in report.measures[RAW] for report in reports)]
    lines = [f"### {title}", "", "| state | " + " | ".join(COLUMNS[key] for key in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for name in names:
        cells = [_cell([report.measures[name][key] for report in reports]) for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(measures: list[Any]) -> str:
    value = float(np.mean([measure.value for measure in measures]))
    low = float(np.mean([measure.interval[0] for measure in measures]))
    high = float(np.mean([measure.interval[1] for measure in measures]))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if abs(value) < 10 else f"{value:.1f}"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=list(MADE), default=list(MADE))
    parser.add_argument("--conformity", type=float, help="a twin (preset KuaiRand, KuaiRec or Toy) with so much")
    parser.add_argument("--taste", default="measured", choices=["measured", "strong"])
    arguments = parser.parse_args()
    single_threaded()
    stem = short_name(arguments.world)
    options = ""
    if arguments.conformity is None:
        pair = open_worlds(arguments.world, arguments.data)
    else:
        title = f"{arguments.world} twin, conformity {arguments.conformity:g}, taste {arguments.taste}"
        pair = twin_worlds(title, arguments.world, taste_strength=arguments.taste, conformity=arguments.conformity)
        stem += f"_conformity{arguments.conformity:g}_{arguments.taste}"
        options = f" --conformity {arguments.conformity:g} --taste {arguments.taste}"
    if arguments.modes != list(MADE):
        options += " --modes " + shlex.join(arguments.modes)
    store = arguments.store / stem
    store.mkdir(parents=True, exist_ok=True)
    if arguments.modes != list(MADE):
        stem += "_selected"
    reports: dict[str, list[ProbeReport]] = {kind: [] for kind in WINDOWS}
    for seed in arguments.seeds:
        purifiers = made(pair, store, seed, arguments.modes)
        for kind, found in reports.items():
            probes = probe_set(pair.test, kind, seed=seed)
            found.append(probe(probes, purified_states(probes, pair.test, purifiers), seed))
    data = pair.test.data.provenance
    title = data.name if arguments.conformity is None else pair.name
    notes = (
        f"Data: {data.name} ({data.origin}), hash {pair.test.data.data_hash}. Seeds {arguments.seeds}; "
        f"{reports['log'][0].users} held-out users; mean over seeds of values and of both ends of the 95 % bootstrap "
        "intervals over users. * reads the test log of declared calibration users, who are not among those probed."
    )
    seeds = "" if len(arguments.seeds) == 3 else f" --seeds {' '.join(map(str, arguments.seeds))}"
    command = f"python benchmarks/purifiers.py {arguments.world}{options}{seeds} --store STORE --results RESULTS"
    tables = [table(found, f"{title}: {WINDOWS[kind]} windows") for kind, found in reports.items()]
    text = "\n\n".join([*tables, notes, f"Made by: `{command}` ({machine()})."]) + "\n"
    write_page(arguments.results, f"purification_{stem}.md", text)
    if arguments.results:
        content = {kind: [report.as_dict() for report in found] for kind, found in reports.items()}
        path = arguments.results / f"purification_{stem}.json"
        write_text_atomically(path, json.dumps(_rounded(content), indent=1, sort_keys=True) + "\n")


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value) for value in content]
    return round(content, 5) if isinstance(content, float) else content


if __name__ == "__main__":
    main()
