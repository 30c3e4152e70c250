"""What each choice of a click means: base rates, and what controls earn; writes docs/results/click_definitions.md.

    python benchmarks/click_definitions.py --results docs/results
    python benchmarks/click_definitions.py --data DATA --results docs/results

All choices of a twin have the same users, items and views. QuotaGreedy learns from at most two million of the logged
views. With ``--data``, the folder of the partial data sets, there is a row for each of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worlds import KUAIRAND_FOLDER, KUAIREC_FOLDER, partial_kuairand, partial_kuairec, write_page

from dsrm.click_scorer import ClickScorer
from hrl_policies.controls import Oracle, QualityOracle, QuotaGreedy, RandomSlates
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.tables import ResultTable
from kuaifair_env import InteractionData, SessionConfig, build_world, evaluate
from kuaifair_env.data.clicks import Clicks, kuairand_clicks, kuairec_clicks
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.response.fitting import cached_response
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.synthetic.choices import chosen, chosen_truth
from kuaifair_env.synthetic.config import twin_config
from kuaifair_env.synthetic.twin import load_twin

KUAIREC_OWN = kuairec_clicks({"watch_ratio": 2.0})
CHOICES: dict[str, tuple[Clicks, tuple[Clicks, ...]]] = {
    "KuaiRec": (
        KUAIREC_OWN,
        (
            *(kuairec_clicks({"watch_ratio": threshold}) for threshold in (0.5, 0.8, 1.0, 1.5)),
            KUAIREC_OWN,
            kuairec_clicks(feedback="watch_ratio"),
        ),
    ),
    "KuaiRand": (
        kuairand_clicks(),
        (
            *map(kuairand_clicks, ("is_click", "long_view", "is_like")),
            kuairand_clicks({"is_click": 1.0, "long_view": 1.0, "is_like": 2.0}),
        ),
    ),
}
LOGGED_ROWS = 2_000_000
CONTROLS = ("Random", "QuotaGreedy", "QualityOracle", "Oracle")


NOTES = (
    "train, test: share of clicks in the logs; Random to Oracle: R_each in the test world, leave rule `temper`, "
    "one session each of 300 held-out users. The oracles know the truth and keep to the leave rule's bound.",
    "Published base rates: KuaiRec's small matrix 73 % at .5 and more, 47.4 % at .8, 32.4 % at 1, 4.6 % at 2; its "
    "big matrix 45.4 %, 33.8 % and 7.3 % at .8, 1 and 2. KuaiRand's random log: 17.6 % clicks, 8.5 % long views, "
    ".5 % likes; its standard log 46.0 %, 33.2 % and 1.8 %.",
    "The paper's R_each (arXiv:2603.03820, Tables 2 and 3; it does not say what a click is): .577 to .917 for "
    "KuaiRec, .727 to .849 for KuaiRand-Pure.",
    "Defaults: `{'watch_ratio': 1.0}` and `is_click`. At .5 Random earns more than the paper's worst agent, at "
    "1.5 and 2 the Oracle of the twin earns less than its best; .8 and 1 fit, and 1 is what the data set's "
    "environments call watched to the end. Partial KuaiRec holds watch ratios of 2 and more only, the random rows "
    "of partial KuaiRand-Pure `is_click` only. Oracle nears 1 in partial KuaiRec because its test world is the "
    "matrix itself.",
    "KuaiRand's unbiased clicks are too rare for the paper's level: only rewards that add long views and likes "
    "reach it.",
    "Made by: python benchmarks/click_definitions.py --data DATA --results docs/results",
)


def named(clicks: Clicks) -> str:
    """Returns a definition as a user writes it, defaults left out."""
    positive = dict(clicks.positive)
    (name,) = list(positive)[:1]
    text = f"`{positive}`" if clicks.graded or name == "watch_ratio" else f"`{name}`"
    return f'{text}, `feedback="watch_ratio"`, clip {clicks.clip:g}' if clicks.feedback != "click" else text


def thinned(log: InteractionLog, rows: int) -> InteractionLog:
    """Returns at most so many rows of a log, drawn at random."""
    if len(log) <= rows:
        return log
    return log.take(np.sort(np.random.default_rng(0).permutation(len(log))[:rows]))


def twin_choices(name: str) -> Iterator[tuple[Clicks, InteractionData, ResponseModel]]:
    """Yields each definition with the logs and the truth that follow from it."""
    own, choices = CHOICES[name]
    twin = load_twin(twin_config(name, clicks=own))
    durations = twin.tables.durations_ms
    for clicks in choices:
        config = replace(twin.config, clicks=clicks)
        logs = {}
        for split, log in (("train", twin.data.train), ("test", twin.data.test)):
            of_choice = chosen(config, log.items, log.clicks, log.watch_ratios, durations, logged=split == "train")
            logs[split] = replace(log, clicks=of_choice[0], feedback=of_choice[1])
        truth = TwinResponse(chosen_truth(config, twin.world, durations))
        response = GradedResponse.around(truth, logs["test"], clicks.largest) if clicks.graded else truth
        yield clicks, replace(twin.data, **logs), response


def partial_choices(folder: Path) -> Iterator[tuple[str, Clicks, InteractionData, ResponseModel]]:
    """Yields the partial data sets with the only definitions that they hold."""
    data = partial_kuairec(folder / KUAIREC_FOLDER)
    yield "partial KuaiRec", KUAIREC_OWN, data, cached_response(data, "test")
    data = partial_kuairand(folder / KUAIRAND_FOLDER)
    yield "partial KuaiRand-Pure", kuairand_clicks("is_click"), data, cached_response(data, "test")


def row_of(title: str, clicks: Clicks, data: InteractionData, response: ResponseModel, users: int) -> tuple[str, ...]:
    """Returns one line of the table: base rates of both logs, and R_each of the controls in the test world."""
    rates = [f"{log.clicks.mean():.1%}" for log in (data.train, data.test)]
    embeddings = item_embeddings(thinned(data.train, LOGGED_ROWS), len(data.users), data.items)
    test = build_world(data, "test", response, embeddings=embeddings)
    log = thinned(test.data.train, LOGGED_ROWS)
    train = replace(test, split="train", data=replace(test.data, train=log))  # only its log is read
    scorer = ClickScorer.fit(train)
    controls = (RandomSlates(), QuotaGreedy(scorer), QualityOracle(test), Oracle())
    env = KuaiFairVecEnv(test, SessionConfig(max_len=30, action_mode="slate"), 128, seed=0)
    ids = test.user_ids[np.linspace(0, len(test.user_ids) - 1, min(users, len(test.user_ids))).astype(int)]
    rewards = [f"{evaluate(control, env, ids).summary()['r_each']:.3f}" for control in controls]
    line = (title, named(clicks), *rates, *rewards)
    print(*line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the two partial data sets")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    parser.add_argument("--users", type=int, default=300)
    arguments = parser.parse_args()
    single_threaded()
    rows = [row_of(f"{name} twin", *choice, arguments.users) for name in CHOICES for choice in twin_choices(name)]
    if arguments.data is not None:
        rows += [row_of(*choice, arguments.users) for choice in partial_choices(arguments.data)]
    table = ResultTable(
        title="What counts as a click, Max Len 30, slates of 10",
        header=("data", "click", "train", "test", *CONTROLS),
        rows=tuple(rows),
        notes=NOTES,
    )
    write_page(arguments.results, "click_definitions.md", table.markdown())


if __name__ == "__main__":
    main()
