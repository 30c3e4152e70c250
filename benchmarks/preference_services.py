"""R_cum of preference models under one quota rule, frozen and serving; writes preference_services_WORLD.md and .csv.gz.

    python benchmarks/preference_services.py KuaiFair-KuaiRandTwin-v0 --store STORE --results docs/results
    python benchmarks/preference_services.py kuairand --data DATA --store STORE --results docs/results

All rows are BeliefQuota and differ in what it believes of users alone. The users are those of serving.py; training seed
``n`` serves them in order ``n``, and so do rows without a training seed. What the store holds is not done again; models
that it lacks are trained as :func:`dsrm.pretrain` does.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from preference_models import Models
from serving import N_ENVS, USERS, users_of
from torch import Tensor
from worlds import argument_parser, cell, open_worlds, short_name, write_page

from dsrm.belief import BeliefScales
from dsrm.belief_purifier import BeliefPurifier
from dsrm.click_scorer import ClickScorer
from dsrm.own_level import OwnScales
from dsrm.preference import Evidence, Moments, PreferenceModel
from dsrm.preference_training import PreferenceKind
from dsrm.pretraining import fitted_scorer
from dsrm.purifier import ItemQuality
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.study import single_threaded
from hrl_policies.study.statistics import holm
from hrl_policies.worlds import WorldPair, purified_sessions
from kuaifair_env import ServingResult, SessionConfig, serve
from kuaifair_env.files import file_hash, write_text_atomically
from kuaifair_env.intervals import Estimate, crossed_mean, interval_of
from kuaifair_env.serving_results import session_figures
from kuaifair_env.simulator import Repeats

FROZEN, SERVING = "frozen", "serving"
NOTHING = OwnScales(0.0, 0.0, 0.0)
SIGNIFICANCE = 0.05
FIGURES = ("r_cum", "len", "ad", "violation_rate")

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What one row of the tables believes of users.

    Attributes:
        kind: The model; None is the closed form.
        scales: Scales of the belief; None takes those that the model was fitted with.
        form: What is made of the model: its mean, or draws (while serving alone); or nothing but its scales.
        item_quality: From what the quality of items is estimated; see :class:`dsrm.PretrainConfig`.
    """

    kind: PreferenceKind | None
    scales: BeliefScales | None = None
    form: Literal["mean", "draws", "scales"] = "mean"
    item_quality: ItemQuality = "log"


CLOSED, RESCALED, GAUSSIAN = "closed form", "closed form, fitted scales", "gaussian"
ROWS: Mapping[str, Row] = {
    "none": Row(None, BeliefScales(own=NOTHING)),
    CLOSED: Row(None, BeliefScales()),
    RESCALED: Row("gaussian", form="scales"),
    "closed form, item features": Row(None, BeliefScales(), item_quality="features"),
    "closed form, fitted scales, item features": Row("gaussian", form="scales", item_quality="features"),
    GAUSSIAN: Row("gaussian"),
    "mixture": Row("mixture"),
    "regression": Row("regression"),
    "diffusion": Row("diffusion"),
    "diffusion, wide scales": Row("diffusion", BeliefScales()),
    "diffusion, sampled": Row("diffusion", form="draws"),
}
FEW = ("mixture", "diffusion, wide scales", "diffusion, sampled")
"""Rows that take longest, or are there to show that something does not work: played for the first seeds alone."""

BASES = (CLOSED, RESCALED, GAUSSIAN)


class Sampled:
    """A preference model whose means are single draws, another one at each call: Thompson sampling of preferences.

    Args:
        model: The model.
        seed: Seed of the draws.
    """

    def __init__(self, model: PreferenceModel, seed: int) -> None:
        self.kind = model.kind
        self._model = model
        self._rng = np.random.default_rng(seed)

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return Moments(
            self.samples(evidence, 1, int(self._rng.integers(2**31)))[0], self._model.moments(evidence).deviations
        )

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return self._model.samples(evidence, count, seed)

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return self._model.settings()

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return self._model.tensors()


@dataclass(frozen=True)
class Services:
    """What one row did in one regime.

    Attributes:
        results: By training seed, which is the order of the users too.
    """

    results: Mapping[int, ServingResult]

    def minus(self, other: Services) -> Values:
        """Returns ``(S, U)`` differences of R_cum by seed and user."""
        seeds = sorted(self.results.keys() & other.results.keys())
        return np.stack([_rewards(self.results[seed]) - _rewards(other.results[seed]) for seed in seeds])

    def figures(self) -> dict[str, float]:
        """Returns means over seeds."""
        rows = [session_figures(result.served.sessions) for result in self.results.values()]
        return {name: float(np.mean([row[name] for row in rows])) for name in FIGURES}


Panel = Mapping[tuple[str, str], Services]
"""Services by regime and row."""


def _rewards(result: ServingResult) -> Values:
    sessions = result.served.sessions
    return sessions.return_[np.argsort(sessions.user_ids)].astype(np.float64)


def serve_all(pair: WorldPair, arguments: Namespace, repeats: Repeats) -> Panel:
    """Has all rows play the same users, frozen and serving; returns what they did by regime and row."""
    store = arguments.store / short_name(arguments.world)
    models = Models(pair, store / "models")
    env = purified_sessions(pair.test, SessionConfig(action_mode="slate", repeats=repeats), N_ENVS, 0, None)
    users = users_of(pair)
    scorers = {quality: fitted_scorer(pair.train, quality) for quality in get_args(ItemQuality)}
    results: dict[tuple[str, str], dict[int, ServingResult]] = {}
    for seed, regime, name in _planned(arguments):
        row = ROWS[name]
        if arguments.only_stored and row.kind is not None and not models.path(row.kind, seed).exists():
            continue
        purifier = None if row.kind is None else models.load(row.kind, seed)
        order = seed if regime == SERVING else 0  # every order of the users gives the same, frozen
        place = store / "services" / repeats / regime / name / f"{order}{_code(row, purifier, seed, models)}"
        if arguments.only_stored and not (place / "result.json").exists():
            continue
        result = serve(
            agent_of(row, purifier, scorers[row.item_quality], order),
            env,
            users,
            len(users),
            order=order,
            n_envs=N_ENVS,
            learn=regime == SERVING,
            evaluate_others=False,
            folder=place,
        )
        reward = result.served.engagement.cumulative_reward
        print(f"repeats {repeats}, seed {seed}, {regime}, {name}: {reward:.3f}", flush=True)
        results.setdefault((regime, name), {})[seed] = result
    return {key: Services(found) for key, found in results.items()}


def _planned(arguments: Namespace) -> list[tuple[int, str, str]]:
    """Returns seeds, regimes and rows to play; draws are for serving, where exploring may pay."""
    return [
        (seed, regime, name)
        for seed, regime, name in product(arguments.seeds, (FROZEN, SERVING), arguments.rows)
        if (name not in FEW or seed in arguments.seeds[: arguments.few])
        and not (ROWS[name].form == "draws" and regime == FROZEN)
    ]


def _code(row: Row, purifier: BeliefPurifier | None, seed: int, models: Models) -> str:
    """Returns what tells services of a row in the same order apart: the model, or its scales where no more is used."""
    if purifier is None or row.kind is None:
        return ""
    if row.form == "scales":
        return "".join(f"-{scale:.6f}" for scale in astuple(purifier.scales.own))
    return f"-{seed}-{file_hash(models.path(row.kind, seed))[:12]}"


def agent_of(row: Row, purifier: BeliefPurifier | None, scorer: ClickScorer, seed: int) -> BeliefQuota:
    """Returns the quota rule with what a row believes of users."""
    if purifier is None:
        return BeliefQuota(scorer, seed=seed, scales=row.scales)
    scales = purifier.scales if row.scales is None else row.scales
    if row.form == "scales":
        return BeliefQuota(scorer, seed=seed, scales=scales)
    preference = Sampled(purifier.preference, seed) if row.form == "draws" else purifier.preference
    return BeliefQuota(scorer, seed=seed, scales=scales, preference=preference)


@dataclass(frozen=True)
class Difference:
    """A row minus another in R_cum, and Holm's p-value; None where one seed is all there is."""

    estimate: Estimate
    adjusted: float | None

    @property
    def cells(self) -> list[str]:
        """The difference and its p-value as cells of a table; without further seeds there is nothing to test."""
        if self.adjusted is None:
            return [f"{self.estimate.value:+.2f}", ""]
        text = cell(interval_of(self.estimate), sign=True)
        return [f"**{text}**" if self.adjusted <= SIGNIFICANCE else text, f"{self.adjusted:.4f}"]


Panels = Mapping[Repeats, Panel]
Key = tuple[Repeats, str, str, str]


def differences(panels: Panels) -> dict[Key, Difference]:
    """Returns differences to all bases by repeats, regime, row and base; p-values are adjusted for all together."""
    estimates, tested = {}, []
    for repeats, panel in panels.items():
        for (regime, name), base in product(panel, BASES):
            key, other = (repeats, regime, name, base), panel.get((regime, base))
            if name == base or other is None or (repeats, regime, base, name) in estimates:
                continue
            if not panel[regime, name].results.keys() & other.results.keys():
                continue
            table = panel[regime, name].minus(other)
            estimates[key] = crossed_mean(table)
            if len(table) > 1:
                tested.append(key)
    adjusted = holm(np.asarray([estimates[key].p_value() for key in tested])).tolist()
    p_values = dict(zip(tested, adjusted, strict=True))
    return {key: Difference(estimate, p_values.get(key)) for key, estimate in estimates.items()}


def table(panel: Panel, repeats: Repeats, regime: str, all_differences: Mapping[Key, Difference]) -> list[str]:
    """Returns the table of a regime."""
    bases = " | ".join(f"minus {base} | p, Holm" for base in BASES)
    lines = [
        f"| users' own part | seeds | R_cum | {bases} | Len | AD | violation rate |",
        "|---|" + "---:|" * (5 + 2 * len(BASES)),
    ]
    for name in ROWS:
        if (regime, name) not in panel:
            continue
        services = panel[regime, name]
        figures = services.figures()
        cells = []
        for base in BASES:
            difference = all_differences.get((repeats, regime, name, base))
            cells += ["", ""] if difference is None else difference.cells
        lines.append(
            f"| {name} | {len(services.results)} | {figures['r_cum']:.2f} | {' | '.join(cells)} | {figures['len']:.2f} "
            f"| {figures['ad']:.3f} | {figures['violation_rate']:.3f} |"
        )
    return lines


def table_of_numbers(panels: Panels) -> str:
    """Returns figures of all services as CSV."""
    lines = [f"repeats,regime,row,seed,{','.join(FIGURES)}"]
    for repeats, panel in panels.items():
        for (regime, name), services in panel.items():
            for seed, result in services.results.items():
                figures = session_figures(result.served.sessions)
                numbers = ",".join(f"{figures[figure]:.4f}" for figure in FIGURES)
                lines.append(f'{repeats},{regime},"{name}",{seed},{numbers}')
    return "\n".join(lines) + "\n"


def page(pair: WorldPair, panels: Panels, arguments: Namespace) -> str:
    """Returns the page of a world."""
    all_differences = differences(panels)
    lines = [f"# Preference models under one quota rule: {pair.name}", ""]
    for repeats, panel in panels.items():
        for regime in (FROZEN, SERVING):
            lines += [f"## Repeats {repeats}, {regime}", "", *table(panel, repeats, regime, all_differences), ""]
    tested = sum(difference.adjusted is not None for difference in all_differences.values())
    data = pair.test.data
    option = " --data DATA" if arguments.data else ""
    some = "" if len(arguments.rows) == len(ROWS) else f" --rows {shlex.join(arguments.rows)}"
    return "\n".join(
        [
            *lines,
            "## Notes",
            "",
            "- Every row is BeliefQuota; rows differ in the distribution of users' own parts given evidence. *none*: "
            f"users have no own part. *{CLOSED}*: `BeliefScales()`, which is the zoo's `belief-quota`; *fitted "
            "scales*: those of the models, which allow for the level of everybody's clicks being unknown. Models begin "
            "with the scales that they were fitted with; *wide scales*: with `BeliefScales()`. *Item features*: the "
            "quality of items is estimated before a session from the training log and their features, not from click "
            "rates alone (`item_quality`). *Sampled*: each slate "
            "follows from one draw of the diffusion posterior instead of its mean (Thompson sampling of preferences).",
            f"- {len(users_of(pair)):,} users of the test world, those of benchmarks/serving.py "
            f"(`numpy.random.default_rng(5).permutation(world.users)[:{USERS}]`), once each, {N_ENVS} at a time; Max "
            "Len 30, K 10. Frozen: nothing is learned of all users, slates are deterministic. Serving: what all users "
            "share goes on being learned from session to session.",
            "- Training seed `n` serves in order `n` of the users; rows without a training seed serve in the same "
            "orders, and play once where they are frozen.",
            "- Differences are paired by seed and order, and by user; brackets: 95 % intervals (Student), seeds and "
            "users crossed, as sessions of a user have the same random numbers in every order. p, Holm: adjusted for "
            f"the {tested} tested differences of this page; bold where it is at most {SIGNIFICANCE}. Where a row has "
            "one seed nothing says how much orders and seeds vary: the difference stands alone.",
            f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the "
            f"test world {pair.test.fingerprint}.",
            f"- Made by: python benchmarks/preference_services.py {arguments.world}{option} --seeds "
            f"{' '.join(map(str, arguments.seeds))} --few {arguments.few}{some} --store STORE "
            "--results docs/results.",
        ]
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder of models and services, by world")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="training seeds, and orders")
    parser.add_argument("--few", type=int, default=2, help=f"how many of them are for {', '.join(FEW)}")
    parser.add_argument("--only-stored", action="store_true", help="play nothing, make the page of what there is")
    parser.add_argument("--repeats", nargs="+", choices=get_args(Repeats), default=get_args(Repeats))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    panels = {repeats: serve_all(pair, arguments, repeats) for repeats in arguments.repeats}
    stem = f"preference_services_{short_name(arguments.world)}"
    if arguments.results is not None:
        write_text_atomically(arguments.results / f"{stem}.csv.gz", table_of_numbers(panels))
    write_page(arguments.results, f"{stem}.md", page(pair, panels, arguments))


if __name__ == "__main__":
    main()
