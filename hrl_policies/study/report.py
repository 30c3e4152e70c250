"""The report of a study: one HTML file that needs no network, with tables, figures, learning curves and provenance."""

from __future__ import annotations

import base64
import html
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrl_policies.study import report_sections as sections
from hrl_policies.study.labels import ORIGINS, Variant, families
from hrl_policies.study.page_assets import asset, page_environment, page_policy
from hrl_policies.study.store import StoredRun, reason_of
from hrl_policies.study.tables import MISSING, Cell, Measured, ResultTable, sort_value
from kuaifair_env.files import write_text_atomically

PICTURES = {".svg": "image/svg+xml", ".png": "image/png"}
"""Kinds of pictures that a report can hold with their media types, the preferred one first."""

CAPTION = ".caption.txt"

_DESCRIPTION = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)
_FIGURES = "figures"

_WIDE_INTERVALS_BELOW = 5
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


@dataclass(frozen=True)
class ReportFigure:
    """A picture of the report: the whole of it as a ``data:`` URI, and the text below it."""

    source: str
    caption: str

    @classmethod
    def of_file(cls, path: Path) -> ReportFigure:
        """Reads a picture.

        Its caption is the text of ``NAME.caption.txt`` beside it, or the description that is kept inside it, as
        :mod:`matplotlib` writes it; of a figure with neither it is the name.

        Raises:
            ValueError: If it is of a kind that reports do not hold, or damaged.
            OSError: If it cannot be read.
        """
        kind = path.suffix.lower()
        if kind not in PICTURES:
            raise ValueError(f"a report holds pictures of the kinds {', '.join(PICTURES)}; got {path}")
        content = path.read_bytes()
        beside = path.with_suffix(CAPTION)
        if beside.exists():
            caption = beside.read_text(encoding="utf-8").strip()
        else:
            match = _DESCRIPTION.search(content.decode("utf-8", errors="replace")) if kind == ".svg" else None
            inside = _png_description(path) if kind == ".png" else html.unescape(match[1]).strip() if match else ""
            name = path.stem.replace("_", " ").replace("-", " ")
            caption = inside or f"{name[:1].upper()}{name[1:]}"
        encoded = base64.b64encode(content).decode("ascii")
        return cls(f"data:{PICTURES[kind]};base64,{encoded}", caption)


def _png_description(path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return str(picture.info.get("Description", "")).strip()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a PNG picture: {error}") from error


def write_report(
    path: str | Path,
    runs: Sequence[StoredRun],
    *,
    title: str,
    command: str,
    figures: Sequence[Path] = (),
    further: Sequence[ResultTable] = (),
    failures: Mapping[str, str] | None = None,
) -> Path:
    """Writes the report of runs as one HTML file that holds its style, script and pictures, and may load nothing else.

    The same runs give the same bytes, wherever their folders lie; only times, which are marked as such, may differ
    between runs that are otherwise equal.

    Args:
        path: File to write; one that exists is replaced.
        runs: Finished and interrupted runs; see :func:`hrl_policies.study.store.all_runs`.
        title: Heading of the report.
        command: The command that makes it.
        figures: PNG and SVG files; see :meth:`~hrl_policies.study.report.ReportFigure.of_file` for captions.
        further: Tables besides those of the runs, such as comparisons and costs.
        failures: Tracebacks by name of the run that failed; see :func:`hrl_policies.study.store.failed_runs`.

    Returns:
        The file.

    Raises:
        ValueError: If there are no runs, a figure is of another kind, or runs do not belong into one table.
        OSError: If a figure cannot be read.
    """
    if not runs and not failures:
        raise ValueError("there are no runs to report")
    content = {
        "title": title,
        "command": command,
        "figures": [ReportFigure.of_file(Path(figure)) for figure in figures],
        "further": sections.plain_tables(further),
        **_content(sorted(runs, key=_order), failures or {}, command),
    }
    write_text_atomically(path, _rendered(content))
    return Path(path)


def stored_figures(store: str | Path) -> list[Path]:
    """Returns the pictures in a store and in its folder ``figures``; of two kinds of one picture the SVG."""
    root = Path(store)
    pictures: dict[Path, Path] = {}
    for kind in PICTURES:
        for folder in (root, root / _FIGURES):
            for path in folder.glob(f"*{kind}"):
                pictures.setdefault(path.with_suffix(""), path)
    return [pictures[name] for name in sorted(pictures)]


def _order(run: StoredRun) -> tuple[object, ...]:
    config, variant = run.config, Variant.of_config(run.config)
    session = config.session
    return config.world, session.max_len, session.repeats, variant.order[0], variant.title, config.seed, run.folder.name


def _content(runs: Sequence[StoredRun], failures: Mapping[str, str], command: str) -> dict[str, Any]:
    worlds, software = sections.shared_worlds(runs), sections.shared_software(runs)
    anchors = {run.folder: f"run-{number}" for number, run in enumerate(runs, 1)}
    # The deepest folder that holds all runs: the report names them without it.
    root = Path(os.path.commonpath([run.folder.absolute().parent for run in runs]) if runs else "")
    return {
        "overview": overview(runs, len(failures)),
        "limits": limits(runs),
        "families": families({Variant.of_config(run.config) for run in runs}),
        "present_origins": list(dict.fromkeys(one.origin for one in worlds.values())),
        "tables": sections.result_sections(runs, anchors, command),
        "run_columns": ["steps", *(column.title for column in sections.RUN_COLUMNS)],
        "runs": sections.run_sections(runs, anchors, root, worlds, software),
        "failures": failures,
        "worlds": list(worlds.values()),
        "software": list(software.values()),
    }


def _rendered(content: Mapping[str, Any]) -> str:
    from kuaifair_env import __version__

    environment = page_environment()
    environment.filters |= {
        "sort_value": _sort_text,
        "number": _number_text,
        "uncertainty": lambda cell: cell.uncertainty if isinstance(cell, Measured) else "",
        "reason": reason_of,
    }
    style, script = asset("style.css"), asset("report.js")
    template = environment.get_template("report.html.j2")
    return template.render(
        content,
        style=style,
        script=script,
        policy=page_policy(style, script),
        version=__version__,
        curve=sections,
        origins=ORIGINS,
    )


def overview(runs: Sequence[StoredRun], failed: int) -> sections.Pairs:
    """Returns what was run, as names and values; ``failed`` is the number of runs that ended with an error."""
    variants = {run.folder: Variant.of_config(run.config) for run in runs}
    ordered = sorted(variants.values(), key=lambda variant: variant.order[0])
    states = {
        "finished": sum(run.complete for run in runs),
        "interrupted": sum(not run.complete for run in runs),
        "failed": failed,
    }
    seeds = {run.config.seed for run in runs if run.complete and variants[run.folder].learns}
    evaluated = {
        f"{run.result['users']} held-out users, {run.config.episodes_per_user} session(s) each"
        for run in runs
        if run.complete
    }
    facts = (
        ("runs", ", ".join(f"{number} {state}" for state, number in states.items() if number)),
        ("trained methods", _listed((variant.title for variant in ordered if variant.learns), "; ")),
        ("controls", _listed((variant.title for variant in ordered if not variant.learns), "; ")),
        ("worlds", _listed(run.config.world for run in runs)),
        ("data", _listed(f"{run.provenance['test']['data']['name']} ({ORIGINS[_origin(run)]})" for run in runs)),
        ("Max Len", _listed(map(str, sorted({run.config.session.max_len for run in runs})))),
        ("repeats", _listed(sorted({run.config.session.repeats for run in runs}))),
        ("training seeds", _listed(map(str, sorted(seeds)))),
        ("evaluated on", "; ".join(sorted(evaluated))),
    )
    return tuple((name, value) for name, value in facts if value)


def limits(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    """Returns what may and may not be concluded from runs, one sentence or two each."""
    finished = [run for run in runs if run.complete]
    learners = [run for run in finished if Variant.of_config(run.config).learns]
    controls = [variant for run in finished if not (variant := Variant.of_config(run.config)).learns]
    sentences = [_ORIGIN_LIMITS[origin] for origin in dict.fromkeys(map(_origin, runs))]
    if learners:
        sentences.append(_limit_of_seeds(learners))
        if all(variant.privileged for variant in controls):
            sentences.append(
                "No control was run that a trained method could be compared with: the tables cannot show that training "
                "helped."
            )
        else:
            sentences.append(
                "A trained method is worth something only where it does better than the controls, which learn nothing "
                "by reinforcement, by more than the intervals."
            )
    if any(Variant.of_config(run.config).privileged for run in finished):
        sentences.append(
            "Rows with † know what users of the test world truly like. They are bounds that say how much could be won, "
            "not methods."
        )
    if any("len_floor" in run.summary for run in finished):
        sentences.append(
            "Len, R_each and the violation rate are tied by a formula: floor and ceiling are the shortest and longest "
            "Len at a method's own R_each, so a long Len says first of all that the leave rule was seldom broken."
        )
    sentences.append(
        "AD near 0 says that popular and long-tail items get equal shares of exposure, not that items are treated "
        "alike: there are far fewer popular ones."
    )
    return tuple(sentences)


def _limit_of_seeds(learners: Sequence[StoredRun]) -> str:
    seeds: defaultdict[tuple[object, ...], set[int]] = defaultdict(set)
    for config in (run.config for run in learners):
        seeds[Variant.of_config(config), config.world, config.session.max_len, config.item_term].add(config.seed)
    min_seeds = min(map(len, seeds.values()))
    if min_seeds == 1:
        return (
            "At least one trained method has a single training seed: its row has no interval, and a difference between "
            "two such rows may be the randomness of training."
        )
    text = "± and brackets are 95 % intervals of the mean for other training seeds, of which a row has at least"
    return f"{text} {min_seeds}" + (": so few give wide intervals." if min_seeds < _WIDE_INTERVALS_BELOW else ".")


def _origin(run: StoredRun) -> str:
    return str(run.provenance["test"]["data"]["origin"])


def _listed(names: Iterable[str], separator: str = ", ") -> str:
    return separator.join(dict.fromkeys(names))


def _sort_text(cell: Cell) -> str:
    value = sort_value(cell)
    return "" if value is None else f"{value:.12g}"


def _number_text(cell: Cell) -> str:
    if isinstance(cell, Measured):
        return cell.number
    return "—" if cell in ("", MISSING) else cell
