"""Agent-side encoders against the mean of a world's own embeddings: how well cos(s, e_i) ranks unbiased feedback.

    python benchmarks/encoders.py kuairand --data ../shared/data --results docs/results

Writes encoders_WORLD.md. Selection looks at users who are in the training world (their random exposures are read by
nothing else here); the test world's users are looked at once, beside them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kuaifair_env.observations import observed_states
from kuaifair_env.splits import held_out_users

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from worlds import argument_parser, open_worlds, short_name, write_page

from dsrm.encoder import EncoderConfig, pretrain_encoder
from dsrm.pretraining import PretrainConfig, pretrain
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.response.calibration import within_user_auc
from kuaifair_env.world import World

PURIFIED = "mean, logQ"
VARIANTS = {
    "mean, logQ": EncoderConfig("mean"),
    "mean, no logQ": EncoderConfig("mean", log_q=False),
    "transformer, logQ": EncoderConfig("transformer", batch_size=256, steps=1_500),
    "transformer, no logQ": EncoderConfig("transformer", log_q=False, batch_size=256, steps=1_500),
}
PURIFIERS = {
    "profile": PretrainConfig(mode="profile"),
    "regression": PretrainConfig(mode="regression"),
    "unbiased*": PretrainConfig(mode="unbiased"),
    "regression unbiased*": PretrainConfig(mode="regression", target="unbiased"),
}


def auc(world: World, states: FloatArray, held: bool) -> str:
    """Returns the within-user AUC of cos(s~, e_i) on the test log of held-out users, or of all others."""
    log = world.data.test
    rows = np.isin(log.users, held_out_users(world.data)) == held
    users, items = log.users[rows], log.items[rows]
    scores = np.einsum("nd,nd->n", unit_rows(states)[users], unit_rows(world.embeddings)[items])
    found = within_user_auc(users, log.clicks[rows], scores)
    low, high = found.interval(resamples=300)
    return f"{found.mean:.4f} [{low:.4f}, {high:.4f}]"


def milliseconds(world: World, rows: int) -> float:
    """Returns the best time of encoding the windows of ``rows`` users."""
    window = world.initial_history.take(world.users[:rows])
    best = np.inf
    for _ in range(20):
        start = time.perf_counter()
        observed_states(world, window)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def row(name: str, world: World, window: HistoryWindow, seconds: float) -> str:
    """Returns a line of the table."""
    states = observed_states(world, window)
    times = " / ".join(f"{milliseconds(world, rows):.2f}" for rows in (1, 64, 256))
    return f"| {name} | {auc(world, states, False)} | {auc(world, states, True)} | {times} | {seconds:.0f} |"


def purified_rows(name: str, world: World, window: HistoryWindow) -> list[str]:
    """Returns the lines of the purifiers over one encoder; of calibration users' AUC nothing is said."""
    states = observed_states(world, window)
    lines = []
    for mode, config in PURIFIERS.items():
        start = time.perf_counter()
        purifier = pretrain(world, config)
        seconds = time.perf_counter() - start
        purifier.bind(world)
        purified = purifier.purify(states, window)
        training = "" if "*" in mode else auc(world, purified, False)
        lines.append(f"| {name} + {mode} | {training} | {auc(world, purified, True)} | | {seconds:.0f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argument_parser(__doc__)
    arguments = parser.parse_args()
    single_threaded()
    world = open_worlds(arguments.world, arguments.data).train
    window = world.initial_history
    lines = [
        f"### {world.data.provenance.name}: encoders",
        "",
        "| encoder | AUC, users of the training world | AUC, held-out users | ms at batch 1 / 64 / 256 | training s |",
        "|---|---|---|---|---|",
        row("item embeddings, mean (default)", world, window, 0.0),
        *purified_rows("item embeddings, mean", world, window),
    ]
    for name, config in VARIANTS.items():
        start = time.perf_counter()
        encoder = pretrain_encoder(world, config)
        encoded = encoder.encoded(world)
        lines.append(row(name, encoded, window, time.perf_counter() - start))
        print(lines[-1], flush=True)
        if name == PURIFIED:
            lines += purified_rows(name, encoded, window)
    lines += [
        "",
        f"Data: {world.data.provenance.name} ({world.data.provenance.origin}), hash {world.data.data_hash}; seed 0; "
        "windows are the last 50 training exposures; within-user AUC on the test log, 95 % bootstrap intervals. "
        "* reads the test log of declared calibration users, none of whom is held out.",
        "",
        f"Made by: `python benchmarks/encoders.py {arguments.world} --results RESULTS` ({machine()}, 1 thread).",
    ]
    write_page(arguments.results, f"encoders_{short_name(arguments.world)}.md", "\n".join(lines))


if __name__ == "__main__":
    main()
