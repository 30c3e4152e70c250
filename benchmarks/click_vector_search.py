"""Searches the settings of CDAE and DiffRec in a training world; writes a section of docs/results/tuning.md.

    python benchmarks/click_vector_search.py KuaiFair-KuaiRandTwin-v0 --results docs/results

The budget is that of every method: 12 trials (the settings shipped before, then what Optuna's TPE sampler proposes) of
one training seed, then both sides again with three other seeds; what has the larger mean is shipped. A fifth of the
training world's users is kept out of training. What counts is how well states made of the first half of their training
log tell what they click in the second: the AUC within users of the cosine of state and item. No test log is read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import optuna
from numpy.typing import NDArray
from worlds import argument_parser, open_worlds, write_section

from dsrm.click_vector_purifier import ClickVectorPurifier
from dsrm.click_vectors import CDAEConfig, DiffRecConfig
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine
from hrl_policies.study.tuning import validation_pair
from hrl_policies.worlds import WorldPair
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.response.calibration import within_user_auc
from kuaifair_env.world import World, windows_before

Config = CDAEConfig | DiffRecConfig
SEED, CONFIRMATION_SEEDS = 0, (1, 2, 3)
MIN_EXPOSURES, MAX_USERS = 10, 2_000
START: dict[str, Config] = {
    "cdae": CDAEConfig(top=50, hidden=50, learning_rate=0.1, corruption=0.4),
    "diffrec": DiffRecConfig(top=50, learning_rate=3e-3, noise_scale=1e-4, elbo_weights=False),
}
"""What was shipped before the search."""
SPACES: dict[str, Callable[[optuna.Trial], dict[str, Any]]] = {
    "cdae": lambda trial: {
        "corruption": trial.suggest_categorical("corruption", [0.0, 0.2, 0.4, 0.6, 0.8]),
        "hidden": trial.suggest_categorical("hidden", [50, 100]),
        "learning_rate": trial.suggest_float("learning_rate", 0.03, 0.3, log=True),
        "top": trial.suggest_categorical("top", [20, 50, 200]),
    },
    "diffrec": lambda trial: {
        "elbo_weights": trial.suggest_categorical("elbo_weights", [False, True]),
        "hidden": trial.suggest_categorical("hidden", [50, 100]),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
        "levels": trial.suggest_categorical("levels", [2, 5]),
        "noise_scale": trial.suggest_categorical("noise_scale", [1e-4, 1e-3, 1e-2, 1e-1]),
        "min_noise": trial.suggest_categorical("min_noise", [5e-4, 1e-3]),
        "top": trial.suggest_categorical("top", [20, 50, 200]),
    },
}


@dataclass(frozen=True)
class LaterFeedback:
    """What users answered in the second half of their training log, and their windows at the end of the first.

    Attributes:
        window: Of the users with a click in the first half and ten exposures or more.
        owners: ``int64 (n,)``, whose each of the later exposures is.
        items: ``int64 (n,)``.
        clicks: ``bool (n,)``.
    """

    window: HistoryWindow
    owners: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: NDArray[np.bool_]

    @classmethod
    def of_users(cls, world: World) -> LaterFeedback:
        """Divides the logs of a world's users."""
        log = world.data.train
        offsets = log.offsets(len(world.data.users))
        users = world.users[offsets[world.users + 1] - offsets[world.users] >= MIN_EXPOSURES][:MAX_USERS]
        first, last = offsets[users], offsets[users + 1]
        middle = (first + last) // 2
        window = windows_before(log, middle, middle - first, world.history_length)
        clicked = np.flatnonzero(window.clicks.any(axis=1))
        rows = np.concatenate([np.arange(middle[user], last[user]) for user in clicked])
        owners = np.repeat(np.arange(len(clicked)), (last - middle)[clicked])
        return cls(window.take(clicked), owners, log.items[rows].astype(np.int64), log.clicks[rows])

    def auc(self, world: World, states: NDArray[np.float32]) -> float:
        """Returns the AUC within users of the cosine of states and items."""
        scores = np.einsum("nd,nd->n", unit_rows(states)[self.owners], unit_rows(world.embeddings)[self.items])
        return float(within_user_auc(self.owners, self.clicks, scores).mean)


@dataclass(frozen=True)
class Search:
    """Trains and scores purifiers of one pair of worlds."""

    pair: WorldPair
    later: LaterFeedback

    def trained(self, config: Config) -> float:
        """Returns the AUC of what is trained with given settings."""
        purifier = ClickVectorPurifier.fit(self.pair.train, config)
        purifier.bind(self.pair.test)
        observed = observed_states(self.pair.test, self.later.window)
        return self.later.auc(self.pair.test, purifier.purify(observed, self.later.window))

    def trials(self, mode: str, count: int, steps: int) -> list[tuple[Config, float, float]]:
        """Returns settings, AUC and processor seconds of each trial, the shipped settings first."""
        start = replace(START[mode], steps=steps, seed=SEED)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=SEED))
        results: list[tuple[Config, float, float]] = []

        def objective(trial: optuna.Trial) -> float:
            config = replace(start, **SPACES[mode](trial))
            begun = time.process_time()
            score = self.trained(config)
            results.append((config, score, time.process_time() - begun))
            print(f"{mode} {len(results)}: {score:.4f}, {results[-1][2]:.0f} s, {trial.params}", flush=True)
            return score

        searched = list(SPACES[mode](optuna.trial.FixedTrial(asdict(start))))
        study.enqueue_trial({name: getattr(start, name) for name in searched})
        study.optimize(objective, n_trials=count)
        return results

    def confirmed(self, config: Config, steps: int) -> list[float]:
        """Returns the AUC of settings with other seeds."""
        return [self.trained(replace(config, steps=steps, seed=seed)) for seed in CONFIRMATION_SEEDS]


def seconds_and_settings(mode: str, config: Config, seconds: float) -> str:
    """Returns the end of a trial's line."""
    names = SPACES[mode](optuna.trial.FixedTrial(asdict(config)))
    return f"{seconds:.0f} | {', '.join(f'{name} {getattr(config, name):.3g}' for name in names)}"


def section(search: Search, mode: str, trials: int, steps: int, confirmation_steps: int) -> str:
    """Runs the search of one model and returns its part of the page."""
    results = search.trials(mode, trials, steps)
    best = int(np.argmax([score for _, score, _ in results]))
    lines = [f"## {mode}", "", "| trial | AUC | seconds | settings |", "|---:|---:|---:|---|"]
    for number, (config, score, seconds) in enumerate(results):
        lines.append(f"| {number} | {score:.4f} | {seconds_and_settings(mode, config, seconds)} |")
    if best == 0:
        return "\n".join([*lines, "", "No trial beat the settings that the search started from; they stay."])
    sides = {
        name: search.confirmed(results[number][0], confirmation_steps)
        for name, number in (("start", 0), ("found", best))
    }
    shipped = max(sides, key=lambda name: float(np.mean(sides[name])))
    for name, scores in sides.items():
        print(mode, name, scores, flush=True)
    texts = [
        f"{name} {np.mean(scores):.4f} ({', '.join(f'{score:.4f}' for score in scores)})"
        for name, scores in sides.items()
    ]
    lines += ["", f"Best: trial {best}. Confirmed with three other seeds: {'; '.join(texts)}. Shipped: {shipped}."]
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=250, help="most optimizer steps of a trial")
    parser.add_argument("--confirmation-steps", type=int, default=400)
    arguments = parser.parse_args()
    single_threaded()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pair = validation_pair(open_worlds(arguments.world, arguments.data).train, arguments.world)
    search = Search(pair, LaterFeedback.of_users(pair.test))
    raw = search.later.auc(pair.test, observed_states(pair.test, search.later.window))
    print(f"observed states: {raw:.4f}", flush=True)
    data = pair.train.data.provenance
    parts = [section(search, mode, arguments.trials, arguments.steps, arguments.confirmation_steps) for mode in SPACES]
    notes = (
        f"Within-user AUC of the second half of the training log of {len(search.later.window.items)} validation users "
        f"({data.name}, {data.origin} data), by states of the first half. Observed states: {raw:.4f}. "
        f"Item embeddings are made of the whole training log, these users' second half included, "
        f"which favours states close to the observed ones. Trials of at most {arguments.steps} steps, confirmations of "
        f"{arguments.confirmation_steps}; both stop early. Other settings are the references' and were not searched."
    )
    made = f"Made by: `python benchmarks/click_vector_search.py {arguments.world} --results RESULTS` ({machine()})."
    title = "# Trials of CDAE and DiffRec"
    write_section(arguments.results, "tuning.md", "\n\n".join([title, notes, *parts, made]))


if __name__ == "__main__":
    main()
