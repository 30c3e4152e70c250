"""Preference models on the same evidence: log loss, ranking and coverage; writes preferences_WORLD.md and .csv.gz.

    python benchmarks/preferences.py KuaiFair-KuaiRandTwin-v0 --store STORE --results docs/results
    python benchmarks/preferences.py kuairand --data DATA --store STORE --results docs/results

What is known of a user is the same for all models, and so are the items whose answers they predict. Seeds that the
store holds are not trained again; the page is made of all that it holds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from numpy.typing import NDArray
from preference_models import Models
from preference_page import page_of, table_of_numbers
from preference_tasks import (
    BELIEF,
    CLOSED,
    FROZEN,
    MODELS,
    NONE,
    RANDOM,
    SERVED,
    TRUTH,
    WIDE,
    Predicted,
    PredictionTask,
    Setting,
    expected_auc,
    expected_log_loss,
    fitted_tasks,
    item_columns,
    real_tasks,
    served_belief,
    task_name,
    true_preferences,
)
from torch import Tensor
from worlds import argument_parser, open_worlds, short_name, write_page

from dsrm.belief import BeliefItems
from dsrm.preference import ClosedForm, Evidence, PreferenceModel
from dsrm.preference_sessions import PreferenceSessions
from hrl_policies.study import single_threaded
from hrl_policies.worlds import WorldPair
from kuaifair_env.files import write_text_atomically

FIXED, FURTHER, BELIEF_FILE = "fixed", "further", "served.safetensors"
SAMPLES, LEVEL = 64, 0.8
HELD_OUT_EXAMPLES, PER_BATCH, PER_TASK, RANDOM_ITEMS = 4_096, 100, 100, 40
COVERAGE_TASKS = ((RANDOM, 0), (RANDOM, 50), (RANDOM, 200), (BELIEF, 50), (BELIEF, 200))

Tasks = Mapping[str, list[PredictionTask]]
Results = dict[str, NDArray[Any]]


def measured(task: PredictionTask, predicted: Predicted, label: str) -> Results:
    """Returns each user's log loss and within-user AUC under the name of a task and a model."""
    return {
        f"{label}|log loss": expected_log_loss(task, predicted.probabilities),
        f"{label}|AUC": expected_auc(task, predicted.means),
    }


def fixed_results(tasks: Tasks, columns: Tensor) -> Results:
    """Returns what predictions without a training seed are worth, each task's users, and how many rows each has."""
    results: Results = {}
    for name, (task, *others) in tasks.items():
        nothing = task.without_answers(columns)
        results[f"{name}|users"], results[f"{name}|rows"] = task.users, task.asked.sum(1).numpy()
        results |= measured(task, nothing, f"{name}|{NONE}")
        plain = expected_log_loss(task, torch.sigmoid(nothing.means))
        results[f"{name}|{NONE}|log loss without spread"] = plain
        for label, each in ((CLOSED, [task]), (WIDE, others)):
            for one in each:
                predicted = one.predicted(ClosedForm().moments(one.evidence), columns)
                results |= measured(one, predicted, f"{name}|{label}")
        if ((task.truth > 0) & (task.truth < 1)).any():
            results |= measured(task, Predicted(torch.logit(task.truth, 1e-6), torch.zeros(())), f"{name}|{TRUTH}")
    return results


def results_of(models: Mapping[str, PreferenceModel], tasks: Tasks, columns: Tensor) -> Results:
    """Returns what the models of one seed are worth in every task."""
    results: Results = {}
    for name, (task, *_) in tasks.items():
        for kind, model in models.items():
            results |= measured(task, task.predicted(model.moments(task.evidence), columns), f"{name}|{kind}")
    return results


def coverage(model: PreferenceModel, evidence: Evidence, preferences: Tensor, columns: Tensor) -> NDArray[np.float64]:
    """Returns how often 80 % intervals of draws hold ``b``, components of ``w``, and log-odds of random items.

    Args:
        model: Gives the draws.
        evidence: What it knows.
        preferences: ``float32 (B, d + 1)``, the truth.
        columns: ``(N, d + 1)``: ones and unit embeddings.
    """
    draws = model.samples(evidence, SAMPLES, seed=0)
    items = torch.randint(len(columns), (RANDOM_ITEMS,), generator=torch.Generator().manual_seed(0))
    features = columns[items].T
    of_components = _held(draws, preferences)
    of_items = _held(draws @ features, preferences @ features)
    return np.asarray([of_components[:, 0].mean(), of_components[:, 1:].mean(), of_items.mean()])


def _held(draws: Tensor, truth: Tensor) -> NDArray[np.float64]:
    """Says which values lie between two order statistics of their draws that hold 80 % of further draws on average."""
    count = len(draws)
    tail = (1.0 - LEVEL) / 2.0 * (count + 1)  # Weibull's positions: quantiles of the sample are too narrow
    shares = torch.tensor([tail - 1.0, count - tail]) / (count - 1)
    low, high = torch.quantile(draws, shares, dim=0)
    return np.asarray(((truth > low) & (truth < high)).double())


def coverage_results(
    models: Mapping[str, PreferenceModel],
    source: PreferenceSessions,
    tasks: Tasks,
    preferences: Tensor,
    columns: Tensor,
    seed: int,
) -> Results:
    """Returns coverage by name: in sessions like those of the training, of users kept out, and in the test world.

    Args:
        models: Of one seed.
        source: Draws sessions.
        tasks: Of the test world.
        preferences: ``float32 (B, d + 1)``, what their users' own parts are above the shared level.
        columns: ``(N, d + 1)``: ones and unit embeddings.
        seed: Of the models.
    """
    rng = np.random.default_rng([seed, 31])
    known = source.known(rng.choice(source.split()[1], HELD_OUT_EXAMPLES), rng)
    rows = [torch.from_numpy(rng.permutation(len(batch.preferences))[:PER_BATCH]) for batch in known]
    users = torch.from_numpy(rng.permutation(len(preferences))[:PER_TASK])
    results = {}
    for kind, model in {CLOSED: ClosedForm(), **models}.items():
        of_batches = [
            coverage(model, batch.evidence.take(some), batch.preferences[some], columns)
            for batch, some in zip(known, rows, strict=True)
        ]
        results[f"coverage|held-out users|{kind}"] = np.mean(of_batches, axis=0)
        for policy, shows in COVERAGE_TASKS:
            name = task_name(SERVED, policy, shows)
            evidence = tasks[name][0].evidence.take(users)
            results[f"coverage|{name}|{kind}"] = coverage(model, evidence, preferences[users], columns)
    return results


def all_tasks(pair: WorldPair, source: PreferenceSessions, store: Path) -> Tasks:
    """Plays all sessions of the fitted test world, and reads the real random rows if there are some."""
    served = served_belief(pair, store / BELIEF_FILE)
    tasks: dict[str, list[PredictionTask]] = {}
    for regime, belief in ((FROZEN, None), (SERVED, served)):
        for policy in (RANDOM, BELIEF):
            tasks |= dict(fitted_tasks(Setting(pair, regime, policy, source.scales, belief)))
    if has_real_rows(pair):
        tasks |= dict(real_tasks(pair, source.scales))
    return tasks


def has_real_rows(pair: WorldPair) -> bool:
    """Says whether the test log holds real random exposures."""
    return pair.name.startswith("partial KuaiRand")


def run_seeds(pair: WorldPair, seeds: list[int], mixtures: int, store: Path) -> None:
    """Trains and measures the models of all seeds that a store does not hold."""
    missing = [seed for seed in seeds if not (store / f"seed-{seed}.npz").exists()]
    if not missing:
        return
    trained = Models(pair, store / "models")
    source = trained.source
    columns = item_columns(BeliefItems.of_world(pair.test))
    tasks = all_tasks(pair, source, store)
    further = dict(real_tasks(pair, source.scales, further=True)) if has_real_rows(pair) else {}
    for name, some in ((FIXED, tasks), (f"{FURTHER}-{FIXED}", further)):
        save_results(store / f"{name}.npz", fixed_results(some, columns))
    preferences = true_preferences(pair, store / BELIEF_FILE, source.scales)
    for seed in missing:
        kinds = [kind for kind in MODELS if kind != "mixture" or seed < mixtures]
        models = {kind: trained.load(kind, seed).preference for kind in kinds}
        save_results(store / f"{FURTHER}-seed-{seed}.npz", results_of(models, further, columns))
        results = results_of(models, tasks, columns)
        results |= coverage_results(models, source, tasks, preferences, columns, seed)
        save_results(store / f"seed-{seed}.npz", results)


def save_results(path: Path, results: Results) -> None:
    """Writes arrays to a file, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    np.savez(unfinished, **results)  # type: ignore[arg-type]
    unfinished.replace(path)


def stored(store: Path, prefix: str) -> tuple[Results, dict[int, Results]]:
    """Returns the results without a training seed, and those of every seed, from a store."""

    def read(path: Path) -> Results:
        with np.load(path) as arrays:
            return dict(arrays)

    paths = {int(path.stem.rpartition("-")[2]): path for path in store.glob(f"{prefix}seed-*.npz")}
    return read(store / f"{prefix}{FIXED}.npz"), {seed: read(paths[seed]) for seed in sorted(paths)}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder of what was measured, by world and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="training seeds")
    parser.add_argument("--mixtures", type=int, default=10, help="seeds from 0 on for which a mixture is fitted too")
    parser.add_argument("--final-check", action="store_true", help="show the rows of further users instead")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    stem = short_name(arguments.world)
    store = arguments.store / stem
    run_seeds(pair, arguments.seeds, arguments.mixtures, store)
    fixed, seeds = stored(store, f"{FURTHER}-" if arguments.final_check else "")
    name = f"preferences_{stem}" + ("_further_users" if arguments.final_check else "")
    options = "".join(
        [
            " --data DATA" if arguments.data else "",
            f" --mixtures {arguments.mixtures}" if arguments.mixtures < parser.get_default("mixtures") else "",
            " --final-check" if arguments.final_check else "",
        ]
    )
    command = f"python benchmarks/preferences.py {arguments.world}{options} --store STORE --results docs/results"
    if arguments.results is not None:
        write_text_atomically(arguments.results / f"{name}.csv.gz", table_of_numbers(fixed, seeds))
    write_page(arguments.results, f"{name}.md", page_of(pair, fixed, seeds, command))


if __name__ == "__main__":
    main()
