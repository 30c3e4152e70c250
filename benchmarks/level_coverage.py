"""Why intervals of users' levels come out narrow, and what widens them; writes a section of preferences.md.

    python benchmarks/level_coverage.py KuaiFair-KuaiRandTwin-v0 --results docs/results

Sessions of users whom the fitted normal (``gaussian``) was not trained on are drawn twice from the same seeds: with the
evidence that agents use, the mode of everything shown, and with Gaussian sites that match moments instead
(:meth:`dsrm.own_level.OwnLevel.match_moments`), which costs several times as much. Agents use the mode, and levels that
are widened by a fitted share of what answers say (:attr:`dsrm.preference.LevelPrior.widening`).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor
from worlds import argument_parser, cell, open_worlds, write_section

from dsrm.own_level import OwnLevel
from dsrm.preference import PreferenceModel
from dsrm.preference_mixture import MixturePreference
from dsrm.preference_sessions import PreferenceSessions
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.statistics import student_interval
from hrl_policies.study.store import machine
from kuaifair_env.intervals import rate_interval

SEEDS, ROWS = range(8), 8_192
INSIDE = float(norm.ppf(0.9))
"""Half the width of an 80 % interval, in standard deviations."""


class MatchedLevel(OwnLevel):
    """The own level with the means and covariances that its posterior has, not those at its mode."""

    def update(self, base: Tensor) -> None:
        super().update(base)
        self.match_moments(base)


def coverages(
    source: PreferenceSessions, model: PreferenceModel, level: type[OwnLevel], seed: int
) -> NDArray[np.float64]:
    """Returns for repeats allowed and forbidden: coverage of ``b`` and ``w``, and deviation of misses of ``b``."""
    rng = np.random.default_rng([seed, 37])
    with patch("dsrm.preference_sessions.OwnLevel", level):
        batches = source.known(rng.choice(source.split()[1], ROWS), rng)
    rows = []
    for batch in batches:
        means, deviations = model.moments(batch.evidence)
        misses = ((batch.preferences - means) / deviations).numpy()
        inside = np.abs(misses) < INSIDE
        rows.append((inside[:, 0].mean(), inside[:, 1:].mean(), misses[:, 0].std()))
    return np.asarray([np.mean(rows[::2], axis=0), np.mean(rows[1::2], axis=0)])


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    source = PreferenceSessions(pair.train, pair.scorer)
    plain = MixturePreference(replace(source.level, widening=0.0), source.normal.taste)
    lines = []
    for name, model, level in (
        ("at the mode", plain, OwnLevel),
        ("at the mode, widened (what agents use)", source.normal, OwnLevel),
        ("moments matched", plain, MatchedLevel),
    ):
        found = np.stack([coverages(source, model, level, seed) for seed in SEEDS])
        for column, repeats in enumerate(("allowed", "forbidden")):
            level_share, taste_share, misses = found[:, column].T
            intervals = [rate_interval(share[:, None]) for share in (level_share, taste_share)]
            cells = " | ".join(cell(interval, decimals=3) for interval in (*intervals, student_interval(misses)))
            lines.append(f"| {name} | {repeats} | {cells} |")
    page = [
        f"# How often 80 % intervals hold, by how evidence is summed up: {pair.name}",
        "",
        "| evidence | repeats | level b | components of taste w | deviation of misses of b, in its own |",
        "|---|---|---:|---:|---:|",
        *lines,
        "",
        "Sessions like those of training, users whom the fitted normal (`gaussian`) was not trained on; "
        f"{len(SEEDS)} seeds of {ROWS:,} moments each; brackets: 95 % intervals over them. At the mode, offsets of "
        "single items stand at theirs too, as if the answers had been given at these log-odds. "
        f"Widening fitted in this world: {source.level.widening:.2f}.",
        "",
        f"Made by: `python benchmarks/level_coverage.py {arguments.world}` ({machine()}).",
    ]
    write_section(arguments.results, "preferences.md", "\n".join(page))


if __name__ == "__main__":
    main()
