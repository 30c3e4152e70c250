"""A small store of runs: trained with two seeds, controls, one interrupted and one failed."""

from __future__ import annotations

from pathlib import Path

from worlds_for_tests import interrupted_pair, small_pair

from hrl_policies.study import cell_folder, plan_run, train
from kuaifair_env.batch import SessionConfig

SEEDS = (11, 15)
CONTROLS = ("random", "quota-greedy", "oracle")
MAX_LENS = (30, 50)
ERROR = "ValueError: a rate is <positive>, got -1"


def write_small_store(folder: Path) -> Path:
    """Writes A2C with two seeds and three controls at two horizons, an interrupted run and a failed one."""
    pair = small_pair()
    for max_len in MAX_LENS:
        session = SessionConfig(max_len=max_len)
        cells = [_a2c(session, seed, 2_000) for seed in SEEDS]
        cells += [plan_run(name, "small", session=session) for name in CONTROLS]
        for cell in cells:
            train(cell, pair, output=folder / cell_folder(cell))
    stopped = _a2c(SessionConfig(), 19, 2_000)
    result = train(stopped, interrupted_pair(at=60), output=folder / cell_folder(stopped))
    assert not result.complete
    failed = folder / "small" / "td3-len30-k10-seed11.failed"
    failed.mkdir()
    (failed / "traceback.txt").write_text(
        f'Traceback (most recent call last):\n  File "x.py", line 1\n{ERROR}\n', encoding="utf-8"
    )
    return folder


def _a2c(session: SessionConfig, seed: int, steps: int):
    return plan_run(
        "a2c", "small", seed=seed, session=session, total_steps=steps, n_envs=8, overrides={"n_steps": 8}
    )
