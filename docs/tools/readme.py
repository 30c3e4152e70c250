"""Fills what README.md and the summary of results take from elsewhere: tables of figures, and the repository's address.

    python docs/tools/readme.py

The tables are made of docs/results/claims_kuairand.csv.gz and baselines_kuairand.csv.gz (frozen), and of the pages
serving_kuairand_allow.md and serving_kuairand_forbid.md beside them (serving); differences are those of the pages. The
address is ``Repository`` of pyproject.toml: change it there, then run this.
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
RESULTS = ROOT / "docs" / "results"
FROZEN, BASELINES, SERVING = (
    RESULTS / f"{name}_kuairand.csv.gz" for name in ("claims", "baselines", "preference_services")
)
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
"""Rows of the frozen table of :data:`FROZEN`, by method."""
OTHERS = {
    "sac4ir": "SAC4IR",
    "a2c": "A2C",
    "bcq": "BCQ",
    "dnair": "DNaIR",
    "td3": "TD3",
    "dorl": "DORL",
    "flat": "FLAT: one level on purified states",
    "mofir": "MOFIR",
}
"""Rows after these, of :data:`BASELINES`."""
SERVED = {
    "Oracle": "Oracle",
    "QualityOracle": "QualityOracle",
    "DSRM-HRL": "**DSRM-HRL**",
    "BeliefQuota, items by features": "its rule without networks",
    "BeliefQuota": "BeliefQuota",
    "ItemQuota": "ItemQuota",
    "SessionQuota": "SessionQuota",
    "HRL": "HRL, learning by gradient (one training seed)",
    "QuotaGreedy": "QuotaGreedy",
    "A2C + fairness": "A2C with a fairness reward, learning by gradient (one training seed)",
}
"""Rows of the serving table, by what the pages of services call them."""
REPEATS = ("allow", "forbid")
Service = tuple[str, str, int]

WORLD = "partial KuaiRand-Pure"
WEIGHED: Service = ("log weighed", "log at its word", 1)
PARTS = (
    ("training", "BeliefQuota, items by features", None),
    ("the manager: half popular, half not in every slate", "DSRM-HRL, constant z", None),
    ("the belief: HRL on observed states in its place", "HRL", None),
    (
        "item features, and scales fitted to the log",
        None,
        ("closed form, fitted scales, item features", "closed form", 1),
    ),
    ("weighing what the log says of items", None, WEIGHED),
    ("memory of the user's session", None, ("none", "closed form", -1)),
    ("the closed form: diffusion in its place", None, ("diffusion", "closed form", -1)),
)
"""What is taken away; the method that is left, on the page of claims; or row, column and sign on that of services, or
:data:`WEIGHED`."""

_BLOCK = re.compile(r"(<!-- results:[^\n]*-->\n).*?(<!-- /results -->)", re.DOTALL)
_PARTS_BLOCK = re.compile(r"(<!-- parts:[^\n]*-->\n).*?(<!-- /parts -->)", re.DOTALL)
_INTERVAL = re.compile(r"[+-]\d+\.\d+")
_ADDRESS = re.compile(r"https?://\S+?(?=/(?:blob|tree|raw)/main/| kuaifair && cd)")

Figures = dict[tuple[str, str], list[float]]


def results() -> str:
    """Returns both tables."""
    lines = [
        "| partial KuaiRand-Pure, frozen | seeds | R_cum, repeats allowed | violation rate | R_cum, repeats forbidden "
        "| violation rate |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [*_frozen_rows(FROZEN, METHODS), *_frozen_rows(BASELINES, OTHERS)]
    lines += [
        "",
        "| partial KuaiRand-Pure, serving 1,000 users | orders | R_cum, repeats allowed | R_cum, repeats forbidden |",
        "|---|---:|---:|---:|",
    ]
    for agent, title in SERVED.items():
        found = [_served(agent, repeats) for repeats in REPEATS]
        orders = ", ".join(dict.fromkeys(count for count, _ in found if count))
        lines.append(f"| {title} | {orders} | {' | '.join(cell for _, cell in found)} |")
    return "\n".join(lines)


def _served(agent: str, repeats: str) -> tuple[str, str]:
    """Returns the number of orders and R_cum of an agent that serves; both empty where it was not run."""
    rows = _rows(RESULTS / f"serving_kuairand_{repeats}.md", "### Serving")
    row = next((row for row in rows if row["agent"].removesuffix(" †") == agent), None)
    if row is None:
        return "", ""
    estimate, *interval = map(float, re.findall(r"\d+\.\d+", row["R_cum, all sessions"]))
    return row["orders"], f"{estimate:.2f}" + (f" ± {(interval[1] - interval[0]) / 2:.2f}" if interval else "")


def _frozen_rows(path: Path, methods: dict[str, str]) -> list[str]:
    """Returns the rows of some methods in the frozen table."""
    figures: dict[str, Figures] = defaultdict(lambda: defaultdict(list))
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            for name in ("r_cum", "violation_rate"):
                figures[name][line["method"], line["repeats"]].append(float(line[name]))
    rows = []
    for name, title in methods.items():
        keys = [(name, repeats) for repeats in REPEATS]
        seeds = ", ".join(dict.fromkeys(str(len(figures["r_cum"][key])) for key in keys))
        cells = [
            f"{_cell(figures['r_cum'][key])} | {statistics.fmean(figures['violation_rate'][key]):.2f}" for key in keys
        ]
        rows.append(f"| {title} | {seeds} | {' | '.join(cells)} |")
    return rows


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
    """Returns what each part contributes, R_cum with it less R_cum without it: a table for each protocol."""
    lines = []
    for protocol in ("frozen", "serving"):
        lines += ["", f"| {protocol}, taken away | repeats allowed | repeats forbidden |", "|---|---:|---:|"]
        for title, left, service in PARTS:
            cells = [_part(protocol, left, service, repeats) for repeats in REPEATS]
            if any(cells):
                lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def _part(protocol: str, left: str | None, service: Service | None, repeats: str) -> str:
    if protocol == "frozen":
        return _frozen_part(left, service, repeats)
    return "" if service is None else _served_part(service, repeats)


def _frozen_part(left: str | None, service: Service | None, repeats: str) -> str:
    if left is not None:
        rows = _rows(_page_of(FROZEN), "### DSRM-HRL minus each other method")
        return next(
            (row["R_cum: difference"] for row in rows if (row["method"], row["repeats"]) == (left, repeats)), ""
        )
    return "" if service is None or service == WEIGHED else _of_services(service, repeats, "frozen")


def _served_part(service: Service, repeats: str) -> str:
    if service != WEIGHED:
        return _of_services(service, repeats, "serving")
    rows = _rows(RESULTS / "log_trust.md", "## Serving in other worlds")
    return next(row["difference"] for row in rows if (row["world"], row["repeats"]) == (WORLD, repeats))


def _of_services(service: Service, repeats: str, protocol: str) -> str:
    name, column, sign = service
    rows = _rows(_page_of(SERVING), f"## Repeats {repeats}, {protocol}")
    return _signed(next(row[f"minus {column}"] for row in rows if row["users' own part"] == name), sign)


def _page_of(records: Path) -> Path:
    return records.with_name(records.name.replace(".csv.gz", ".md"))


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
