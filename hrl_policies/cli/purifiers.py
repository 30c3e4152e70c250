"""The commands around purified states: ``kuaifair pretrain``, ``probe`` and ``encode``."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsrm.purifier import ItemQuality, Mode, Target, forget_pretraining
from hrl_policies.cli import (
    AllowPartial,
    Clip,
    DataColumns,
    DataDir,
    DataSource,
    Env,
    EnvKwargs,
    Feedback,
    ItemsData,
    ItemTerm,
    OwnData,
    PositiveFeedback,
    Progress,
    PurifierFile,
    TestData,
    data_settings,
    new_file,
    open_world,
    register_own_data,
    world_kwargs,
)

if TYPE_CHECKING:
    from dsrm.purifier import StatePurifier
    from kuaifair_env.settings import WorldSettings

# The choices of dsrm.encoder, whose import takes a second.
EncoderKind = Literal["mean", "transformer"]
ProbeWindows = Literal["log", "short", "policy"]
_PROBES = "probes.json"


def pretrain(
    env: Env,
    output: PurifierFile,
    mode: Annotated[
        Mode, typer.Option("--mode", "-m", help="paper is literal and measures as the identity.")
    ] = "profile",
    target: Annotated[Target, typer.Option(help="What --mode regression learns.")] = "profile",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    levels: Annotated[
        int | None, typer.Option(min=1, help="Noise levels K; 100, and 20 in paper mode, where nothing is said.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of training at most.")] = None,
    examples: Annotated[int | None, typer.Option(min=100, help="Windows of a round.")] = None,
    item_quality: Annotated[
        ItemQuality | None,
        typer.Option(
            help="Beliefs: how good items are, by click rates or by features too; candidates choose by the log."
        ),
    ] = None,
    item_term: ItemTerm = None,
    like: Annotated[
        Path | None, typer.Option(help="--mode noise: as much noise as this purifier moves states.")
    ] = None,
    source: DataSource = "auto",
    allow_partial: AllowPartial = False,
    positive: PositiveFeedback = None,
    feedback: Feedback = "click",
    clip: Clip = None,
    env_settings: EnvKwargs = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    data_dir: DataDir = None,
    progress: Progress = True,
) -> None:
    """Pretrain a state purifier in the training world and write it to one file.

    A killed run goes on from OUTPUT.partial when the same command is given again. unbiased reads the test log of
    declared calibration users, who are never evaluated; all other modes read the training log alone.

    Example: kuaifair pretrain --env KuaiFair-Toy-v0 --mode profile --output profile.safetensors
    """
    positive = register_own_data(env, data, test_data, items_data, columns, positive)
    base = data_settings(source, allow_partial, positive, feedback, clip)
    settings: WorldSettings = {**base, **world_kwargs(env_settings)}
    forget_pretraining(output)
    if like is not None and mode != "noise":
        raise ValueError("--like is for --mode noise")
    with new_file(output):
        from dsrm.pretraining import PretrainConfig, noise_like, pretrain_file
        from dsrm.purifier import load_purifier, purifier_hash, save_purifier
        from hrl_policies.study import single_threaded

        single_threaded()
        world = open_world(env, "train", settings, data_dir, item_term)
        start = time.perf_counter()
        purifier: StatePurifier
        if like is not None:
            purifier = noise_like(load_purifier(like), world, seed)
            save_purifier(purifier, output)
        else:
            config = PretrainConfig(mode=mode, target=target, seed=seed, levels=levels, item_quality=item_quality)
            sizes = {name: size for name, size in (("rounds", rounds), ("examples", examples)) if size is not None}
            if sizes:
                config = replace(config, training=replace(config.rounds_and_batches, **sizes))
            purifier = pretrain_file(output, world, config, progress=progress)
    _report(purifier, output, purifier_hash(output), time.perf_counter() - start)


def _report(purifier: StatePurifier, output: Path, digest: str, seconds: float) -> None:
    from hrl_policies.study.store import machine

    described = purifier.describe()
    report = described.get("report", {})
    for name, text in (
        ("kind", described["kind"]),
        ("mode", report.get("mode")),
        ("data", (report.get("data") or {}).get("name")),
        ("users", report.get("training_users")),
        ("held out for early stopping", report.get("validation_users")),
        ("test log", report.get("test_log")),
        ("rounds", f"{report['rounds']}; round {report['best_round']} is kept" if "rounds" in report else None),
        ("validation loss", min(report["validation_losses"]) if "validation_losses" in report else None),
        ("student against teacher, cosine", report.get("student_cosine")),
        ("popularity R^2 of the direction", report.get("popularity_r2")),
        ("seconds", f"{seconds:.1f} ({machine()})"),
        ("file", f"{output} (hash {digest})"),
    ):
        if text is not None:
            typer.echo(f"{name:<34}{text}")


def probe(
    purifiers: Annotated[list[Path], typer.Argument(help="Files that `kuaifair pretrain` wrote.")],
    env: Env,
    windows: Annotated[
        ProbeWindows, typer.Option(help="log: last logged exposures; policy: made by simulated policies.")
    ] = "log",
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds, resamples and policies.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for probes.json and the figures.")
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw the t-SNE picture (slow) and counts against rates.")] = True,
    item_term: ItemTerm = None,
    source: DataSource = "auto",
    allow_partial: AllowPartial = False,
    positive: PositiveFeedback = None,
    feedback: Feedback = "click",
    clip: Clip = None,
    env_settings: EnvKwargs = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    data_dir: DataDir = None,
) -> None:
    """Measure what purified states hold, on held-out users and beside the raw state; draw the paper's Fig. 4 and 2.

    Example: kuaifair probe profile.safetensors regression.safetensors --env KuaiFair-Toy-v0 --output probes
    """
    from dsrm.probe_data import draw_counts_and_rates, draw_states, probe_set
    from dsrm.probes import probe as measure
    from dsrm.probes import purified_states, report_table
    from dsrm.purifier import load_purifier
    from hrl_policies.study import single_threaded
    from kuaifair_env.files import need_writable, write_text_atomically

    if output is not None:
        need_writable(output / _PROBES)
    positive = register_own_data(env, data, test_data, items_data, columns, positive)
    base = data_settings(source, allow_partial, positive, feedback, clip)
    settings: WorldSettings = {**base, **world_kwargs(env_settings)}
    by_name = {path.name.removesuffix(".safetensors"): path for path in purifiers}
    if len(by_name) < len(purifiers):
        raise ValueError("purifiers are called by their file names, which must differ")
    loaded = {name: load_purifier(path) for name, path in by_name.items()}
    single_threaded()
    world = open_world(env, "test", settings, data_dir, item_term)
    probes = probe_set(world, windows, seed=seed)
    states = purified_states(probes, world, loaded)
    report = measure(probes, states, seed)
    typer.echo(report_table(report))
    provenance = world.data.provenance
    typer.echo(f"{provenance.name} ({provenance.origin}), hash {world.data.data_hash}")
    if output is not None:
        content: dict[str, Any] = report.as_dict()
        output.mkdir(parents=True, exist_ok=True)
        if figures:
            content["counts_and_rates_r2"] = draw_counts_and_rates(output / "counts_and_rates.png", world.data)
            draw_states(output / "states.png", probes, states)
        write_text_atomically(output / _PROBES, json.dumps(content, indent=1, sort_keys=True) + "\n")
        typer.echo(f"written to {output}")


def encode(
    env: Env,
    output: PurifierFile,
    kind: Annotated[
        EncoderKind, typer.Option(help="mean of the clicked embeddings, or a transformer on top.")
    ] = "mean",
    logq: Annotated[bool, typer.Option(help="Correct sampled negatives for how often they are sampled.")] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = 0,
    source: DataSource = "auto",
    allow_partial: AllowPartial = False,
    positive: PositiveFeedback = None,
    feedback: Feedback = "click",
    clip: Clip = None,
    env_settings: EnvKwargs = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    data_dir: DataDir = None,
    progress: Progress = True,
) -> None:
    """Pretrain an agent-side encoder on the training log: item embeddings and states in place of the world's own.

    Use it as gym.make(ID, encoder=dsrm.Encoder.load(FILE)).
    """
    positive = register_own_data(env, data, test_data, items_data, columns, positive)
    base = data_settings(source, allow_partial, positive, feedback, clip)
    settings: WorldSettings = {**base, **world_kwargs(env_settings)}
    with new_file(output):
        from dsrm.encoder import EncoderConfig, pretrain_encoder
        from hrl_policies.study import single_threaded

        single_threaded()
        config = EncoderConfig(kind, log_q=logq, seed=seed)
        if steps is not None:
            config = replace(config, steps=steps)
        encoder = pretrain_encoder(
            open_world(env, "train", settings, data_dir),
            config,
            progress,
        )
        encoder.save(output)
    losses = encoder.report["validation_losses"]
    typer.echo(f"validation loss {losses[0]} (untrained) to {min(losses)}; test log unread; written to {output}")
