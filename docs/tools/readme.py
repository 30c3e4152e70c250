"""Fills what README.md and the summary of results take from elsewhere: tables of figures, and the repository's address.

    python docs/tools/readme.py

The tables are made of docs/results/claims_kuairand.csv.gz (frozen) and preference_services_kuairand.csv.gz beside
it (serving); differences are those of the pages beside the records. The address is ``Repository`` of pyproject.toml:
change it there, then run this.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

from repository import ROOT, address
from scipy.special import stdtrit

README, SUMMARY = ROOT / "README.md", ROOT / "docs" / "results" / "summary.md"
FROZEN, SERVING = (ROOT / "docs" / "results" / f"{name}_kuairand.csv.gz" for name in ("claims", "preference_services"))
METHODS = {
    "oracle": "Oracle (knows each user)",
    "quality-oracle": "QualityOracle (knows each item, and no user)",
    "dsrm-hrl": "**DSRM-HRL**",
    "belief-quota": "BeliefQuota (a belief in closed form, nothing trained)",
    "session-quota": "SessionQuota (counts a session's clicks, nothing trained)",
    "session-quota-features": "SessionQuota with DSRM-HRL's view of items",
    "hrl": "HRL: two levels on observed states",
    "item-quota": "ItemQuota (a number for each item)",
    "quota-greedy": "QuotaGreedy (half popular, half not, by predicted clicks)",
    "a2c+fair": "A2C with a fairness reward",
}
"""Rows of the frozen table, by method."""
SERVED = {
    "closed form, fitted scales, item features": "**DSRM-HRL**, networks at their start",
    "closed form": "BeliefQuota",
}
"""Rows of the serving table, by what the benchmark calls them."""
REPEATS = ("allow", "forbid")
PARTS = (
    ("training", "BeliefQuota, items by features", None),
    ("the manager: half popular, half not in every slate", "DSRM-HRL, constant z", None),
    ("the belief: HRL on observed states in its place", "HRL", None),
    (
        "item features, and scales fitted to the log",
        None,
        ("closed form, fitted scales, item features", "closed form", 1),
    ),
    ("memory of the user's session", None, ("none", "closed form", -1)),
    ("the closed form: diffusion in its place", None, ("diffusion", "closed form", -1)),
)
"""What is taken away; the method that is left, on the page of claims; or row, column and sign on that of services."""

_BLOCK = re.compile(r"(<!-- results:[^\n]*-->\n).*?(<!-- /results -->)", re.DOTALL)
_PARTS_BLOCK = re.compile(r"(<!-- parts:[^\n]*-->\n).*?(<!-- /parts -->)", re.DOTALL)
_INTERVAL = re.compile(r"[+-]\d+\.\d+")
_ADDRESS = re.compile(r"https?://\S+?(?=/(?:blob|tree|raw)/main/| kuaifair && cd)")

Figures = dict[tuple[str, str], list[float]]


def results() -> str:
    """Returns both tables."""
    frozen = _figures(FROZEN, "method", {})
    served = _figures(SERVING, "row", {"regime": "serving"})
    lines = [
        "| partial KuaiRand-Pure, frozen | seeds | R_cum, repeats allowed | repeats forbidden | violation rate |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, title in METHODS.items():
        cells = [_cell(frozen["r_cum"].get((name, repeats), [])) for repeats in REPEATS]
        violations = statistics.fmean(frozen["violation_rate"][name, "allow"])
        counts = [len(frozen["r_cum"].get((name, repeats), ())) for repeats in REPEATS]
        seeds = ", ".join(dict.fromkeys(str(count) for count in counts if count))
        lines.append(f"| {title} | {seeds} | {' | '.join(cells)} | {violations:.2f} |")
    lines += [
        "",
        "| partial KuaiRand-Pure, serving 1,000 users | orders | R_cum, repeats allowed | repeats forbidden |",
        "|---|---:|---:|---:|",
    ]
    for name, title in SERVED.items():
        cells = [_cell(served["r_cum"][name, repeats]) for repeats in REPEATS]
        lines.append(f"| {title} | {len(served['r_cum'][name, 'allow'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(path: Path, row: str, wanted: dict[str, str]) -> dict[str, Figures]:
    """Returns figures of a table by column, then by row and repeats; one for each seed or order."""
    figures: dict[str, Figures] = defaultdict(lambda: defaultdict(list))
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            if all(line[name] == value for name, value in wanted.items()):
                for name in ("r_cum", "violation_rate"):
                    figures[name][line[row], line["repeats"]].append(float(line[name]))
    return figures


def _cell(values: list[float]) -> str:
    """Returns a mean with half of its 95 % Student interval, where there is more than one value and they differ."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) < 2 or max(values) - min(values) < 1e-9:
        return f"{mean:.2f}"
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} ± {half:.2f}"


def parts() -> str:
    """Returns what each part contributes: R_cum with it less R_cum without it."""
    claims, services = (path.with_name(path.name.replace(".csv.gz", ".md")) for path in (FROZEN, SERVING))
    differences = _rows(claims, "### DSRM-HRL minus each other method")
    lines = [
        "| what is taken away | frozen, repeats allowed | forbidden | serving, repeats allowed | forbidden |",
        "|---|---:|---:|---:|---:|",
    ]
    for title, left, service in PARTS:
        cells = []
        for protocol in ("frozen", "serving"):
            for repeats in REPEATS:
                found = ""
                if left is not None and protocol == "frozen":
                    rows = [row for row in differences if (row["method"], row["repeats"]) == (left, repeats)]
                    found = rows[0]["R_cum: difference"] if rows else ""
                elif service is not None:
                    name, column, sign = service
                    rows = _rows(services, f"## Repeats {repeats}, {protocol}")
                    row = next(row for row in rows if row["users' own part"] == name)
                    found = _signed(row[f"minus {column}"], sign)
                cells.append(found)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(page: Path, heading: str) -> list[dict[str, str]]:
    """Returns the rows of the first table under a heading, or one that begins so, without bold."""
    text = page.read_text(encoding="utf-8").partition(heading)[2].replace("**", "")
    lines = [line for line in text.partition("\n#")[0].splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def _signed(difference: str, sign: int) -> str:
    """Returns a difference with its interval, or the opposite one."""
    if sign > 0:
        return difference
    estimate, low, high = (-float(number) for number in _INTERVAL.findall(difference))
    return f"{estimate:+.2f} [{high:+.2f}, {low:+.2f}]".replace("-0.00", "+0.00")


def filled(page: str) -> str:
    """Returns a page with the tables as they are now, and links to where the repository is now."""
    tables = results()
    page = _BLOCK.sub(lambda match: f"{match.group(1)}{tables}\n\n{match.group(2)}", page)
    page = _PARTS_BLOCK.sub(lambda match: f"{match.group(1)}{parts()}\n\n{match.group(2)}", page)
    return _ADDRESS.sub(address(), page)


if __name__ == "__main__":
    for path in (README, SUMMARY):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
