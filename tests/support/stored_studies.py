"""Small stores of runs, for tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from worlds_for_tests import small_pair

from dsrm.artifacts import save_purifier
from dsrm.controls import IPSPurifier
from hrl_policies.study import PurifierIdentity, load_run, plan_run, run_study
from hrl_policies.study.store import StoredRun
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig

WORLDS = ("KuaiFair-KuaiRecTwin-v0", "small")
SEEDS = (11, 15, 19)


def pairs() -> dict[str, WorldPair]:
    """Two pairs of small worlds; one bears the name of a twin, so that the paper has figures for it."""
    return {name: small_pair(name=name, seed=seed) for seed, name in enumerate(WORLDS)}


def small_store(
    folder: Path, worlds: Sequence[str] = WORLDS, max_lens: Sequence[int] = (8, 12)
) -> list[StoredRun]:
    """Runs A2C, raw and purified, HRL and three controls in small worlds at short horizons."""
    path = folder / "ips.safetensors"
    save_purifier(IPSPurifier(), path)
    ips = PurifierIdentity.of_file(path)
    made = pairs()
    cells = []
    for world in worlds:
        for max_len in max_lens:
            session = SessionConfig(max_len=max_len)
            for seed in SEEDS:
                cells += [
                    plan_run(
                        "a2c",
                        world,
                        seed=seed,
                        session=session,
                        total_steps=1_200,
                        n_envs=8,
                        overrides={"n_steps": 8},
                        purifier=purifier,
                    )
                    for purifier in (None, ips)
                ]
                cells.append(plan_run("hrl", world, seed=seed, session=session, total_steps=256, n_envs=8))
            cells += [plan_run(name, world, session=session) for name in ("random", "quota-greedy", "oracle")]
    run_study(cells, folder / "store", made, purifiers={ips: path})
    found = sorted(result.parent for result in (folder / "store").rglob("result.json"))
    return [load_run(one) for one in found]


def session_rows(rng: np.random.Generator, users: int, sessions: int) -> list[dict[str, float]]:
    """Returns made-up records of sessions."""
    return [
        {
            "user_id": float(user),
            "len": float(rng.integers(5, 20)),
            "r_cum": float(rng.uniform(2, 9)),
            "popular_share": float(rng.random()),
            "violation_rate": float(rng.random()),
        }
        for user in range(users)
        for _ in range(sessions)
    ]
