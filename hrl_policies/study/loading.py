"""What a run is made of: its worlds, purifier and policy, made from its configuration or read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrl_policies.study.config import PurifierIdentity, RunConfig
from hrl_policies.study.records import TRAIN_AGAIN
from hrl_policies.study.store import BELIEF, MODEL, PURIFIER, StoredRun
from hrl_policies.worlds import SEED_LIMIT, WorldPair, load_worlds, session_seed, training_sessions
from hrl_policies.zoo import BuildContext, method
from kuaifair_env.data.own import OwnTables
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import whole
from kuaifair_env.fingerprint import WorldFingerprint
from kuaifair_env.origins import OwnOrigin
from kuaifair_env.registration import ENVIRONMENTS, register_origin

if TYPE_CHECKING:
    from dsrm.purifier import StatePurifier


def worlds_of(config: RunConfig, worlds: WorldPair | None, data_dir: str | Path | None = None) -> WorldPair:
    """Returns the worlds of a run: those given, if they bear its name, or those of its environment id.

    Raises:
        ValueError: If the names differ.
    """
    if worlds is None:
        return open_worlds(config.world, config.world_settings, config.item_term, data_dir)
    term = "" if worlds.item_term is None else worlds.item_term.mode
    if term != config.item_term:
        raise ValueError(
            f"the run wants the item term {config.item_term or 'none'!r}, but the worlds hold {term or 'none'!r}"
        )
    if worlds.name != config.world:
        raise ValueError(f"the run wants the worlds {config.world!r}, but was given {worlds.name!r}")
    return worlds


def open_worlds(
    name: str, settings: Mapping[str, Any] | None = None, item_term: str = "", data_dir: str | Path | None = None
) -> WorldPair:
    """Makes the worlds of an environment id, with an item term if one is named.

    Raises:
        ValueError: If a name or setting is unknown.
    """
    # Keys are those of WorldSettings; make_world checks them again.
    pair = load_worlds(name, dict(settings or {}), data_dir)  # type: ignore[arg-type]
    return pair.given_mode(item_term) if item_term else pair


def register_data_of(run: StoredRun) -> None:
    """Registers the world of one's own that a run was made in, unless it is registered.

    Raises:
        ArtifactError: If its tables were in memory, or are not where they were.
    """
    name = run.config.world
    data = run.provenance.get("test", {}).get("data", {})
    if name in ENVIRONMENTS or data.get("origin") != "own":
        return
    again = (
        f"register them again: kuaifair_env.register_world({name!r}, ...), or --data FILE on the command line; their "
        f"hash is {data.get('hash')}"
    )
    tables = data.get("settings", {}).get("tables")
    if tables is None:
        raise ArtifactError(f"{run.folder} was made on data of your own that were not in files; {again}")
    try:
        register_origin(OwnOrigin.of_tables(name, OwnTables.from_dict(tables).resolved()))
    except DataError as error:
        raise ArtifactError(f"{run.folder} was made on data of your own that are gone ({error}); {again}") from error


def check_same_worlds(run: StoredRun, worlds: WorldPair) -> None:
    """Checks that worlds are those that a run was made in.

    Raises:
        ArtifactError: If they are others.
    """
    for split, world in (("train", worlds.train), ("test", worlds.test)):
        stored, now = WorldFingerprint.of_description(run.provenance[split]["fingerprint"]), world.fingerprint
        differences = now.differences(stored)
        if differences:
            raise ArtifactError(
                f"{run.folder} was made in another {split} world, fingerprint {stored}; this one is {now} "
                f"({world.data.provenance.name}, {world.data.provenance.origin}): {', '.join(differences)} differ. It "
                "needs the data that it was made on (--data-dir, --data)"
            )


def build_policy(
    config: RunConfig, worlds: WorldPair, purifier: StatePurifier | None = None, seed_shift: int = 0
) -> Any:
    """Builds the untrained model, or the control, of a run.

    Args:
        config: The run.
        worlds: Its worlds.
        purifier: Its purifier.
        seed_shift: Added to the seed of sessions and of the algorithm when a run is resumed.

    Raises:
        ValueError: If a hyperparameter is not valid.
    """
    spec = method(config.method)
    seed = (config.seed + seed_shift) % SEED_LIMIT
    env = None
    if spec.learns:
        env = training_sessions(
            worlds.train,
            config.session,
            config.n_envs,
            config.seed,
            randomisation=config.randomisation,
            purifier=purifier,
        )
    policy = spec.build(BuildContext(worlds, config.session, seed, env, config.policy, config.hyperparameters))
    if env is not None:
        # Stable-Baselines3 has seeded the sessions with the algorithm's seed.
        env.seed(session_seed(seed))
    return policy


def load_policy(run: StoredRun, worlds: WorldPair) -> Any:
    """Returns the trained model or control of a finished run.

    Raises:
        ArtifactError: If the data has changed, or the model file is damaged.
    """
    check_same_worlds(run, worlds)
    purifier = purifier_of(run)
    with whole(run.folder / "config.json", "configuration of a run", TRAIN_AGAIN):
        policy = build_policy(run.config, worlds, purifier)
    if method(run.config.method).learns:
        from kuaifair_env.sb3_files import restore_parameters

        run.check(MODEL)
        restore_parameters(policy, run.folder / MODEL)
        # Off-policy algorithms act at random in their first steps.
        policy.num_timesteps = run.steps_done
        if run.result.get("guard", {}).get("kept") == "start":
            policy.frozen_while_serving = "its guard found no gain in training, so its networks stay where they started"
    return policy


def load_trusted(path: Path, config: RunConfig, worlds: WorldPair, purifier: StatePurifier | None = None) -> Any:
    """Returns the model in a ``.zip`` that Stable-Baselines3's ``save`` wrote, over training sessions of its own.

    Stable-Baselines3's loader executes what is pickled in the file, so whoever wrote it must be trusted.

    Args:
        path: The file.
        config: How the agent was trained: the algorithm of its method reads the file.
        worlds: Worlds like those that it was trained in.
        purifier: Purifier of the states that it observes.

    Raises:
        ArtifactError: If it cannot be read, was trained on other observations, actions or items, or holds NaN.
        ValueError: If the method is a control.
    """
    from kuaifair_env.sb3_files import check_finite

    if not method(config.method).learns:
        raise ValueError(f"{config.method} is a control and has no file; --method names what the agent was trained by")
    if not path.is_file():
        raise ArtifactError(f"{path} is no file; --trust is for a .zip, and run folders are loaded without it")
    untrained = build_policy(config, worlds, purifier)
    try:
        model = type(untrained).load(path, env=untrained.get_env(), device="cpu")
    except Exception as error:
        # Whatever the pickles in the file do.
        raise ArtifactError(
            f"{path} does not hold {config.method} as it acts here: {' '.join(str(error).split())}"
        ) from error
    check_finite(model.get_parameters(), path)
    return model


def purifier_of(run: StoredRun) -> StatePurifier | None:
    """Returns the purifier of a run folder, with what it learned in training, or None.

    Raises:
        ArtifactError: If it is missing or damaged.
    """
    purifier = read_purifier(run.config, run.folder / PURIFIER)[0]
    path = run.folder / BELIEF
    if purifier is None or not path.exists():
        return purifier
    from dsrm.purifier import load_purifier

    run.check(BELIEF)
    learned = load_purifier(path)
    if learned.describe() != purifier.describe():
        raise ArtifactError(f"{path} is not what the run's purifier learned; the folder holds files of two runs")
    return learned


def read_purifier(config: RunConfig, path: str | Path | None) -> tuple[StatePurifier | None, bytes | None]:
    """Reads the purifier that a configuration names; returns its file's content too.

    Raises:
        ArtifactError: If the file is not the one that is named.
        ValueError: If there is no file.
    """
    if config.purifier is None:
        return None, None
    if path is None:
        raise ValueError(f"the run needs the file of its purifier '{config.purifier.name}'")
    from dsrm.purifier import load_purifier

    now = PurifierIdentity.of_file(path).hash
    if now != config.purifier.hash:
        raise ArtifactError(f"{path} has hash {now}; the run names {config.purifier.hash}")
    return load_purifier(path), Path(path).read_bytes()
