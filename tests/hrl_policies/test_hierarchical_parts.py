"""The parts of the hierarchical agent: advantages, fairness rewards, item tables, windows, settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import small_world
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer

from dsrm.click_scorer import ClickScorer
from hrl_policies.common.yaml_files import validated
from hrl_policies.hrl_ppo import HierarchySettings
from hrl_policies.hrl_ppo.items import ItemTable, Observed, Window
from hrl_policies.hrl_ppo.networks import omegas
from hrl_policies.hrl_ppo.rewards import advantages, fairness_reward
from kuaifair_env.metrics import gini

T, B = 24, 5
GAMMA, LAMBDA = 0.9, 0.8


class Steps:
    """Random steps of ``T x B`` sessions, a tenth of which end."""

    def __init__(self, seed: int, ending: float = 0.1) -> None:
        rng = np.random.default_rng(seed)
        self.rewards = rng.normal(size=(T, B)).astype(np.float32)
        self.values = rng.normal(size=(T, B)).astype(np.float32)
        self.done = rng.random((T, B)) < ending
        self.cut = self.done & (rng.random((T, B)) < 0.5)
        self.final = np.where(self.cut, rng.normal(size=(T, B)), 0).astype(np.float32)
        self.last = rng.normal(size=B).astype(np.float32)

    def advantages(self, decided=None, final=None):
        decided = np.ones((T, B), np.bool_) if decided is None else decided
        final = self.final if final is None else final
        return advantages(self.rewards, self.values, self.done, final, self.last, decided, GAMMA, LAMBDA)

    def every(self, interval: int):
        """Where decisions fall that hold for some steps and not beyond a session."""
        decided = np.zeros((T, B), np.bool_)
        left = np.zeros(B, int)
        for step in range(T):
            decided[step] = left == 0
            left = np.where(decided[step], interval, left) - 1
            left[self.done[step]] = 0
        return decided


def of_stable_baselines(steps: Steps, rewards) -> np.ndarray:
    buffer = RolloutBuffer(T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), gae_lambda=LAMBDA, gamma=GAMMA, n_envs=B)
    starts = np.ones(B, np.float32)
    for step in range(T):
        value = torch.from_numpy(steps.values[step])
        buffer.add(np.zeros((B, 1)), np.zeros((B, 1)), rewards[step], starts, value, torch.zeros(B))
        starts = steps.done[step].astype(np.float32)
    buffer.compute_returns_and_advantage(torch.from_numpy(steps.last), steps.done[-1])
    return buffer.advantages


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.5]))
def test_advantages_of_single_steps_are_those_of_stable_baselines(seed, ending):
    steps = Steps(seed, ending)
    found = steps.advantages(final=np.zeros((T, B), np.float32))
    np.testing.assert_allclose(found, of_stable_baselines(steps, steps.rewards), rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_sessions_that_were_cut_off_go_on_with_the_value_of_where_they_were(seed):
    """Stable-Baselines3 adds the discounted value to the last reward, to the same effect."""
    steps = Steps(seed, 0.3)
    expected = of_stable_baselines(steps, steps.rewards + GAMMA * steps.final)
    np.testing.assert_allclose(steps.advantages(), expected, rtol=1e-4, atol=1e-5)


def literal_smdp(steps: Steps, decided, session: int):
    """One session's semi-Markov advantages, written out segment by segment."""
    starts = [step for step in range(T) if decided[step, session]]
    ends = [*starts[1:], T]
    found = np.zeros(T)
    for first in range(len(starts)):
        weight = 1.0
        for low, high in zip(starts[first:], ends[first:], strict=True):
            length = high - low
            over = bool(steps.done[high - 1, session])
            gained = sum(GAMMA**j * steps.rewards[low + j, session] for j in range(length))
            if over:
                after = steps.final[high - 1, session]
            else:
                after = steps.last[session] if high == T else steps.values[high, session]
            delta = gained + GAMMA**length * after - steps.values[low, session]
            found[starts[first]] += weight * delta
            weight *= GAMMA**length * LAMBDA
            if over:
                break
    return found


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([1, 4, 10]), st.sampled_from([0.05, 0.3]))
def test_advantages_of_decisions_that_hold_are_those_of_a_semi_markov_process(seed, interval, ending):
    steps = Steps(seed, ending)
    decided = steps.every(interval)
    found = steps.advantages(decided)
    expected = np.stack([literal_smdp(steps, decided, session) for session in range(B)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[~decided] == 0).all()


def test_only_the_value_at_decisions_counts():
    steps = Steps(7)
    decided = steps.every(4)
    before = steps.advantages(decided)
    steps.values = np.where(decided, steps.values, 99.0).astype(np.float32)
    np.testing.assert_array_equal(steps.advantages(decided), before)


POPULAR = np.array([True, True, True, False, False, False, False, False, False, False])
POPULARITY = np.arange(10, 0, -1)
SILENT = np.zeros(3, np.float32)
SLATES = np.array([[0, 1, 3, 4], [0, 1, 2, 3], [6, 7, 8, 9]])


def fair(kind, sessions=3, size=4):
    return fairness_reward(kind, POPULAR, POPULARITY, sessions, size)


def test_slate_disparity_is_the_distance_from_half_and_half():
    found = fair("slate_ad").reward(SLATES, SILENT)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.0, -0.5, -1.0])


def test_session_share_has_a_half_life_of_five_slates_and_forgets_ended_sessions():
    form = fair("ema_group")
    first = form.reward(SLATES, SILENT)
    kept = 0.5**0.2
    shares = kept * 0.5 + (1 - kept) * np.array([0.5, 0.75, 0.0])
    np.testing.assert_allclose(first, -np.abs(2 * shares - 1), rtol=1e-5)
    for _ in range(4):
        last = form.reward(SLATES, SILENT)
    # Five slates without a popular item leave half of the disparity to go: .5 -> .25 -> 0.
    np.testing.assert_allclose(last[[0, 2]], [0.0, -0.5], atol=1e-6)
    form.end_sessions(np.array([False, False, True]))
    np.testing.assert_allclose(form.reward(SLATES, SILENT)[2], first[2], rtol=1e-5)
    assert form.reward(SLATES, SILENT)[1] < first[1], "sessions that go on keep their share"


def test_system_gini_pays_for_what_a_step_changed():
    form = fair("ema_gini")
    one, two = np.array([[0, 1, 3, 4]] * 3), np.array([[5, 6, 7, 8]] * 3)
    np.testing.assert_array_equal(form.reward(one, SILENT), [0, 0, 0])
    kept = 1 - 12 / (20 * 10 + 12)
    shown = np.bincount(one.ravel(), minlength=10).astype(float)
    before = gini(shown)
    shown = kept * shown + np.bincount(two.ravel(), minlength=10)
    found = form.reward(two, SILENT)
    np.testing.assert_allclose(found, (before - gini(shown)) * 10 / 4, rtol=1e-5)
    assert found[0] > 0 and (found == found[0]).all(), "showing what was not shown is fairer for all"
    assert form.reward(two, SILENT)[0] < 0.1 * found[0], "showing it again pays less"
    form.start_rollout()
    np.testing.assert_array_equal(form.reward(two, SILENT), [0, 0, 0])


def test_decile_gini_looks_at_deciles_of_popularity():
    """With 20 items a decile holds two, which are interchangeable."""
    order = np.random.default_rng(0).permutation(20)
    popularity = np.empty(20)
    popularity[order] = np.arange(20)
    form = fairness_reward("decile_gini", popularity > 15, popularity, 1, 2)
    decile = [order[2 * place : 2 * place + 2] for place in range(10)]
    assert form.reward(np.array([[decile[0][0], decile[1][0]]]), SILENT[:1]) == [0]
    kept = 1 - 2 / (20 * 20 + 2)
    same = form.reward(np.array([[decile[0][1], decile[1][1]]]), SILENT[:1])
    np.testing.assert_allclose(same, 0, atol=1e-6)
    shown = np.zeros(10)
    shown[:2] = (1 + kept) / 2
    before = gini(shown)
    shown[:2] *= kept
    shown[[8, 9]] = 0.5
    expected = (before - gini(shown)) * 10
    np.testing.assert_allclose(form.reward(np.array([[decile[8][1], decile[9][0]]]), SILENT[:1]), expected, rtol=1e-5)


def test_policy_entropy_is_that_of_a_uniform_choice_at_best():
    entropies = np.array([np.log(10), 0.0, np.log(10) / 2], np.float32)
    np.testing.assert_allclose(fair("policy_entropy").reward(SLATES, entropies), [0, -1, -0.5], atol=1e-6)


@pytest.mark.parametrize("kind", ["slate_ad", "ema_group", "ema_gini", "decile_gini", "policy_entropy"])
def test_every_form_starts_a_rollout_as_it_started_the_first(kind):
    form = fair(kind)
    everything = np.ones(3, np.bool_)
    first = form.reward(SLATES, SILENT)
    form.reward(SLATES[::-1], SILENT)
    form.end_sessions(everything)
    form.start_rollout()
    np.testing.assert_array_equal(form.reward(SLATES, SILENT), first)


def test_unknown_fairness_is_refused():
    with pytest.raises(ValueError, match="slate_ad"):
        fair("fairest")


def filled(scorer=None, candidates=40):
    world = small_world(candidates=candidates)
    table = ItemTable(world.n_items, world.dimension, 10)
    table.fill(world, scorer)
    return world, table


def test_order_and_place_lead_there_and_back():
    world, table = filled()
    everything = torch.arange(40)
    assert torch.equal(table.order[table.place], everything)
    assert torch.equal(table.place[table.order], everything)
    heads = int(world.groups.popular.sum())
    assert 0 < heads < 40
    np.testing.assert_array_equal(world.groups.popular[table.order.numpy()], np.arange(40) < heads)


def test_tables_are_the_world_s_own():
    world, table = filled()
    place = table.place.numpy()
    np.testing.assert_array_equal(table.popular.numpy()[place], world.groups.popular)
    logs = np.log1p(world.data.train.exposures(50)[:40])
    np.testing.assert_allclose(table.popularity.numpy()[place], (logs - logs.mean()) / logs.std(), rtol=1e-4)
    vectors = world.embeddings[:40]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(table.units.numpy()[place], units, rtol=1e-4, atol=1e-6)
    assert (table.prior == 0).all() and table.similarity == 1
    heads = int(world.groups.popular.sum())
    expected = [count <= heads and 10 - count <= 40 - heads for count in range(11)]
    assert table.feasible.tolist() == expected


def test_with_a_scorer_the_accuracy_term_is_the_scorer_s():
    world = small_world(candidates=40)
    scorer = ClickScorer.fit(world)
    _, table = filled(scorer)
    states = np.random.default_rng(0).normal(size=(6, world.dimension)).astype(np.float32)
    queries = torch.nn.functional.normalize(torch.from_numpy(states), dim=1)
    found = table.prior + (queries @ table.units.T) * table.similarity
    np.testing.assert_allclose(found[:, table.place], scorer.score(states), rtol=1e-4, atol=1e-4)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([0, 12, 20, 24, 39, 40, 100]))
def test_candidates_are_the_best_of_each_group(seed, count):
    _, table = filled()
    scores = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 40)).astype(np.float32))
    found = table.best_candidates(scores, count).numpy()
    if count == 0 or count >= 40:
        np.testing.assert_array_equal(found, np.tile(np.arange(40), (3, 1)))
        return
    half = max(count // 2, 10)
    for row, chosen in zip(scores.numpy(), found, strict=True):
        expected = []
        for group in (table.popular.numpy(), ~table.popular.numpy()):
            members = np.flatnonzero(group)
            expected.extend(members[np.argsort(-row[members])][:half])
        assert sorted(expected) == sorted(chosen)


def test_group_scores_are_the_mean_of_half_a_slate_of_each_group():
    _, table = filled()
    scores = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    expected = [
        [np.sort(row[group])[::-1][:5].mean() for group in (table.popular.numpy(), ~table.popular.numpy())]
        for row in scores
    ]
    np.testing.assert_allclose(table.group_scores(torch.from_numpy(scores)), expected, rtol=1e-5)
    for count in (0, 6, 22, 38, 100):
        candidates = table.best_candidates(torch.from_numpy(scores), count)
        among = table.group_scores(torch.from_numpy(scores).gather(1, candidates), count)
        np.testing.assert_allclose(among, expected, rtol=1e-5)


H = 15


def windows(seed, table):
    """Codes up to 50: items 40 .. 49 stand in the log only."""
    rng = np.random.default_rng(seed)
    items = rng.integers(0, 51, (4, H))
    items[0] = 0
    items[1, 5:] = items[1, 4]
    clicks = rng.random((4, H)) < 0.5
    clicks[items == 0] = rng.random() < 0.5
    observed = Window(torch.from_numpy(items), torch.from_numpy(clicks.astype(np.float32)), table)
    return items, clicks, observed


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_clicks_and_skips_are_counted_by_candidate(seed):
    _, table = filled()
    items, clicks, window = windows(seed, table)
    candidates = np.stack([np.random.default_rng(seed + r).permutation(40)[:25] for r in range(4)])
    found = window.counts(torch.from_numpy(candidates)).numpy()
    order = table.order.numpy()
    for row in range(4):
        for column, place in enumerate(candidates[row]):
            here = items[row] == order[place] + 1
            assert found[row, column].tolist() == [(here & clicks[row]).sum(), (here & ~clicks[row]).sum()]


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_weights_of_clicks_and_skips_are_added_to_scores(seed):
    _, table = filled()
    _, _, window = windows(seed, table)
    scores = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed))
    counts = window.counts(torch.arange(40).expand(4, -1))
    found = window.add_memory(scores, torch.tensor([0.7, -0.4]))
    np.testing.assert_allclose(found, scores + 0.7 * counts[..., 0] - 0.4 * counts[..., 1], atol=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_the_manager_sees_what_the_window_holds(seed):
    world, table = filled()
    items, clicks, window = windows(seed, table)
    found = window.context().numpy()

    def share(part, whole):
        return part / whole if whole else 0.0

    for row in range(4):
        known = [(item - 1, click) for item, click in zip(items[row], clicks[row], strict=True) if 0 < item <= 40]
        head = [click for item, click in known if world.groups.popular[item]]
        tail = [click for item, click in known if not world.groups.popular[item]]
        expected = [
            len(known) / H,
            share(sum(head) + sum(tail), len(known)),
            share(len(head), len(known)),
            share(sum(head), sum(head) + sum(tail)),
            share(sum(head), len(head)) - share(sum(tail), len(tail)),
        ]
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


def test_items_that_are_no_candidates_leave_no_trace():
    _, table = filled()
    items = torch.tensor([[0, 0, 3, 17], [0, 0, 3, 17]])
    items[1, :2] = torch.tensor([41, 50])
    clicks = torch.tensor([[0.0, 0, 1, 0], [1, 1, 1, 0]])
    window = Window(items, clicks, table)
    everything = torch.arange(40).expand(2, -1)
    for found in (window.counts(everything), window.context()):
        assert torch.equal(found[0], found[1])
    assert window.counts(everything).sum() == 4


def test_observations_without_a_window_have_a_silent_context():
    _, table = filled()
    plain = Observed(np.ones((3, 8), np.float32), table)
    assert plain.window is None and len(plain) == 3 and (plain.context == 0).all()
    keyed = {
        "state": np.ones((3, 8), np.float32),
        "history_items": np.full((3, 4), 7),
        "history_clicks": np.ones((3, 4), np.int8),
    }
    assert torch.equal(Observed(keyed, table).state, plain.state)
    assert (Observed(keyed, table).context[:, :2] == 1).all()


def test_weights_of_eq_6():
    x = torch.tensor([[-2.0, 1.0], [0.0, 0.0], [3.0, -4.0]])
    accuracy, fairness = omegas(x[:, :1], "simplex")
    np.testing.assert_allclose(fairness, 1 / (1 + np.exp([2.0, 0.0, -3.0])), rtol=1e-6)
    np.testing.assert_allclose(accuracy + fairness, 1, rtol=1e-6)
    found = torch.stack(omegas(x, "paper"), dim=1)
    np.testing.assert_allclose(found, np.log1p(np.exp(x.numpy())), rtol=1e-5)


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"manager": "frozen"}, "manager must be 'learned'"),
        ({"weights": "softmax"}, "weights must be 'simplex'"),
        ({"worker": "pointer"}, "worker must be 'query'"),
        ({"manager": "flat", "weights": "quota"}, "need a manager"),
        ({"manager": "flat", "weights": "her4if"}, "need a manager"),
        ({"candidates": -1}, "candidates"),
        ({"interval": 0}, "interval"),
        ({"width": 0}, "width"),
        ({"start_temperature": 0.0}, "start_temperature"),
        ({"start_deviation": -1.0}, "start_deviation"),
        ({"temprature": 1.0}, "temprature is unknown; there are candidates"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given_settings, message):
    with pytest.raises(ValueError, match=message):
        validated(HierarchySettings, given_settings, "hierarchy")


def test_the_manager_s_action_has_one_component_or_a_weight_of_each_group():
    sizes = {form: HierarchySettings(weights=form).action_size for form in ("simplex", "paper", "her4if", "quota")}
    assert sizes == {"simplex": 1, "paper": 2, "her4if": 2, "quota": 1}
