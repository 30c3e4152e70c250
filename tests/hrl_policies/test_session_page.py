"""The page of one session: what it says is what happened, and nothing in it is taken for markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import isclose

import numpy as np
import pytest
from small_worlds import small_pair

from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.controls import GreedyCTR, Oracle
from hrl_policies.study.session_page import observe_session, write_session_page
from kuaifair_env import SessionConfig, evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv

CONFIG = SessionConfig(action_mode="slate", slate_size=5, max_len=12)


def observed(pair, agent, seed=7):
    env = KuaiFairVecEnv(pair.test, CONFIG, 1, 0)
    return observe_session(agent, env, pair, pair.test.user_ids[0], title=type(agent).__name__, seed=seed)


@pytest.fixture(scope="module")
def pair():
    return small_pair(np.linspace(0.05, 0.95, 50)[None].repeat(40, 0))


@pytest.mark.parametrize("control", [GreedyCTR, BeliefQuota, Oracle])
def test_a_session_is_the_one_that_evaluation_plays(pair, control):
    arguments = () if control is Oracle else (pair.scorer,)
    session = observed(pair, control(*arguments))
    env = KuaiFairVecEnv(pair.test, CONFIG, 4, 0)
    result = evaluate(control(*arguments), env, pair.test.user_ids[:1], seed=7)
    assert session.trace.steps == result.sessions.length[0]
    assert isclose(session.trace.rewards.sum(), result.sessions.return_[0], rel_tol=1e-6)
    assert session.trace.leave_reason is not None


def test_the_belief_moves_towards_what_is_clicked(pair):
    session = observed(pair, GreedyCTR(pair.scorer))
    before, after, clicks = (np.asarray(part) for part in (session.before, session.after, session.trace.clicks))
    assert len(session.states) == session.trace.steps + 1
    assert ((before > 0) & (before < 1) & (after > 0) & (after < 1)).all()
    assert (after - before)[clicks].mean() > (after - before)[~clicks].mean()
    certainty = [state.taste_certainty for state in session.states]
    assert certainty[0] == 0 and certainty[-1] > 0
    assert session.states[-1].level_deviation < session.states[0].level_deviation


def test_agents_meet_the_same_user_and_another_seed_gives_another_session(pair):
    one, again, other = (observed(pair, GreedyCTR(pair.scorer), seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(one.trace.clicks, again.trace.clicks)
    assert one.trace.clicks.shape != other.trace.clicks.shape or (one.trace.clicks != other.trace.clicks).any()


def test_the_page_holds_the_session_and_takes_no_name_for_markup(pair, tmp_path):
    hostile = "</script><script>alert(1)</script>"
    session = observed(pair, GreedyCTR(pair.scorer))
    ids = np.asarray([f"{hostile}{number}" for number in range(pair.test.n_items)])
    session = replace(session, title=hostile, trace=replace(session.trace, item_ids=ids, user_id=hostile))
    page = write_session_page(tmp_path / "page.html", [session], seed=7, origin="own", command=hostile)
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and hostile not in text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    (data,) = re.findall(r'<script type="application/json" id="sessions">(.*?)</script>', text)
    (described,) = json.loads(data)
    assert described["title"] == hostile and described["steps"][0]["ids"] == [ids[i] for i in session.trace.items[0]]
    assert len(described["tempers"]) == len(described["states"]) == len(described["steps"]) + 1
