"""Probe figures as an aligned table for the terminal."""

from __future__ import annotations

from dsrm.probes import RAW, Measure, ProbeReport

_ROWS = {
    "recovery_cosine": "recovery cosine to s* (+)",
    "recovery_mse": "recovery error (-)",
    "taste_r2": "true taste, R2 (+)",
    "auc": "AUC within users (+)",
    "top_click_rate": "click rate of top 10 (+)",
    "ndcg": "NDCG@10 (+)",
    "interest": "interest, accuracy (+)",
    "interest_f1": "interest, macro F1 (+)",
    "interest_purity": "interest among neighbours (+)",
    "interest_silhouette": "interest silhouette (+)",
    "popularity_r2": "popularity, R2 (-)",
    "popularity_knn_r2": "popularity, kNN R2 (-)",
    "popularity_r2_given_interest": "popularity given interest, R2 (-)",
    "level_r2": "long-run popularity, R2 (-)",
    "popularity_purity": "popularity among neighbours (-)",
    "popularity_silhouette": "popularity silhouette (-)",
    "effective_rank": "effective rank",
    "participation": "participation ratio",
    "raw_cosine": "cosine to the raw state",
    "raw_r2": "raw state explained, R2",
}


def report_table(report: ProbeReport) -> str:
    """Returns all measures, one column for each state; ``*`` marks a difference from raw whose interval excludes 0.

    Args:
        report: See :func:`dsrm.probes.probe`.
    """
    names = list(report.measures)
    rows = [["", *names]]
    for key, title in _ROWS.items():
        if key in report.measures[RAW]:
            raw = report.measures[RAW][key]
            rows.append([title, *(_cell(report.measures[name][key], raw) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    classes, majority = report.classes
    return "\n".join(
        [
            lines[0],
            "-" * len(lines[0]),
            *lines[1:],
            "",
            f"{report.users} held-out users, {report.kind} windows; [95 % bootstrap over users]; * differs from raw.",
            f"{classes} interests; always guessing the most frequent gives {majority:.3f}.",
        ]
    )


def _cell(measure: Measure, raw: Measure) -> str:
    low, high = measure.interval
    gain = measure.gain_over(raw)
    differs = gain.interval[0] > 0 or gain.interval[1] < 0
    return f"{measure.value:.3f} [{low:.3f}, {high:.3f}]{'*' if differs and measure is not raw else ' '}"
