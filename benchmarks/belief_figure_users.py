"""What figures 4 and 6 of belief_figures.py show of users: their states, and draws of their posterior."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from belief_costs import Clock
from numpy.typing import NDArray
from preference_tasks import users_of
from preferences import coverage
from torch import Tensor
from worlds import cell

from dsrm.belief import Belief
from dsrm.belief_purifier import BeliefPurifier, similarity_coefficient
from dsrm.diffusion import SamplerConfig
from dsrm.preference import ClosedForm, Evidence, PreferenceModel
from dsrm.preference_networks import DiffusionPreference
from dsrm.preference_sessions import PreferenceSessions
from dsrm.preference_training import PreferenceKind
from dsrm.probe_data import ProbeSet, probe_set
from dsrm.session_evidence import SessionEvidence
from hrl_policies.controls import best_slates
from hrl_policies.study.figures import grid, legend_beside, looks
from hrl_policies.study.statistics import student_interval
from hrl_policies.worlds import WorldPair
from kuaifair_env import SessionConfig, World
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.fair_counts import fair_counts_now
from kuaifair_env.files import save_figure
from kuaifair_env.intervals import rate_interval
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.simulator import FixedSessions

SLATE = 10
SHOWN_USERS, SLATES = 700, 10
MIN_CLICKS, MIN_ITEMS, MIN_USERS = 5, 20, 20
NEIGHBOURS, GROUPS = 15, 5
STEPS, SAMPLES, EXAMPLES, PER_BATCH, CLOCKED, REPEATED = (1, 2, 5, 10, 20, 50, 100), 24, 12_288, 32, 64, 5
SOLVERS = {
    "second order (DPM-Solver++)": SamplerConfig.posterior(STEPS[-1], SAMPLES),
    "ancestral (eq. 3)": SamplerConfig("ddpm", start="noise", samples=SAMPLES),
}

RAW = "s~ before the session"

Values = NDArray[np.float64]


def played_evidence(pair: WorldPair, belief: Belief, users: IntArray) -> tuple[FloatArray, FloatArray, Evidence]:
    """Plays some slates by the closed form, and returns observed states before and after, and the evidence after."""
    world = pair.test
    session = SessionConfig(slate_size=SLATE, action_mode="slate", max_len=SLATES + 1, leave="never")
    batch = SessionBatch(world, session, len(users))
    batch.take_sessions_from(FixedSessions.of_users(users, 1, seed=0))
    batch.reset(np.arange(len(users)))
    reader = SessionEvidence(belief, pair.scorer, batch, ClosedForm())
    reader.begin()
    counts = fair_counts_now(KuaiFairVecEnv(world, SessionConfig(slate_size=SLATE, action_mode="slate"), 1, 0).batch)
    for _ in range(SLATES):
        logits = reader.beliefs.logits(converged=reader.take()).numpy()
        batch.step(best_slates(logits, world.groups.popular, counts, batch.simulator.allowed))
    reader.take()
    reader.beliefs.update(converged=True)
    return reader.states.copy(), np.asarray(batch.observe(), np.float32), reader.beliefs.evidence()


def states_of_users(
    pair: WorldPair, models: Mapping[PreferenceKind, BeliefPurifier], belief: Belief
) -> tuple[ProbeSet, dict[str, FloatArray]]:
    """Returns labels of users, and their states before and after purification.

    Purified states are posterior means of the whole ``w``, as agents get them (see ``BeliefPurifier``).
    """
    world = pair.test
    probes = labelled(world, np.sort(np.random.default_rng(4).permutation(users_of(world)[0])[:SHOWN_USERS]))
    before, after, evidence = played_evidence(pair, belief, probes.users)
    states = {RAW: unit_rows(before), f"s~ after {SLATES} slates": unit_rows(after)}
    logged = similarity_coefficient(pair.scorer, world) * states[RAW]
    preferences: dict[str, PreferenceModel] = {"closed form": ClosedForm()}
    preferences |= {name: model.preference for name, model in models.items()}
    for name, preference in preferences.items():
        states[f"belief, {name}"] = logged + preference.moments(evidence).means[:, 1:].numpy()
    return probes, states


def labelled(world: World, users: NDArray[np.int64]) -> ProbeSet:
    """Returns users with clicks, their popular share of logged clicks, and what they like most.

    That is the tag whose items they truly click most beyond the mean user in a twin, else the most frequent tag of
    their unbiased clicks.
    """
    probes = probe_set(world, max_users=len(world.users))
    rows = np.flatnonzero(np.isin(probes.users, users))
    shares = popular_shares(world, probes.users[rows])
    rows, shares = rows[np.isfinite(shares)], shares[np.isfinite(shares)]
    users = probes.users[rows]
    interest = probes.interest[rows] if world.true_preference is None else true_interests(world, users)
    arrays = {"window": probes.window.take(rows), "states": probes.states[rows], "level": probes.level[rows]}
    return replace(probes, users=users, interest=interest, popularity=shares, clean=None, taste=None, **arrays)


def popular_shares(world: World, users: IntArray) -> Values:
    """Returns the popular share of users' clicks on candidates in the training log; NaN where there are few."""
    log = world.data.train
    rows = log.clicks & (log.items < world.n_items)
    clickers, popular = log.users[rows], world.groups.popular[log.items[rows]]
    counts = np.bincount(clickers, minlength=len(world.data.users))
    shares = np.bincount(clickers, popular, len(counts)) / np.maximum(counts, 1)
    return np.asarray(np.where(counts >= MIN_CLICKS, shares, np.nan)[users])


def true_interests(world: World, users: IntArray) -> NDArray[np.int64]:
    """Returns the tag whose items each user likes most beyond the mean user, by true log-odds; -1 of a rare one."""
    appeal = log_odds(np.clip(world.response.expected_catalogue(users, world.n_items, None), 1e-6, 1 - 1e-6))
    tags = world.tags.astype(np.float64)
    frequent = np.flatnonzero(tags.sum(axis=0) >= MIN_ITEMS)
    of_tags = (appeal - appeal.mean(axis=0)) @ tags[:, frequent] / tags[:, frequent].sum(axis=0)
    labels = frequent[of_tags.argmax(axis=1)]
    return np.where(np.bincount(labels)[labels] >= MIN_USERS, labels, -1)


def log_odds(rates: Values) -> Values:
    """Returns the logarithms of the odds of click rates."""
    return np.asarray(np.log(rates / (1.0 - rates)))


def purity(states: FloatArray, labels: NDArray[np.int64]) -> Values:
    """Returns for each labelled user the share of nearest labelled neighbours with the same label."""
    from sklearn.neighbors import NearestNeighbors

    known = labels >= 0
    features, of_users = states[known], labels[known]
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(features).kneighbors(return_distance=False)
    return np.asarray((of_users[nearest] == of_users[:, None]).mean(axis=1))


def by_chance(labels: NDArray[np.int64]) -> float:
    """Returns the purity of neighbours that say nothing."""
    counts = np.bincount(labels[labels >= 0])
    return float((counts * (counts - 1)).sum() / (counts.sum() * (counts.sum() - 1)))


def state_rows(probes: ProbeSet, states: Mapping[str, FloatArray]) -> list[str]:
    """Returns the table of figure 4: purities, and differences from the observed state before the session."""
    edges = np.quantile(probes.popularity, np.linspace(0.0, 1.0, GROUPS + 1)[1:-1])
    labels = {"popularity": np.searchsorted(edges, probes.popularity), "interest": probes.interest}
    purities = {name: [purity(vectors, one) for one in labels.values()] for name, vectors in states.items()}
    first = purities[RAW]
    rows = []
    for name, values in purities.items():
        cells: list[str] = []
        for each, raw in zip(values, first, strict=True):
            gain = "" if each is raw else cell(student_interval(each - raw), sign=True, decimals=3)
            cells += [cell(rate_interval(each[None]), decimals=3), gain]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    popularity, interest = (by_chance(one) for one in labels.values())
    return [*rows, f"| by chance | {popularity:.3f} | | {interest:.3f} | |"]


class Draws(ClosedForm):
    """A preference model of which some draws are all that is known."""

    def __init__(self, draws: Tensor) -> None:
        self._draws = draws

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return self._draws


@dataclass(frozen=True)
class SampledPosterior:
    """How good draws of a sampler are: rows are batches of held-out sessions.

    Attributes:
        coverage: ``(n, 3)``, of 80 % intervals: ``b``, components of ``w``, log-odds of items.
        spread: ``(n,)``, root mean square standard deviation of log-odds.
        error: ``(n,)``, root mean square error of the mean of log-odds.
    """

    coverage: Values
    spread: Values
    error: Values


HeldOut = Sequence[tuple[Evidence, Tensor]]


def held_out_sessions(pair: WorldPair) -> HeldOut:
    """Returns evidence and true preferences in batches of simulated sessions of users kept from training."""
    source = PreferenceSessions(pair.train, pair.scorer)
    rng = np.random.default_rng(66)
    found = []
    for batch in source.known(rng.choice(source.split()[1], EXAMPLES), rng):
        rows = torch.from_numpy(rng.permutation(len(batch.preferences))[:PER_BATCH])
        found.append((batch.evidence.take(rows), batch.preferences[rows]))
    return found


def sampled(model: DiffusionPreference, config: SamplerConfig, sessions: HeldOut, columns: Tensor) -> SampledPosterior:
    """Measures the draws of one sampler."""
    found = []
    for evidence, preferences in sessions:
        draws = model.drawn(evidence, config)
        spread = (draws @ columns.T).var(dim=0).mean().sqrt()
        error = mean_error(draws.mean(dim=0), preferences, columns)
        found.append((coverage(Draws(draws), evidence, preferences, columns), float(spread), error))
    return SampledPosterior(*(np.asarray(column, np.float64) for column in zip(*found, strict=True)))


def mean_error(means: Tensor, preferences: Tensor, columns: Tensor) -> float:
    """Returns the root mean square error of items' log-odds."""
    return float(((means - preferences) @ columns.T).square().mean().sqrt())


Sampled = Mapping[str, Mapping[int, SampledPosterior]]


def samplers(model: DiffusionPreference, sessions: HeldOut, columns: Tensor) -> Sampled:
    """Measures all samplers with all numbers of evaluations."""
    found: dict[str, dict[int, SampledPosterior]] = {}
    for title, config in SOLVERS.items():
        found[title] = {}
        for steps in STEPS:
            found[title][steps] = sampled(model, replace(config, steps=steps), sessions, columns)
        print(title, flush=True)
    return found


def clocks(model: DiffusionPreference, sessions: HeldOut) -> dict[int, Clock]:
    """Times a draw for a batch of 64 users with each number of evaluations."""
    evidence = sessions[0][0].take(torch.arange(CLOCKED) % PER_BATCH)
    found = {}
    for steps in STEPS:
        config = replace(SamplerConfig.posterior(steps, 1), steps=steps)
        clock = Clock()
        for _ in range(REPEATED):
            clock.time(lambda config=config: model.drawn(evidence, config))
        found[steps] = clock
    return found


def sampler_rows(found: Sampled, times: Mapping[int, Clock]) -> list[str]:
    """Returns the table of figure 6."""
    rows = []
    for title, by_steps in found.items():
        finest = by_steps[STEPS[-1]]
        for steps, one in by_steps.items():
            covered = " | ".join(cell(rate_interval(column[:, None])) for column in one.coverage.T)
            spread = cell(student_interval(one.spread / finest.spread))
            cost = times[steps].row() if title == next(iter(found)) else " | "
            error = cell(student_interval(one.error), decimals=3)
            rows.append(f"| {title} | {steps} | {covered} | {spread} | {error} | {cost} |")
    return rows


def mean_errors(model: DiffusionPreference, sessions: HeldOut, columns: Tensor) -> dict[str, Values]:
    """Returns the errors of means that need no draws, by what gives them, for each batch of sessions."""
    means = {
        "its own: one evaluation at the noisiest level": model.own_means,
        "its student's, which agents get": lambda evidence: model.moments(evidence).means,
        "closed form": lambda evidence: ClosedForm().moments(evidence).means,
    }
    return {
        name: np.asarray([mean_error(of(evidence), truth, columns) for evidence, truth in sessions])
        for name, of in means.items()
    }


def draw_samplers(path: Path, found: Sampled, times: Mapping[int, Clock], closed_form: float, about: str) -> None:
    """Draws figure 6: coverage, spread, error (beside the closed form's) and cost against evaluations."""
    look = looks(list(found))
    figure, (axes,) = grid(1, 4, 2.6, 2.6)
    titles = ("coverage of 80 % intervals, log-odds", "spread / spread with 100", "error of the mean, log-odds")
    for name, by_steps in found.items():
        style = {"color": look[name].colour, "marker": look[name].marker, "linestyle": look[name].line, "markersize": 4}
        finest = by_steps[STEPS[-1]].spread.mean()
        curves = [
            (one.coverage[:, 2].mean(), one.spread.mean() / finest, one.error.mean()) for one in by_steps.values()
        ]
        for axis, title, curve in zip(axes, titles, zip(*curves, strict=True), strict=False):
            axis.plot(STEPS, curve, label=name, **style)
            axis.set_title(title, fontsize=8)
    axes[0].axhspan(0.75, 0.85, color="0.9", zorder=0)
    axes[2].axhline(closed_form, color="0.4", linewidth=1.0, label="closed form")
    axes[2].set_ylim(0.0, 1.3 * closed_form)
    axes[3].plot(STEPS, [clock.ratio for clock in times.values()], "k.-")
    axes[3].set_title("cost of a draw for 64 users,\nin matrix products", fontsize=8)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axis.minorticks_off()
        axis.set_xlabel("evaluations", fontsize=8)
    legend_beside(figure, np.asarray([axes]))
    save_figure(figure, path, about)
