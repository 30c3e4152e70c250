"""Fills what README.md and the summary of results take from elsewhere: tables of figures, and the repository's address.

    python docs/tools/readme.py

The tables are made of docs/results/claims_kuairand.csv.gz (frozen) and preference_services_kuairand.csv.gz beside
it (serving). The address is ``Repository`` of pyproject.toml: change it there, then run this.
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

_BLOCK = re.compile(r"(<!-- results:[^\n]*-->\n).*?(<!-- /results -->)", re.DOTALL)
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


def filled(page: str) -> str:
    """Returns a page with the tables as they are now, and links to where the repository is now."""
    tables = results()
    page = _BLOCK.sub(lambda match: f"{match.group(1)}{tables}\n\n{match.group(2)}", page)
    return _ADDRESS.sub(address(), page)


if __name__ == "__main__":
    for path in (README, SUMMARY):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
