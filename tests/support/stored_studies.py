"""Small stores of runs, for tables and figures."""

from __future__ import annotations

from pathlib import Path

from worlds_for_tests import small_pair

from dsrm.baselines import IPSPurifier
from dsrm.purifier import save_purifier
from hrl_policies.study import PurifierIdentity, RunConfig, plan_run, run_study
from hrl_policies.study.store import StoredRun, stored_runs
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig

LIKE_THE_PAPERS = "KuaiFair-KuaiRecTwin-v0"
OWN = "small"
SEEDS = (11, 15, 19)
MAX_LENS = (8, 30)
CONTROLS = ("random", "quota-greedy", "oracle")


def pairs() -> dict[str, WorldPair]:
    """Two pairs of small worlds; one bears the name of a twin, so that the paper has figures for it."""
    return {name: small_pair(name=name, seed=seed) for seed, name in enumerate((LIKE_THE_PAPERS, OWN))}


def small_store(folder: Path) -> list[StoredRun]:
    """Runs A2C and three controls in small worlds at two horizons; in one also HRL, and A2C on purified states."""
    path = folder / "ips.safetensors"
    save_purifier(IPSPurifier(), path)
    ips = PurifierIdentity.of_file(path)
    cells = []
    for max_len in MAX_LENS:
        session = SessionConfig(max_len=max_len)

        def a2c(
            world: str, seed: int, purifier: PurifierIdentity | None, session: SessionConfig = session
        ) -> RunConfig:
            return plan_run(
                "a2c",
                world,
                seed=seed,
                session=session,
                total_steps=1_200,
                n_envs=8,
                overrides={"n_steps": 8},
                purifier=purifier,
            )

        for seed in SEEDS:
            cells += [a2c(LIKE_THE_PAPERS, seed, None), a2c(LIKE_THE_PAPERS, seed, ips), a2c(OWN, seed, None)]
            cells.append(
                plan_run("hrl", LIKE_THE_PAPERS, seed=seed, session=session, total_steps=256, n_envs=8)
            )
        cells += [
            plan_run(name, world, session=session) for world in (LIKE_THE_PAPERS, OWN) for name in CONTROLS
        ]
    run_study(cells, folder / "store", pairs(), purifiers={ips: path})
    return stored_runs(folder / "store")
