"""From a study to its runs: every combination once, in a fixed order, each with a folder of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrl_policies.study.config import PurifierIdentity, RunConfig, plan_run
from hrl_policies.study.plan import cell_folder
from hrl_policies.study.spec import StudyMethod, StudySpec
from hrl_policies.zoo import load_settings, method
from kuaifair_env.batch import SessionConfig

SESSION_PARAMETERS = ("slate_size", "leave", "initial_history", "repeats")
TRAINING_PARAMETERS = ("total_steps", "n_envs", "taste_noise")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study, before its purifier is there.

    Attributes:
        spec: The study.
        entry: The method.
        world: Name of the worlds.
        max_len: Horizon.
        seed: Training seed.
        purifier: Mode of the purifier; empty for none.
        swept: Values of the swept parameters that concern the method.
    """

    spec: StudySpec
    entry: StudyMethod
    world: str
    max_len: int
    seed: int
    purifier: str = ""
    swept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Name of its folder inside the store."""
        return cell_folder(self.config())

    @property
    def variant(self) -> str:
        """What tells it from other runs of its method; session settings do not, they make tables of their own."""
        own = self.entry.label or _settings_text(self.entry.set)
        swept = {name: value for name, value in self.swept.items() if name not in SESSION_PARAMETERS}
        return ", ".join(part for part in (own, _settings_text(swept)) if part)

    def config(self, identity: PurifierIdentity | None = None) -> RunConfig:
        """Returns the configuration of the run.

        Args:
            identity: Its purifier; None stands one in that has a mode but no file, for names and checks.

        Raises:
            ValueError: If a setting is not valid.
        """
        if identity is None and self.purifier:
            identity = PurifierIdentity(self.purifier, "")
        spec, swept = self.spec, dict(self.swept)
        sessions = {name: swept.pop(name, getattr(spec, name)) for name in SESSION_PARAMETERS}
        training = {name: swept.pop(name, None) for name in TRAINING_PARAMETERS}
        if method(self.entry.name).learns and training["total_steps"] is None:
            training["total_steps"] = self.entry.steps or spec.steps
        return plan_run(
            self.entry.name,
            self.world,
            seed=self.seed,
            session=SessionConfig(max_len=self.max_len, **sessions),
            overrides={**self.entry.set, **swept},
            world_settings=spec.world_settings,
            users=spec.users,
            episodes_per_user=spec.episodes,
            purifier=identity,
            item_term=spec.item_term,
            variant=self.variant,
            **training,
        )


def planned_runs(spec: StudySpec) -> list[PlannedRun]:
    """Returns every run of a study: worlds outermost, so that a process keeps the worlds it has made.

    Controls, which do not train, are run once, with the control seeds.

    Raises:
        ValueError: If a method is unknown.
    """
    return [
        PlannedRun(spec, entry, world, max_len, seed, purifier, swept)
        for world in spec.worlds
        for max_len in spec.max_lens
        for entry in spec.methods
        for purifier in purifiers_of(spec, entry)
        for swept in _combinations(spec, entry)
        for seed in seeds_of(spec, entry)
    ]


def purifiers_of(spec: StudySpec, entry: StudyMethod) -> tuple[str, ...]:
    """Returns the modes of purifiers that a method is run with; empty stands for none."""
    if entry.purifier is not None:
        return (entry.purifier,)
    own = method(entry.name).purifier
    return (own,) if own else spec.purifiers


def seeds_of(spec: StudySpec, entry: StudyMethod) -> tuple[int, ...]:
    """Returns the seeds that a method is run with."""
    return spec.seeds if method(entry.name).learns else spec.control_seeds or spec.seeds[:1]


def sweeps(entry: StudyMethod, parameter: str) -> bool:
    """Returns whether a swept parameter concerns a method: whether there is something to set.

    Session settings concern all methods, training settings those that learn, and a hyperparameter those methods whose
    settings, the zoo's or the study's, name it.
    """
    if parameter in SESSION_PARAMETERS:
        return True
    if not method(entry.name).learns:
        return False
    return (
        parameter in TRAINING_PARAMETERS
        or parameter in entry.set
        or _holds(load_settings(entry.name).hyperparameters, parameter)
    )


def _combinations(spec: StudySpec, entry: StudyMethod) -> Iterator[dict[str, Any]]:
    names = [name for name in spec.sweep if sweeps(entry, name)]
    for values in itertools.product(*(spec.sweep[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _holds(settings: Mapping[str, Any], name: str) -> bool:
    first, dot, rest = name.partition(".")
    if not dot:
        return first in settings
    inner = settings.get(first)
    return isinstance(inner, Mapping) and _holds(inner, rest)


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
