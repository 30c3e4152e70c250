"""Fills what README.md takes from elsewhere: the table of results, and the repository's address in all of its links.

    python docs/tools/readme.py

The table holds some rows of docs/results/summary.md. The address is ``Repository`` of pyproject.toml: change it there,
then run this.
"""

from __future__ import annotations

import re

from repository import ROOT, address, address_of

README, SUMMARY = ROOT / "README.md", ROOT / "docs" / "results" / "summary.md"
ROWS = (
    "Oracle",
    "**DSRM-HRL**",
    "SessionQuota",
    "HRL:",
    "A2C + fairness",
    "**QuotaGreedy**",
    "DORL",
    "A2C |",
    "BCQ |",
    "TD3",
    "Random",
)
"""How the rows begin that the README shows."""

_BLOCK = re.compile(r"(<!-- results:[^\n]*-->\n).*?(<!-- /results -->)", re.DOTALL)
_ADDRESS = re.compile(r"https?://\S+?(?=/(?:blob|tree|raw)/main/| kuaifair && cd)")
_RELATIVE = re.compile(r"\]\((?!https?:)([^)]+)\)")


def results(summary: str) -> str:
    """Returns what the summary of results says its table is about, and some of the table's rows."""
    about, table = re.search(r"^# .*?\n\n(.*?)\n\n((?:\|.*\n)+)", summary, re.DOTALL).groups()  # type: ignore[union-attr]
    head, dashes, *rows = table.splitlines()
    shown = [next(row for row in rows if row.startswith(f"| {wanted}")) for wanted in ROWS]
    block = "\n".join([about, "", head, dashes, *shown])
    return _RELATIVE.sub(lambda match: f"]({address_of((SUMMARY.parent / match.group(1)).resolve())})", block)


def filled(readme: str) -> str:
    """Returns the README with the table as it is now, and links to where the repository is now."""
    table = results(SUMMARY.read_text(encoding="utf-8"))
    readme = _BLOCK.sub(lambda match: f"{match.group(1)}{table}\n\n{match.group(2)}", readme)
    return _ADDRESS.sub(address(), readme)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
