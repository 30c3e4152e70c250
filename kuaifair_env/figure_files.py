"""Figures on disk: PNG, SVG or PDF, equal bytes for equal figures, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuaifair_env.data.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150

# What the writers would add: the library's name and version, and the time.
_NOTHING: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Creator": None, "Date": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
_ABOUT = {"png": "Description", "svg": "Description", "pdf": "Subject"}
_SETTINGS: dict[Any, Any] = {"svg.hashsalt": "kuaifair", "pdf.fonttype": 42}


def save_figure(figure: Figure, path: str | Path, about: str = "") -> None:
    """Writes a figure atomically, in the format that the file's ending names.

    Args:
        figure: The figure.
        path: A name that ends in ``.png``, ``.svg`` or ``.pdf``.
        about: What the figure is made from, such as the data's origin and hash; kept inside the file.

    Raises:
        ValueError: If the ending is another.
    """
    import matplotlib

    form = Path(path).suffix.removeprefix(".").lower()
    if form not in _NOTHING:
        raise ValueError(f"a figure ends in .png, .svg or .pdf, but {Path(path).name!r} does not")
    with atomic_path(path) as temporary, matplotlib.rc_context(_SETTINGS):
        figure.savefig(
            temporary, format=form, dpi=DPI, metadata=_NOTHING[form] | {_ABOUT[form]: about or None}
        )
