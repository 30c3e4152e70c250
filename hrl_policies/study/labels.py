"""What tables and figures say of their numbers: data, evaluation, training, purifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hrl_policies.study.store import RunRecord
from hrl_policies.zoo import METHODS, method

ORIGINS = {
    "real": "real data, official files",
    "partial": "PARTIAL data: a part of the official files",
    "twin": "SYNTHETIC TWIN, not real data",
    "own": "the user's own logs",
}
"""Where data comes from, in the words of every table."""

PRIVILEGED = "† knows what users of the test world truly like: a bound, not a method."


def data(record: RunRecord) -> str:
    """Returns what the data of a run are: name, origin, hash, response model, size."""
    return (
        f"Data: {record.data} ({ORIGINS[record.origin]}), hash {record.data_hash}; response model of the test world: "
        f"{record.response}; {record.candidates} candidates."
    )


def evaluation(record: RunRecord) -> str:
    """Returns on whom, how often and under which rule a run was evaluated."""
    session = record.config.session.describe()
    return (
        f"Evaluated on {record.users} held-out users, {record.config.episodes_per_user} session(s) each, the same "
        f"users and the same random numbers for every method; slates of {session['slate_size']}; "
        f"leave rule {leave_rule(session['leave'])}."
    )


def training(trained: Sequence[RunRecord]) -> str:
    """Returns seeds and steps of runs that were trained."""
    seeds = ", ".join(str(seed) for seed in sorted({record.config.seed for record in trained}))
    steps: dict[str, int] = {}
    for record in trained:
        name = record.config.method
        steps[name] = max(steps.get(name, 0), record.config.total_steps)
    listed = ", ".join(f"{method(name).title} {steps[name]:,}" for name in METHODS if name in steps)
    return f"Trained in the training world with seeds {seeds}; steps: {listed}."


def purifiers(records: Sequence[RunRecord]) -> list[str]:
    """Returns one line on the purifiers of runs, or none."""
    purified = {
        (record.purifier, record.config.purifier.hash) for record in records if record.config.purifier
    }
    files = ", ".join(f"{name} {digest}" for name, digest in sorted(purified))
    return [f"Purifiers (name and hash of the file): {files}."] if purified else []


def leave_rule(rule: Mapping[str, Any]) -> str:
    """Returns a leave rule with its settings."""
    settings = ", ".join(
        f"{name}={value}" for name, value in rule.items() if name != "rule" and value is not None
    )
    return f"{rule['rule']}({settings})"
