"""Trains a method in one world, evaluates it in the other, and keeps what is needed to check the result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hrl_policies.study.config import RunConfig
from hrl_policies.study.loading import (
    build_policy,
    check_same_worlds,
    purifier_of,
    read_purifier,
    register_data_of,
    worlds_of,
)
from hrl_policies.study.progress import PeakMemory
from hrl_policies.study.store import (
    GUARD,
    MODEL,
    PARTIAL,
    PURIFIER,
    CurveRow,
    load_run,
    machine,
    need_free,
    partial_folder,
    remove_partial,
    versions,
    write_contents,
    write_partial,
    write_run,
)
from hrl_policies.worlds import WorldPair, purified_sessions
from hrl_policies.zoo import method
from kuaifair_env.batch import SessionBatch
from kuaifair_env.errors import ArtifactError, TrainingError, lack_of_memory
from kuaifair_env.evaluation import EvaluationResult, evaluate
from kuaifair_env.files import need_writable
from kuaifair_env.randomised_worlds import randomised

if TYPE_CHECKING:
    from dsrm.purifier import StatePurifier
    from hrl_policies.guard import GuardCallback

_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        config: What was run.
        evaluation: How the policy did in the test world; None if the run was interrupted.
        curve: The learning curve, empty for controls.
        policy: The trained model or the control.
        steps_done: Training steps taken.
        folder: Where it was written, or None.
        training_seconds: Wall time of training (of the last part, if resumed); ``evaluation_seconds`` likewise.
    """

    config: RunConfig
    evaluation: EvaluationResult | None
    curve: list[CurveRow]
    policy: Any
    steps_done: int
    folder: Path | None
    training_seconds: float
    evaluation_seconds: float

    @property
    def complete(self) -> bool:
        """Whether the run was finished and evaluated."""
        return self.evaluation is not None


@dataclass
class _Run:
    """A run while it goes on; the content of its purifier's file goes into its folder.

    ``pretrained`` is the purifier as it was before training, and ``purifier`` has what it learned.
    """

    config: RunConfig
    worlds: WorldPair
    pretrained: StatePurifier | None
    purifier: StatePurifier | None
    purifier_file: bytes | None
    policy: Any
    curve: list[CurveRow]
    steps_done: int = 0
    guard: GuardCallback | None = None
    shortage: MemoryError | None = None


def single_threaded() -> None:
    """Gives torch and BLAS one thread: more cost time with arrays of this size, and ruin it when cores are shared."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(limits=1, user_api="blas")


def train(
    config: RunConfig,
    worlds: WorldPair | None = None,
    *,
    purifier: str | Path | None = None,
    output: str | Path | None = None,
    data_dir: str | Path | None = None,
    progress: bool = False,
) -> RunResult:
    """Trains a method (controls have nothing to train), evaluates it on held-out users and writes the run folder.

    The same configuration, versions and platform give the same bytes, timings aside. Ctrl-C ends training cleanly, and
    so does a lack of memory: the folder ``OUTPUT.partial`` then holds the model, and :func:`resume` goes on.

    Args:
        config: What to run; see :func:`hrl_policies.study.config.plan_run`.
        worlds: The worlds; None makes those of the environment id ``config.world``.
        purifier: File of the purifier that the configuration names.
        output: Run folder to write; None writes nothing.
        data_dir: Folder with the official files, if ``worlds`` is None.
        progress: Whether to show progress bars.

    Raises:
        ArtifactError: If the folder exists already, or the purifier's file is not the one that is named.
        DataError: If the worlds cannot be made.
        MemoryError: If memory does not suffice.
        TrainingError: If training diverges.
        ValueError: If a setting is not valid.
    """
    target = None if output is None else Path(output)
    if target is not None:
        need_free(target)
        need_writable(target)
        if partial_folder(target).exists():
            raise ArtifactError(
                f"{partial_folder(target)} holds an interrupted run; resume it (kuaifair train --resume), or remove it"
            )
    if purifier is not None and config.purifier is None:
        raise ValueError("a purifier was given, but the run's configuration names none; see plan_run")
    log, memory = RunLog(config), PeakMemory()
    with log.recording():
        pair = worlds_of(config, worlds, data_dir)
        SessionBatch(pair.test, config.session, 1)  # fails before the training where sessions do not fit the test world
        loaded, content = read_purifier(config, purifier)
        run = _Run(config, pair, loaded, loaded, content, build_policy(config, pair, loaded), [])
        run.guard = _guard_of(run)
        return _finish(run, target, progress, log, memory)


def resume(
    folder: str | Path, worlds: WorldPair | None = None, *, data_dir: str | Path | None = None, progress: bool = False
) -> RunResult:
    """Goes on with an interrupted run.

    Model, optimisers and replay buffer are as they were, and the training world's blocks of shared deviations go on;
    running sessions and random streams are new, so a resumed
    run is a valid run but not, byte for byte, the one that would have been. ``result.json`` says that it was resumed.

    Args:
        folder: The ``.partial`` folder.
        worlds: See :func:`train`.
        data_dir: See :func:`train`.
        progress: See :func:`train`.

    Raises:
        ArtifactError: If the folder is not an interrupted run, the run is finished, or the data has changed.
    """
    path = Path(folder)
    target = path.with_name(path.name.removesuffix(PARTIAL))
    if target != path:
        partial_folder(target)
        if target.exists():
            raise ArtifactError(_forget_finished(path, target))
    stored = load_run(path)
    if stored.complete or target == path:
        raise ArtifactError(f"{path} is not an interrupted run; those end in {PARTIAL}")
    need_writable(target)
    from hrl_policies.study.training import restore_checkpoint

    log, memory = RunLog(stored.config), PeakMemory()
    log.lines.append(f"resumed after {stored.steps_done:,} steps")
    with log.recording():
        if worlds is None:
            register_data_of(stored)
        pair = worlds_of(stored.config, worlds, data_dir)
        check_same_worlds(stored, pair)
        pretrained, content = read_purifier(stored.config, path / PURIFIER)
        loaded = purifier_of(stored)
        stored.check()
        policy = build_policy(stored.config, pair, loaded, seed_shift=stored.steps_done)
        restore_checkpoint(policy, path, stored.steps_done)
        run = _Run(stored.config, pair, pretrained, loaded, content, policy, stored.curve, stored.steps_done)
        run.guard = _guard_of(run)
        if run.guard is not None:
            run.guard.load(path / GUARD)
        result = _finish(run, target, progress, log, memory)
    if result.complete:
        remove_partial(path)
    return result


def _forget_finished(path: Path, target: Path) -> str:
    """Removes the earlier state of a run, if it was resumed to its end; returns why it is not resumed."""
    finished = load_run(target)
    if path.exists():
        stored = load_run(path)
        resumed = finished.config.as_dict(), finished.result.get("resumed_at")
        if resumed != (stored.config.as_dict(), stored.steps_done):
            return f"{target} exists already, and is not what became of {path}: rename or remove one of them"
        finished.check()
    remove_partial(path)
    return f"{target} exists already: the run is finished, and {path} is no longer needed, nor there"


def evaluate_run(
    config: RunConfig,
    policy: Any,
    worlds: WorldPair,
    purifier: StatePurifier | None = None,
    *,
    ranking: bool = False,
    progress: bool = False,
) -> EvaluationResult:
    """Evaluates a policy in the test world, on the users and with the randomness that a configuration names.

    Args:
        config: The run; replace ``users``, ``n_users``, ``episodes_per_user`` or ``evaluation_seed`` for others.
        policy: Anything with ``predict``.
        worlds: The run's worlds.
        purifier: The run's purifier; see :func:`~hrl_policies.study.loading.purifier_of`.
        ranking: Whether to measure R-NDCG@K too.
        progress: Whether to show a progress bar.
    """
    batch_size = min(_EVALUATION_BATCH, config.user_count * config.episodes_per_user)
    return evaluate(
        policy,
        purified_sessions(worlds.test, config.session, batch_size, 0, purifier),
        users=config.users,
        n_users=config.n_users,
        episodes_per_user=config.episodes_per_user,
        seed=config.evaluation_seed,
        ranking=ranking,
        progress=progress,
    )


def _finish(run: _Run, target: Path | None, progress: bool, log: RunLog, memory: PeakMemory) -> RunResult:
    config, resumed_at = run.config, run.steps_done
    learns = method(config.method).learns
    start, cpu_start = time.perf_counter(), time.process_time()
    interrupted = learns and _learn(run, progress)
    if run.guard is not None and not interrupted:
        # Deviations of the training world taught a belief its scales; the guard evaluated the agent without them.
        run.purifier = run.pretrained
    training, training_cpu = time.perf_counter() - start, time.process_time() - cpu_start
    start = time.perf_counter()
    evaluation = None
    try:
        if not interrupted:
            evaluation = evaluate_run(config, run.policy, run.worlds, run.purifier, progress=progress)
    except (KeyboardInterrupt, MemoryError) as error:
        if not learns:
            raise
        run.shortage = error if isinstance(error, MemoryError) else None
    seconds = time.perf_counter() - start
    if target is not None:
        contents = _contents(run, checkpoint=evaluation is None)
        if evaluation is None:
            target = partial_folder(target)
            write_partial(target, contents, run.steps_done)
            if run.shortage is not None:
                raise MemoryError(
                    f"{run.shortage or 'some of it could not be had'}; {target} keeps the {run.steps_done:,} steps "
                    "that were trained: kuaifair train --resume goes on"
                )
        else:
            log.lines.append(f"finished: {training:.1f} s of training, {seconds:.1f} s of evaluation")
            timing = {
                "training_seconds": training,
                "training_cpu_seconds": training_cpu,
                "evaluation_seconds": seconds,
                "peak_memory_mib": memory.mib(),
            }
            guarded = {}
            if run.guard is not None:
                guarded, timing["guard_cpu_seconds"] = {"guard": run.guard.describe()}, run.guard.seconds
                log.lines.append(f"guard: kept {run.guard.kept}; {run.guard.evaluations}")
            result = {
                "method": config.method,
                "world": config.world,
                "origin": evaluation.world["data"]["origin"],
                "fingerprint": evaluation.world["fingerprint"]["id"],
                "seed": config.seed,
                "steps_done": run.steps_done,
                "resumed_at": resumed_at,
                "users": len(set(evaluation.sessions.user_ids.tolist())),
                "summary": {name: float(value) for name, value in evaluation.summary().items()},
                **guarded,
            }
            write_run(target, contents, result, evaluation.sessions.columns(), timing, log.text())
    return RunResult(config, evaluation, run.curve, run.policy, run.steps_done, target, training, seconds)


def _contents(run: _Run, checkpoint: bool) -> Callable[[Path], None]:
    """Returns what writes the files of any run; a checkpoint has the replay buffer too."""
    save: Callable[[Path], None] | None = None
    if method(run.config.method).learns:
        from hrl_policies.study import training

        save = partial(training.save_checkpoint if checkpoint else training.save_model, run.policy)
        if run.guard is not None:
            save = partial(_save_guarded, run, save if checkpoint else None)
    return partial(
        write_contents,
        config=run.config,
        provenance=_run_provenance(run),
        curve=run.curve,
        save_model=save,
        purifier=run.purifier_file,
    )


def _save_guarded(run: _Run, save_checkpoint: Callable[[Path], None] | None, folder: Path) -> None:
    """Writes a checkpoint with the state of the guard, or the model that the guard kept."""
    assert run.guard is not None
    if save_checkpoint is None:
        run.policy.save(folder / MODEL)
        return
    save_checkpoint(folder)
    run.guard.save(folder / GUARD)


def _guard_of(run: _Run) -> GuardCallback | None:
    """Returns the guard that a run's hyperparameters name, if they name one."""
    config = run.config
    settings = config.hyperparameters.get("guard")
    if settings is None:
        return None
    from hrl_policies.guard import guard_of_run

    return guard_of_run(
        settings,
        run.worlds.train,
        config.session,
        randomisation=config.randomisation,
        purifier=run.pretrained,
        seed=config.seed,
        total_steps=config.total_steps,
    )


def _run_provenance(run: _Run) -> dict[str, Any]:
    """Returns the descriptions of both worlds, and how training sessions depart from the training world."""
    described = run.worlds.describe()
    if run.config.randomisation is None:
        return described
    sessions = randomised(run.worlds.train, run.config.randomisation, run.config.seed)
    assert sessions.randomisation is not None
    return described | {"randomisation": sessions.randomisation.describe()}


def _learn(run: _Run, progress: bool) -> bool:
    """Trains; returns whether it was interrupted."""
    from hrl_policies.common.offline import OfflineAlgorithm
    from hrl_policies.study.training import (
        LossCurveCallback,
        SessionCurveCallback,
        need_memory,
        purifying_wrapper,
        stops_cleanly,
    )

    config, model = run.config, run.policy
    steps = config.total_steps - run.steps_done
    if steps <= 0:
        return False
    need_memory(model)
    # What learns in a model of the log plays sessions there, although it is offline.
    kind = LossCurveCallback if isinstance(model, OfflineAlgorithm) else SessionCurveCallback
    callback = kind(config.total_steps, run.curve, progress, f"{config.method}, seed {config.seed}")
    with stops_cleanly(callback):
        callbacks = [callback] if run.guard is None else [callback, run.guard]
        try:
            model.learn(steps, callback=callbacks, log_interval=None, reset_num_timesteps=run.steps_done == 0)
        except Exception as error:
            shortage = lack_of_memory(error)
            if shortage is None:
                _need_finite(config.method, model, error)
                raise
            if model.num_timesteps == run.steps_done:
                raise shortage from error
            run.shortage = shortage
    _need_finite(config.method, model)
    run.curve, run.steps_done = callback.curve, int(model.num_timesteps)
    around = purifying_wrapper(model)
    if around is not None:
        run.purifier = around.learned()
    return callback.stop_requested or run.shortage is not None


def _need_finite(name: str, model: Any, cause: Exception | None = None) -> None:
    """Checks that what was learned can be used.

    Raises:
        TrainingError: If it holds NaN or infinity.
    """
    from kuaifair_env.sb3_files import check_finite

    try:
        check_finite(model.get_parameters(), name)
    except ArtifactError as error:
        tensor = str(error).partition(": ")[2].partition(";")[0]
        raise TrainingError(
            f"the training of {name} diverged after {model.num_timesteps:,} steps: {tensor}; a smaller learning_rate "
            "may help"
        ) from cause or error


class RunLog:
    """Lines of a run's ``log.txt``, collected while it runs and written with its folder."""

    def __init__(self, config: RunConfig) -> None:
        steps = f", {config.total_steps:,} steps in {config.n_envs} sessions" if config.total_steps else ""
        variant = f" ({config.variant})" if config.variant else ""
        where = f"{config.world}, Max Len {config.session.max_len}"
        purifier = f"{config.purifier.name} {config.purifier.hash}" if config.purifier else "none"
        environment = versions()
        packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if number)
        self.lines = [
            f"run: {config.method}{variant} in {where}, seed {config.seed}{steps}",
            f"purifier: {purifier}",
            f"on: Python {environment['python']}, {environment['platform']}; {machine()}",
            f"with: {packages}",
        ]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Notes every warning once, and shows it as it would have been shown."""
        shown = warnings.showwarning

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            said = f"warning: {category.__name__}: {' '.join(str(message).split())}"
            if said not in self.lines:
                self.lines.append(said)
            shown(message, category, filename, lineno, file, line)

        # Entering this makes Python forget which warnings earlier runs of the process have shown.
        with warnings.catch_warnings():
            warnings.showwarning = note
            yield

    def text(self) -> str:
        """Returns the log."""
        return "\n".join(self.lines) + "\n"
