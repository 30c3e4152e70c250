"""Milliseconds per purification for each sampler at batch 1 and 64, beside the policy's own forward pass.

    python benchmarks/purify_latency.py --env KuaiFair-KuaiRandTwin-v0 --purifier profile.safetensors

Quality stands beside it: the within-user AUC of the same states on held-out users' unbiased feedback. Processor time of
one thread, medians over repeated runs, each beside its ratio to a matrix product timed in between.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from preference_costs import CALLS, RUNS, row
from stable_baselines3.common.policies import ActorCriticPolicy
from worlds import open_worlds

from dsrm.diffusion import SamplerConfig
from dsrm.model import DSRM
from dsrm.probe_data import probe_set
from dsrm.probes import RAW, probe, purified_states
from dsrm.purifier import StatePurifier, load_purifier
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine
from kuaifair_env.files import write_text_atomically

BATCHES = (1, 64)
SAMPLERS: dict[str, SamplerConfig | None] = {
    "student (default)": None,
    "1 evaluation": SamplerConfig("ddim", 1),
    "DPM++ 3": SamplerConfig("dpm++", 3),
    "DDIM 5": SamplerConfig("ddim", 5),
    "DDIM 10": SamplerConfig("ddim", 10),
    "DDPM 20, one sample": SamplerConfig("ddpm", 20, start="noise"),
    "DDIM 10, eta 1, mean of 8": SamplerConfig("ddim", 10, eta=1.0, start="noise", samples=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="environment id, kuairand or kuairec")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--purifier", type=Path, required=True)
    parser.add_argument("--regression", type=Path)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    single_threaded()
    world = open_worlds(arguments.env, arguments.data).test
    model = load_purifier(arguments.purifier)
    assert isinstance(model, DSRM)
    variants: dict[str, StatePurifier] = {name: model.with_sampler(sampler) for name, sampler in SAMPLERS.items()}
    if arguments.regression:
        variants["regression control"] = load_purifier(arguments.regression)
    probes = probe_set(world)
    quality = probe(probes, purified_states(probes, world, variants)).measures
    spaces = model.bind(world)
    policy = ActorCriticPolicy(spaces, spaces, lambda _: 3e-4)
    cells: defaultdict[str, list[str]] = defaultdict(list)
    for batch in BATCHES:
        rows = np.arange(batch) % len(probes)
        states, window = probes.states[rows], probes.window.take(rows)
        observed = torch.from_numpy(states)

        def forward(observed: torch.Tensor = observed) -> object:
            with torch.inference_mode():
                return policy(observed)

        calls: dict[str, Callable[[], object]] = {
            "policy's forward pass": forward,
            "building the condition": partial(model.conditions, states, window),
            **{name: partial(purifier.purify, states, window) for name, purifier in variants.items()},
        }
        for name, call in calls.items():
            cells[name].append(row(call))
    lines = [
        "| | " + " | ".join(f"ms, batch {batch} [range over runs] | ratio" for batch in BATCHES) + " | AUC |",
        "|---|" + "---:|" * (2 * len(BATCHES) + 1),
    ]
    for name, of_batches in cells.items():
        auc = f"{quality[name]['auc'].value:.4f}" if name in quality else ""
        lines.append(f"| {name} | {' | '.join(of_batches)} | {auc} |")
    raw = quality[RAW]["auc"]
    regression = " --regression FILE" if arguments.regression else ""
    lines += [
        "",
        f"Raw state: AUC {raw.value:.4f} [{raw.interval[0]:.4f}, {raw.interval[1]:.4f}] on {len(probes)} users "
        f"of {world.data.provenance.name} ({world.data.provenance.origin}). Purifying includes building the "
        "condition. Ratio: to a (256, 64) x (64, 10,728) product on the same thread, timed in between; medians of "
        f"{CALLS} calls, {RUNS} runs.",
        "",
        f"Made by: `python benchmarks/purify_latency.py --env {arguments.env} --purifier FILE{regression}` "
        f"({machine()}); the purifier's mode is `{model.config.mode}`.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "purify_latency.md", text)


if __name__ == "__main__":
    main()
