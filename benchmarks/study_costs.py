"""Measures what the methods of the zoo cost, for `kuaifair study plan`; writes hrl_policies/study/plans/costs.json.

    python benchmarks/study_costs.py [method or purifier ...]

Costs are processor time of one thread in calibration products (see ``hrl_policies.study.progress``), so that they can
be carried to another machine. Each method is trained and evaluated in the toy world and in the KuaiRand twin: what
grows with the number of candidates is told from what does not. Purifiers are pretrained in the toy world. What is named
is added to the table, or replaced there; without names everything is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsrm.baselines import IdentityPurifier
from hrl_policies.common.offline import OfflineAlgorithm
from hrl_policies.study import PurifierIdentity, evaluate_run, plan_run
from hrl_policies.study.loading import build_policy
from hrl_policies.study.progress import calibration_seconds
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.training import save_model
from hrl_policies.worlds import WorldPair, cached_purifier, load_worlds
from hrl_policies.zoo import METHODS, load_settings, method
from kuaifair_env.files import folder_size, write_text_atomically

TABLE = Path(__file__).resolve().parents[1] / "hrl_policies/study/plans/costs.json"
WORLDS = ("KuaiFair-Toy-v0", "KuaiFair-KuaiRandTwin-v0")
PURIFIERS = ("profile", "candidates", "tce", "rce", "bod", "cdae", "diffrec")
SHORT, LONG = 1_024, 5_120
# Gradient steps of an offline method, each of which costs as much as many slates.
OFFLINE = {SHORT: 64, LONG: 512}
USERS = 100


def cost_of_method(name: str, pairs: list[WorldPair]) -> dict[str, float]:
    """Returns the costs of a method: at the start, by step, by session, and what each candidate adds to these."""
    measured = [measure(name, pair) for pair in pairs]
    sizes = [pair.test.n_items for pair in pairs]
    cost: dict[str, float] = {"start": measured[0]["start"], "bytes": measured[0]["bytes"]}
    for part in ("step", "session"):
        small, large = (one[part] for one in measured)
        each = max(0.0, (large - small) / (sizes[1] - sizes[0]))
        cost[part] = max(0.0, small - each * sizes[0])
        cost[f"{part}_item"] = each
    return {part: float(f"{value:.3g}") for part, value in cost.items()}


def measure(name: str, pair: WorldPair) -> dict[str, float]:
    """Returns processor time in calibration products.

    What comes once, such as a world model or the choice of a preference, is told from what comes with every step by
    training twice, for fewer and for more steps.
    """
    unit = calibration_seconds()
    spec = method(name)
    if not spec.learns:
        _, built, session = trained_and_evaluated(name, pair, None)
        return {"start": built / unit, "step": 0.0, "session": session / unit, "bytes": 0.0}
    few, some, _ = trained_and_evaluated(name, pair, SHORT)
    policy, more, session = trained_and_evaluated(name, pair, LONG)
    step = max(0.0, (more - some) / (policy.num_timesteps - few.num_timesteps))
    return {
        "start": max(0.0, some - step * few.num_timesteps) / unit,
        "step": step / unit,
        "session": session / unit,
        "bytes": float(model_bytes(policy)),
    }


def trained_and_evaluated(name: str, pair: WorldPair, steps: int | None) -> tuple[Any, float, float]:
    """Returns a policy, the processor time of building and training it, and that of evaluation one session."""
    spec, overrides = method(name), {}
    if spec.learns and "learning_starts" in load_settings(name).hyperparameters:
        # Nothing is learned before, so that a short run would look too cheap.
        overrides["learning_starts"] = 64
    # Purification costs little beside simulation; here an identity stands in for it.
    purifier = IdentityPurifier() if spec.purifier else None
    identity = PurifierIdentity("identity", "") if spec.purifier else None
    config = plan_run(name, pair.name, total_steps=steps, n_users=USERS, overrides=overrides, purifier=identity)
    start = time.process_time()
    policy = build_policy(config, pair, purifier)
    if steps is not None:
        policy.learn(OFFLINE[steps] if isinstance(policy, OfflineAlgorithm) else steps, log_interval=None)
    trained = time.process_time()
    evaluate_run(replace(config, n_users=USERS), policy, pair, purifier)
    return policy, trained - start, (time.process_time() - trained) / USERS


def model_bytes(policy: Any) -> int:
    """Returns the size of a model's file."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(policy, Path(folder))
        return folder_size(folder)


def cost_of_purifier(mode: str, pair: WorldPair) -> dict[str, float]:
    """Returns what pretraining costs, and how large the file is."""
    unit = calibration_seconds()
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        path = cached_purifier(pair.train, mode, folder=folder)
        work = (time.process_time() - start) / unit
        return {"work": float(f"{work:.3g}"), "bytes": path.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names or [*METHODS, *PURIFIERS]
    single_threaded()
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    pairs = [load_worlds(world) for world in WORLDS]
    for pair in pairs:
        # Fitted once for all controls, not once for each.
        _ = pair.scorer
    # The first run imports what all need.
    measure("a2c", pairs[0])
    for name in names:
        if name in PURIFIERS:
            table["purifiers"][name] = cost_of_purifier(name, pairs[0])
        else:
            table["methods"][name] = cost_of_method(name, pairs)
        print(name, table["purifiers"].get(name) or table["methods"][name], flush=True)
        write_text_atomically(TABLE, json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
