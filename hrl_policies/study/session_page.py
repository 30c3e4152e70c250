"""A page that replays one session step by step: slates, clicks, temper, and what a belief makes of the user.

The belief is the closed form of :mod:`dsrm.belief`, told what the session shows and nothing more. It is the same for
every agent, whatever the agent itself knows, so that two agents can be read side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsrm.belief import Belief, BeliefItems
from dsrm.session_evidence import SessionEvidence
from hrl_policies.study.labels import ORIGINS
from hrl_policies.study.loading import load_policy, purifier_of
from hrl_policies.study.page_assets import asset, page_environment, page_policy
from hrl_policies.study.store import StoredRun
from hrl_policies.worlds import WorldPair, purified_sessions
from hrl_policies.zoo import method
from kuaifair_env.abandonment import leave_rule
from kuaifair_env.adapters import Actor, check_agent, inference_mode, played, playing_sessions_of
from kuaifair_env.agent_view import sessions_for_agents
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import IntArray
from kuaifair_env.evaluation import binding, users_to_evaluate
from kuaifair_env.files import write_text_atomically
from kuaifair_env.render import SessionRecorder, SessionTrace, render_ansi
from kuaifair_env.simulator import FixedSessions


@dataclass(frozen=True)
class BeliefState:
    """What the belief says of the user before the first slate, or after one.

    Attributes:
        level: Mean of ``b``: by how much log-odds the user clicks more than the training log predicts.
        level_deviation: Its standard deviation.
        taste: Length of the mean of ``w``, the user's taste over item embeddings, in log-odds.
        taste_certainty: Share of the prior spread of ``w`` that is gone, in [0, 1].
        best_clicks: Expected clicks on the slate of the likeliest items, popular or not.
    """

    level: float
    level_deviation: float
    taste: float
    taste_certainty: float
    best_clicks: float


@dataclass(frozen=True)
class ObservedSession:
    """One session of an agent, with what the belief said meanwhile.

    Attributes:
        title: Name of the agent.
        trace: Slates, clicks, rewards and temper; ``T`` steps.
        before: ``float (T, K)``, predicted click probability of each shown item before its slate.
        after: ``float (T, K)``, of the same items once the slate was answered.
        states: ``T + 1`` states of the belief.
    """

    title: str
    trace: SessionTrace
    before: Sequence[Sequence[float]]
    after: Sequence[Sequence[float]]
    states: Sequence[BeliefState]


class _BeliefRecorder:
    """The belief about the user of row 0 of a batch, step by step."""

    def __init__(self, pair: WorldPair, batch: SessionBatch) -> None:
        belief = Belief(BeliefItems.of_world(batch.world))
        self._slate_size = batch.config.items_per_slate
        self._evidence = SessionEvidence(belief, pair.scorer, sessions_for_agents(batch))
        self._widths = self._evidence.beliefs.own.widths
        self.states: list[BeliefState] = []
        self.before: list[list[float]] = []
        self.after: list[list[float]] = []
        self._evidence.begin()
        self._probabilities = self._look()

    def add(self, items: IntArray) -> None:
        self.before.append(_rounded(self._probabilities[items]))
        self._evidence.take_step(np.asarray([0]))
        self._probabilities = self._look()
        self.after.append(_rounded(self._probabilities[items]))

    def _look(self) -> torch.Tensor:
        beliefs = self._evidence.beliefs
        probabilities = beliefs.logits(converged=True)[0].sigmoid()
        means, deviations = (moment[0] for moment in beliefs.moments())
        remaining = float((deviations[1:] / self._widths[1:]).mean()) if len(means) > 1 else 1.0
        self.states.append(
            BeliefState(
                level=round(float(means[0]), 3),
                level_deviation=round(float(deviations[0]), 3),
                taste=round(float(means[1:].norm()), 3),
                taste_certainty=round(min(max(1.0 - remaining, 0.0), 1.0), 3),
                best_clicks=round(float(probabilities.topk(self._slate_size).values.sum()), 2),
            )
        )
        return probabilities


def observe_session(
    policy: Any, env: Any, pair: WorldPair, user: int | str, *, title: str, seed: int
) -> ObservedSession:
    """Plays one session and returns all that its page shows.

    The same user and seed give the same session to every agent: what differs is what the agents show.

    Args:
        policy: What :func:`kuaifair_env.evaluate` takes.
        env: Sessions of the test world, one at a time.
        pair: The worlds, for the click model that the belief starts from.
        user: Raw id of a user of the environment's world.
        title: Name of the agent.
        seed: Seed of the session's randomness.

    Raises:
        DataError: If the user is unknown.
    """
    played_env = played(env, 1)
    agent = getattr(policy, "__self__", policy)
    check_agent(agent, played_env)
    actor, world = Actor(policy, deterministic=True), played_env.world
    sessions = FixedSessions.of_users(users_to_evaluate(world, [user]), 1, seed)
    with (
        playing_sessions_of(played_env, sessions) as [batch],
        inference_mode(agent),
        binding(policy, actor, [batch], played_env.own_batch) as reads_masks,
    ):
        observation, starts, done = played_env.reset(), np.ones(1, np.bool_), np.zeros(1, np.bool_)
        session = SessionRecorder(world, leave_rule(batch.config.leave))
        session.start(batch.simulator)
        belief = _BeliefRecorder(pair, batch)
        while not done[0]:
            actions = actor.act(observation, starts, played_env.action_masks() if reads_masks else None)
            observation, done, starts = played_env.step(actions)
            outcome = batch.outcome
            assert outcome is not None
            session.add(outcome)
            belief.add(outcome.items[0])
    return ObservedSession(title, session.trace(), belief.before, belief.after, belief.states)


def observe_run(run: StoredRun, pair: WorldPair, user: int | str, seed: int) -> ObservedSession:
    """Returns a session of the agent of a finished run; see :func:`observe_session`.

    Raises:
        ArtifactError: If the run's data have changed, or its files are damaged.
    """
    env = purified_sessions(pair.test, run.config.session, 1, 0, purifier_of(run))
    title = method(run.config.method).title
    return observe_session(load_policy(run, pair), env, pair, user, title=title, seed=seed)


def write_session_page(
    path: str | Path, sessions: Sequence[ObservedSession], *, seed: int, origin: str, command: str
) -> Path:
    """Writes the page of one session, or of two side by side, as one HTML file that loads nothing.

    Args:
        path: File to write; one that exists is replaced.
        sessions: Of one user and seed.
        seed: Seed of the session's randomness.
        origin: Where the data come from: ``"real"``, ``"partial"``, ``"twin"`` or ``"own"``.
        command: The command that makes it.

    Returns:
        The file.
    """
    style = asset("style.css") + asset("session.css")
    script = asset("session.js")
    traces = [session.trace for session in sessions]
    page = page_environment().get_template("session.html.j2")
    text = page.render(
        title=f"User {traces[0].user_id}: {' beside '.join(session.title for session in sessions)}",
        seed=seed,
        origin=origin,
        origin_text=ORIGINS[origin],
        command=command,
        sessions=[_described(session) for session in sessions],
        texts=[(session.title, render_ansi(session.trace)) for session in sessions],
        style=style,
        script=script,
        policy=page_policy(style, script),
    )
    write_text_atomically(path, text)
    return Path(path)


def _described(session: ObservedSession) -> dict[str, Any]:
    """Returns what the script of the page reads, JSON-able."""
    trace = session.trace
    ids = trace.items if trace.item_ids is None else trace.item_ids[trace.items]
    return {
        "title": session.title,
        "reason": trace.leave_reason,
        "leaveBelow": trace.leave_below,
        "tempers": _rounded(trace.tempers),
        "states": [asdict(state) for state in session.states],
        "steps": [
            {
                "ids": [str(item) for item in ids[step]],
                "popular": trace.popular[step].tolist(),
                "clicks": trace.clicks[step].tolist(),
                "before": session.before[step],
                "after": session.after[step],
                "reward": round(float(trace.rewards[step]), 3),
                "share": round(float(trace.popular_shares[step]), 3),
                "unfair": bool(trace.violations[step]),
            }
            for step in range(trace.steps)
        ],
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
