"""What can be won in a world, and by what: the controls from random slates to the oracle, with intervals over users.

    python benchmarks/headroom.py KuaiFair-Toy-v0 KuaiFair-KuaiRandTwin-v0 --output docs/results
    python benchmarks/headroom.py kuairand kuairec --data ../shared/data --output docs/results

``--taste strong`` makes the twins with the stronger setting. For each world and horizon the table gives Len, R_each
and R_cum of every control, the R_cum that perfect item quality is worth beyond QuotaGreedy (QualityOracle -
QuotaGreedy; negative where the greedy scores already know more of taste than that), what knowing each user's taste is
worth beyond it (Oracle - QualityOracle), and how well the length formula holds. Intervals are 95 % bootstrap intervals
over users; differences are paired by user.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from partial_worlds import NAMES, load, worlds_of

from hrl_policies.study import evaluate_run, plan_run, single_threaded
from hrl_policies.study.runner import build_policy
from hrl_policies.study.statistics import Interval, mean_interval, ratio_interval
from hrl_policies.worlds import WorldPair, load_worlds
from hrl_policies.zoo import method
from kuaifair_env import EvaluationResult, SessionConfig
from kuaifair_env.files import write_text_atomically

CONTROLS = ("random", "pop-only", "tail-only", "greedy-ctr", "quota-greedy", "quality-oracle", "oracle")
HEADER = "| control | Len | R_each | R_cum | AD | violation rate | Len by the formula | off by |"


def pair_of(name: str, data: Path | None, taste: str) -> WorldPair:
    """Makes the two worlds of an id, or of partial real data."""
    if name in NAMES:
        if data is None:
            raise SystemExit(f"{name} needs --data FOLDER, the folder with the partial data sets")
        return worlds_of(name, load(name, data))
    return load_worlds(name, {"taste": taste})


def per_user(result: EvaluationResult, name: str) -> NDArray[np.float64]:
    """Returns each user's mean of a column over that user's sessions."""
    columns = result.sessions.columns()
    _, user = np.unique(columns["user_id"], return_inverse=True)
    return np.bincount(user, columns[name]) / np.bincount(user)


def control_row(title: str, result: EvaluationResult) -> str:
    """Returns one line of the table."""
    summary = result.summary()
    length, collected = per_user(result, "len"), per_user(result, "r_cum")
    formula = summary["len_predicted"]
    cells = (
        title,
        written(mean_interval(length), 2),
        written(ratio_interval(collected, length), 3),
        written(mean_interval(collected), 2),
        f"{summary['ad']:.3f}",
        f"{summary['violation_rate']:.3f}",
        f"{formula:.2f}",
        f"{100 * (summary['len'] / formula - 1):+.1f} %",
    )
    return "| " + " | ".join(cells) + " |"


def written(interval: Interval, digits: int) -> str:
    """Returns an interval as text."""
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def section(pair: WorldPair, max_len: int, users: int, episodes: int, title: str) -> str:
    """Evaluates every control in a world and returns the part of the page about it."""
    session = SessionConfig(max_len=max_len)
    results = {}
    for name in CONTROLS:
        config = plan_run(name, pair.name, session=session, users=users, episodes_per_user=episodes)
        results[name] = evaluate_run(config, build_policy(config, pair), pair)
    gains = {name: per_user(result, "r_cum") for name, result in results.items()}
    quality = mean_interval(gains["quality-oracle"] - gains["quota-greedy"])
    taste = mean_interval(gains["oracle"] - gains["quality-oracle"])
    model = pair.test.response.describe()
    held_out = model.get("held_out", {})
    lines = [f"### {title}, Max Len {max_len}", "", HEADER, "|---|" + "---:|" * 7]
    lines += [control_row(method(name).title, result) for name, result in results.items()]
    lines += [
        "",
        f"- Perfect item quality without any taste is worth {written(quality, 2)} R_cum beyond QuotaGreedy "
        "(QualityOracle - QuotaGreedy, paired).",
        f"- Knowing each user's taste is worth {written(taste, 2)} R_cum beyond it (Oracle - QualityOracle, paired).",
        f"- Test world: {model['kind']} response, {pair.test.n_items:,} candidates, {len(pair.test.users):,} held-out "
        f"users, of whom {len(gains['random']):,} evaluated with {episodes} session(s) each; data "
        f"{pair.test.data.provenance.name} ({pair.test.data.provenance.origin}), hash {pair.test.data.data_hash}.",
    ]
    if "within_user_auc" in held_out:
        low, high = held_out["within_user_auc_interval"]
        quality_auc = model["controls"]["item_quality"]["within_user_auc"]
        lines.append(
            f"- Held-out rows of the test log: within-user AUC {held_out['within_user_auc']:.3f} "
            f"[{low:.3f}, {high:.3f}], item quality alone {quality_auc:.3f}; AUC {held_out['auc']:.3f}; expected "
            f"calibration error {held_out['expected_calibration_error']:.4f}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "worlds", nargs="+", help="environment ids, or kuairand and kuairec for partial real data"
    )
    parser.add_argument("--data", type=Path, help="folder that holds the two partial data sets")
    parser.add_argument("--taste", default="measured", choices=["measured", "strong"], help="of twins")
    parser.add_argument("--max-lens", nargs="+", type=int, default=[30, 50])
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for headroom_WORLD.md")
    arguments = parser.parse_args()
    single_threaded()
    for name in arguments.worlds:
        pair = pair_of(name, arguments.data, arguments.taste)
        strong = arguments.taste == "strong" and name not in NAMES
        title = pair.name + (", strong taste" if strong else "")
        page = "\n".join(
            section(pair, max_len, arguments.users, arguments.episodes, title)
            for max_len in arguments.max_lens
        )
        print(page, flush=True)
        if arguments.output:
            stem = name.removeprefix("KuaiFair-").removesuffix("-v0").lower() + ("_strong" if strong else "")
            write_text_atomically(arguments.output / f"headroom_{stem}.md", page)


if __name__ == "__main__":
    main()
