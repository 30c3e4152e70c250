"""Downloads the official archives and checks them before they get their name."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pooch

from kuaifair_env.data.sources import OfficialDataset, dataset, download_folder, open_source
from kuaifair_env.errors import DataError
from kuaifair_env.files import file_hash, remove_stale, write_text_atomically

_CHUNK = 1 << 18


def fetch(
    name: str,
    folder: str | Path | None = None,
    *,
    base_url: str | None = None,
    sha256: str | None = None,
    check_sum: bool = True,
    retries: int = 3,
    timeout: float = 60.0,
    progress: bool = True,
    announce: Callable[[str], None] = print,
) -> Path:
    """Downloads an official archive, unless a whole one is there already.

    The archive is downloaded beside its place, checked (checksum, then whether it opens and has the files a
    reader needs), and only then given its name. The checksum is the publisher's MD5 (the Zenodo record's), or
    ``sha256`` when given. A note ``<archive>.json`` records address, date, size and SHA-256.

    Args:
        name: ``"kuairec"`` or ``"kuairand"``.
        folder: Where the archive goes; None is the cache's download folder, where the readers look.
        base_url: Address of a folder that holds the archive, for mirrors; None is the publisher's.
        sha256: SHA-256 that the archive must have, instead of the publisher's MD5.
        check_sum: False accepts an archive of another version, checked for its files alone.
        retries: How often a failed download is tried again.
        timeout: Seconds without an answer after which an attempt has failed.
        progress: Whether a progress bar is shown on stderr.
        announce: Shows licence, citation and results to the user.

    Returns:
        The archive.

    Raises:
        DataError: When the archive cannot be had, or is not the right one; nothing is left behind then.
    """
    facts = dataset(name)
    expected = _expected_hash(facts, sha256, check_sum)
    target = (download_folder() if folder is None else Path(folder).expanduser()) / facts.archive
    announce(f"{facts.title}: licence {facts.licence}\nPlease cite: {facts.citation}")
    if target.exists():
        if _is_whole(target, facts, expected):
            announce(f"{target} is there already and whole")
            return target
        announce(f"{target} is not whole or another version; it is downloaded again")
    url = f"{(base_url or facts.url).rstrip('/')}/{facts.archive}"
    announce(f"downloading {url} ({facts.size / 1e6:.0f} MB)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent, f".{facts.archive}-")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{facts.archive}-") as temporary:
            arrived = _download(url, Path(temporary), facts, expected, retries, timeout, progress)
            open_source(arrived, facts).require(facts.files)
            digest = file_hash(arrived)
            os.replace(arrived, target)
    except OSError as error:
        raise DataError(f"cannot be written: {error}", file=target) from error
    note = {
        "url": url,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "size": target.stat().st_size,
        "sha256": digest,
        "checked_against": expected or "nothing but its files",
    }
    write_text_atomically(target.with_name(f"{facts.archive}.json"), json.dumps(note, indent=1) + "\n")
    announce(f"{target}: {target.stat().st_size:,} bytes, SHA-256 {digest}")
    return target


def _expected_hash(facts: OfficialDataset, sha256: str | None, check_sum: bool) -> str | None:
    if sha256 is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise DataError(f"a SHA-256 has 64 hexadecimal digits, got {sha256!r}")
        return f"sha256:{sha256.lower()}"
    return f"md5:{facts.md5}" if check_sum else None


def _is_whole(archive: Path, facts: OfficialDataset, expected: str | None) -> bool:
    if expected is not None:
        algorithm, digest = expected.split(":")
        return file_hash(archive, algorithm) == digest
    try:
        open_source(archive, facts).require(facts.files)
    except DataError:
        return False
    return True


def _download(
    url: str,
    folder: Path,
    facts: OfficialDataset,
    expected: str | None,
    retries: int,
    timeout: float,
    progress: bool,
) -> Path:
    from requests.exceptions import RequestException

    source = pooch.create(
        path=folder,
        base_url=url.removesuffix(facts.archive),
        registry={facts.archive: expected},
        retry_if_failed=retries,
    )
    downloader = pooch.HTTPDownloader(progressbar=progress, chunk_size=_CHUNK, timeout=timeout)
    try:
        return Path(source.fetch(facts.archive, downloader=downloader))
    except RequestException as error:
        raise DataError(
            f"{url} could not be downloaded in {retries + 1} attempt(s): {error}; try later, or download "
            "it with a browser and set KUAIFAIR_DATA to its folder"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{url} is not the expected archive: {error}; if the publisher has a new version, look at it "
            "and pass its SHA-256"
        ) from error
