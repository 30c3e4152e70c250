"""Downloads of files that may be large, from servers that may do anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from kuaifair_env.errors import DataError

MAX_SIZE = 200 * 10**9
"""Bytes at most of a file whose size is not known before."""

_CHUNK = 1 << 16
_PAUSE = 1.0
_MIN_RATE = 1_000.0
"""Bytes a second: a server that sends less for as long as the time-out counts as failed."""
_PARTIAL_CONTENT = 206
_RANGE_NOT_SATISFIABLE = 416
_FAILURES = (ArithmeticError, HTTPException, OSError, ValueError)
"""What Python's client raises over answers that are none, or break off."""


class _AttemptError(Exception):
    """An attempt failed, and the next one may not."""

    @classmethod
    def over(cls, error: Exception) -> _AttemptError:
        """Returns what another error says, in one line without control characters: a server may have written it."""
        said = " ".join(str(error).split())[:200]
        return cls("".join(letter for letter in said if letter.isprintable()) or type(error).__name__)


class _Redirections(HTTPRedirectHandler):
    """Follows redirections within HTTP, without reading what comes with them, which need not end."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


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
    _check_address(url)
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


def _check_address(url: str) -> None:
    """Refuses what is no address of HTTP.

    Raises:
        ValueError: If it is not.
    """
    try:
        address = urlsplit(url)
        valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # of a port or a host
        valid = False
    if not (valid and url.isascii() and url.isprintable() and " " not in url):
        raise ValueError(f"an address begins with http:// or https:// and is of ASCII without blanks, got {url!r}")


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
        response: HTTPResponse = build_opener(_Redirections).open(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code == _RANGE_NOT_SATISFIABLE:
            target.write_bytes(b"")
        raise _AttemptError.over(error) from error
    except _FAILURES as error:
        raise _AttemptError.over(error) from error
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
        except _FAILURES as error:
            raise _AttemptError.over(error) from error
        if not block:
            return
        yield block
        came += len(block)
        waited = time.monotonic() - since
        if waited > timeout:
            if came < _MIN_RATE * waited:
                raise _AttemptError(f"only {came:,} bytes came in {waited:.1f} s")
            since, came = time.monotonic(), 0
