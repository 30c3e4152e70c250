"""Every purifier and control on held-out users; writes the sections of worlds in docs/results/purification.md.

    python benchmarks/purifiers.py KuaiFair-KuaiRecTwin-v0 --store runs/purifiers --results docs/results
    python benchmarks/purifiers.py kuairand --data DATA --store runs/purifiers --results docs/results
    python benchmarks/purifiers.py KuaiRand --conformity 1.5 --taste strong --modes profile regression ips paper \
        linear_debias --store runs/purifiers --results docs/results

A world is an environment id, one of the two partial data sets, or with ``--conformity`` a twin whose users click what
is popular more than the data sets' do: a world in which there is much to purify. Purifiers that the store holds are not
made again. Figures of all seeds go to purification_WORLD.csv.gz.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pandas as pd
from worlds import argument_parser, open_worlds, short_name, twin_worlds, write_section

from dsrm.diffusion import SamplerConfig
from dsrm.model import DSRM
from dsrm.pretraining import PretrainConfig, noise_like, pretrain
from dsrm.probe_data import probe_set
from dsrm.probes import RAW, Measure, ProbeReport, probe, purified_states
from dsrm.purifier import StatePurifier, load_purifier, save_purifier
from hrl_policies.study.records import write_table
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine
from hrl_policies.worlds import WorldPair

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
WINDOWS = {"log": "Last logged", "short": "Short (last five exposures)", "policy": "Policy-made"}
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


def rows_of(windows: str, seed: int, report: ProbeReport) -> list[dict[str, Any]]:
    """Returns the figures of a seed as rows: value and interval, and the same of the paired gain over the raw state."""
    return [
        {"windows": windows, "seed": seed, "state": state, "measure": name}
        | measure.as_dict()
        | _gain(measure, report.measures[RAW][name])
        for state, measures in report.measures.items()
        for name, measure in measures.items()
    ]


def _gain(measure: Measure, raw: Measure) -> dict[str, float]:
    gain = measure.gain_over(raw)
    return {"gain": gain.value, "gain_low": gain.interval[0], "gain_high": gain.interval[1]}


def tables(records: pd.DataFrame) -> str:
    """Returns the Markdown tables of records: means over seeds of the value and of both ends of its interval."""
    lines = []
    for kind, title in WINDOWS.items():
        groups = records[records.windows == kind].groupby(["state", "measure"], sort=False)
        figures = groups[["value", "low", "high"]].mean()
        means = dict(zip(figures.index, figures.to_numpy(), strict=True))
        states = list(dict.fromkeys(state for state, _ in means))
        columns = [name for name in COLUMNS if (RAW, name) in means]
        lines += [f"## {title} windows", "", f"| state | {' | '.join(COLUMNS[name] for name in columns)} |"]
        lines.append("|---|" + "---|" * len(columns))
        lines += [f"| {state} | {' | '.join(_cell(*means[state, name]) for name in columns)} |" for state in states]
        lines.append("")
    return "\n".join(lines)


def _cell(value: float, low: float, high: float) -> str:
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
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        purifiers = made(pair, store, seed, arguments.modes)
        for kind in WINDOWS:
            probes = probe_set(pair.test, kind, seed=seed)
            rows += rows_of(kind, seed, probe(probes, purified_states(probes, pair.test, purifiers), seed))
    data = pair.test.data.provenance
    notes = (
        f"Data: {data.name} ({data.origin}), hash {pair.test.data.data_hash}. Seeds {arguments.seeds}; "
        f"{len(pair.test.users)} held-out users, fewer where a window is empty; mean over seeds of values and of both "
        "ends of the 95 % bootstrap intervals over users. * reads the test log of declared calibration users, who are "
        f"not among those probed. All figures: `purification_{stem}.csv.gz`."
    )
    seeds = "" if len(arguments.seeds) == 3 else f" --seeds {' '.join(map(str, arguments.seeds))}"
    command = f"python benchmarks/purifiers.py {arguments.world}{options}{seeds} --store STORE --results RESULTS"
    title = data.name if arguments.conformity is None else pair.name
    text = f"# {title}\n\n{tables(pd.DataFrame(rows))}\n{notes}\n\nMade by: `{command}` ({machine()})."
    write_section(arguments.results, "purification.md", text)
    if arguments.results:
        write_table(arguments.results / f"purification_{stem}.csv.gz", rows)


if __name__ == "__main__":
    main()
