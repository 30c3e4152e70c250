"""The estimators beside Open Bandit Pipeline's, on the same arrays; writes a section of ope_checks.md.

    python benchmarks/ope_reference.py --results docs/results

Needs Open Bandit Pipeline (``pip install --no-deps obp``; its own pins ask for old releases of what it needs), which
this project does not depend on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from worlds import open_worlds, write_section

from hrl_policies.controls import QuotaGreedy
from hrl_policies.ope import CrossFittedClicks, RandomLog, SlateMarginals, estimate_click_rate, first_slates
from hrl_policies.study import single_threaded
from kuaifair_env import SessionConfig
from kuaifair_env.sb3 import KuaiFairVecEnv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    import obp
    from obp.ope import (
        DoublyRobust,
        InverseProbabilityWeighting,
        ReplayMethod,
        SelfNormalizedInverseProbabilityWeighting,
    )

    pair = open_worlds("KuaiFair-Toy-v0")
    world = pair.test
    log = RandomLog.of_world(world)
    users = np.unique(log.users)
    env = KuaiFairVecEnv(world, SessionConfig(action_mode="slate"), 64, seed=0)
    greedy = first_slates(QuotaGreedy(pair.scorer), env, users)
    table = np.random.default_rng(0).dirichlet(np.ones(world.n_items), len(users))
    model = CrossFittedClicks.fit(world)
    rows = np.arange(len(log))
    lines = []
    for title, slates in {"QuotaGreedy": greedy, "random probabilities": SlateMarginals(users, table)}.items():
        ours = estimate_click_rate(log, slates, model=model).estimates
        places = np.searchsorted(users, log.users)
        of_user = np.zeros((len(users), world.n_items))
        every = np.arange(world.n_items)
        of_user[:] = [slates.probabilities(np.full(world.n_items, place), every) for place in range(len(users))]
        actions = of_user[places][:, :, None]
        rewards = log.clicks.astype(float)
        predicted = np.repeat(model.predict(users, np.tile(every, (len(users), 1)))[places][:, :, None], 1, axis=2)
        common = {"reward": rewards, "action": log.items, "position": np.zeros(len(rows), int)}
        weighted = common | {"pscore": log.propensities[log.items], "action_dist": actions}
        theirs = {
            "ips": InverseProbabilityWeighting().estimate_policy_value(**weighted),
            "snips": SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**weighted),
            "dr": DoublyRobust().estimate_policy_value(**weighted, estimated_rewards_by_reg_model=predicted),
        }
        if title == "QuotaGreedy":
            # Its replay takes one action: a row's own where the slate holds it, else another.
            match = (actions[rows, log.items, 0] > 0).astype(float)
            chosen = np.zeros_like(actions)
            chosen[rows, np.where(match > 0, log.items, (log.items + 1) % world.n_items), 0] = 1.0
            theirs["rejection"] = ReplayMethod().estimate_policy_value(**common, action_dist=chosen)
        for name, value in theirs.items():
            mine = ours[name].estimate  # type: ignore[index]
            lines.append(f"| {title} | {name} | {mine:.10f} | {value:.10f} | {abs(mine - value):.1e} |")
    page = [
        "# Off-policy estimators beside Open Bandit Pipeline's",
        "",
        f"The toy twin's random log, {len(log):,} rows of {len(users):,} users; Open Bandit Pipeline {obp.__version__} "
        "given the same clicks, propensities, action probabilities and predicted clicks. `rejection` is its "
        "`ReplayMethod`, which takes deterministic policies alone.",
        "",
        "| policy | estimator | here | Open Bandit Pipeline | difference |",
        "|---|---|---:|---:|---:|",
        *lines,
        "",
        "Intervals are not compared: its bootstrap draws rows, those here are over users.",
        "",
        "Made by: python benchmarks/ope_reference.py --results docs/results, with `pip install --no-deps obp`.",
    ]
    write_section(arguments.results, "ope_checks.md", "\n".join(page))


if __name__ == "__main__":
    main()
