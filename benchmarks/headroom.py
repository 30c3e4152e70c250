"""What can be won in each variant of a world, by frozen controls; writes sections of docs/results/headroom.md.

    python benchmarks/headroom.py KuaiFair-KuaiRandTwin-v0 --store STORE --results docs/results
    python benchmarks/headroom.py kuairand --data DATA --store STORE --results docs/results

Every variant is the study of ``benchmarks/studies/headroom.yml`` with another leave rule, with drifting tastes or with
another response, repeats allowed and forbidden. Runs that the store holds are not done again.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worlds import PARTIAL, argument_parser, open_worlds, short_name, write_section

from hrl_policies.study import check_study, read_study, run_study, single_threaded
from hrl_policies.study.labels import ORIGINS, PRIVILEGED_NOTE, Task, Variant
from hrl_policies.study.results import Comparison, EvaluatedRun, comparisons, figure_interval, world_notes
from hrl_policies.study.spec import SessionSettings, StudySpec
from hrl_policies.study.statistics import mean_interval
from hrl_policies.study.store import stored_runs
from hrl_policies.study.tables import Cell, Measured, ResultTable, Span
from hrl_policies.worlds import WorldPair, load_worlds
from kuaifair_env.evaluation import DEFAULT_SEED
from kuaifair_env.intervals import Interval
from kuaifair_env.registration import make_world
from kuaifair_env.response.fitting import ResponseKind, cached_response
from kuaifair_env.world import World, build_world

STUDY = Path(__file__).parent / "studies" / "headroom.yml"


@dataclass(frozen=True)
class Kind:
    """A variant of a world: how its sessions differ, another response of its test world, another taste of a twin."""

    session: SessionSettings
    response: ResponseKind = "auto"
    taste: Literal["measured", "strong"] = "measured"


VARIANTS: dict[str, Kind] = {
    "as in the paper": Kind(SessionSettings()),
    "tolerance": Kind(SessionSettings(leave="personal")),
    "drift": Kind(SessionSettings(drift=15)),
    "history-dependent": Kind(SessionSettings(), "sequential"),
    "strong taste": Kind(SessionSettings(), taste="strong"),
}
_GAINS = {
    "knows the mean tolerance": ("quota-greedy", "mean-tolerance-quota"),
    "knows each tolerance": ("mean-tolerance-quota", "tolerance-quota"),
    "knows the items": ("tolerance-quota", "quality-oracle"),
    "knows each taste": ("quality-oracle", "oracle"),
    "all of it": ("quota-greedy", "oracle"),
}
_TITLES = ("R_cum", "Len", "formula", "viol.")


def variant_of(pair: WorldPair, kind: Kind) -> WorldPair:
    """Returns the worlds of a variant; only what users of the test world do may differ, since controls do not train."""
    response: ResponseKind = kind.response
    if kind.taste != "measured":
        return replace(load_worlds(pair.name, {"taste": kind.taste}), name=f"{pair.name}, {kind.taste} taste")
    if kind.session.drift and pair.test.response.describe()["kind"] == "observed":
        response = "factorised"
    if response == "auto":
        return pair
    return WorldPair(f"{pair.name}, {response}", pair.train, _with_response(pair, response))


def _with_response(pair: WorldPair, response: ResponseKind) -> World:
    if pair.name not in PARTIAL.values():
        return make_world(pair.name, split="test", response=response)
    data = pair.test.data
    return build_world(data, "test", cached_response(data, "test", response), embeddings=pair.test.embeddings)


def run_variant(spec: StudySpec, pair: WorldPair, kind: Kind, store: Path) -> Comparison:
    """Runs the controls in a variant, and returns their runs."""
    changes = {"worlds": (pair.name,), "session": kind.session, "sweep": {"repeats": spec.sweep["repeats"]}}
    runs = check_study(spec.model_copy(update=changes), worlds={pair.name: pair})
    run_study(runs, store, {pair.name: pair}).raise_for_failures()
    (comparison,) = comparisons(stored_runs(store))
    return comparison


def gains_of(comparison: Comparison, task: Task) -> dict[str, Interval]:
    """Returns what each piece of knowledge adds to R_cum, paired by user, with bootstrap intervals over users."""

    def earned(method: str) -> np.ndarray:
        (run,) = comparison.cell(task, Variant(method))
        return run.users.per_session("r_cum")

    return {title: mean_interval(earned(more) - earned(less)) for title, (less, more) in _GAINS.items()}


def summary_table(by_variant: Mapping[str, Comparison], title: str) -> ResultTable:
    """Returns R_cum of QuotaGreedy and of the Oracle, and what lies between them, for every variant."""
    rows: list[tuple[Cell, ...]] = []
    for name, comparison in by_variant.items():
        for task in comparison.tasks:
            ends = [comparison.cell(task, Variant(method))[0].summary["r_cum"] for method in ("quota-greedy", "oracle")]
            gains = gains_of(comparison, task)
            personal = comparison.conditions == "leave personal"
            tolerance = gains["knows the mean tolerance"].estimate + gains["knows each tolerance"].estimate
            rows.append(
                (
                    name,
                    task.repeats,
                    *(f"{end:.2f}" for end in ends),
                    *(Measured.of_interval(gain, 2, sign=True) for gain in gains.values()),
                    f"{100 * tolerance / gains['all of it'].estimate:.0f} %" if personal else "",
                )
            )
    return ResultTable(
        title=title,
        header=("variant", "repeats", "QuotaGreedy", "Oracle", *_GAINS, "of which tolerance"),
        rows=tuple(rows),
        notes=(
            "Differences of R_cum, paired by user, with 95 % bootstrap intervals over users: from QuotaGreedy (half of "
            "each slate popular) to the best count that users tolerate on average, to that which each user tolerates, "
            "to the true quality of items, to each user's true taste now.",
            "Where all users tolerate the same, the first step is that from half to any count inside the bound. The "
            "Oracle looks one slate ahead: with a history-dependent response more could be won. Where the response of "
            "the test world is another (below), variants differ in that too.",
        ),
    )


def control_table(by_variant: Mapping[str, Comparison], title: str) -> ResultTable:
    """Returns what every control earns in every variant, repeats allowed and forbidden."""
    rows: list[tuple[Cell, ...]] = []
    for name, comparison in by_variant.items():
        for variant in comparison.variants:
            runs = [comparison.cell(task, variant)[0] for task in comparison.tasks]
            rows.append((name, variant.title, *(cell for run in runs for cell in _cells(run))))
    first = next(iter(by_variant.values()))
    variants_of_note: defaultdict[str, list[str]] = defaultdict(list)
    for name, comparison in by_variant.items():
        for note in world_notes(comparison.runs):
            variants_of_note[note].append(name)
    return ResultTable(
        title=title,
        header=("variant", "control", *(_TITLES * len(first.tasks))),
        rows=tuple(rows),
        notes=(
            *(f"{', '.join(names).capitalize()}: {note}" for note, names in variants_of_note.items()),
            "Brackets: 95 % intervals over users. viol.: share of slates that the leave rule punishes; "
            "formula: the Len that follows from R_each and viol.",
            PRIVILEGED_NOTE,
        ),
        spans=tuple(Span(task.session_title, len(_TITLES)) for task in first.tasks),
    )


def _cells(run: EvaluatedRun) -> tuple[Cell, ...]:
    earned = Measured.of_interval(figure_interval([run], "r_cum"), 2)
    length, formula = (Measured(run.summary[name], 2) for name in ("len", "len_predicted"))
    return earned, length, formula, Measured(run.summary["violation_rate"])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, default=Path("studies/headroom"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="all that the world has by default")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    spec, problems = read_study(STUDY)
    assert not problems, problems
    command = f"python benchmarks/headroom.py {arguments.world}{' --data DATA' if arguments.data else ''}"
    by_variant = {}
    twin = pair.test.data.provenance.origin == "twin"
    for name in arguments.variants or [name for name, kind in VARIANTS.items() if twin or kind.taste == "measured"]:
        kind = VARIANTS[name]
        store = arguments.store / f"{short_name(arguments.world)}-{name.replace(' ', '-')}"
        by_variant[name] = run_variant(spec, variant_of(pair, kind), kind, store)
    tables = (
        summary_table(by_variant, "What can be won"),
        control_table(by_variant, "The controls"),
    )
    header = (
        f"# {pair.name}\n\n{min(spec.n_users or 0, len(pair.test.users))} held-out users, one session each, "
        f"seed {DEFAULT_SEED}, Max Len {spec.max_lens[0]}; {ORIGINS[pair.test.data.provenance.origin]}.\n\n"
        f"    {command}\n"
    )
    text = "\n".join([header, *(table.markdown().removeprefix("#") for table in tables)])
    write_section(arguments.results, "headroom.md", text)


if __name__ == "__main__":
    main()
