"""Tables 1 to 4 from run folders, number by number, and the paper's own figures.

Differences and scores from run folders, against sums by hand.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from studies import LIKE_THE_PAPERS, MAX_LENS, OWN, pairs, runs_of

from hrl_policies.study.comparisons import (
    difference_table,
    differences,
    length_scores,
    reward_scores,
    score_table,
)
from hrl_policies.study.labels import Task, Variant
from hrl_policies.study.outputs import study_tables, write_tables
from hrl_policies.study.paper_tables import (
    PAPER,
    PUBLISHED_LOGS,
    PUBLISHED_RESULTS,
    PUBLISHED_SECONDS,
    ablation_table,
    cost_table,
    overall_table,
    paper_data,
    published_result,
    world_table,
)
from hrl_policies.study.results import EvaluatedRun, UserSums, comparisons, figure_interval, folded
from hrl_policies.study.statistics import holm, linearised_ratio, stratified_interval
from hrl_policies.study.store import load_run, stored_runs
from hrl_policies.study.tables import MISSING, Measured, result_tables
from hrl_policies.zoo import METHODS
from kuaifair_env.errors import ArtifactError
from kuaifair_env.intervals import Interval, crossed_difference, crossed_mean, rate_interval
from kuaifair_env.metrics import implied_violation_rate, length_floor_and_ceiling, normalised_length

TWIN, SMALL = "KuaiRecTwin (own)", "small (own)"


def cell(table, row, column, world=TWIN, max_len=None, repeats="allowed"):
    """Returns a cell by the words at the left of its row and above its column."""
    name = column if max_len is None else f"Max Len {max_len}, repeats {repeats}: {column}"
    place = table.full_header().index(name)
    (found,) = [cells for cells in table.rows if world in cells[:2] and row in cells[:4]]
    return found[place]


def test_sums_of_users_give_back_every_headline_figure(comparison):
    for run in comparison.runs:
        for figure in ("len", "r_each", "r_cum", "ad", "violation_rate"):
            found = figure_interval([run], figure)
            assert found.estimate == pytest.approx(run.record.summary[figure], abs=1e-9)
            assert found.low - 1e-12 <= found.estimate <= found.high + 1e-12


@pytest.mark.parametrize(
    ("signed", "size"),
    [
        ((-0.1, -0.3, 0.05), (0.1, 0.0, 0.3)),
        ((-0.4, -0.5, -0.2), (0.4, 0.2, 0.5)),
        ((0.3, 0.2, 0.6), (0.3, 0.2, 0.6)),
    ],
)
def test_the_interval_of_a_size_follows_from_that_of_the_signed_gap(signed, size):
    assert folded(Interval(*signed, 0.9)) == Interval(*size, 0.9)


def test_sessions_of_one_user_are_one_unit():
    rows = [
        {
            "user_id": float(user),
            "len": 4.0 + user,
            "r_cum": 2.0,
            "popular_share": 0.5,
            "violation_rate": 0.25,
        }
        for user in (7, 3, 7)
    ]
    sums = UserSums.of_sessions(rows)
    assert sums.user_ids.tolist() == [3, 7]
    assert sums.sessions.tolist() == [1, 2] and sums.steps.tolist() == [7, 22]
    assert sums.per_session("len").tolist() == [7.0, 11.0]
    assert sums.violations.tolist() == [1.75, 5.5]
    with pytest.raises(ValueError, match="no 'ad'"):
        sums.per_session("ad")
    with pytest.raises(ValueError, match="'gini'"):
        sums.values("gini")


def test_a_cell_is_the_mean_over_seeds_with_its_interval_for_other_seeds_and_users(runs, comparison):
    table = overall_table(comparison, "x")
    lengths = np.stack([EvaluatedRun.of_run(run).users.per_session("len") for run in runs_of(runs, "a2c")])
    expected = crossed_mean(lengths)
    found = cell(table, "A2C", "Len", max_len=30)
    assert found.value == pytest.approx(np.mean([run.summary["len"] for run in runs_of(runs, "a2c")]))
    ends = found.value - expected.half_width(), found.value + expected.half_width()
    assert (found.low, found.high) == pytest.approx(ends)
    # Users are a sample as well: the interval over seeds alone is shorter.
    over_seeds = crossed_mean(lengths.mean(axis=1)[:, None])
    assert expected.variance > over_seeds.variance
    assert cell(table, "A2C", "seeds", max_len=30) == "3"
    shares = cell(table, "A2C", "viol.", max_len=30)
    assert 0.0 <= shares.low <= shares.value <= shares.high <= 1.0


def test_a_control_has_its_interval_over_users(runs, comparison):
    (run,) = runs_of(runs, "random")
    users = EvaluatedRun.of_run(run).users
    expected = rate_interval(linearised_ratio(users.reward, users.steps)[None])
    found = cell(overall_table(comparison, "x"), "Random", "R_each", max_len=30)
    assert (found.value, found.low, found.high) == pytest.approx((run.summary["r_each"], expected.low, expected.high))
    assert found.low < found.value < found.high


def test_no_interval_of_a_rate_leaves_0_to_1_and_none_is_students(runs, comparison):
    (run,) = runs_of(runs, "random")
    users = EvaluatedRun.of_run(run).users
    share = rate_interval(linearised_ratio(users.popular, users.steps)[None])
    found = cell(overall_table(comparison, "x"), "Random", "AD", max_len=30)
    assert (found.low, found.high) == pytest.approx(sorted(abs(2.0 * end - 1.0) for end in (share.low, share.high)))
    records = [one.record for one in comparison.runs]
    tables = [overall_table(comparison, "x"), ablation_table(comparison, "x"), *result_tables(records, "x")]
    for table in tables:
        for place in (n for n, title in enumerate(table.header) if title in ("R_each", "AD", "viol.", "cov.")):
            for shown in (row[place] for row in table.rows if row[place] != MISSING):
                assert shown.spread is None
                assert shown.low is None or 0.0 <= shown.low <= shown.value <= shown.high <= 1.0


def test_interquartile_means_come_with_stratified_intervals(runs, comparison):
    found = cell(overall_table(comparison, "x", average="iqm"), "A2C", "R_cum", max_len=8)
    values = np.asarray([run.summary["r_cum"] for run in runs_of(runs, "a2c", max_len=8)])
    expected = stratified_interval(values[:, None], resamples=10_000)
    assert (found.value, found.low, found.high) == pytest.approx((expected.estimate, expected.low, expected.high))
    with pytest.raises(ValueError, match="unknown average 'median'"):
        overall_table(comparison, "x", average="median")


def test_floor_and_ceiling_stand_beside_len(runs, comparison):
    table = overall_table(comparison, "x")
    floor, ceiling = zip(
        *(length_floor_and_ceiling(30, run.summary["r_each"]) for run in runs_of(runs, "a2c")), strict=True
    )
    assert cell(table, "A2C", "floor", max_len=30).value == pytest.approx(np.mean(floor))
    assert cell(table, "A2C", "ceil.", max_len=30).value == pytest.approx(np.mean(ceiling))


def test_worlds_are_rows_horizons_are_groups_and_methods_come_in_the_order_of_the_zoo(comparison):
    table = overall_table(comparison, "kuaifair x")
    controls = ["Random", "QuotaGreedy", "Oracle †"]
    methods = {TWIN: ["A2C", "A2C + ips", *controls, "HRL"], SMALL: ["A2C", *controls]}
    assert [row[:2] for row in table.rows] == [(world, name) for world, names in methods.items() for name in names]
    assert [span.title for span in table.spans] == ["Max Len 8, repeats allowed", "Max Len 30, repeats allowed"]
    text = table.render("markdown")
    for part in (
        "15 held-out users",
        "the user's own logs",
        "11, 15, 19",
        "A2C 256",
        "Made by: kuaifair x",
    ):
        assert part in text


def test_ablations_hold_parts_and_other_states_beside_the_whole(comparison):
    table = ablation_table(comparison, "x")
    assert [row[:2] for row in table.rows] == [
        (TWIN, "A2C"),
        (TWIN, "A2C + ips"),
        (TWIN, "HRL"),
        (SMALL, "A2C"),
    ]
    assert any("ips" in note for note in table.notes if note.startswith("Purifiers"))


def test_the_papers_figures_stand_below_ours_and_say_where_they_are_from(comparison):
    table = overall_table(comparison, "x", compare=True)
    name = f"A2C: {PAPER}"
    assert "another world" in name
    length = cell(table, name, "Len", max_len=30)
    assert (length.value, length.spread, length.low) == (13.433, 0.236, None)
    assert cell(table, name, "AD", max_len=30).value == 0.498
    floor, ceiling = length_floor_and_ceiling(30, 0.62)
    assert cell(table, name, "floor", max_len=30).value == pytest.approx(floor)
    assert cell(table, name, "ceil.", max_len=30).value == pytest.approx(ceiling)
    assert cell(table, name, "viol.", max_len=30).value == pytest.approx(implied_violation_rate(13.433, 30, 0.62))
    assert cell(table, name, "Len", max_len=8) == MISSING
    assert [row[1] for row in table.rows if PAPER in str(row[1])] == [name, f"HRL: {PAPER}"]
    assert any("not released" in note for note in table.notes)
    assert not any(PAPER in str(row[1]) for row in overall_table(comparison, "x").rows)


def test_worlds_that_the_paper_does_not_have_are_named(runs):
    (own,) = comparisons([run for run in runs if run.config.world == OWN])
    table = overall_table(own, "x", compare=True)
    assert any("no figures for these worlds" in note for note in table.notes)


def test_training_times_are_scaled_to_the_same_number_of_sessions(runs, comparison):
    table = cost_table(comparison, "x", compare=True)
    chosen = runs_of(runs, "hrl")
    rates = [run.timing["training_seconds"] * 20_000 / sum(point["sessions"] for point in run.curve) for run in chosen]
    row = next(row for row in table.rows if row[:4] == (TWIN, "30", "allow", "HRL"))
    by_title = dict(zip(table.header, row, strict=True))
    assert by_title["s per 20,000 sessions"].value == pytest.approx(np.mean(rates))
    cpu = [
        run.timing["training_cpu_seconds"] * rate / run.timing["training_seconds"]
        for run, rate in zip(chosen, rates, strict=True)
    ]
    assert by_title["processor s per 20,000 sessions"].value == pytest.approx(np.mean(cpu))
    assert by_title["seconds"].value == pytest.approx(np.mean([run.timing["training_seconds"] for run in chosen]))
    assert by_title["paper (another machine)"].value == 8_462.525
    assert by_title["machine"] == "1" and f"Machine 1: {chosen[0].timing['machine']}." in table.notes
    short = next(row for row in table.rows if row[:4] == (TWIN, "8", "allow", "HRL"))
    assert short[table.header.index("paper (another machine)")] == MISSING
    assert not any("Random" in row for row in table.rows)


def test_peak_memory_is_the_largest_of_the_seeds_and_missing_where_it_was_not_kept(runs):
    chosen = runs_of(runs, "hrl")
    sizes = [400.0, 512.0, 450.0]
    told = [
        replace(run, timing=run.timing | {"peak_memory_mib": size}) for run, size in zip(chosen, sizes, strict=False)
    ]
    (found,) = comparisons(told)
    table = cost_table(found, "x")
    column = table.header.index("peak MiB")
    assert table.rows[0][column].value == max(sizes[: len(told)])
    (older,) = comparisons([replace(run, timing=run.timing | {"peak_memory_mib": None}) for run in chosen])
    assert cost_table(older, "x").rows[0][column] == MISSING


def test_resumed_runs_have_no_training_time(runs):
    chosen = runs_of(runs, "hrl")
    resumed = replace(chosen[0], result=chosen[0].result | {"resumed_at": 64})
    (found,) = comparisons([resumed, *chosen[1:]])
    table = cost_table(found, "x")
    assert table.rows[0][table.header.index("seeds")] == "2"
    assert any("Left out: 1 run(s)" in note for note in table.notes)
    (only,) = comparisons([resumed])
    assert cost_table(only, "x") is None


def test_logs_are_counted():
    made = pairs()
    table = world_table(list(made.values()), "x", compare=True)
    log = made[OWN].train.data.train
    row = dict(zip(table.header, next(r for r in table.rows if r[:2] == (SMALL, "train")), strict=True))
    seen = {(int(user), int(item)) for user, item in zip(log.users, log.items, strict=True)}
    users, items = len({user for user, _ in seen}), len({item for _, item in seen})
    assert (row["users"], row["items"], row["interactions"]) == (str(users), str(items), str(len(log)))
    assert row["density, %"].value == pytest.approx(100 * len(seen) / (users * items))
    assert row["clicks, %"].value == pytest.approx(100 * log.clicks.mean())
    assert (row["session users"], row["candidates"]) == ("25", "50")
    published = [row for row in table.rows if "in the paper" in str(row[0])]
    assert [row[1:5] for row in published] == [
        ("train", "7176", "10728", "12530800"),
        ("test", "1411", "3327", "4676500"),
    ]
    with pytest.raises(ValueError, match="no worlds"):
        world_table([], "x")


def test_runs_that_cannot_be_compared_are_refused(runs):
    first, second, *_ = runs_of(runs, "a2c")
    with pytest.raises(ValueError, match="more than once with the same seed"):
        comparisons([first, first])
    other = replace(second, config=replace(second.config, evaluation_seed=1))
    with pytest.raises(ValueError, match="different randomness"):
        comparisons([first, other])
    with pytest.raises(ValueError, match="no finished runs"):
        comparisons([])
    interrupted = replace(second, result={})
    assert len(comparisons([first, interrupted])[0].runs) == 1


def test_forbidden_repeats_stand_beside_allowed_ones(runs):
    agents, (hrl, *_), controls = runs_of(runs, "a2c"), runs_of(runs, "hrl"), runs_of(runs, "random")
    forbidden = [
        replace(run, config=replace(run.config, session=replace(run.config.session, repeats="forbid")))
        for run in [*agents[:2], *controls]
    ]
    (both,) = comparisons([*agents, hrl, *controls, *forbidden])
    assert [task.repeats for task in both.tasks] == ["allow", "forbid"]
    table = overall_table(both, "x", compare=True)
    assert [span.title for span in table.spans] == ["Max Len 30, repeats allowed", "Max Len 30, repeats forbidden"]
    assert [cell(table, "A2C", "seeds", max_len=30, repeats=word) for word in ("allowed", "forbidden")] == ["3", "2"]
    assert cell(table, f"A2C: {PAPER}", "Len", max_len=30) != MISSING
    assert cell(table, f"A2C: {PAPER}", "Len", max_len=30, repeats="forbidden") == MISSING
    parts = ablation_table(both, "x")
    assert cell(parts, "HRL", "Len", max_len=30, repeats="forbidden") == MISSING
    assert not any("needs repeats" in note for note in parts.notes), "nobody said that it does"
    assert [row[2:4] for row in difference_table(both, "a2c", "x").rows] == [
        ("allow", "Random"),
        ("allow", "HRL"),
        ("forbid", "Random"),
    ]
    assert [row[2] for row in cost_table(both, "x").rows] == ["allow", "allow", "forbid"]


def test_other_sessions_have_tables_of_their_own(runs):
    first, second, *_ = runs_of(runs, "a2c")
    other = replace(second, config=replace(second.config, session=replace(second.config.session, slate_size=6)))
    tables = study_tables([first, other])
    assert [name for name in tables if name.startswith("table_2")] == [
        "table_2_overall_1",
        "table_2_overall_2",
    ]
    assert tables["table_2_overall_1"].title == "Overall results"
    assert tables["table_2_overall_2"].title == "Overall results, slate_size 6"


def test_every_table_is_written_in_every_form(runs, tmp_path):
    tables = study_tables(
        runs, compare=True, base="a2c", worlds=list(pairs().values()), command="kuaifair study tables S"
    )
    written = write_tables(tmp_path, tables, ("text", "markdown", "latex", "csv"))
    names = {
        "table_1_environments", "table_2_overall", "table_3_ablation", "table_4_training_time", "differences", "scores"
    }  # fmt: skip
    assert {path.name for path in written} == {
        name + ending for name in names for ending in (".txt", ".md", ".tex", ".csv")
    }
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    for path in written:
        assert "kuaifair study tables S" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="unknown format 'html'"):
        write_tables(tmp_path, tables, ("html",))


def test_numbers_are_numbers(comparison):
    for table in (overall_table(comparison, "x"), cost_table(comparison, "x")):
        for row in table.rows:
            for one in row:
                assert not isinstance(one, Measured) or np.isfinite(one.value)


def test_a_store_that_is_not_there_is_an_error(store, tmp_path):
    with pytest.raises(ArtifactError, match="no folder"):
        stored_runs(tmp_path / "nowhere")
    assert stored_runs(tmp_path) == []
    assert len(stored_runs(store)) == len(MAX_LENS) * (3 * 4 + 6)
    assert load_run(stored_runs(store)[0].folder).complete


# --- the paper's own figures: complete, typed once, and within what the length formula allows ---------------


WORLDS = (("KuaiRec", 30), ("KuaiRand-Pure", 30), ("KuaiRec", 50), ("KuaiRand-Pure", 50))

# The violation rate that the length formula, solved by hand, gives for each row, in the order of WORLDS.
BY_HAND = {
    "A2C": (0.86, 0.93, 0.89, 0.98),
    "TD3": (0.73, 0.65, 0.39, 0.44),
    "BCQ": (0.19, 0.53, 0.28, 0.77),
    "MOFIR": (0.77, 0.91, 0.8, 0.95),
    "DORL": (0.62, 0.92, 0.93, 0.98),
    "DNaIR": (0.17, 0.65, 0.91, 0.41),
    "SAC4IR": (0.18, 0.94, 0.34, 0.59),
    "Ours": (0.03, 0.08, 0.3, 0.26),
    "FLAT": (0.13, 0.19, 0.46, 0.43),
    "HRL": (0.17, 0.39, 0.35, 0.66),
    "+RCE": (0.63, 0.75, 0.7, 0.77),
    "+TCE": (0.63, 0.74, 0.73, 0.79),
    "+BOD": (0.65, 0.89, 0.56, 0.8),
}


@pytest.mark.parametrize("row", PUBLISHED_RESULTS, ids=lambda row: f"{row.data}-{row.name}-{row.max_len}")
def test_every_published_row_lies_between_floor_and_ceiling(row):
    length, reward = row.means["len"], row.means["r_each"]
    floor, ceiling = length_floor_and_ceiling(row.max_len, reward)
    assert floor <= length <= ceiling
    by_hand = BY_HAND[row.name][WORLDS.index((row.data, row.max_len))]
    assert implied_violation_rate(length, row.max_len, reward) == pytest.approx(by_hand, abs=0.0051)
    assert 0.0 <= normalised_length(length, row.max_len, reward) <= 1.0


def test_all_published_rows_are_here():
    keys = {(row.data, row.name, row.max_len) for row in PUBLISHED_RESULTS}
    assert len(keys) == len(PUBLISHED_RESULTS) == 52
    assert keys == {(data, name, max_len) for name in BY_HAND for data, max_len in WORLDS}
    assert [row.table for row in PUBLISHED_RESULTS] == [2] * 32 + [3] * 20


def test_every_figure_is_what_the_tables_add_up_to():
    """Column sums, added up from the printed page: a mistyped digit does not survive them."""
    sums = {
        name: sum(row.means[name] + row.spreads[name] for row in PUBLISHED_RESULTS)
        for name in ("len", "r_each", "r_cum", "ad")
    }
    assert sums == pytest.approx({"len": 1276.703, "r_each": 42.212, "r_cum": 1020.113, "ad": 23.038}, abs=1e-6)


def test_published_cumulative_reward_is_len_times_reward_up_to_twelve_percent():
    ratios = [row.means["r_cum"] / (row.means["len"] * row.means["r_each"]) for row in PUBLISHED_RESULTS]
    assert min(ratios) == pytest.approx(0.88, abs=0.005)
    assert max(ratios) < 1.04
    assert np.mean(ratios) == pytest.approx(0.974, abs=0.002)


def test_methods_of_the_zoo_find_their_published_rows():
    task = Task("mine", 30, "allow", "KuaiRec", "real")
    row = published_result(task, Variant("dsrm-hrl", "candidates"), 30)
    assert row is not None and row.means == {"len": 26.6, "r_each": 0.917, "r_cum": 23.752, "ad": 0.008}
    assert row.spreads["len"] == 0.816
    assert published_result(task, Variant("dsrm-hrl", "candidates"), 40) is None
    assert published_result(task, Variant("dsrm-hrl", "ips"), 30) is None
    assert published_result(task, Variant("quota-greedy"), 30) is None
    named = {Variant(name, spec.purifier).paper_name for name, spec in METHODS.items()} - {None}
    assert {"A2C", "TD3", "Ours", "FLAT", "HRL", "+RCE", "+TCE", "+BOD"} <= named
    assert named <= {row.name for row in PUBLISHED_RESULTS}
    assert set(PUBLISHED_SECONDS) <= {row.name for row in PUBLISHED_RESULTS}


def test_worlds_are_matched_to_the_papers_by_name():
    assert paper_data("KuaiFair-KuaiRandTwin-v0", "anything") == "KuaiRand-Pure"
    assert paper_data("mine", "KuaiRec") == "KuaiRec"
    assert paper_data("KuaiFair-Toy-v0", "Toy") is None
    assert {log.data for log in PUBLISHED_LOGS} == {row.data for row in PUBLISHED_RESULTS}


TWIN = "KuaiRecTwin (own)"


def test_differences_pair_users_and_count_every_seed(runs, comparison):
    found = differences(comparison, "a2c")
    task = Task(LIKE_THE_PAPERS, 30, "allow", "small", "own")
    to_hrl = next(one for one in found if (one.task, one.other.method, one.figure) == (task, "hrl", "r_cum"))

    def earned(run):
        return EvaluatedRun.of_run(run).users.per_session("r_cum")

    first, second = (np.stack([earned(run) for run in runs_of(runs, name)]) for name in ("a2c", "hrl"))
    assert to_hrl.estimate.value == pytest.approx(first.mean() - second.mean())
    assert to_hrl.estimate == crossed_difference(first, second)
    assert (to_hrl.seeds, to_hrl.seeds_text) == ((3, 3), "3, 3")
    (control,) = runs_of(runs, "random")
    to_random = next(one for one in found if (one.task, one.other.method, one.figure) == (task, "random", "r_cum"))
    expected = np.mean([(earned(run) - earned(control)).mean() for run in runs_of(runs, "a2c")])
    assert to_random.estimate.value == pytest.approx(expected)
    assert to_random.seeds_text == "3, control"
    assert len(found) == 2 * (2 * 5 + 2 * 3)


def test_controls_are_compared_over_users(comparison, monkeypatch):
    one = next(one for one in differences(comparison, "quota-greedy") if one.other.method == "random")
    assert one.seeds == (1, 1) and one.p_value < 0.01 and one.measured().low > 0
    assert one.seeds_text == "control, control"
    monkeypatch.setattr("hrl_policies.study.comparisons._MIN_TEST_USERS", 16)
    untested = next(one for one in differences(comparison, "quota-greedy") if one.other.method == "random")
    assert untested.p_value is None and "fewer than 16 users" in untested.why_untested


def with_more_seeds(runs):
    """Adds a fourth and a fifth seed of A2C, which did as its first and second did, and a fourth of HRL."""
    fourth, fifth = (
        [
            replace(run, config=replace(run.config, seed=run.config.seed + 100))
            for run in runs
            if run.config.seed == seed
        ]
        for seed in (11, 15)
    )
    trained = [run for run in fourth if run.config.method in ("a2c", "hrl")]
    return [*runs, *trained, *(run for run in fifth if run.config.method == "a2c")]


def test_three_seeds_have_an_interval_and_no_test(comparison):
    table = difference_table(comparison, "a2c", "x")
    header = table.full_header()
    for title in (": p", "p, Holm", "detectable"):
        assert {row[place] for place in _places(header, title) for row in table.rows} == {MISSING}
    assert all(row[place].low is not None for place in _places(header, ": difference") for row in table.rows)
    (note,) = [note for note in table.notes if note.startswith("No test")]
    assert "fewer than 4 seeds" in note and note.endswith("A2C + ips, Random, QuotaGreedy, Oracle †, HRL.")
    assert "p, Holm: adjusted for the 0 tests of this table." in table.notes


def test_a_method_that_is_untested_in_one_world_is_named_with_it(runs):
    own = [run for run in runs if run.config.world == OWN]
    (comparison,) = comparisons([*with_more_seeds(own), *(run for run in runs if run.config.world != OWN)])
    (note,) = [one for one in difference_table(comparison, "a2c", "x").notes if one.startswith("No test")]
    for part in (f"Random ({TWIN}, Max Len 8, repeats allowed; {TWIN}, Max Len 30, repeats allowed)", "HRL."):
        assert part in note and SMALL not in note


def test_all_p_values_of_a_table_are_corrected_together(runs):
    (comparison,) = comparisons(with_more_seeds(runs))
    table = difference_table(comparison, "a2c", "x")
    found = differences(comparison, "a2c")
    assert {one.seeds_text for one in found} == {"5, 5", "5, 4", "5, control"}
    header = table.full_header()
    raw = [row[place] for place in _places(header, ": p") for row in table.rows]
    adjusted = [row[place] for place in _places(header, "p, Holm") for row in table.rows]
    assert sorted(one.value for one in raw) == pytest.approx(sorted(one.estimate.p_value() for one in found))
    assert [one.value for one in adjusted] == pytest.approx(holm(np.asarray([one.value for one in raw])).tolist())
    assert any(f"the {len(found)} tests" in note for note in table.notes)
    assert str(table.rows[0][4])[0] in "+-"


def test_where_nothing_is_shown_the_table_says_what_would_have_been(runs):
    (comparison,) = comparisons(with_more_seeds(runs))
    table = difference_table(comparison, "a2c", "x")
    found = {(one.task, one.other, one.figure): one for one in differences(comparison, "a2c")}
    p_values = [one.p_value for one in found.values()]
    nulls = {key for key, p in zip(found, holm(np.asarray(p_values)), strict=True) if p > 0.05}
    assert 0 < len(nulls) < len(found)
    header = table.full_header()
    cells = [row[place] for place in _places(header, "detectable") for row in table.rows]
    assert sum(one != MISSING for one in cells) == len(nulls)
    expected = [found[key].estimate.detectable(0.05 / len(nulls)) for key in nulls]
    assert sorted(one.value for one in cells if one != MISSING) == pytest.approx(sorted(expected))
    # What would have been shown four times in five is more than what would just have been.
    for key in nulls:
        estimate = found[key].estimate
        assert abs(estimate.value) <= estimate.half_width(1 - 0.05 / len(nulls))
        assert estimate.detectable(0.05 / len(nulls)) >= estimate.half_width(1 - 0.05 / len(nulls))


def _places(header, ending):
    return [place for place, title in enumerate(header) if title.endswith(ending)]


def test_a_base_that_was_not_run_is_named_with_those_that_were(runs, comparison):
    with pytest.raises(ValueError, match=r"no run of 'flat'.*a2c, hrl, oracle"):
        difference_table(comparison, "flat", "x")
    with pytest.raises(ValueError, match="no finished run is of 'flat'"):
        study_tables(runs, base="flat")
    assert "differences" not in study_tables(runs)


def test_methods_need_no_seed_in_common(runs):
    a2c = [run for run in runs_of(runs, "a2c") if run.config.seed in (11, 15)]
    hrl = [run for run in runs_of(runs, "hrl") if run.config.seed == 19]
    (found,) = comparisons([*a2c, *hrl, *runs_of(runs, "random")])
    (to_random, _, to_hrl, _) = differences(found, "a2c")
    assert to_random.measured().low is not None
    assert to_hrl.seeds_text == "2, 1"
    earned = [np.mean([run.summary["r_cum"] for run in group]) for group in (a2c, hrl)]
    assert to_hrl.estimate.value == pytest.approx(earned[0] - earned[1])


def test_a_single_training_seed_has_no_interval_and_no_test(runs):
    hrl = [run for run in runs_of(runs, "hrl") if run.config.seed == 19]
    (found,) = comparisons([*runs_of(runs, "a2c"), *hrl])
    table = difference_table(found, "a2c", "x")
    assert str(table.rows[0][4]) == f"{table.rows[0][4].value:+.2f}" and table.rows[0][5] == MISSING
    assert "No interval and no test, as one of the methods was trained with a single seed: HRL." in table.notes


def test_scores_are_nothing_at_the_floor_and_one_at_the_fair_control(comparison):
    lengths, rewards = length_scores(comparison), reward_scores(comparison)
    control = rewards.by_variant[Variant("quota-greedy", "")]
    assert control == pytest.approx(np.ones((1, 4)))
    assert rewards.by_variant[Variant("random", "")] == pytest.approx(np.zeros((1, 4)))
    assert (rewards.by_variant[Variant("oracle", "")] > 1.5).all()
    run = comparison.by_cell[comparison.tasks[0], Variant("a2c", "")][0]
    summary = run.record.summary
    by_hand = (summary["len"] - summary["len_floor"]) / (summary["len_ceiling"] - summary["len_floor"])
    assert lengths.by_variant[Variant("a2c", "")][0, 0] == pytest.approx(by_hand)
    assert lengths.by_variant[Variant("a2c", "")].shape == (3, 4)
    # HRL was not run in both worlds: no score over all tasks.
    assert Variant("hrl", "") not in lengths.by_variant


def test_score_table_has_intervals_for_seeds_and_chances_against_the_base(comparison):
    table = score_table(comparison, "a2c", "x")
    assert [row[0] for row in table.rows] == ["A2C", "Random", "QuotaGreedy", "Oracle †"]
    header = table.full_header()
    place = header.index("normalised R_cum: P(base better)")
    chances = {row[0]: row[place] for row in table.rows}
    assert chances["A2C"] == MISSING and chances["QuotaGreedy"].value == 0.0
    middle = table.rows[0][header.index("normalised Len: IQM")]
    expected = stratified_interval(length_scores(comparison).by_variant[Variant("a2c", "")], resamples=10_000)
    assert (middle.value, middle.low) == pytest.approx((expected.estimate, expected.low))
    assert "normalised Len: P(base better)" not in score_table(comparison, None, "x").full_header()


def test_without_the_controls_there_is_no_reward_score(runs):
    (found,) = comparisons([run for run in runs if run.config.method != "quota-greedy"])
    assert reward_scores(found) is None
    assert [span.title for span in score_table(found, None, "x").spans] == ["normalised Len"]
