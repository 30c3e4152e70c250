"""The trials of a search, stored by Optuna in a journal: what to try next, and what came of it.

The journal is a text file of JSON lines with checksums; nothing in it is executed when it is read. The sampler is
seeded anew for every trial, from the seed and the number of trials before it, so that a search which was interrupted
goes on with the trials that it would have made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kuaifair_env.errors import ArtifactError, KuaiFairError
from kuaifair_env.files import fits_checksum, naming, parse_as, whole, with_checksum

if TYPE_CHECKING:
    import optuna

    from hrl_policies.zoo import SearchSpace

_STUDY = "kuaifair"
_PLAN, _VALUES, _SECONDS, _ERROR = "plan", "values", "seconds", "error"
_LINE = "line"
_REMEDY = "choose another output folder"


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial; number 0 is that of the shipped values.

    Attributes:
        values: What was tried, by (dotted) name.
        score: What came of it; None if the method refused the values or diverged.
        seconds: Wall time.
        error: Why there is no score.
    """

    number: int
    values: Mapping[str, Any]
    score: float | None
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Proposal:
    """A trial to be made: its number, what to try by (dotted) name, and Optuna's own trial."""

    number: int
    values: Mapping[str, Any]
    trial: optuna.Trial


class _Records:
    """Backend of Optuna's journal storage: a file of JSON lines, each with its number and a checksum.

    The last line of a process that was killed while it wrote is dropped. Methods are those of Optuna's
    ``BaseJournalBackend``.

    Args:
        path: The file, made if it is not there.

    Raises:
        ArtifactError: If a line is not what was written; names it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        *lines, torn = content.split(b"\n")
        if torn:
            os.truncate(path, len(content) - len(torn))
        self._path = path
        self._logs: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            with whole(f"{path}, line {number},", "record of a search", _REMEDY):
                log = parse_as(dict[str, Any], json.loads(line.decode("utf-8")))
                if log[_LINE] != number or not fits_checksum(log):
                    raise ValueError("its checksum does not fit")
                self._logs.append(log)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yields the records from a number on."""
        yield from self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes records."""
        new = [with_checksum({_LINE: len(self._logs) + place, **log}) for place, log in enumerate(logs, 1)]
        with naming(self._path), self._path.open("ab") as stream:
            stream.write("".join(f"{json.dumps(log)}\n" for log in new).encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        self._logs += new


class TrialJournal:
    """The trials of one search; one process at a time may write.

    Args:
        path: The journal, made if it is not there.
        plan: All that a trial's score depends on, JSON-able; a journal belongs to one plan.
        space: Where to look.
        first: The values of the first trial.
        seed: Seed of the sampler.

    Raises:
        KuaiFairError: If Optuna is not installed.
        ArtifactError: If the journal is damaged, or that of another plan.
    """

    def __init__(
        self, path: Path, plan: Mapping[str, Any], space: SearchSpace, first: Mapping[str, Any], seed: int
    ) -> None:
        self._optuna = import_optuna()
        self._space, self._first, self._seed = space, first, seed
        self._study = self._opened(path)
        with whole(path, "journal of trials", _REMEDY):
            self._check_plan(path, json.loads(json.dumps(plan)))
            self.finished()  # whether all trials can be read
        # Trials that were begun and never finished are made again.
        for trial in self._in_state("RUNNING"):
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def finished(self) -> list[TrialRecord]:
        """Returns the finished trials in their order."""
        finished = [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.name == "COMPLETE" or _ERROR in trial.user_attrs
        ]
        return [
            TrialRecord(
                number,
                trial.user_attrs[_VALUES],
                trial.value if trial.state.name == "COMPLETE" else None,
                trial.user_attrs[_SECONDS],
                trial.user_attrs.get(_ERROR, ""),
            )
            for number, trial in enumerate(finished)
        ]

    def propose(self) -> Proposal:
        """Returns what to try next."""
        number = len(self.finished())
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed, multivariate=False, constant_liar=False)
        if number == 0 and not self._in_state("WAITING"):
            self._study.enqueue_trial({name: self._space[name].to_optuna(value) for name, value in self._first.items()})
        trial = self._study.ask()
        values = {name: dimension.suggest(trial, name) for name, dimension in self._space.items()}
        trial.set_user_attr(_VALUES, values)
        return Proposal(number, values, trial)

    def record(self, proposal: Proposal, score: float | None, seconds: float, error: str = "") -> None:
        """Keeps how a trial went; one without a score failed, with an error."""
        proposal.trial.set_user_attr(_SECONDS, seconds)
        if score is None:
            proposal.trial.set_user_attr(_ERROR, error)
        state = self._optuna.trial.TrialState
        self._study.tell(proposal.trial, score, state=state.FAIL if score is None else state.COMPLETE)

    def _opened(self, path: Path) -> optuna.Study:
        from optuna.storages import JournalStorage

        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        records = _Records(path)
        with whole(path, "journal of trials", _REMEDY):
            study: optuna.Study = self._optuna.create_study(
                storage=JournalStorage(cast(Any, records)),
                study_name=_STUDY,
                direction="maximize",
                pruner=self._optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
            return study

    def _check_plan(self, path: Path, plan: Mapping[str, Any]) -> None:
        stored = self._study.user_attrs.get(_PLAN)
        if stored is None:
            self._study.set_user_attr(_PLAN, plan)
            return
        different = sorted(name for name in {*stored, *plan} if stored.get(name) != plan.get(name))
        if different:
            raise ArtifactError(
                f"{path} holds trials of another search ({', '.join(different)} differ); choose another output folder"
            )

    def _in_state(self, name: str) -> list[Any]:
        return self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState[name],))


def import_optuna() -> Any:
    """Returns the module ``optuna``.

    Raises:
        KuaiFairError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise KuaiFairError("tuning needs Optuna; install it with: pip install 'kuaifair[tune]'") from error
    return optuna
