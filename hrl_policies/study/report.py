"""The report of a study: one HTML file that needs no network, with tables, figures, learning curves and provenance."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hrl_policies.study import report_curves
from hrl_policies.study.notes import ORIGINS
from hrl_policies.study.report_figures import ReportFigure
from hrl_policies.study.report_further import further_tables
from hrl_policies.study.report_runs import RUN_COLUMNS, run_sections, versions_of_runs, worlds_of_runs
from hrl_policies.study.report_sources import FailedRun, common_folder
from hrl_policies.study.report_summary import limits, overview
from hrl_policies.study.report_tables import MISSING, families, run_title, table_sections
from hrl_policies.study.result_table import ResultTable
from hrl_policies.study.store import StoredRun
from hrl_policies.zoo import METHODS
from kuaifair_env.data.files import write_text_atomically

_ASSETS = "report_assets"


def write_report(
    path: str | Path,
    runs: Sequence[StoredRun],
    *,
    title: str,
    command: str,
    figures: Sequence[Path] = (),
    further: Sequence[ResultTable] = (),
    failures: Sequence[FailedRun] = (),
) -> Path:
    """Writes the report of runs as one HTML file that holds its style, script and pictures, and may load nothing else.

    The same runs give the same bytes, wherever their folders lie; only times, which are marked as such, may differ
    between runs that are otherwise equal.

    Args:
        path: File to write; one that exists is replaced.
        runs: Finished and interrupted runs; see :func:`hrl_policies.study.report_sources.all_runs`.
        title: Heading of the report.
        command: The command that makes it.
        figures: PNG and SVG files; see :meth:`~hrl_policies.study.report_figures.ReportFigure.of_file` for captions.
        further: Tables besides those of the runs, such as comparisons and costs.
        failures: Runs that ended with an error.

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
        "further": further_tables(further),
        **_content(sorted(runs, key=_order), failures, command),
    }
    write_text_atomically(path, _rendered(content))
    return Path(path)


def _order(run: StoredRun) -> tuple[object, ...]:
    """Returns what runs are sorted by: world, Max Len, the order of the zoo, and seed."""
    config = run.config
    place = list(METHODS).index(config.method)
    return config.world, config.session.max_len, place, run_title(config), config.seed, run.folder.name


def _content(runs: Sequence[StoredRun], failures: Sequence[FailedRun], command: str) -> dict[str, Any]:
    worlds, software = worlds_of_runs(runs), versions_of_runs(runs)
    anchors = {run.folder: f"run-{number}" for number, run in enumerate(runs, 1)}
    return {
        "overview": overview(runs, failures),
        "limits": limits(runs),
        "families": families(runs),
        "present_origins": list(dict.fromkeys(one.origin for one in worlds.values())),
        "tables": table_sections(runs, anchors, command),
        "run_columns": [column.title for column in RUN_COLUMNS],
        "runs": run_sections(runs, anchors, common_folder(runs), worlds, software),
        "failures": failures,
        "worlds": list(worlds.values()),
        "software": list(software.values()),
    }


def _rendered(content: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from kuaifair_env import __version__

    environment = Environment(
        loader=PackageLoader("hrl_policies.study", _ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _asset("style.css"), _asset("report.js")
    return environment.get_template("report.html.j2").render(
        content,
        style=style,
        script=script,
        policy=_policy(style, script),
        version=__version__,
        curve=report_curves,
        missing=MISSING,
        origins=ORIGINS,
    )


def _policy(style: str, script: str) -> str:
    """Returns the Content-Security-Policy: this style, this script and pictures within the file, nothing else."""
    return (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _asset(name: str) -> str:
    return resources.files("hrl_policies.study").joinpath(_ASSETS, name).read_text(encoding="utf-8")
