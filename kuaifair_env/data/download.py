"""Downloads of files that may be large, from servers that may do anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from kuaifair_env.errors import DataError

MAX_SIZE = 200 * 10**9
"""Bytes at most of a file whose size is not known before."""

_CHUNK = 1 << 16
_PAUSE = 1.0
_MIN_RATE = 1_000.0
"""Bytes a second: a server that sends less for as long as the time-out counts as failed."""
_PARTIAL_CONTENT = 206
_RANGE_NOT_SATISFIABLE = 416


class _AttemptError(Exception):
    """An attempt failed, and the next one may not."""


def download(
    url: str, target: Path, *, size: int | None = None, retries: int = 3, timeout: float = 60.0, progress: bool = False
) -> None:
    """Downloads a file; an attempt that fails is tried again from where it stopped, if the server can do that.

    Args:
        url: Its address, ``http://`` or ``https://``.
        target: A name to write to, which nobody reads before this is done; after an error it may hold a part.
        size: Bytes that it must have; None takes any number up to :data:`MAX_SIZE`.
        retries: How often a failed attempt is tried again.
        timeout: Seconds without an answer, or with less than 1,000 bytes a second, after which an attempt has failed.
        progress: Whether a progress bar is shown on stderr.

    Raises:
        DataError: If the file cannot be had.
        OSError: If it cannot be written.
        ValueError: If the address is of another kind.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"an address begins with http:// or https://, got {url!r}")
    target.touch()
    for attempt in range(retries + 1):
        try:
            return _attempt(url, target, size, timeout, progress)
        except _AttemptError as error:
            if attempt == retries:
                raise DataError(
                    f"could not be downloaded in {retries + 1} attempt(s): {error}; try later, or download it with a "
                    "browser and set KUAIFAIR_DATA to its folder",
                    file=url,
                ) from error
        time.sleep(_PAUSE)


def _attempt(url: str, target: Path, size: int | None, timeout: float, progress: bool) -> None:
    from tqdm.auto import tqdm

    there = target.stat().st_size
    with _answer(url, there, timeout, target) as response:
        if response.status != _PARTIAL_CONTENT:
            there = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            raise _AttemptError("the server sent another part than was asked for")
        total = _total(url, response, there, size)
        with (
            target.open("ab" if there else "wb") as stream,
            tqdm(total=total, initial=there, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            for block in _blocks(response, timeout):
                there += len(block)
                if there > (MAX_SIZE if total is None else total):
                    raise DataError(f"the server sends more than {total or MAX_SIZE:,} bytes", file=url)
                stream.write(block)
                bar.update(len(block))
    if total is not None and there != total:
        raise _AttemptError(f"{there:,} bytes came instead of {total:,}")


def _answer(url: str, there: int, timeout: float, target: Path) -> HTTPResponse:
    """Asks for what is not there yet."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "kuaifair"}
    headers |= {"Range": f"bytes={there}-"} if there else {}
    try:
        response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code == _RANGE_NOT_SATISFIABLE:
            target.write_bytes(b"")
        raise _AttemptError(" ".join(str(error).split())) from error
    except (OSError, HTTPException) as error:
        raise _AttemptError(str(error) or type(error).__name__) from error
    return response


def _total(url: str, response: HTTPResponse, there: int, size: int | None) -> int | None:
    """Returns how many bytes the file must have, None if nobody says so.

    Raises:
        DataError: If what the server offers is not the file.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise DataError(f"the server sends it encoded as {encoding!r}, which was not asked for", file=url)
    announced = None if response.length is None else there + response.length
    if size is not None and announced not in (None, size):
        raise DataError(f"not the expected archive: it has {announced:,} bytes, not {size:,}", file=url)
    return announced if size is None else size


def _blocks(response: HTTPResponse, timeout: float) -> Iterator[bytes]:
    """Yields the content as it comes."""
    since, came = time.monotonic(), 0
    while True:
        try:
            block = response.read1(_CHUNK)
        except (OSError, HTTPException) as error:
            raise _AttemptError(str(error) or type(error).__name__) from error
        if not block:
            return
        yield block
        came += len(block)
        waited = time.monotonic() - since
        if waited > timeout:
            if came < _MIN_RATE * waited:
                raise _AttemptError(f"only {came:,} bytes came in {waited:.1f} s")
            since, came = time.monotonic(), 0
