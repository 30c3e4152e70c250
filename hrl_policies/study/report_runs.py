"""Runs in the report of a study: learning curve, settings, provenance; what several runs share is described once."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrl_policies.study.labels import ORIGINS, Variant
from hrl_policies.study.report_results import Pairs, search_words
from hrl_policies.study.store import CurveRow, StoredRun
from hrl_policies.study.table import Cell, Measured
from hrl_policies.study.tables import COLUMNS

RUN_COLUMNS = COLUMNS[:5]
"""Figures of a run in the list of all runs: Len, R_each, R_cum, AD and the violation rate."""

WIDTH, HEIGHT = 320, 150
"""Size of a panel's drawing, in its own units."""

LEFT, RIGHT, TOP, BOTTOM = 40, 310, 12, 122
"""Where its axes run."""

_NICE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis.

    Attributes:
        at: Coordinate in the drawing.
        label: The label.
    """

    at: float
    label: str


@dataclass(frozen=True)
class CurvePanel:
    """One figure over training steps, ready to be drawn.

    Attributes:
        title: Name of the figure.
        path: Data of the SVG path.
        end: Coordinates of the last point.
        across: Ticks of the axis of steps.
        up: Ticks of the other axis.
        evaluated: Height of the line for the figure in the test world; None without one.
        words: The drawing in words, for screen readers.
    """

    title: str
    path: str
    end: tuple[float, float]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    evaluated: float | None
    words: str


def curve_panel(
    curve: Sequence[CurveRow], figure: str, title: str, top: float, evaluated: float | None = None
) -> CurvePanel | None:
    """Draws one column of a learning curve from 0 to ``top`` over steps from 0 to the last.

    Args:
        curve: Rows of ``learning_curve.csv``.
        figure: Name of the column.
        title: Title of the panel.
        top: Upper end of the axis, such as :func:`axis_top` gives.
        evaluated: The figure in the test world.

    Returns:
        The panel, or None if the curve has no point that is a number.
    """
    points = [(row["steps"], row[figure]) for row in curve if figure in row]
    finite = [point for point in points if all(map(math.isfinite, point))]
    if not finite:
        return None
    last = max(steps for steps, _ in finite) or 1.0
    places = [_place(point, last, top) for point in points]
    return CurvePanel(
        title=title,
        path=_path(places),
        end=_rounded(_place(finite[-1], last, top)),
        across=(Tick(LEFT, "0"), Tick(RIGHT, f"{last:,.0f} steps")),
        up=tuple(Tick(_height(share * top, top), f"{share * top:g}") for share in (0.0, 0.5, 1.0)),
        evaluated=None if evaluated is None else round(_height(evaluated, top), 1),
        words=(
            f"{title} in training: {finite[0][1]:.3g} at {finite[0][0]:,.0f} steps, "
            f"{finite[-1][1]:.3g} at {finite[-1][0]:,.0f}"
        ),
    )


def axis_top(values: Sequence[float]) -> float:
    """Returns a round number that no finite value exceeds, 1 where there is nothing above 0."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if largest <= 0.0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return float(next((nice * unit for nice in _NICE if nice * unit >= largest), 10.0 * unit))


def _path(places: Sequence[tuple[float, float]]) -> str:
    """Joins the points; one that is not a number leaves a gap."""
    parts, pen = [], "M"
    for place in places:
        if not all(map(math.isfinite, place)):
            pen = "M"
            continue
        x, y = _rounded(place)
        parts.append(f"{pen}{x:g} {y:g}")
        pen = "L"
    return "".join(parts)


def _place(point: tuple[float, float], last: float, top: float) -> tuple[float, float]:
    return LEFT + (RIGHT - LEFT) * point[0] / last, _height(point[1], top)


def _height(value: float, top: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value / top


def _rounded(place: tuple[float, float]) -> tuple[float, float]:
    return round(place[0], 1), round(place[1], 1)


@dataclass(frozen=True)
class RunSection:
    """One run with all that is known of it.

    Attributes:
        anchor: Id in the document.
        title: Name of the method with its purifier if it is not its own.
        state: ``"finished"`` or ``"interrupted"``.
        family: Checkbox that shows it.
        search: Words that the filter finds it by.
        world: Environment id, or name of a study's own.
        max_len: Horizon.
        seed: Training seed.
        figures: Training steps taken, then Len, R_each, R_cum, AD and the violation rate; empty cells for missing ones.
        panels: Its learning curve.
        settings: How it was run.
        hyperparameters: Arguments of the algorithm.
        provenance: Hashes of data and files.
        method: What the method is, sees and comes from.
        timing: Seconds and machine; differs from one run to the next.
        data: Anchor of its worlds.
        software: Anchor of its versions.
    """

    anchor: str
    title: str
    state: str
    family: str
    search: str
    world: str
    max_len: int
    seed: int
    figures: tuple[Cell, ...]
    panels: tuple[CurvePanel, ...]
    settings: Pairs
    hyperparameters: Pairs
    provenance: Pairs
    method: Pairs
    timing: str
    data: str
    software: str


@dataclass(frozen=True)
class SharedFacts:
    """Facts that several runs share: their worlds, or their software.

    Attributes:
        anchor: Id in the document.
        title: Its name.
        facts: Names and values that are worth reading.
        origin: Kind of data; empty for software.
        full: All of it as JSON; empty where the facts are all.
    """

    anchor: str
    title: str
    facts: Pairs
    origin: str = ""
    full: str = ""


def run_sections(
    runs: Sequence[StoredRun],
    anchors: Mapping[Path, str],
    root: Path,
    worlds: Mapping[str, SharedFacts],
    software: Mapping[str, SharedFacts],
) -> tuple[RunSection, ...]:
    """Returns a section for every run; curves of one world and horizon have one scale.

    Args:
        runs: The runs.
        anchors: Their ids by folder.
        root: Folder that is left out of their names.
        worlds: See :func:`shared_worlds`.
        software: See :func:`shared_software`.
    """
    rewards: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        own = rewards.setdefault((run.config.world, run.config.session.max_len), [])
        own += [row["r_cum"] for row in run.session_curve]
        own += [run.summary["r_cum"]] if run.complete else []
    return tuple(
        _run_section(
            run,
            anchors[run.folder],
            run.folder.absolute().relative_to(root).as_posix(),
            axis_top(rewards[run.config.world, run.config.session.max_len]),
            worlds[_fingerprint(run.provenance)].anchor,
            software[_fingerprint(run.versions)].anchor,
        )
        for run in runs
    )


def _run_section(run: StoredRun, anchor: str, name: str, top: float, data: str, software: str) -> RunSection:
    config, variant = run.config, Variant.of_config(run.config)
    spec, state = variant.spec, "finished" if run.complete else "interrupted"
    steps = f"{run.steps_done:,}" if run.steps_done else ""
    figures = [Measured(run.summary[c.figure], c.digits) if run.complete else "" for c in RUN_COLUMNS]
    return RunSection(
        anchor=anchor,
        title=variant.title,
        state=state,
        family=variant.family,
        search=f"{search_words(config)} {state}",
        world=config.world,
        max_len=config.session.max_len,
        seed=config.seed,
        figures=(steps, *figures),
        panels=_panels(run, top),
        settings=_settings(run),
        hyperparameters=tuple(_flat(config.hyperparameters)),
        provenance=_provenance(run, name),
        method=(
            ("what", spec.kind),
            ("acts by", spec.action_mode),
            ("sees", spec.sees),
            ("from", spec.reference),
        ),
        timing=_timing(run.timing),
        data=data,
        software=software,
    )


def _panels(run: StoredRun, top: float) -> tuple[CurvePanel, ...]:
    summary = run.summary if run.complete else {}
    panels = (
        curve_panel(run.curve, "r_cum", "R_cum", top, summary.get("r_cum")),
        curve_panel(run.curve, "violation_rate", "violation rate", 1.0, summary.get("violation_rate")),
    )
    return tuple(panel for panel in panels if panel is not None)


def _settings(run: StoredRun) -> Pairs:
    config = run.config
    session = config.session.describe()
    trained = (
        ("policy", config.policy),
        ("training sessions at once", str(config.n_envs)),
        ("training steps", f"{run.steps_done:,} of {config.total_steps:,}"),
        ("taste noise", f"{config.taste_noise:g}"),
    )
    return (
        *(trained if Variant.of_config(config).learns else ()),
        ("item term", config.item_term or "none"),
        ("evaluated on", f"{config.users} users, {config.episodes_per_user} session(s) each"),
        ("evaluation seed", str(config.evaluation_seed)),
        *(("world " + name, value) for name, value in _flat(config.world_settings)),
        *_flat(session),
    )


def _provenance(run: StoredRun, name: str) -> Pairs:
    config, data = run.config, run.provenance["test"]["data"]
    resumed = run.result.get("resumed_at", 0)
    return (
        ("run folder", name),
        ("data", f"{data['name']} ({ORIGINS[data['origin']]})"),
        ("data hash", data["hash"]),
        ("purifier", f"{config.purifier.name}, hash {config.purifier.hash}" if config.purifier else "none"),
        *((("resumed", f"after {resumed:,} steps"),) if resumed else ()),
    )


def _timing(timing: Mapping[str, Any]) -> str:
    if not timing:
        return ""
    seconds = f"training {timing['training_seconds']:.1f} s, evaluation {timing['evaluation_seconds']:.1f} s"
    return f"{seconds} ({timing['machine']})"


def shared_worlds(runs: Sequence[StoredRun]) -> dict[str, SharedFacts]:
    """Returns every pair of worlds once, by fingerprint."""
    found: dict[str, SharedFacts] = {}
    for run in runs:
        key = _fingerprint(run.provenance)
        if key not in found:
            found[key] = _worlds(run.provenance, f"worlds-{len(found) + 1}")
    return found


def shared_software(runs: Sequence[StoredRun]) -> dict[str, SharedFacts]:
    """Returns every set of versions once, by fingerprint."""
    found: dict[str, SharedFacts] = {}
    for run in runs:
        key, number = _fingerprint(run.versions), len(found) + 1
        if key not in found:
            facts = (
                ("Python", str(run.versions["python"])),
                ("platform", str(run.versions["platform"])),
                *((name, str(version)) for name, version in sorted(run.versions["packages"].items())),
            )
            found[key] = SharedFacts(f"software-{number}", f"Software {number}", facts)
    return found


def _fingerprint(content: Mapping[str, Any]) -> str:
    """Returns a hash of JSON-able content, equal for equal content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _worlds(provenance: Mapping[str, Any], anchor: str) -> SharedFacts:
    data = provenance["test"]["data"]
    facts = [
        ("data", f"{data['name']}: {ORIGINS[data['origin']]}"),
        ("what it is", str(data.get("description", ""))),
        ("data hash", data["hash"]),
        *((f"file {name}", str(digest)) for name, digest in sorted(data.get("files", {}).items())),
    ]
    for split in ("train", "test"):
        world = provenance[split]
        kind = world["response"].get("kind", "unknown")
        sizes = f"{world['candidates']:,} candidates, {world['users']:,} users"
        facts.append((f"{split} world", f"{sizes}, response model: {kind}"))
    title = str(provenance.get("name", data["name"]))
    full = _short_lists(json.dumps(provenance, indent=1, sort_keys=True))
    return SharedFacts(anchor, title, tuple(fact for fact in facts if fact[1]), data["origin"], full)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields nested settings by dotted name."""
    for name, value in sorted(content.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _short_lists(text: str) -> str:
    """Puts lists of numbers in indented JSON on one line each."""
    return re.sub(r"\[[^][{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
