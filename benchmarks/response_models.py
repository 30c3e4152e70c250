"""How much personal taste can be modelled in a test world: ablations of the factor model on partial KuaiRand-Pure.

    python benchmarks/response_models.py DATA

Every line is fitted on the same rows of the random log and evaluated on the same fifth of it that no fit has seen:
within-user AUC with a 95 % bootstrap interval over users, its paired gain over item quality alone, AUC, log loss,
expected calibration error, the slope of the personal part (1 where taste is neither overstated nor understated), and
the personal part's standard deviation and share of the logit's variance.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
from partial_data import partial_kuairand
from rich.console import Console
from rich.table import Table

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Users
from kuaifair_env.response import (
    FactorisedConfig,
    FactorisedResponse,
    NegativeSampling,
    SplitConfig,
    fit_factorised,
)
from kuaifair_env.response.calibration import assess, within_user_auc
from kuaifair_env.response.factorised_fit import shrunken_item_rate
from kuaifair_env.response.rows import LabelledRows, labelled_rows

SPLIT = SplitConfig(report=0.2)


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    data: InteractionData
    context: InteractionLog | None
    config: FactorisedConfig


def variants(data: InteractionData, seed: int) -> list[Variant]:
    """Returns what is compared, from nothing personal to everything."""
    bare = replace(
        data,
        users=Users(data.users.ids, FeatureTable.empty(len(data.users))),
        items=Catalogue(data.items.ids, FeatureTable.empty(len(data.items)), np.zeros((len(data.items), 0), np.bool_)),
    )
    others = np.random.default_rng(seed).permutation(len(data.users))
    log = data.train
    foreign = InteractionLog.sorted(others[log.users], log.items, log.clicks, log.times)
    full = FactorisedConfig(split=SPLIT)
    plain = replace(full, factor_precision=5.0, learning_rate=5e-3, patience=8)
    return [
        Variant("user and item bias", bare, None, replace(full, rank=0)),
        Variant("+ all inputs, no taste", data, log, replace(full, rank=0)),
        Variant("plain factor model", bare, None, plain),
        Variant("features and tags, no history", data, None, full),
        Variant("another user's history", data, foreign, full),
        Variant("own history, no user ids", data, log, replace(full, user_ids=False)),
        Variant("own history, no user features", replace(data, users=bare.users), log, full),
        Variant("default", data, log, full),
    ]


def evaluated(model: FactorisedResponse, rows: LabelledRows, quality: np.ndarray) -> list[str]:
    """Returns the cells of one line."""
    held = rows.where("report")
    users, items, clicks = rows.users[held], rows.items[held], rows.clicks[held]
    expected = model.expected(users, items[:, None])[:, 0]
    found = assess(users, clicks, expected)
    within = within_user_auc(users, clicks, expected)
    gain, (low, high) = within.gain_over(within_user_auc(users, clicks, quality))
    slope, spread = model.describe()["slopes"]["personal"], model.describe()["spread"]
    taste = spread["personal"] > 0
    return [
        "{:.4f} [{:.4f}, {:.4f}]".format(within.mean, *within.interval()),
        f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]",
        f"{found['auc']:.4f}",
        f"{found['log_loss']:.4f}",
        f"{found['expected_calibration_error']:.4f}",
        f"{slope['slope']:.2f} ± {slope['error']:.2f}" if taste else "-",
        f"{spread['personal']:.2f} ({spread['personal_share']:.1%})" if taste else "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the partial data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = partial_kuairand(arguments.folder)
    rows = labelled_rows(data.test, len(data.items), SPLIT, NegativeSampling(), arguments.seed)
    held = rows.where("report")
    quality = shrunken_item_rate(rows, len(data.items))[rows.items[held]]
    table = Table("model", "within-user AUC", "gain over quality", "AUC", "log loss", "ECE", "slope", "taste (share)")
    alone = assess(rows.users[held], rows.clicks[held], quality)
    table.add_row(
        "item quality alone",
        "{:.4f} [{:.4f}, {:.4f}]".format(alone["within_user_auc"], *alone["within_user_auc_interval"]),
        "-",
        *(f"{alone[name]:.4f}" for name in ("auc", "log_loss", "expected_calibration_error")),
        "-",
        "-",
    )
    console = Console(width=150)
    for variant in variants(data, arguments.seed):
        console.print(f"fitting: {variant.name}")
        model = fit_factorised(
            data.test, variant.data, context_log=variant.context, config=variant.config, seed=arguments.seed
        )
        table.add_row(variant.name, *evaluated(model, rows, quality))
    console.print(table)


if __name__ == "__main__":
    main()
