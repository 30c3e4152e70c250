"""Training time of the methods of the paper's Table 4, side by side; writes docs/results/train_speed.md.

    python benchmarks/train_speed.py --results docs/results

World: the KuaiRec twin with its whole catalogue as candidates, slates of 10, Max Len 30, 64 concurrent sessions, one
thread. The methods take turns, a tenth of the sessions each, so that a machine whose speed drifts slows all of them
alike; ratios are medians over the turns. Seconds are processor time of the one thread. Sessions differ in length from
method to method, since users leave some sooner than others; hence there is a ratio for the same number of sessions and
one for the same number of user-steps. A turn lasts one rollout longer than it takes to end its sessions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from dsrm.purifier import load_purifier
from hrl_policies.study import PurifierIdentity, plan_run
from hrl_policies.study.loading import build_policy
from hrl_policies.study.paper_tables import PUBLISHED_SECONDS
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine
from hrl_policies.worlds import WorldPair, cached_purifier
from hrl_policies.zoo import method
from kuaifair_env.batch import SessionConfig
from kuaifair_env.embeddings import cached_embeddings
from kuaifair_env.files import write_text_atomically
from kuaifair_env.response.fitting import cached_response
from kuaifair_env.synthetic.config import twin_config
from kuaifair_env.synthetic.twin import load_twin
from kuaifair_env.world import build_world

METHODS = {"a2c": "A2C", "sac4ir": "SAC4IR", "dnair": "DNaIR", "hrl": "HRL", "hrl+rce": "+RCE", "dsrm-hrl": "Ours"}
"""Their names in the paper's Table 4."""
TURNS = 10
SEED = 11


class Turn(NamedTuple):
    """What a method spent in a turn.

    Attributes:
        seconds: Of processor time.
        steps: User-steps.
        sessions: Sessions that ended.
    """

    seconds: float
    steps: int
    sessions: int


class StopAfterSessions(BaseCallback):
    """Ends training after the update that follows the rollout in which a number of sessions have ended."""

    def __init__(self, sessions: int) -> None:
        super().__init__()
        self.sessions, self.ended = sessions, 0
        self._enough = False

    def _on_step(self) -> bool:
        self.ended += int(np.count_nonzero(self.locals["dones"]))
        return not self._enough

    def _on_rollout_end(self) -> None:
        self._enough = self.ended >= self.sessions


def whole_catalogue(n_items: int | None) -> WorldPair:
    """Returns the KuaiRec twin with all of its items, or the first of them, as candidates."""
    data = load_twin(twin_config("KuaiRec")).data
    embeddings, response = cached_embeddings(data, 64), cached_response(data, "train")
    candidates = np.arange(len(data.items) if n_items is None else n_items)
    train = build_world(data, "train", response, candidates=candidates, embeddings=embeddings)
    # Nothing is evaluated here: the training world's own users stand in for those of a test world.
    held, rest = train.users[:100], train.users[100:]
    return WorldPair("KuaiRec twin", replace(train, users=rest), replace(train, split="test", users=held))


def turns_of(models: dict[str, BaseAlgorithm], sessions: int) -> dict[str, list[Turn]]:
    """Trains the models in turns."""
    spent: dict[str, list[Turn]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            callback = StopAfterSessions(sessions // TURNS)
            before, start = model.num_timesteps, time.process_time()
            model.learn(10**9, callback, reset_num_timesteps=False)
            spent[name].append(Turn(time.process_time() - start, model.num_timesteps - before, callback.ended))
    return spent


def page(spent: dict[str, list[Turn]], sessions: int, items: int, command: str) -> str:
    """Returns the page."""
    base, base_steps, base_sessions = columns(spent["hrl"])
    lines = [
        f"### Training time for {sessions:,} sessions or a few more, {items:,} candidates",
        "",
        "| method | processor seconds | sessions | user-steps a session | user-steps/s | time of HRL, a session | "
        "time of HRL, a user-step | paper, s (other hardware, other simulator) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, turns in spent.items():
        seconds, steps, ended = columns(turns)
        a_session = ratio((seconds / ended) / (base / base_sessions))
        a_step = ratio((seconds / steps) / (base / base_steps))
        paper = PUBLISHED_SECONDS[METHODS[name]]
        lines.append(
            f"| {method(name).title} | {seconds.sum():.0f} | {ended.sum():,.0f} | {steps.sum() / ended.sum():.1f} | "
            f"{steps.sum() / seconds.sum():,.0f} | {a_session} | {a_step} | {paper:,.0f} |"
        )
    lines += [
        "",
        f"KuaiRec twin (synthetic), slates of 10, Max Len 30, 64 concurrent sessions, seed {SEED}, one thread. The "
        f"methods take {TURNS} turns; ratios are medians of turns [least, largest]. Users stay longer with some "
        "methods than with others, and what training costs goes with the steps. Making purifiers is not in it. The "
        "paper's: arXiv:2603.03820, Table 4 (KuaiRec, Max Len 30, 20,000 episodes).",
        "",
        f"Made by: `{command}` ({machine()}).",
    ]
    return "\n".join(lines) + "\n"


def columns(turns: list[Turn]) -> NDArray[np.float64]:
    """Returns seconds, steps and sessions of turns, ``float64 (3, turns)``."""
    return np.asarray(turns, np.float64).T


def ratio(ratios: NDArray[np.float64]) -> str:
    """Returns the median of ratios and their range, for the page."""
    return f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=20_000)
    parser.add_argument("--items", type=int, help="candidates (default: the whole catalogue)")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    single_threaded()
    pair = whole_catalogue(arguments.items)
    spent = turns_of({name: model_of(name, pair) for name in METHODS}, arguments.sessions)
    text = page(
        spent,
        arguments.sessions,
        pair.train.n_items,
        f"python benchmarks/train_speed.py --sessions {arguments.sessions} --results RESULTS",
    )
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "train_speed.md", text)


def model_of(name: str, pair: WorldPair) -> BaseAlgorithm:
    """Returns the untrained model of a method with the zoo's settings, and its purifier made."""
    mode = method(name).purifier
    purifier = cached_purifier(pair.train, mode) if mode else None
    identity = PurifierIdentity.of_file(purifier) if purifier else None
    config = plan_run(name, pair.name, seed=SEED, session=SessionConfig(max_len=30), purifier=identity)
    build: Callable[..., BaseAlgorithm] = build_policy
    return build(config, pair, load_purifier(purifier) if purifier else None)


if __name__ == "__main__":
    main()
