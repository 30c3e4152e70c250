"""Small stores of runs, for tables, figures and reports."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from worlds_for_tests import interrupted_pair, small_pair

from dsrm.baselines import IPSPurifier
from dsrm.purifier import save_purifier
from hrl_policies.study import PurifierIdentity, RunConfig, plan_run, run_folder, run_study, train
from hrl_policies.study.store import StoredRun
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig

LIKE_THE_PAPERS = "KuaiFair-KuaiRecTwin-v0"
OWN = "small"
SEEDS = (11, 15, 19)
MAX_LENS = (8, 30)
CONTROLS = ("random", "quota-greedy", "oracle")
ERROR = "ValueError: a rate is <positive>, got -1"


def pairs() -> dict[str, WorldPair]:
    """Two pairs of small worlds; one bears the name of a twin, so that the paper has figures for it."""
    return {name: small_pair(name=name, seed=seed) for seed, name in enumerate((LIKE_THE_PAPERS, OWN))}


def write_comparison_store(folder: Path) -> Path:
    """Writes A2C and controls in two worlds at two horizons; in one world also HRL, and A2C on purified states."""
    path = folder / "ips.safetensors"
    save_purifier(IPSPurifier(), path)
    ips = PurifierIdentity.of_file(path)
    runs = []
    for session in (SessionConfig(max_len=max_len) for max_len in MAX_LENS):
        for seed in SEEDS:
            runs += [
                a2c(LIKE_THE_PAPERS, seed, session),
                a2c(LIKE_THE_PAPERS, seed, session, ips),
                a2c(OWN, seed, session),
                plan_run("hrl", LIKE_THE_PAPERS, seed=seed, session=session, total_steps=256, n_envs=8),
            ]
        runs += [plan_run(name, world, session=session) for world in (LIKE_THE_PAPERS, OWN) for name in CONTROLS]
    run_study(runs, folder / "store", pairs(), purifiers={ips: path}).raise_for_failures()
    return folder / "store"


def write_report_store(folder: Path, store: Path) -> Path:
    """Copies the runs of one world, and adds an interrupted run and a failed one."""
    shutil.copytree(store / OWN, folder / OWN)
    stopped = a2c(OWN, 23, SessionConfig())
    result = train(stopped, interrupted_pair(at=40), output=folder / run_folder(stopped))
    assert not result.complete
    failed = folder / OWN / "td3-len30-k10-seed11.failed"
    failed.mkdir()
    (failed / "traceback.txt").write_text(
        f'Traceback (most recent call last):\n  File "x.py", line 1\n{ERROR}\n', encoding="utf-8"
    )
    return folder


def a2c(world: str, seed: int, session: SessionConfig, purifier: PurifierIdentity | None = None) -> RunConfig:
    """A2C as it is trained in these stores."""
    return plan_run(
        "a2c",
        world,
        seed=seed,
        session=session,
        total_steps=480,
        n_envs=8,
        overrides={"n_steps": 8},
        purifier=purifier,
    )


def runs_of(
    runs: Sequence[StoredRun],
    method: str,
    world: str = LIKE_THE_PAPERS,
    max_len: int = 30,
    purified: bool = False,
) -> list[StoredRun]:
    """Returns the seeds of one method on one task."""
    return [
        run
        for run in runs
        if (run.config.method, run.config.world, run.config.session.max_len) == (method, world, max_len)
        and (run.config.purifier is not None) == purified
    ]
