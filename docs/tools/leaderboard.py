"""Writes docs/leaderboard.md from the submitted results in docs/leaderboard/*.json.

    python docs/tools/leaderboard.py

A file is one of ``kuaifair study submit``. Its texts come from strangers: here they are escaped.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict

from repository import ROOT

from hrl_policies.study.labels import ORIGINS, PRIVILEGED_NOTE, session_title, world_title
from hrl_policies.study.submission import Figure, SubmittedResult, read_submission

FOLDER, PAGE = ROOT / "docs" / "leaderboard", ROOT / "docs" / "leaderboard.md"

INTRODUCTION = """\
# Leaderboard

Made by `python docs/tools/leaderboard.py` from the files in `docs/leaderboard`; how to add one: [Publish your method's
number](how-to/publish.md). Rows of a table were evaluated in the same test world, on the same users with the same
random numbers. *Frozen* agents learn nothing while they are evaluated, *serving* ones may; the two never share a table.
Means over training seeds, or over orders of the users, ± half of Student's 95 % interval, rates with Wilson's; without
one there is one seed, or all agree. More R_cum and Len is better, less violation rate.
"""


def page() -> str:
    """Returns the page."""
    groups: dict[tuple[str, ...], list[tuple[SubmittedResult, str, str]]] = defaultdict(list)
    for path in sorted(FOLDER.glob("*.json")):
        submission = read_submission(path)
        for result in submission.results:
            groups[_group(result)].append((result, path.name, submission.link))
    return "\n".join([INTRODUCTION, *(_table(groups[key]) for key in sorted(groups))])


def _group(result: SubmittedResult) -> tuple[str, ...]:
    """Returns what rows of a table have in common; protocols first."""
    return (
        result.protocol,
        result.world,
        session_title(result.max_len, result.repeats),
        result.conditions,
        result.fingerprint,
        result.evaluation_hash,
        str(result.sessions),
    )


def _table(rows: list[tuple[SubmittedResult, str, str]]) -> str:
    first = rows[0][0]
    which = f", {first.conditions}" if first.conditions else ""
    units = "orders" if first.orders else "seeds"
    title = f"{first.protocol.capitalize()}: {world_title(first.world, first.origin)}"
    lines = [
        f"## {_escaped(f'{title}, {session_title(first.max_len, first.repeats)}{which}')}\n",
        f"| method | R_cum | Len | violation rate | {units} | steps | submission |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for result, name, link in sorted(rows, key=lambda row: -sum(row[0].r_cum) / len(row[0].r_cum)):
        figures = [_cell(result, "r_cum", 2), _cell(result, "len", 2), _cell(result, "violation_rate", 3)]
        source = f"[{name}](leaderboard/{name})" + (f", [code]({link})" if link else "")
        cells = [_escaped(result.title), *figures, str(len(result.seeds)), f"{result.steps:,}", source]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"Data: {first.data} ({ORIGINS[first.origin]}), hash {first.data_hash}; fingerprint of the test world "
        f"{first.fingerprint}; {first.users:,} users, {first.sessions:,} sessions; evaluation {first.evaluation_hash}."
    )
    privileged = f" {PRIVILEGED_NOTE}" if any("†" in result.title for result, _, _ in rows) else ""
    return "\n".join([*lines, "", _escaped(note) + privileged, ""])


def _cell(result: SubmittedResult, name: Figure, digits: int) -> str:
    figures, interval = result.figures(name), result.interval(name)
    mean = f"{sum(figures) / len(figures):.{digits}f}"
    if interval is None:
        return mean
    if name == "violation_rate":
        return f"{mean} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return f"{mean} ± {interval.half_width:.{digits}f}"


def _escaped(text: str) -> str:
    """Returns text that Markdown shows as it stands."""
    return re.sub(r"([\\`*_\[\]|#~{}!])", r"\\\1", html.escape(text, quote=False))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
