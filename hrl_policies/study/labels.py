"""A run as tables, figures and reports name it: figures, method, world, and notes on where numbers come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrl_policies.study.config import RunConfig, unusual_settings
from hrl_policies.study.store import StoredRun, stored_runs
from hrl_policies.zoo import METHODS, MethodSpec, method
from kuaifair_env.abandonment import leave_rule, rule_text
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import EvaluationResult
from kuaifair_env.fingerprint import WorldFingerprint
from kuaifair_env.randomisation import describe_setting
from kuaifair_env.simulator import Repeats

ORIGINS = {
    "real": "real data, official files",
    "partial": "PARTIAL data: a part of the official files",
    "twin": "SYNTHETIC TWIN, not real data",
    "own": "the user's own logs",
}
"""Kinds of data, in the words of every table."""

MODES = ("action_mode", "observation_mode")
"""Settings of sessions that are the method's own: those of one table may differ in them."""

PRIVILEGED_NOTE = "† knows what users of the test world truly like: a bound, not a method."

PROPOSED = "dsrm-hrl"
"""The paper's own method: what others are compared with unless a table is asked for another."""

LOWER_CONTROL, UPPER_CONTROL = "random", "quota-greedy"
"""Controls between which rewards are scaled: chance, and the control that is fair without learning."""

_PAPER_NAMES = {
    "a2c": "A2C",
    "td3": "TD3",
    "bcq": "BCQ",
    "mofir": "MOFIR",
    "dorl": "DORL",
    "dnair": "DNaIR",
    "sac4ir": "SAC4IR",
    "dsrm-hrl": "Ours",
    "flat": "FLAT",
    "hrl": "HRL",
    "hrl+rce": "+RCE",
    "hrl+tce": "+TCE",
    "hrl+bod": "+BOD",
}


@dataclass(frozen=True)
class RunRecord:
    """One finished run, as tables need it: what was run, its headline figures, and the data behind them.

    Attributes:
        data: Name of the data set; ``origin`` is a key of :data:`ORIGINS`.
        candidates: Number of candidates ``N``.
        users: Number of users that it was evaluated on.
        response: Kind of the test world's response model.
        fingerprint: That of the test world.
    """

    config: RunConfig
    summary: Mapping[str, float]
    data: str
    origin: str
    data_hash: str
    candidates: int
    users: int
    response: str
    fingerprint: WorldFingerprint

    @property
    def purifier(self) -> str:
        """Name of the purifier, empty without one."""
        return "" if self.config.purifier is None else self.config.purifier.name

    @classmethod
    def of_evaluation(cls, config: RunConfig, evaluation: EvaluationResult) -> RunRecord:
        """Returns the record of a run in memory."""
        users = len(np.unique(evaluation.sessions.user_ids))
        return cls._of_world(config, evaluation.summary(), evaluation.world, users)

    @classmethod
    def of_run(cls, run: StoredRun) -> RunRecord:
        """Returns the record of a run folder.

        Raises:
            ArtifactError: If the run was interrupted.
        """
        return cls._of_world(run.config, run.summary, run.provenance["test"], int(run.result["users"]))

    @classmethod
    def _of_world(
        cls, config: RunConfig, summary: Mapping[str, float], world: Mapping[str, Any], users: int
    ) -> RunRecord:
        data = world["data"]
        return cls(
            config=config,
            summary={name: float(value) for name, value in summary.items()},
            data=data["name"],
            origin=data["origin"],
            data_hash=data["hash"],
            candidates=int(world["candidates"]),
            users=users,
            response=str(world["response"].get("kind", "unknown")),
            fingerprint=WorldFingerprint.of_description(world["fingerprint"]),
        )


def stored_records(store: str | Path) -> list[RunRecord]:
    """Returns the records of all finished runs in a store.

    Raises:
        ArtifactError: If there is no such folder, or a run folder is damaged.
    """
    return [RunRecord.of_run(run) for run in stored_runs(store)]


@dataclass(frozen=True)
class Variant:
    """A method on some states, under some settings: a row of a table, a line of a figure.

    Attributes:
        method: Name in the zoo.
        purifier: Name of the purifier; empty without one.
        setting: What a study changed, such as ``"n_steps=2"``; empty for the zoo's settings.
    """

    method: str
    purifier: str = ""
    setting: str = ""

    @classmethod
    def of_config(cls, config: RunConfig) -> Variant:
        """Returns the variant that a run is one of."""
        return cls(config.method, "" if config.purifier is None else config.purifier.name, config.variant)

    @property
    def spec(self) -> MethodSpec:
        """The method's entry in the zoo."""
        return method(self.method)

    @property
    def learns(self) -> bool:
        """Whether it is trained, as controls are not."""
        return self.spec.learns

    @property
    def privileged(self) -> bool:
        """Whether it knows what users of the test world truly like."""
        return self.spec.privileged

    @property
    def family(self) -> str:
        """Group of methods that it belongs to; privileged bounds are kept apart from other controls."""
        return "privileged bound" if self.privileged else self.spec.family

    @property
    def as_shipped(self) -> bool:
        """Whether states and settings are the method's own."""
        return self.purifier == self.spec.purifier and not self.setting

    @property
    def is_ablation(self) -> bool:
        """Whether the method is a part of the paper's own, as its Table 3 compares them."""
        return self.spec.family == "hierarchical" and self.method != PROPOSED

    @property
    def title(self) -> str:
        """Name in tables and figures: with setting, with the purifier if it is not its own, with † if privileged."""
        purifier = f" + {self.purifier}" if self.purifier and self.purifier != self.spec.purifier else ""
        setting = f" ({self.setting})" if self.setting else ""
        return self.spec.title + setting + purifier + (" †" if self.privileged else "")

    @property
    def paper_name(self) -> str | None:
        """Name in the paper, or None if the paper has no figures for it."""
        return _PAPER_NAMES.get(self.method) if self.as_shipped else None

    @property
    def order(self) -> tuple[int, str, str]:
        """Sort key: the order of the zoo, then purifier and setting."""
        return list(METHODS).index(self.method), self.purifier, self.setting


@dataclass(frozen=True, order=True)
class Task:
    """What methods are compared on: a world (environment id, or a study's own name), its data, horizon and repeats."""

    world: str
    max_len: int
    repeats: Repeats
    data: str
    origin: str

    @classmethod
    def of_record(cls, record: RunRecord) -> Task:
        """Returns the task of a run."""
        session = record.config.session
        return cls(record.config.world, session.max_len, session.repeats, record.data, record.origin)

    @property
    def world_title(self) -> str:
        """Name of the world in tables and figures."""
        return world_title(self.world, self.origin)

    @property
    def session_title(self) -> str:
        """Horizon and repeats in tables and figures."""
        return session_title(self.max_len, self.repeats)


def session_title(max_len: int, repeats: Repeats) -> str:
    """Returns a horizon, and whether items may be shown again, in tables and figures."""
    return f"Max Len {max_len}, repeats {'allowed' if repeats == 'allow' else 'forbidden'}"


def world_title(world: str, origin: str) -> str:
    """Returns the name of a world in tables and figures: its id in short, with the kind of data behind it."""
    short = re.sub(r"^KuaiFair-|-v\d+$", "", world)
    return f"{short} ({origin})"


def families(variants: Iterable[Variant]) -> tuple[str, ...]:
    """Returns the families of methods in the order of the zoo, those that are trained first."""
    ordered = sorted(variants, key=lambda variant: (not variant.learns, variant.order))
    return tuple(dict.fromkeys(variant.family for variant in ordered))


def session_conditions(session: SessionConfig) -> dict[str, Any]:
    """Returns how sessions run, apart from a task's horizon and repeats and from how a method acts and observes."""
    return {name: value for name, value in session.describe().items() if name not in (*MODES, "max_len", "repeats")}


def conditions(config: RunConfig) -> str:
    """Returns how a run differs from default sessions in default worlds, apart from its task; empty if not at all."""
    unusual = unusual_session(config.session) | unusual_settings(config.world_settings)
    parts = [f"{name} {value}" for name, value in unusual.items()]
    return ", ".join([*parts, *([f"item term '{config.item_term}'"] if config.item_term else [])])


def unusual_session(session: SessionConfig) -> dict[str, Any]:
    """Returns how sessions differ from default ones, apart from a task's horizon and repeats."""
    usual = session_conditions(SessionConfig())
    unusual = {name: value for name, value in session_conditions(session).items() if value != usual[name]}
    return unusual | ({"leave": rule_text(leave_rule(session.leave))} if "leave" in unusual else {})


def leave_rule_text(rule: Mapping[str, Any]) -> str:
    """Returns a leave rule with its settings."""
    settings = ", ".join(f"{name}={value}" for name, value in rule.items() if name != "rule" and value is not None)
    return f"{rule['rule']}({settings})"


def data_note(record: RunRecord) -> str:
    """Returns what the data of a run are: name, origin, hash, response model, size."""
    return (
        f"Data: {record.data} ({ORIGINS[record.origin]}), hash {record.data_hash}; response model of the test world: "
        f"{record.response}; {record.candidates} candidates; fingerprint {record.fingerprint}."
    )


def evaluation_note(record: RunRecord) -> str:
    """Returns on whom, how often and under which rule a run was evaluated."""
    session = record.config.session.describe()
    rewards = "" if session["reward"] == "mean" else f"; rewards are the {session['reward']} of a slate's feedback"
    drift = f"; tastes drift, by half in {session['drift']:g} slates" if session["drift"] else ""
    clock = "; agents see the session clock" if session["session_clock"] else ""
    return (
        f"Evaluated on {record.users} held-out users, {record.config.episodes_per_user} session(s) each, the same "
        f"users and the same random numbers for every method; slates of {session['slate_size']}; "
        f"leave rule {leave_rule_text(session['leave'])}{drift}{rewards}{clock}."
    )


def training_notes(records: Sequence[RunRecord], remark: str = "") -> list[str]:
    """Returns a note on seeds and steps of the runs that were trained, with a remark behind it; none of controls."""
    trained = [record for record in records if Variant.of_config(record.config).learns]
    if not trained:
        return []
    seeds = ", ".join(str(seed) for seed in sorted({record.config.seed for record in trained}))
    steps: dict[Variant, int] = {}
    for record in sorted(trained, key=lambda record: Variant(record.config.method).order):
        variant = Variant(record.config.method)
        steps[variant] = max(steps.get(variant, 0), record.config.total_steps)
    listed = ", ".join(f"{variant.spec.title} {count:,}" for variant, count in steps.items())
    online = [record for record in trained if method(record.config.method).kind == "online"]
    settings = dict.fromkeys(json.dumps(describe_setting(record.config.randomisation) or "none") for record in online)
    randomised = ", ".join(setting.strip('"') for setting in settings)
    how = f"; its randomisation: {randomised}" if randomised else ""
    return [f"Trained in the training world with seeds {seeds}{how}; steps: {listed}.{remark}"]


def repeats_notes(variants: Iterable[Variant], repeats: Iterable[Repeats]) -> list[str]:
    """Returns why methods have no results where repeats are forbidden; none in a table without such results."""
    names = dict.fromkeys(variant.method for variant in variants) if "forbid" in repeats else {}
    return [f"{spec.title} needs repeats: {spec.needs_repeats}." for spec in map(method, names) if spec.needs_repeats]


def method_notes(records: Sequence[RunRecord]) -> list[str]:
    """Returns notes on the purifiers of runs and on what † means, each only where there is something to explain."""
    purified = {(record.purifier, record.config.purifier.hash) for record in records if record.config.purifier}
    files = ", ".join(f"{name} {digest}" for name, digest in sorted(purified))
    privileged = any(Variant.of_config(record.config).privileged for record in records)
    notes = [f"Purifiers (name and hash of the file): {files}."] if purified else []
    return [*notes, PRIVILEGED_NOTE] if privileged else notes
