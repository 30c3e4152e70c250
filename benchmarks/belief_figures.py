"""Figures 2, 3, 4 and 6 of the paper for the belief, and the numbers behind them; writes belief_figures_WORLD.md.

    python benchmarks/belief_figures.py kuairand --data DATA --store STORE --results docs/results

What the store holds is not made again; its models and the belief that served are those of preferences.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from belief_figure_users import (
    GROUPS,
    MIN_CLICKS,
    NEIGHBOURS,
    REPEATED,
    SAMPLES,
    SLATE,
    SLATES,
    Values,
    clocks,
    draw_samplers,
    held_out_sessions,
    log_odds,
    mean_errors,
    sampler_rows,
    samplers,
    state_rows,
    states_of_users,
)
from numpy.typing import NDArray
from preference_models import Models
from preference_tasks import SERVED_SESSIONS, item_columns, served_belief, users_of
from preferences import BELIEF_FILE
from tolerances import ConstantQuota
from worlds import argument_parser, cell, open_worlds, short_name, write_page

import dsrm
from dsrm.belief import Belief, BeliefItems
from dsrm.belief_purifier import BeliefPurifier
from dsrm.click_scorer import ClickScorer
from dsrm.preference import PreferenceModel
from dsrm.preference_networks import DiffusionPreference
from dsrm.preference_training import PreferenceKind
from dsrm.probe_data import draw_states
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.controls import GreedyCTR, best_slates, item_quality
from hrl_policies.study import single_threaded
from hrl_policies.study.figures import grid, legend_beside, looks
from hrl_policies.study.statistics import bootstrap, student_interval
from hrl_policies.study.store import machine
from hrl_policies.worlds import WorldPair
from kuaifair_env import EvaluationResult, SessionConfig, World, evaluate
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import save_figure
from kuaifair_env.observations import observed_states
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.splits import evaluation_users

MODELS: tuple[PreferenceKind, ...] = ("gaussian", "diffusion")
N_ENVS = 64
MIN_EXPOSURES = 50
POPULAR = (0, 2, 4, 5, 6, 8, 10)
PLAYERS = 300


@dataclass(frozen=True)
class Items:
    """What is known of the candidates that have an unbiased click rate.

    Attributes:
        exposures: ``log(1 + exposures)`` in the training log.
        clicks: ``log(1 + clicks)`` there.
        logged: Log-odds of the smoothed click rate in the training log.
        unbiased: Log-odds of the click rate without bias.
        before: What the click scorer predicts, the mean over users, in log-odds.
        after: The same with what the shared level has learned.
        shown: Whether the item was shown while serving.
    """

    exposures: Values
    clicks: Values
    logged: Values
    unbiased: Values
    before: Values
    after: Values
    shown: NDArray[np.bool_]


def items_of(pair: WorldPair, served: Path) -> Items:
    """Collects what is known of the items; the rate without bias is the truth of a twin, or of the random log."""
    world = pair.test
    n = world.n_items
    exposures, clicks = (counts[:n] for counts in (world.exposures, pair.train.data.train.click_counts(n)))
    if world.true_preference is None:
        shown = world.data.test.exposures(len(world.data.items))[:n]
        unbiased = (world.data.test.click_counts(len(world.data.items))[:n] + 0.5) / (shown + 1.0)
        enough = shown >= MIN_EXPOSURES
    else:
        unbiased, enough = item_quality(world).astype(np.float64), np.ones(n, np.bool_)
    enough &= exposures >= MIN_EXPOSURES
    users = users_of(world)[0]
    prior = pair.scorer.score(observed_states(world, world.initial_history.take(users))).mean(axis=0)
    shared = loaded_belief(world, served).shared
    of_log = np.log1p(exposures), np.log1p(clicks), log_odds((clicks + 0.5) / (exposures + 1.0))
    columns = (*of_log, log_odds(unbiased), prior, prior + shared.mean.numpy())
    known = (np.asarray(column[enough], np.float64) for column in columns)
    return Items(*known, shared.weights.numpy()[enough] > 0.0)


def loaded_belief(world: World, path: Path) -> Belief:
    """Returns a belief with what was learned while serving."""
    belief = Belief(BeliefItems.of_world(world))
    belief.load(path)
    return belief


def correlation(x: Values, y: Values) -> Values:
    """Returns Pearson's correlation along the last axis."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    return np.asarray((x * y).sum(axis=-1) / np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1)))


def item_rows(items: Items) -> list[str]:
    """Returns the table of figure 2: what exposure explains, correlation with the truth, and error."""

    def agreement(values: Values, rows: NDArray[np.bool_]) -> str:
        like = bootstrap(correlation, items.unbiased[rows], values[rows], resamples=1_000)
        error = np.sqrt(((values - items.unbiased)[rows] ** 2).mean())
        return f"{cell(like)} | {error:.2f}"

    everything = np.ones(len(items.shown), np.bool_)
    explained = {
        name: cell(bootstrap(lambda x, y: correlation(x, y) ** 2, items.exposures, values, resamples=1_000))
        for name, values in {
            "log(1 + clicks) in the training log": items.clicks,
            "click rate without bias": items.unbiased,
            "click rate of the training log": items.logged,
            "predicted before serving": items.before,
            f"believed after {SERVED_SESSIONS:,} sessions": items.after,
        }.items()
    }
    rows = []
    for (name, share), values in zip(
        explained.items(), (None, None, items.logged, items.before, items.after), strict=True
    ):
        cells = (
            " | | | |" if values is None else (f" {agreement(values, everything)} | {agreement(values, items.shown)} |")
        )
        rows.append(f"| {name} | {share} |{cells}")
    return rows


def draw_items(path: Path, items: Items, about: str) -> None:
    """Draws figure 2: log-odds of items against exposure, and what was believed of them against the truth."""
    panels = {
        ("log(1 + exposures)", "training log"): (items.exposures, items.logged),
        ("log(1 + exposures)", "without bias"): (items.exposures, items.unbiased),
        ("without bias", "before serving"): (items.unbiased, items.before),
        ("without bias", f"after {SERVED_SESSIONS:,} sessions"): (items.unbiased, items.after),
    }
    figure, axes = grid(1, len(panels), 2.7, 2.7)
    for axis, ((across, up), (x, y)) in zip(axes[0], panels.items(), strict=True):
        shade = np.where(items.shown, "0.1", "0.65")
        axis.scatter(x, y, s=3, color=shade, linewidths=0, alpha=0.5)
        ends = np.quantile(x, [0.0, 1.0])
        axis.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color="black", linewidth=1.2)
        axis.set_xlabel(across, fontsize=8)
        axis.set_title(f"{up}: r = {float(correlation(x, y)):.2f}", fontsize=9)
    axes[0, 0].set_ylabel("log-odds of a click", fontsize=8)
    low, high = (np.quantile(np.concatenate([items.before, items.after]), share) for share in (0.001, 0.999))
    for axis in axes[0, 2:]:
        axis.set_ylim(low, high)
    save_figure(figure, path, about)


class FixedBeliefQuota(BeliefQuota):
    """The best slate with so many popular items by a belief.

    Args:
        scorer: The click model.
        popular: Number of popular items of a slate.
        belief: What was learned of all users.
        preference: Which distribution users' own parts have.
    """

    def __init__(self, scorer: ClickScorer, popular: int, belief: Belief, preference: PreferenceModel | None) -> None:
        super().__init__(scorer, preference=preference)
        self._belief = belief
        self._counts = np.arange(SLATE + 1) == popular

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`~hrl_policies.controls.Control`."""
        self._evidence.begin()
        logits = self._evidence.beliefs.logits(converged=self._evidence.take()).numpy()
        return best_slates(logits, batch.world.groups.popular, self._counts, batch.simulator.allowed)


Evaluations = Mapping[str, Sequence[EvaluationResult]]


def evaluations(pair: WorldPair, models: Mapping[PreferenceKind, BeliefPurifier], served: Path) -> Evaluations:
    """Evaluates the same rule with every share of popular items on every kind of state."""
    world, scorer = pair.test, pair.scorer
    items = BeliefItems.of_world(world)
    beliefs: dict[str, tuple[Belief, PreferenceModel | None]] = {"closed form, frozen": (Belief(items), None)}
    beliefs |= {f"{name}, frozen": (Belief(items, model.scales), model.preference) for name, model in models.items()}
    after = loaded_belief(world, served)
    beliefs |= {"closed form, served": (after, None), "diffusion, served": (after, models["diffusion"].preference)}
    users = evaluation_users(world.data.users.ids[users_of(world)[0]], PLAYERS)

    def played(control: GreedyCTR) -> EvaluationResult:
        env = KuaiFairVecEnv(world, SessionConfig(slate_size=SLATE, action_mode="slate"), N_ENVS, seed=0)
        return evaluate(control, env, users)

    found = {"observed state": [played(ConstantQuota(scorer, popular)) for popular in POPULAR]}
    for name, (belief, preference) in beliefs.items():
        found[name] = [played(FixedBeliefQuota(scorer, popular, belief, preference)) for popular in POPULAR]
        print(name, [round(one.engagement.cumulative_reward, 2) for one in found[name]], flush=True)
    return found


def rewards(result: EvaluationResult) -> Values:
    """Returns each session's cumulative reward."""
    return np.asarray(result.sessions.return_, np.float64)


def evaluation_rows(found: Evaluations) -> list[str]:
    """Returns the table of figure 3: R_cum by popular share, and the best share beside that of the observed state."""
    first = [rewards(result) for result in found["observed state"]]
    half = POPULAR.index(SLATE // 2)
    rows = []
    for name, results in found.items():
        means = " | ".join(f"{result.engagement.cumulative_reward:.2f}" for result in results)
        gain = student_interval(rewards(results[half]) - first[half])
        rows.append(f"| {name} | {means} | {'' if name == 'observed state' else cell(gain, sign=True)} |")
    disparities = " | ".join(f"{result.fairness.absolute_difference:.2f}" for result in found["observed state"])
    return [*rows, f"| AD | {disparities} | |"]


def draw_evaluations(path: Path, found: Evaluations, about: str) -> None:
    """Draws figure 3: R_cum against AD, on either side of equal shares, and against the popular share."""
    look = looks(list(found))
    figure, (axes,) = grid(1, 3, 3.0, 2.9)
    shares = np.asarray(POPULAR) / SLATE
    panels = (("AD, mostly long-tail items", shares <= 0.5), ("AD, mostly popular items", shares >= 0.5))
    highest = max(result.engagement.cumulative_reward for results in found.values() for result in results)
    for axis in axes:
        axis.set_ylim(0.0, 1.05 * highest)
    for name, results in found.items():
        style = {"color": look[name].colour, "marker": look[name].marker, "linestyle": look[name].line, "markersize": 5}
        reward = np.asarray([result.engagement.cumulative_reward for result in results])
        disparity = np.asarray([result.fairness.absolute_difference for result in results])
        for axis, (title, side) in zip(axes, panels, strict=False):
            axis.plot(disparity[side], reward[side], label=name, **style)
            axis.set_xlabel(title, fontsize=8)
        axes[2].plot(shares, reward, label=name, **style)
    axes[0].set_ylabel("R_cum")
    axes[2].set_xlabel("popular share of every slate", fontsize=8)
    legend_beside(figure, np.asarray([axes]), "what is known of users and items")
    save_figure(figure, path, about)


def described(models: Mapping[PreferenceKind, BeliefPurifier], fitted: Models) -> str:
    """Returns kinds, sizes and training of models."""
    texts = []
    for name, model in models.items():
        text = f"{name} (hash {dsrm.purifier_hash(fitted.path(name, 0))}"
        if isinstance(model.preference, DiffusionPreference):
            network = model.preference.denoiser.network.config
            text += f", width {network.width}, {network.blocks} blocks, {model.report['rounds']} rounds"
        texts.append(text + ")")
    return ", ".join(texts)


def page(
    world: str,
    pair: WorldPair,
    pictures: Mapping[int, Path],
    tables: Mapping[int, Sequence[str]],
    means: Sequence[str],
    users: tuple[int, int],
    models: str,
) -> str:
    """Returns the page.

    Args:
        world: As the command names it.
        pair: Both worlds.
        pictures: Files of the figures.
        tables: Rows of their tables.
        means: Rows about means without draws.
        users: How many are drawn in figure 4, and how many of them have a known interest.
        models: What they are.
    """
    provenance, twin = pair.test.data.provenance, pair.test.true_preference is not None
    unbiased = (
        "the true mean click probability over users" if twin else f"the random log's, from {MIN_EXPOSURES} exposures on"
    )
    interest = (
        "the tag whose items a user truly clicks most beyond the mean user"
        if twin
        else "the most frequent tag of a user's clicks in the random log"
    )
    shares = " | ".join(f"{popular / SLATE:.0%}" for popular in POPULAR)
    lines = [
        f"# Figures 2, 3, 4 and 6 of the paper for the belief: {provenance.name}",
        "",
        f"Data: {provenance.name} ({provenance.origin}), hash {pair.test.data.data_hash}; test world "
        f"{pair.test.fingerprint}. One training seed and one order of service: the figures illustrate, and what they "
        "show is claimed on the pages that compare models over seeds. Brackets: 95 % intervals over items, users or "
        "batches of sessions.",
        "",
        "## Figure 2: the spurious reward trap",
        "",
        f"![Log-odds of items]({pictures[2].name})",
        "",
        f"Each candidate with at least {MIN_EXPOSURES} exposures in the training log, in log-odds of a click; dark: "
        f"shown while serving. Without bias: {unbiased}. Before: what the click scorer predicts from the training log, "
        "the mean over the users who are not served. After: the same and the shared level of `belief-quota` when it "
        f"has served {SERVED_SESSIONS:,} sessions of other users. Counts of clicks grow with the exposures that they "
        "are a part of; rates need not. Errors are root mean squares in log-odds.",
        "",
        "| log-odds of an item | R^2 of log exposure | correlation with the rate without bias | error | the same, of "
        "items shown while serving | error |",
        "|---|---:|---:|---:|---:|---:|",
        *tables[2],
        "",
        "## Figure 3: state purification gain",
        "",
        f"![R_cum against AD]({pictures[3].name})",
        "",
        f"The same rule, the best slate with a fixed number of popular items, on different states; {PLAYERS} users of "
        "the test world, one session each, Max Len 30. Observed state: the click scorer on the window of 50 shows, as "
        "in the paper. The others hold a belief from the session's start. Frozen: nothing is kept from session to "
        "session. Served: with the shared level of Figure 2, which met none of these users. Only the state differs "
        "within a column, so that AD does not. The last column is paired by users.",
        "",
        *_by_protocol(tables[3], f"{shares} | 50%: gain over the observed state |"),
        "",
        "## Figure 4: states before and after purification",
        "",
        f"![States by popularity and interest]({pictures[4].name})",
        "",
        f"t-SNE (seed 0) of {users[0]} users of the test world who were not served and have {MIN_CLICKS} clicks in the "
        f"training log; {SLATES} slates of `belief-quota`, the same for all states. Observed states have unit length, "
        "as the click scorer reads them; beliefs are posterior means of the whole w above the shared level of Figure "
        f"2. A picture is no evidence; the table is of the states themselves: the share of the {NEIGHBOURS} nearest "
        f"neighbours with the same label. Popularity: {GROUPS} equal groups of users by the popular share of their "
        f"clicks in the training log. Interest ({users[1]} users): {interest}. Differences are paired by users.",
        "",
        "| state | popularity purity | difference | interest purity | difference |",
        "|---|---:|---:|---:|---:|",
        *tables[4],
        "",
        "## Figure 6: evaluations of the denoiser",
        "",
        f"![Coverage, spread, error and cost]({pictures[6].name})",
        "",
        f"{SAMPLES} draws of the diffusion model (mode `belief`, 100 noise levels) in simulated sessions of training "
        "users kept from training, whose preferences are known. Coverage: 80 % intervals of b, of the components of w, "
        "and of random items' log-odds b + w . e. Spread: of log-odds, in that of 100 evaluations by the same solver. "
        "Error: root mean square, of the draws' mean of log-odds. Time: processor time of a draw for 64 users on one "
        f"thread, mean of {REPEATED}, and its ratio to a float32 product (256, 64) x (64, 10,728) "
        f"({machine()}, shared with other work); it is the same for both solvers.",
        "",
        "| solver | evaluations | coverage, b | coverage, w | coverage, log-odds | spread | error of the mean | ms | "
        "ratio |",
        "|---|---:|" + "---:|" * 7,
        *tables[6],
        "",
        "Agents take means without draws:",
        "",
        "| mean | error |",
        "|---|---:|",
        *means,
        "",
        f"Made by: `python benchmarks/belief_figures.py {world} --store STORE --results docs/results`. Models, "
        f"seed 0: {models}.",
    ]
    return "\n".join(lines)


def _by_protocol(rows: Sequence[str], columns: str) -> list[str]:
    """Returns the rows of Figure 3 as one table of frozen states, and one of those with a shared level that served."""
    served = [row for row in rows if ", served" in row]
    frozen = [row for row in rows if row not in served]
    lines = []
    for name, some in (("frozen", frozen), ("after a service", served)):
        heading = f"| R_cum by popular share, {name} | {columns}"
        lines += [heading, "|---|" + "---:|" * (len(POPULAR) + 1), *some, ""]
    return lines[:-1]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder for trained models and what was served")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    short = short_name(arguments.world)
    store = arguments.store / short
    folder = store if arguments.results is None else arguments.results
    fitted = Models(pair, store / "models")
    models = {kind: fitted.load(kind, seed=0) for kind in MODELS}
    diffusion = models["diffusion"].preference
    assert isinstance(diffusion, DiffusionPreference)
    served = served_belief(pair, store / BELIEF_FILE)
    provenance = pair.test.data.provenance
    about = f"{provenance.name} ({provenance.origin}), hash {pair.test.data.data_hash}"
    pictures = {number: folder / f"belief_figure_{number}_{short}.png" for number in (2, 3, 4, 6)}

    items = items_of(pair, served)
    draw_items(pictures[2], items, about)
    probes, states = states_of_users(pair, models, loaded_belief(pair.test, served))
    shown = [name for name in states if not name.endswith(("closed form", "gaussian"))]
    drawn = {name: states[name] for name in shown}
    draw_states(pictures[4], probes, drawn, popularity="popular share of logged clicks")
    sessions, columns = held_out_sessions(pair), item_columns(BeliefItems.of_world(pair.train))[::50]
    posteriors, times = samplers(diffusion, sessions, columns), clocks(diffusion, sessions)
    means = mean_errors(diffusion, sessions, columns)
    draw_samplers(pictures[6], posteriors, times, float(means["closed form"].mean()), about)
    gains = evaluations(pair, models, served)
    draw_evaluations(pictures[3], gains, about)

    tables = {
        2: item_rows(items),
        3: evaluation_rows(gains),
        4: state_rows(probes, states),
        6: sampler_rows(posteriors, times),
    }
    further = [f"| {name} | {cell(student_interval(errors), decimals=3)} |" for name, errors in means.items()]
    users = len(probes), int((probes.interest >= 0).sum())
    text = page(arguments.world, pair, pictures, tables, further, users, described(models, fitted))
    write_page(arguments.results, f"belief_figures_{short}.md", text)


if __name__ == "__main__":
    main()
