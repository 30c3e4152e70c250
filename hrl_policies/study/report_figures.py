"""Pictures of a report: whole inside the file, with captions."""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path

PICTURES = {".svg": "image/svg+xml", ".png": "image/png"}
"""Kinds of pictures that a report can hold with their media types, the preferred one first."""

CAPTION = ".caption.txt"

_DESCRIPTION = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)


@dataclass(frozen=True)
class ReportFigure:
    """A picture of the report.

    Attributes:
        source: The whole picture as a ``data:`` URI.
        caption: What stands below it.
    """

    source: str
    caption: str

    @classmethod
    def of_file(cls, path: Path) -> ReportFigure:
        """Reads a picture.

        Its caption is the text of ``NAME.caption.txt`` beside it, or else its name and the description that is kept
        inside it, as :mod:`matplotlib` writes it.

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
            inside = _svg_description(content) if kind == ".svg" else _png_description(path)
            name = path.stem.replace("_", " ").replace("-", " ")
            caption = f"{name[:1].upper()}{name[1:]}. {inside}".removesuffix(". ")
        encoded = base64.b64encode(content).decode("ascii")
        return cls(f"data:{PICTURES[kind]};base64,{encoded}", caption)


def _svg_description(content: bytes) -> str:
    found = _DESCRIPTION.search(content.decode("utf-8", errors="replace"))
    return "" if found is None else html.unescape(found[1]).strip()


def _png_description(path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return str(picture.info.get("Description", "")).strip()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a PNG picture: {error}") from error
