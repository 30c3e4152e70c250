"""Does the number of diffusion steps matter (paper Fig. 6)? Noise level and step count, swept apart.

    python benchmarks/diffusion_steps.py kuairand --data ../shared/data --results docs/results

The paper's one number moves three things at once: how finely noise is graded in training, how many evaluations the
sampler takes, and, with a linear schedule, how much noise there is at all. Here models are trained with 5 to 500
levels, and each is then sampled with few and many evaluations (from the noisiest level) and from weaker levels (with
five evaluations, starting at the noised observed state). Evaluated by the within-user AUC of cos(s^, e_i) on unbiased
feedback of held-out users, on logged and on policy-made windows, and by QuotaGreedy's R_cum in the test world.
Writes a page, and of the samplers with as many evaluations from full noise a CSV and a figure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kuaifair_env.splits import evaluation_users

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import pandas as pd
from worlds import argument_parser, open_worlds, short_name, write_page

from dsrm.diffusion import SamplerConfig
from dsrm.model import DSRM, DistillationConfig
from dsrm.pretraining import PretrainConfig, pretrain
from dsrm.probe_data import ProbeSet, probe_set
from dsrm.purifier import Mode, StatePurifier
from dsrm.wrappers import VecDSRM
from hrl_policies.controls import QuotaGreedy
from hrl_policies.study.curves import StepResult, draw_diffusion_steps
from hrl_policies.study.labels import world_title
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.evaluation import evaluate
from kuaifair_env.response.calibration import within_user_auc
from kuaifair_env.sb3 import KuaiFairVecEnv

LEVELS = (5, 20, 100, 500)
SHARES = (0.25, 0.5, 0.75, 1.0)
BATCH = 250
DRAWN = ("len", "len_floor", "len_ceiling", "r_each", "r_cum", "ad", "violation_rate", "auc")


def samplers(levels: int) -> dict[str, SamplerConfig]:
    """Returns the sweep over evaluations at full noise, and the sweep over noise at five evaluations."""
    counts = sorted({1, 5, min(20, levels), levels})
    found = {f"{count} deterministic": SamplerConfig("ddim", count) for count in counts}
    found |= {f"{count} ancestral (DDPM)": SamplerConfig("ddpm", count, start="noise") for count in counts}
    for share in SHARES:
        level = max(1, round(share * levels))
        found[f"noised to level {share:.2f} K, then {min(5, level)}"] = SamplerConfig(
            "ddim", min(5, level), start="state", level=level
        )
    return found


def auc(probes: ProbeSet, states: FloatArray) -> float:
    """Returns the within-user AUC of cos(state, item) on unbiased feedback."""
    place = np.searchsorted(probes.users, probes.log.users)
    scores = np.einsum("nd,nd->n", unit_rows(states)[place], probes.embeddings[probes.log.items])
    return within_user_auc(place, probes.log.clicks, scores).mean


def earned(pair: WorldPair, purifier: StatePurifier | None) -> dict[str, float]:
    """Returns QuotaGreedy's headline figures in the test world, Max Len 30."""
    env = KuaiFairVecEnv(pair.test, SessionConfig(max_len=30, action_mode="slate"), BATCH, seed=0)
    users = evaluation_users(pair.test.user_ids, 1_000)
    wrapped = env if purifier is None else VecDSRM(env, purifier)
    return evaluate(QuotaGreedy(pair.scorer), wrapped, users=users, seed=0).summary()


def rows_of(pair: WorldPair, probes: Sequence[ProbeSet], model: DSRM) -> dict[str, dict[str, float]]:
    """Returns both AUCs, microseconds per state and QuotaGreedy's figures, for each sampler."""
    found = {}
    for name, sampler in samplers(model.config.levels).items():
        purifier = model.with_sampler(sampler)
        purifier.bind(pair.test)
        start = time.perf_counter()
        evaluated = [auc(one, purifier.purify(one.states, one.window)) for one in probes]
        microseconds = 1e6 * (time.perf_counter() - start) / sum(len(one) for one in probes)
        gains = earned(pair, purifier) if sampler.steps <= 20 else {}
        found[name] = gains | {"auc": evaluated[0], "auc_policy": evaluated[1], "microseconds": microseconds}
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--mode", default="profile", choices=["profile", "unbiased"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    probes = [probe_set(pair.test, kind) for kind in ("log", "policy")]
    lines = [
        f"### {pair.test.data.provenance.name}: levels, evaluations and noise, mode {arguments.mode}",
        "",
        "| levels K | sampler | AUC, logged | AUC, policy-made | QuotaGreedy R_cum | µs per state |",
        "|---:|---|---|---|---|---:|",
    ]
    raw = [auc(one, one.states) for one in probes]
    lines.append(f"| | raw | {raw[0]:.4f} | {raw[1]:.4f} | {earned(pair, None)['r_cum']:.2f} | |")
    results: list[StepResult] = []
    mode: Mode = "unbiased" if arguments.mode == "unbiased" else "profile"
    for levels in LEVELS:
        found = []
        for seed in arguments.seeds:
            start = time.perf_counter()
            config = PretrainConfig(mode, seed=seed, levels=levels, distillation=DistillationConfig(steps=1))
            model = pretrain(pair.train, config)
            assert isinstance(model, DSRM)
            found.append(rows_of(pair, probes, model))
            print(f"K = {levels}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        for name in found[0]:
            cells = [
                _cell(np.asarray([one[name].get(figure, np.nan) for one in found]), digits)
                for figure, digits in (("auc", 4), ("auc_policy", 4), ("r_cum", 2))
            ]
            fastest = min(one[name]["microseconds"] for one in found)
            lines.append(f"| {levels} | {name} | {' | '.join(cells)} | {fastest:.0f} |")
        results += [
            StepResult(
                world_title(pair.name, pair.test.data.provenance.origin),
                levels,
                int(name.split()[0]),
                seed,
                {figure: one[name][figure] for figure in DRAWN if figure in one[name]},
            )
            for seed, one in zip(arguments.seeds, found, strict=True)
            for name in one
            if name.endswith(" deterministic")
        ]
    lines += [
        "",
        f"Mean ± standard deviation over pretraining seeds {arguments.seeds}; {len(probes[0])} and {len(probes[1])} "
        "held-out users probed, 1,000 served. Deterministic sampling starts at the mean of the noise (DDIM, eta 0), "
        "ancestral sampling at noise; R_cum is left out beyond 20 evaluations.",
        "",
        f"Made by: `python benchmarks/diffusion_steps.py {arguments.world} --mode {arguments.mode} --results RESULTS` "
        f"({machine()}, 1 thread).",
    ]
    name = f"diffusion_steps_{short_name(arguments.world)}_{arguments.mode}"
    write_page(arguments.results, f"{name}.md", "\n".join(lines))
    if arguments.results:
        pd.DataFrame(
            [
                {
                    "world": one.world,
                    "levels": one.levels,
                    "steps": one.steps,
                    "seed": one.seed,
                    **one.figures,
                }
                for one in results
            ]
        ).to_csv(arguments.results / f"{name}.csv", index=False)
        draw_diffusion_steps(arguments.results / f"{name}.png", results, ("len", "r_cum", "ad", "auc"))


def _cell(numbers: FloatArray, digits: int) -> str:
    if np.isnan(numbers).any():
        return ""
    return f"{numbers.mean():.{digits}f} ± {numbers.std(ddof=min(1, len(numbers) - 1)):.{digits}f}"


if __name__ == "__main__":
    main()
