"""Users leave exactly when the published rules say so."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuaifair_env.abandonment import (
    LEAVE_RULES,
    CategoryBoredom,
    NeverLeave,
    TemperFairness,
    describe_rule,
    leave_rule,
    rule_text,
)


@dataclass(frozen=True)
class Facts:
    """What a rule may ask of a world, without a world."""

    tags: np.ndarray = field(default_factory=lambda: np.zeros((20, 0), np.bool_))
    tolerated_shares: np.ndarray = field(default_factory=lambda: np.zeros(20))


NO_FACTS = Facts()


def length(rule: TemperFairness, max_len: int, reward: float, popular_share: float, slate_size: int = 10) -> int:
    """Plays constant slates until the user leaves."""
    bound = rule.bind(1, slate_size, max_len, NO_FACTS)
    bound.reset(np.array([0]), np.array([0]))
    items = np.arange(slate_size)[None]
    for step in range(1, 10 * max_len):
        decision = bound.update(items, np.array([popular_share]), np.array([reward]), np.array([step]))
        if decision.leaves[0]:
            return step
    raise AssertionError("the user never left")


# Reward -> (always penalised; with one step of grace; never penalised), for temper 30 and 50.
VECTORS = {
    30: {
        0.0: (10, 11, 15),
        0.5: (12, 13, 20),
        0.73: (13, 14, 23),
        0.788: (14, 14, 24),
        0.9: (14, 15, 27),
        1.0: (15, 16, 30),
    },
    50: {0.0: (17, 17, 25), 0.5: (20, 21, 33), 0.73: (22, 23, 39), 0.9: (24, 24, 45), 1.0: (25, 26, 50)},
}


@pytest.mark.parametrize("max_len", VECTORS)
def test_constant_slates_last_as_long_as_the_published_rule_says(max_len):
    for reward, (always, grace, never) in VECTORS[max_len].items():
        assert length(TemperFairness(), max_len, reward, 0.8) == always
        assert length(TemperFairness(grace_steps=1), max_len, reward, 0.8) == grace
        assert length(TemperFairness(), max_len, reward, 0.5) == never


def test_the_bound_is_inclusive_and_forgives_rounding():
    # |2 * 0.65 - 1| is 0.30000000000000004 or 0.29999999999999993, depending on the order of the arithmetic.
    for share in (0.65, 0.35, 13 / 20, 1 - 0.65):
        assert length(TemperFairness(), 30, 0.5, share, 20) == 12
    assert length(TemperFairness(), 30, 0.5, 0.6, 10) == 20
    assert length(TemperFairness(ad_bound=0.1), 30, 0.5, 0.6, 10) == 12


def test_temper_of_exactly_one_stays_although_tenths_do_not_add_up_in_binary():
    bound = TemperFairness().bind(1, 10, 3, NO_FACTS)
    bound.reset(np.array([0]), np.array([0]))
    items = np.arange(10)[None]
    rewards = [0.9, 0.9, 1.0 + 0.2]  # 1.1 + 1.1 + 0.8: the temper falls from 3 to 0 by tenths
    tempers = [bound.update(items, np.array([0.5]), np.array([r]), np.array([t + 1])) for t, r in enumerate(rewards)]
    assert not tempers[0].leaves[0]
    exactly_one = TemperFairness(initial_temper=4.0).bind(1, 10, 3, NO_FACTS)
    exactly_one.reset(np.array([0]), np.array([0]))
    steps = [
        exactly_one.update(items, np.array([0.5]), np.array([r]), np.array([t + 1]))
        for t, r in enumerate([0.9, 0.9, 1.2])
    ]
    assert steps[-1].temper[0] == pytest.approx(1.0)
    assert not steps[-1].leaves[0]


def test_modes_evaluate_the_side_they_name():
    tail_only, popular_only = 0.0, 1.0
    assert length(TemperFairness(), 30, 0.5, tail_only) == 12
    assert length(TemperFairness(mode="popular_only"), 30, 0.5, tail_only) == 20
    assert length(TemperFairness(mode="popular_only"), 30, 0.5, popular_only) == 12
    proportional = TemperFairness(mode="target", target_share=0.2)
    assert length(proportional, 30, 0.5, 0.2) == 20
    assert length(proportional, 30, 0.5, 0.5) == 12


@pytest.mark.parametrize("mode", ["parity", "popular_only"])
def test_a_target_without_its_mode_is_an_error(mode):
    with pytest.raises(ValueError, match=r"no effect.*add mode='target'"):
        TemperFairness(mode=mode, target_share=0.3)


def test_no_fairness_is_kuaisims_rule():
    assert length(TemperFairness(unfair_penalty=0.0), 20, 0.5, 1.0) == 13


@pytest.mark.parametrize(("slate_size", "window"), [(1, 4), (2, 2), (3, 2), (4, 1), (10, 1)])
def test_small_slates_are_evaluated_over_as_many_as_make_four_items(slate_size, window):
    assert TemperFairness().window_for(slate_size) == window
    assert TemperFairness(window=5).window_for(slate_size) == 5

    def violations(popular_items: list[int]) -> list[bool]:
        bound = TemperFairness().bind(1, slate_size, 30, NO_FACTS)
        bound.reset(np.array([0]), np.array([0]))
        items = np.arange(slate_size)[None]
        return [
            bool(bound.update(items, np.array([n / slate_size]), np.array([0.5]), np.array([t + 1])).violation[0])
            for t, n in enumerate(popular_items)
        ]

    # As many popular as long-tail items in every window that is evaluated, then popular ones alone.
    balanced = [slate_size // 2, slate_size - slate_size // 2] * 5
    assert violations(balanced) == [False] * 10
    assert violations([slate_size] * 10) == [False] * (window - 1) + [True] * (11 - window)


def test_the_window_of_single_items_moves_on():
    bound = TemperFairness().bind(1, 1, 30, NO_FACTS)
    bound.reset(np.array([0]), np.array([0]))
    shares = [1.0] * 5 + [0.0] * 6
    violations = [
        bool(bound.update(np.array([[0]]), np.array([p]), np.array([0.5]), np.array([t + 1])).violation[0])
        for t, p in enumerate(shares)
    ]
    # Popular among the last four: 4, 4, 3, 2 (equal), 1, 0, 0, 0.
    assert violations == [False] * 3 + [True] * 3 + [False] + [True] * 4


def test_a_new_session_forgets_the_last_one():
    bound = TemperFairness(window=3).bind(2, 4, 30, NO_FACTS)
    bound.reset(np.array([0, 1]), np.array([0, 1]))
    items = np.tile(np.arange(4), (2, 1))
    for step in range(1, 4):
        bound.update(items, np.array([1.0, 1.0]), np.array([0.0, 0.0]), np.array([step, step]))
    bound.reset(np.array([1]), np.array([1]))
    decision = bound.update(items, np.array([0.5, 0.5]), np.array([0.0, 0.0]), np.array([4, 1]))
    np.testing.assert_allclose(decision.disparity, [abs(2 * 2.5 / 3 - 1), 0.0])
    np.testing.assert_allclose(decision.temper, [30 - 3 * 3 - 3, 28.0])


def test_category_boredom_counts_tags_of_the_recent_items():
    tags = np.zeros((6, 2), np.bool_)
    tags[:3, 0] = tags[3:, 1] = True
    bound = CategoryBoredom(window=3, threshold=1).bind(1, 1, 30, Facts(tags))
    bound.reset(np.array([0]), np.array([0]))
    shown = [0, 3, 1, 4, 2]
    left = [
        bool(bound.update(np.array([[i]]), np.zeros(1), np.zeros(1), np.array([t + 1])).leaves[0])
        for t, i in enumerate(shown)
    ]
    # Before item 2 (tag 0) the window holds 3, 1, 4: tag 0 once, which threshold 1 forgives.
    assert left == [False] * 5
    assert not bound.update(np.array([[5]]), np.zeros(1), np.zeros(1), np.array([6])).leaves[0]
    # Now 4, 2, 5 are in the window: tag 1 twice, one more than forgiven.
    assert bound.update(np.array([[3]]), np.zeros(1), np.zeros(1), np.array([7])).leaves[0]


def test_category_window_is_short_at_first_and_not_read_from_its_end():
    tags = np.ones((4, 1), np.bool_)
    bound = CategoryBoredom(window=5, threshold=0).bind(1, 1, 30, Facts(tags))
    bound.reset(np.array([0]), np.array([0]))
    first = bound.update(np.array([[0]]), np.zeros(1), np.zeros(1), np.array([1]))
    second = bound.update(np.array([[1]]), np.zeros(1), np.zeros(1), np.array([2]))
    assert (bool(first.leaves[0]), bool(second.leaves[0])) == (False, True)


def test_rules_by_name_and_their_errors():
    assert leave_rule("strict") == TemperFairness(ad_bound=0.1)
    assert leave_rule(NeverLeave()) == NeverLeave()
    with pytest.raises(ValueError, match="choose from"):
        leave_rule("sometimes")
    with pytest.raises(ValueError, match="LeaveRule"):
        leave_rule(5)
    with pytest.raises(ValueError, match="too small to measure"):
        TemperFairness(window=1).bind(1, 1, 30, NO_FACTS)
    with pytest.raises(ValueError, match="has none"):
        CategoryBoredom().bind(1, 1, 30, NO_FACTS)
    for settings in (
        {"ad_bound": 1.5},
        {"unfair_penalty": -1.0},
        {"unfair_penalty": float("nan")},
        {"initial_temper": 0.5},
        {"initial_temper": float("nan")},
        {"mode": "both"},
        {"window": 0},
        {"grace_steps": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            TemperFairness(**settings)
    for settings in ({"window": 0}, {"threshold": -1}):
        with pytest.raises(ValueError, match="window must be at least 1 and threshold at least 0"):
            CategoryBoredom(**settings)
    for rule in (TemperFairness(), CategoryBoredom(), NeverLeave()):
        with pytest.raises(FrozenInstanceError):
            rule.window = 3


def test_a_rule_of_ones_own_is_described_by_its_name():
    class Own:
        def bind(self, batch_size, slate_size, max_len, world):
            raise NotImplementedError

    assert describe_rule(Own()) == {"rule": "Own"}


def test_users_who_never_leave_have_temper_left_at_the_end():
    bound = NeverLeave().bind(1, 1, 5, NO_FACTS)
    bound.reset(np.array([0]), np.array([0]))
    for step in range(1, 6):
        decision = bound.update(np.zeros((1, 1), int), np.zeros(1), np.zeros(1), np.array([step]))
        assert (decision.temper[0], bool(decision.leaves[0])) == (6 - step, False)


UNIT = st.floats(0, 1)
RULES = st.one_of(
    st.builds(
        TemperFairness,
        ad_bound=UNIT,
        unfair_penalty=st.floats(0, 1e9),
        mode=st.sampled_from(["parity", "popular_only", "personal"]),
        window=st.none() | st.integers(1, 1000),
        grace_steps=st.integers(0, 1000),
        initial_temper=st.none() | st.floats(1, 1e9),
    ),
    st.builds(TemperFairness, mode=st.just("target"), target_share=UNIT),
    st.builds(CategoryBoredom, window=st.integers(1, 1000), threshold=st.integers(0, 1000)),
    st.just(NeverLeave()),
    st.sampled_from(sorted(LEAVE_RULES)).map(leave_rule),
)


@given(RULES)
def test_every_rule_survives_each_of_its_forms(rule):
    assert leave_rule(rule) == rule
    assert leave_rule(rule_text(rule)) == rule
    assert leave_rule(json.loads(json.dumps(describe_rule(rule)))) == rule
    assert leave_rule(json.loads(json.dumps(asdict(rule)))) == rule, "as Gymnasium's specifications write it"


def test_numbers_of_numpy_are_written_as_plain_ones():
    rule = TemperFairness(ad_bound=np.float32(0.25), window=np.int64(2))
    assert leave_rule(json.loads(json.dumps(describe_rule(rule)))) == TemperFairness(ad_bound=0.25, window=2)


def test_a_rule_is_written_as_name_text_or_mapping():
    rule = TemperFairness(ad_bound=0.2, grace_steps=3)
    assert leave_rule("temper:ad_bound=0.2,grace_steps=3") == rule
    assert leave_rule(" temper : ad_bound = 0.2 , grace_steps = 3 ") == rule
    assert leave_rule({"rule": "temper", "ad_bound": 0.2, "grace_steps": 3}) == rule
    assert leave_rule("temper", {"ad_bound": 0.2, "grace_steps": 3}) == rule
    assert leave_rule("strict:grace_steps=3", {"ad_bound": 0.2}) == rule
    assert rule_text(rule) == "temper:ad_bound=0.2,grace_steps=3"
    assert rule_text(TemperFairness(ad_bound=0.1)) == "strict"
    assert leave_rule("temper:window=none,mode=popular_only,unfair_penalty=1e-1") == TemperFairness(
        mode="popular_only", unfair_penalty=0.1
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "sometimes:ad_bound=0.2",
            r"'sometimes'; choose from temper, strict, .*: ad_bound, .*; category \(parameters: window, thresh",
        ),
        ("temper:ad_bound", "written as in 'temper:ad_bound=0.2"),
        ("temper:ad_bound=", "written as in"),
        ("temper:ad_bound=0.2,ad_bound=0.3", "each once"),
        ("temper:bound=0.2", "'temper' has no parameter bound; it takes ad_bound, unfair_penalty"),
        ("never:window=3", "'never' has no parameter window; it takes nothing"),
        ("temper:ad_bound=low", "ad_bound must be a number, got 'low'"),
        ("temper:ad_bound=none", "ad_bound must be a number"),
        ("temper:grace_steps=1.5", "grace_steps must be a whole number"),
        ("category:threshold=x", "threshold must be a whole number"),
        ({"rule": "temper", "mode": ["parity"]}, "mode must be"),
        ({"rule": ["temper"]}, "no leave rule is called"),
        ({"ad_bound": 0.2}, "a leave rule as a mapping says which"),
        ({}, "says which"),
        ({"rule": "temper", 1: 2}, "'temper' has no parameter 1; it takes"),
        ("", "choose from"),
    ],
)
def test_a_rule_that_cannot_be_read_says_what_would_be_right(rule, message):
    with pytest.raises(ValueError, match=message):
        leave_rule(rule)


def test_under_personal_each_user_leaves_by_the_share_that_this_user_tolerates():
    facts = Facts(tolerated_shares=np.array([0.1, 0.5, 0.9]))
    bound = leave_rule("personal").bind(2, 10, 30, facts)
    bound.reset(np.array([0, 1]), np.array([2, 0]))
    items = np.tile(np.arange(10), (2, 1))
    first = bound.update(items, np.array([0.6, 0.6]), np.array([0.5, 0.5]), np.array([1, 1]))
    # |.6 - .9| is the bound itself, |.6 - .1| above it; |.7 - .9| is below.
    assert first.violation.tolist() == [True, True]
    second = bound.update(items, np.array([0.7, 0.3]), np.array([0.5, 0.5]), np.array([2, 2]))
    assert second.violation.tolist() == [False, False]
    np.testing.assert_allclose(second.temper, 30 - 1.5 * 2 - 1)
    bound.reset(np.array([1]), np.array([1]))
    third = bound.update(items, np.array([0.7, 0.3]), np.array([0.5, 0.5]), np.array([3, 1]))
    assert third.violation.tolist() == [False, False], "a new user in the row has a tolerance of its own"
    np.testing.assert_allclose(third.disparity, [0.4, 0.4], err_msg="|2p - 1|, which says nothing of the user")
