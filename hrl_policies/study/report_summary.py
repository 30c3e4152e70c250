"""The head of a report: what was run, and what its figures can and cannot show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hrl_policies.study.notes import ORIGINS
from hrl_policies.study.report_runs import Pairs
from hrl_policies.study.report_sources import FailedRun
from hrl_policies.study.report_tables import run_title
from hrl_policies.study.store import StoredRun
from hrl_policies.zoo import METHODS, method

_FEW_SEEDS = 5
_ORIGIN_LIMITS = {
    "real": "Data are real and whole, but users are simulated by a response model of logged feedback: nothing here "
    "was shown to people.",
    "partial": "Data are a PART of the official files: numbers cannot be compared with those of the whole data set, "
    "and users are simulated.",
    "twin": "Data are a SYNTHETIC TWIN: people who do not exist, made to resemble a data set in its marginals. It "
    "shows how methods behave where the truth is known, and nothing about real users.",
    "own": "Data are the user's own logs, and users are simulated by a response model of logged feedback: nothing "
    "here was shown to people.",
}


def overview(runs: Sequence[StoredRun], failures: Sequence[FailedRun]) -> Pairs:
    """Returns what was run, in a few pairs of words."""
    order = list(METHODS)
    ordered = sorted(runs, key=lambda run: order.index(run.config.method))
    learning = [run for run in ordered if method(run.config.method).learns]
    controls = [run for run in ordered if not method(run.config.method).learns]
    seeds = sorted({run.config.seed for run in learning if run.complete})
    states = {
        "finished": sum(run.complete for run in runs),
        "interrupted": sum(not run.complete for run in runs),
        "failed": len(failures),
    }
    judged = {
        f"{run.result['users']} held-out users, {run.config.episodes_per_user} session(s) each"
        for run in runs
        if run.complete
    }
    facts = (
        ("runs", ", ".join(f"{number} {state}" for state, number in states.items() if number)),
        ("trained methods", _listed(run_title(run.config) for run in learning)),
        ("controls", _listed(run_title(run.config) for run in controls)),
        ("worlds", _listed(run.config.world for run in runs)),
        ("data", _listed(_data(run) for run in runs)),
        ("Max Len", _listed(str(length) for length in sorted({run.config.session.max_len for run in runs}))),
        ("training seeds", _listed(str(seed) for seed in seeds)),
        ("judged on", "; ".join(sorted(judged))),
    )
    return tuple((name, value) for name, value in facts if value)


def limits(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    """Returns what may and may not be concluded from runs, one sentence or two each."""
    finished = [run for run in runs if run.complete]
    origins = dict.fromkeys(run.provenance["test"]["data"]["origin"] for run in runs)
    found = [_ORIGIN_LIMITS[origin] for origin in origins]
    learning = [run for run in finished if method(run.config.method).learns]
    controls = [run for run in finished if not method(run.config.method).learns]
    if learning:
        found.append(_seeds_limit(learning))
        if all(method(run.config.method).privileged for run in controls):
            found.append(
                "No control was run that a trained method could be held against: the tables cannot show that training "
                "helped."
            )
        else:
            found.append(
                "A trained method is worth something only where it does better than the controls, which learn nothing "
                "by reinforcement, by more than the intervals."
            )
    if any(method(run.config.method).privileged for run in finished):
        found.append(
            "Rows with † know what users of the test world truly like. They are bounds that say how much could be won, "
            "not methods."
        )
    if any("len_floor" in run.summary for run in finished):
        found.append(
            "Len, R_each and the violation rate are tied by a law: floor and ceiling are the shortest and longest Len "
            "at a method's own R_each, so a long Len says first of all that the leave rule was seldom broken."
        )
    found.append(
        "AD near 0 says that popular and long-tail items get equal shares of exposure, not that items are treated "
        "alike: there are far fewer popular ones."
    )
    return tuple(found)


def _seeds_limit(learning: Sequence[StoredRun]) -> str:
    seeds: dict[tuple[object, ...], set[int]] = {}
    for run in learning:
        key = (run_title(run.config), run.config.world, run.config.session.max_len, run.config.item_term)
        seeds.setdefault(key, set()).add(run.config.seed)
    fewest = min(map(len, seeds.values()))
    if fewest == 1:
        return (
            "At least one trained method has a single training seed: its row has no interval, and a difference between "
            "two such rows may be the luck of training."
        )
    text = f"± is half the 95 % Student interval of the mean over training seeds, of which a row has at least {fewest}"
    return text + (": so few give wide intervals." if fewest < _FEW_SEEDS else ".")


def _data(run: StoredRun) -> str:
    data = run.provenance["test"]["data"]
    return f"{data['name']} ({ORIGINS[data['origin']]})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
