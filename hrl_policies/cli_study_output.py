"""``kuaifair study tables`` and ``kuaifair study figures``: what a store of runs says."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from hrl_policies.study.store import StoredRun
    from hrl_policies.worlds import WorldPair


class TableChoice(str, Enum):
    """Forms of a table."""

    text = "text"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"


class FigureChoice(str, Enum):
    """Formats of a figure."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


class AverageChoice(str, Enum):
    """What stands for several training seeds."""

    mean = "mean"
    iqm = "iqm"


class Other(str, Enum):
    """Whose figures may be shown beside ours."""

    paper = "paper"


_Store = Annotated[Path, typer.Argument(help="Folder of run folders.")]
_Worlds = Annotated[
    bool,
    typer.Option(
        "--worlds", help="Make the runs' worlds again, for what needs the data (Table 1; Figs. 2 and 4)."
    ),
]
_DataDir = Annotated[
    Path | None,
    typer.Option(
        help="With --worlds: folder or archive with the official files; else KUAIFAIR_DATA, else the cache."
    ),
]


def tables(
    context: typer.Context,
    store: _Store,
    forms: Annotated[
        list[TableChoice] | None,
        typer.Option(
            "--format", help="Write files in this form; repeat for several. Without, print to the terminal."
        ),
    ] = None,
    compare: Annotated[
        Other | None, typer.Option(help="Show the paper's figures beside ours; they are from another world.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Method that others are compared with (default dsrm-hrl, if it was run)."),
    ] = None,
    average: Annotated[
        AverageChoice, typer.Option(help="Over training seeds: mean, or interquartile mean.")
    ] = AverageChoice.mean,
    worlds: _Worlds = False,
    data_dir: _DataDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files (default STORE/tables).")
    ] = None,
) -> None:
    """Print or write the paper's Tables 1 to 4, paired differences with Holm's correction, and scores over all worlds.

    Example: kuaifair study tables runs --format latex --compare paper --base dsrm-hrl
    """
    from hrl_policies.study.outputs import study_tables, write_tables

    if output is not None and not forms:
        raise ValueError("--output takes files, and --format says which: text, markdown, latex or csv")
    runs = _finished(store)
    made = _worlds_of(runs, worlds, data_dir)
    command = str(context.obj or f"kuaifair study tables {store}")
    paper = compare is Other.paper
    console = Console(soft_wrap=True, highlight=False)
    if not forms:
        shown = study_tables(
            runs, compare=paper, base=base, average=average.value, worlds=made, command=command
        )
        for table in shown.values():
            table.show(console)
        return
    written = write_tables(
        output or store / "tables",
        runs,
        [form.value for form in forms],
        compare=paper,
        base=base,
        average=average.value,
        worlds=made,
        command=command,
    )
    _tell(console, written)


def figures(
    store: _Store,
    forms: Annotated[
        list[FigureChoice] | None,
        typer.Option("--format", help="Format of the files; repeat for several (default png and svg)."),
    ] = None,
    worlds: _Worlds = False,
    data_dir: _DataDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files (default STORE/figures).")
    ] = None,
) -> None:
    """Draw the paper's Figs. 3 and 7, the Pareto frontier, performance profiles and bars; with --worlds Figs. 2 and 4.

    Example: kuaifair study figures runs --format pdf
    """
    from hrl_policies.study.drawing import draw_study

    runs = _finished(store)
    chosen = forms or [FigureChoice.png, FigureChoice.svg]
    written = draw_study(
        output or store / "figures",
        runs,
        [form.value for form in chosen],
        worlds=_worlds_of(runs, worlds, data_dir),
    )
    _tell(Console(soft_wrap=True, highlight=False), written)


def _finished(store: Path) -> list[StoredRun]:
    from hrl_policies.study.store import stored_runs

    runs = stored_runs(store)
    if not runs:
        raise ValueError(f"{store} holds no finished run; a run folder has a result.json")
    return runs


def _worlds_of(runs: list[StoredRun], wanted: bool, data_dir: Path | None) -> list[WorldPair]:
    from hrl_policies.study.outputs import worlds_of_runs

    if not wanted and data_dir is not None:
        raise ValueError("--data-dir goes with --worlds")
    return worlds_of_runs(runs, data_dir) if wanted else []


def _tell(console: Console, written: list[Path]) -> None:
    for path in written:
        console.print(str(path), markup=False)
