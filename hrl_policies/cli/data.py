"""``kuaifair data``: download, check and look at data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hrl_policies.cli.options import Progress
from kuaifair_env.data.sources import DatasetName

if TYPE_CHECKING:
    from kuaifair_env.data.dataset import InteractionData

data_app = typer.Typer(help="Download, check and look at data sets.", no_args_is_help=True)


@data_app.command()
def fetch(
    name: Annotated[DatasetName, typer.Argument(help="Data set.")],
    folder: Annotated[Path | None, typer.Option(help="Where the archive goes; the cache by default.")] = None,
    base_url: Annotated[str | None, typer.Option(help="A mirror's folder instead of the publisher's.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Expected SHA-256, instead of the publisher's MD5.")] = None,
    check_sum: Annotated[
        bool, typer.Option("--checksum/--no-checksum", help="Whether the checksum must be the known one.")
    ] = True,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed download is tried again.")] = 3,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without an answer that count as failed.")] = 60.0,
    progress: Progress = True,
) -> None:
    """Download an official archive, show its licence, and check it."""
    from kuaifair_env.data.official import fetch as download

    download(
        name,
        folder,
        base_url=base_url,
        sha256=sha256,
        check_sum=check_sum,
        retries=retries,
        timeout=timeout,
        progress=progress,
        announce=typer.echo,
    )


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="An official archive, or the folder that it unpacks to.")],
    name: Annotated[DatasetName | None, typer.Option(help="Which it is, when the path does not tell.")] = None,
) -> None:
    """Read an archive or folder as training would, and report what is in it."""
    from kuaifair_env.data.kuairand import read_kuairand
    from kuaifair_env.data.kuairec import read_kuairec
    from kuaifair_env.data.sources import recognise

    facts = recognise(path, name)
    with Console(stderr=True).status(f"reading {escape(str(path))}"):
        data = read_kuairec(path) if facts.name == "kuairec" else read_kuairand(path)
    Console().print(_report_table(data))


@data_app.command()
def info(
    data_dir: Annotated[Path | None, typer.Option(help="A folder to look in.")] = None,
) -> None:
    """Say which data sets are found where, what the cache holds, and the licences."""
    from kuaifair_env.data.cache import cache_dir
    from kuaifair_env.data.sources import DATASETS, find_source
    from kuaifair_env.errors import DataError

    sources = Table("data set", "found", "licence", title="official data")
    for facts in DATASETS.values():
        try:
            path = find_source(facts.name, data_dir)
            found = f"not found; kuaifair data fetch {facts.name}" if path is None else str(path)
        except DataError as error:
            found = str(error)
        sources.add_row(facts.title, escape(found), facts.licence)
    entries = _cache_table()
    console = Console()
    console.print(sources)
    console.print(f"cache: {escape(str(cache_dir()))}", soft_wrap=True)
    if entries.row_count:
        console.print(entries)
    for facts in DATASETS.values():
        console.print(f"cite {facts.title}: {facts.citation}", soft_wrap=True)


def _cache_table() -> Table:
    from kuaifair_env.data.cache import cached_entries, read_manifest
    from kuaifair_env.files import folder_size

    table = Table("entry", "data set", "origin", "hash", "MB", title="cached data sets")
    for entry in cached_entries():
        manifest = read_manifest(entry)
        provenance = manifest["provenance"]
        size = f"{folder_size(entry) / 1e6:,.1f}"
        cells = (entry.name, provenance["name"], provenance["origin"], manifest["data_hash"], size)
        table.add_row(*(escape(str(cell)) for cell in cells))
    return table


def _report_table(data: InteractionData) -> Table:
    table = Table("part", "what", "count", title=escape(f"{data.provenance.name} ({data.provenance.origin})"))
    table.columns[2].justify = "right"
    for part, what, count in _flat(data.report):
        table.add_row(part, what.replace("_", " "), f"{count:,}" if isinstance(count, int) else escape(str(count)))
    for which, log in (("train", data.train), ("test", data.test)):
        table.add_row(which, "click rate", f"{log.clicks.mean():.4f}")
    for file, digest in data.provenance.files.items():
        table.add_row("file", escape(file), f"SHA-256 {digest[:16]}...")
    table.add_row("data", "hash", data.data_hash)
    table.caption = escape(data.provenance.description)
    return table


def _flat(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, value in report.items():
        if isinstance(value, Mapping):
            for inner, count in value.items():
                yield name, inner, count
        else:
            yield "data", name, value
