"""The commands around purified states: ``kuaifair pretrain``, ``probe`` and ``encode``."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from dsrm.probe_data import ProbeSet
    from dsrm.probes import ProbeReport
    from dsrm.purifier import StatePurifier
    from kuaifair_env.data.schema import FloatArray
    from kuaifair_env.registration import WorldSettings
    from kuaifair_env.world import World

CHECKPOINT = ".partial"


class PurifierMode(str, Enum):
    """How a purifier is made."""

    profile = "profile"
    paper = "paper"
    unbiased = "unbiased"
    paired = "paired"
    regression = "regression"
    linear_debias = "linear_debias"
    ips = "ips"
    identity = "identity"
    noise = "noise"
    tce = "tce"
    rce = "rce"
    bod = "bod"


class TargetKind(str, Enum):
    """What the regression control learns."""

    profile = "profile"
    unbiased = "unbiased"
    paired = "paired"


class WindowKind(str, Enum):
    """Which windows are probed."""

    log = "log"
    short = "short"
    policy = "policy"


class EncoderChoice(str, Enum):
    """Which encoder is trained."""

    mean = "mean"
    transformer = "transformer"


class WorldSource(str, Enum):
    """Where data comes from."""

    auto = "auto"
    real = "real"
    twin = "twin"


def pretrain(
    env: Annotated[str, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")],
    mode: Annotated[
        PurifierMode, typer.Option("--mode", "-m", help="paper is literal and measures as the identity.")
    ] = PurifierMode.profile,
    target: Annotated[TargetKind, typer.Option(help="What --mode regression learns.")] = TargetKind.profile,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    levels: Annotated[int, typer.Option(min=1, help="Noise levels K.")] = 20,
    rounds: Annotated[int | None, typer.Option(min=1, help="Most rounds of training.")] = None,
    examples: Annotated[int | None, typer.Option(min=100, help="Windows of a round.")] = None,
    item_term: Annotated[
        str | None,
        typer.Option(help="For worlds with this item term: log, ips, features or unbiased."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="--mode noise: as much noise as this purifier moves states.")
    ] = None,
    source: Annotated[
        WorldSource, typer.Option(help="real forbids the twin, twin forbids real files.")
    ] = WorldSource.auto,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder or archive with the official files; else KUAIFAIR_DATA, else the cache."),
    ] = None,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")] = True,
) -> None:
    """Pretrain a state purifier in the training world and write it to one file.

    A killed run goes on from OUTPUT.partial when the same command is given again. unbiased reads the test log of
    declared calibration users, who are never evaluated; all other modes read the training log alone.

    Example: kuaifair pretrain --env KuaiFair-Toy-v0 --mode profile --output profile.safetensors
    """
    from hrl_policies.study import single_threaded
    from kuaifair_env.errors import ArtifactError
    from kuaifair_env.registration import make_world

    if output.exists():
        raise ArtifactError(f"{output} exists already; choose another file, or remove it")
    if like is not None and mode is not PurifierMode.noise:
        raise ValueError("--like is for --mode noise")
    single_threaded()
    settings: WorldSettings = {"split": "train", "source": source.value}
    if data_dir is not None:
        settings["data_dir"] = data_dir
    world = _with_term(make_world(env, **settings), item_term)
    start = time.perf_counter()
    purifier = _made(world, mode, target, seed, levels, rounds, examples, like, output, progress)
    from dsrm.purifier import purifier_hash, save_purifier

    save_purifier(purifier, output)
    _report(purifier, output, purifier_hash(output), time.perf_counter() - start)


def _made(
    world: Any,
    mode: PurifierMode,
    target: TargetKind,
    seed: int,
    levels: int,
    rounds: int | None,
    examples: int | None,
    like: Path | None,
    output: Path,
    progress: bool,
) -> StatePurifier:
    from dataclasses import replace

    from dsrm.pretrain import PretrainConfig, noise_like, pretrain
    from dsrm.purifier import load_purifier
    from dsrm.training import TrainingConfig

    if like is not None:
        return noise_like(load_purifier(like), world, seed)
    training = TrainingConfig()
    if rounds is not None:
        training = replace(training, rounds=rounds)
    if examples is not None:
        training = replace(training, examples=examples)
    config = PretrainConfig(mode=mode.value, target=target.value, seed=seed, levels=levels, training=training)
    checkpoint = output.with_name(output.name + CHECKPOINT)
    output.parent.mkdir(parents=True, exist_ok=True)
    return pretrain(world, config, checkpoint=checkpoint, progress=progress)


def _report(purifier: StatePurifier, output: Path, digest: str, seconds: float) -> None:
    from hrl_policies.study.store import machine

    console = Console(soft_wrap=True, highlight=False)
    described = purifier.describe()
    report = described.get("report", {})
    for name, text in (
        ("kind", described["kind"]),
        ("mode", report.get("mode")),
        ("data", (report.get("data") or {}).get("name")),
        ("users", report.get("training_users")),
        ("held out for early stopping", report.get("validation_users")),
        ("test log", report.get("test_log")),
        ("rounds (best)", f"{report['rounds']} ({report['best_round']})" if "rounds" in report else None),
        ("validation loss", report["curve"][report["best_round"] - 1][1] if report.get("curve") else None),
        ("student against teacher, cosine", report.get("student_cosine")),
        ("popularity R^2 of the direction", report.get("popularity_r2")),
    ):
        if text is not None:
            console.print(f"{name:<34}{text}", markup=False)
    console.print(f"{'seconds':<34}{seconds:.1f} ({machine()})", markup=False)
    console.print(f"{'file':<34}{output} (hash {digest})", markup=False)


def probe(
    purifiers: Annotated[list[Path], typer.Argument(help="Files that `kuaifair pretrain` wrote.")],
    env: Annotated[str, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")],
    windows: Annotated[
        WindowKind, typer.Option(help="log: last logged exposures; policy: made by simulated policies.")
    ] = WindowKind.log,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds, resamples and policies.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for probes.json and the figures.")
    ] = None,
    figures: Annotated[
        bool, typer.Option(help="Draw the t-SNE picture (slow) and counts against rates.")
    ] = True,
    item_term: Annotated[
        str | None, typer.Option(help="The item term that the purifiers were made for.")
    ] = None,
    source: Annotated[
        WorldSource, typer.Option(help="real forbids the twin, twin forbids real files.")
    ] = WorldSource.auto,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder or archive with the official files; else as for `pretrain`.")
    ] = None,
) -> None:
    """Measure what purified states hold, on held-out users and beside the raw state; draw the paper's Fig. 4 and 2.

    Example: kuaifair probe profile.safetensors regression.safetensors --env KuaiFair-Toy-v0 --output probes
    """
    from dsrm.probe_data import probe_set
    from dsrm.probes import probe, purified_states, report_table
    from dsrm.purifier import load_purifier
    from hrl_policies.study import single_threaded
    from kuaifair_env.registration import make_world

    single_threaded()
    settings: WorldSettings = {"split": "test", "source": source.value}
    if data_dir is not None:
        settings["data_dir"] = data_dir
    world = _with_term(make_world(env, **settings), item_term)
    named = {path.name.removesuffix(".safetensors"): load_purifier(path) for path in purifiers}
    if len(named) < len(purifiers):
        raise ValueError("purifiers are called by their file names, which must differ")
    probes = probe_set(world, windows.value, seed=seed)
    states = purified_states(probes, world, named)
    report = probe(probes, states, seed)
    console = Console(soft_wrap=True, highlight=False)
    console.print(report_table(report), markup=False)
    data = world.data.provenance
    console.print(f"{data.name} ({data.origin}), hash {world.data.data_hash}", markup=False)
    if output is not None:
        _write_probes(output, report, probes, states, world, figures)
        console.print(f"written to {output}", markup=False)


def encode(
    env: Annotated[str, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")],
    kind: Annotated[
        EncoderChoice, typer.Option(help="mean of the clicked embeddings, or a transformer on top.")
    ] = EncoderChoice.mean,
    logq: Annotated[
        bool, typer.Option(help="Correct sampled negatives for how often they are sampled.")
    ] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Most optimiser steps.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = 0,
    source: Annotated[
        WorldSource, typer.Option(help="real forbids the twin, twin forbids real files.")
    ] = WorldSource.auto,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder or archive with the official files; else as for `pretrain`.")
    ] = None,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")] = True,
) -> None:
    """Pretrain an agent-side encoder on the training log: item embeddings and observed states in place of the SVD's.

    Use it as gym.make(ID, encoder=dsrm.Encoder.load(FILE)).
    """
    from dataclasses import replace

    from dsrm.encoder import EncoderConfig, pretrain_encoder
    from hrl_policies.study import single_threaded
    from kuaifair_env.errors import ArtifactError
    from kuaifair_env.registration import make_world

    if output.exists():
        raise ArtifactError(f"{output} exists already; choose another file, or remove it")
    single_threaded()
    settings: WorldSettings = {"split": "train", "source": source.value}
    if data_dir is not None:
        settings["data_dir"] = data_dir
    config = EncoderConfig(kind.value, log_q=logq, seed=seed)
    if steps is not None:
        config = replace(config, steps=steps)
    encoder = pretrain_encoder(make_world(env, **settings), config, progress)
    encoder.save(output)
    curve = encoder.report["curve"]
    Console(soft_wrap=True, highlight=False).print(
        f"validation loss {curve[0]} (SVD) to {min(curve)}; test log unread; written to {output}",
        markup=False,
    )


def _with_term(world: World, mode: str | None) -> World:
    if mode is None:
        return world
    from dsrm.item_term import fit_item_term, item_term_mode, with_item_term

    return with_item_term(world, fit_item_term(world, item_term_mode(mode)))


def _write_probes(
    output: Path,
    report: ProbeReport,
    probes: ProbeSet,
    states: dict[str, FloatArray],
    world: World,
    figures: bool,
) -> None:
    import json

    from dsrm.probe_figures import draw_counts_and_rates, draw_states
    from kuaifair_env.files import write_text_atomically

    content: dict[str, Any] = report.as_dict()
    output.mkdir(parents=True, exist_ok=True)
    if figures:
        content["counts_and_rates_r2"] = draw_counts_and_rates(output / "counts_and_rates.png", world.data)
        draw_states(output / "states.png", probes, states)
    write_text_atomically(output / "probes.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
