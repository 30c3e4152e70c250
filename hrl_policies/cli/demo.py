"""``kuaifair demo``: the whole job in miniature."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.table import Table

from hrl_policies.study import PurifierIdentity, RunRecord, load_run, plan_run, run_folder, run_study
from hrl_policies.study.figures import draw_results
from hrl_policies.study.session_page import observe_run, write_session_page
from hrl_policies.worlds import WorldPair, load_worlds
from hrl_policies.zoo import method
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import raw_id
from kuaifair_env.files import need_writable

if TYPE_CHECKING:
    from dsrm.purifier import Mode

DEMO_ENV = "KuaiFair-Toy-v0"
DEMO_MAX_LEN = 30
DEMO_FIGURE = "kuaifair-demo.png"
DEMO_PAGE = "kuaifair-demo-session.html"
DEMO_METHOD = "dsrm-hrl"
DEMO_BESIDE = "greedy-ctr"
"""Whose session the page shows beside that of the method: it ignores fairness."""
DEMO_STEPS = {"a2c": 200_000, "hrl": 40_000, DEMO_METHOD: 40_000}
DEMO_ROWS = {
    "random": "ten items at random",
    "greedy-ctr": "likeliest clicks, fair or not",
    "a2c": "learns by reinforcement",
    "quota-greedy": "half popular items, half not; no reinforcement",
    "session-quota": "the same, remembers the session's clicks",
    "belief-quota": "best fair slate by a belief about the user; no reinforcement",
    "hrl": "two levels that learn by reinforcement",
    DEMO_METHOD: "the paper's method: two levels that start at the belief",
    "oracle": "knows every user's taste: the most to win",
}
"""Methods in the order of the table, and what it says of them."""
_COLUMNS = {
    "len": ("Len", 1, "slates until a user leaves", "more"),
    "r_each": ("R_each", 3, "clicks a slate, as a share of its items", "more"),
    "r_cum": ("R_cum", 2, "R_each summed over the session: clicks and staying together", "more"),
    "ad": ("AD", 2, "how unequally popular and other items were shown in all", "less"),
    "violation_rate": ("violations", 2, "share of slates too unequal for the user, which end sessions sooner", "less"),
}

_INTRODUCTION = f"""[bold]KuaiFair demo[/bold]: {DEMO_ENV}, a synthetic world of a few hundred users and items.
Agents learn in a training world that was fitted on a popularity-biased log. Then all meet the same other users in a \
test world, where clicks follow true taste. A minute, or two on a slow machine."""

_READING = """[bold]What this shows[/bold]
- The whole job runs: two worlds, purification, training, evaluation, and the controls that a claim has to beat.
- Unequal slates end sessions: the fewer violations, the longer users stay, whatever the method.
- QuotaGreedy, SessionQuota and BeliefQuota learn nothing by reinforcement. An agent is worth something only where it \
beats them.
[bold]What it does not show[/bold]
- Nothing about real users: the world is synthetic and tiny.
- Nothing about which agent is better: one training seed and short training. docs/results has seeds and intervals."""


def run_demo(console: Console, *, seed: int, steps: int | None, output: Path | None, progress: bool) -> list[RunRecord]:
    """Trains agents briefly, evaluates them beside controls, prints one table with its reading, and draws a figure.

    Args:
        console: Where to print.
        seed: Training seed.
        steps: Training steps of each agent; None takes the demo's own.
        output: Folder for the runs and the figure; None keeps no run, and puts the figure into the working folder.
        progress: Whether to show what is going on as it moves; without, there is one line for each phase.

    Returns:
        The records behind the table, in its order.
    """
    need_writable((output or Path()) / DEMO_FIGURE)
    console.print(_INTRODUCTION)
    with _phase(console, 1, "making the training world and the test world", progress):
        worlds = load_worlds(DEMO_ENV)
        _ = worlds.scorer
    with tempfile.TemporaryDirectory(prefix="kuaifair-demo-") as scratch:
        folder = output or Path(scratch)
        with _phase(console, 2, "fitting what the method believes at first to the training log", progress):
            purifier = _pretrained(worlds, seed, folder)
        identity = PurifierIdentity.of_file(purifier)
        records = []
        for number, name in enumerate(DEMO_ROWS, 3):
            config = plan_run(
                name,
                DEMO_ENV,
                seed=seed,
                session=SessionConfig(max_len=DEMO_MAX_LEN),
                total_steps=(steps or DEMO_STEPS[name]) if method(name).learns else None,
                purifier=identity if method(name).purifier else None,
            )
            task = f"training for {config.total_steps:,} steps and evaluating" if config.total_steps else "evaluating"
            with _phase(console, number, f"{task} {method(name).title}", progress):
                result = run_study(
                    [config], folder, {DEMO_ENV: worlds}, purifiers={identity: purifier}, retry_failed=True
                )
                records += result.raise_for_failures().records
        page = _session_page(records, worlds, folder, (output or Path()) / DEMO_PAGE)
    console.print(_table(records))
    for title, _, meaning, better in _COLUMNS.values():
        console.print(f"[bold]{title}[/bold]: {meaning}; {better} is better", soft_wrap=True)
    console.print(_READING, soft_wrap=True)
    figure = (output or Path()) / DEMO_FIGURE
    draw_results(figure, records)
    console.print(f"Figure: {figure}", soft_wrap=True)
    console.print(f"One session, slate by slate, to open in a browser: {page}", soft_wrap=True)
    if output is not None:
        console.print(f"Run folders: {output}", soft_wrap=True)
    console.print(_standing({record.config.method: record.summary["r_cum"] for record in records}), soft_wrap=True)
    return records


@contextmanager
def _phase(console: Console, number: int, task: str, moving: bool) -> Iterator[None]:
    """Says what is being done while it is done: as a line that moves, or as a line that stays."""
    line = f"({number} of {len(DEMO_ROWS) + 2}) {task}"
    if moving:
        with console.status(line):
            yield
        return
    console.print(line, highlight=False, soft_wrap=True)
    yield


def _pretrained(worlds: WorldPair, seed: int, folder: Path) -> Path:
    """Makes the method's purifier, unless the folder holds it."""
    from dsrm.pretraining import PretrainConfig, pretrain
    from dsrm.purifier import save_purifier

    mode = cast("Mode", method(DEMO_METHOD).purifier)
    path = folder / f"{mode}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_purifier(pretrain(worlds.train, PretrainConfig(mode=mode, seed=seed)), path)
    return path


def _session_page(records: list[RunRecord], worlds: WorldPair, folder: Path, path: Path) -> Path:
    """Writes a session of the method beside that of a method which ignores fairness, of the first user."""
    by_method = {record.config.method: record.config for record in records}
    configs = [by_method[name] for name in (DEMO_BESIDE, DEMO_METHOD)]
    user, seed = raw_id(worlds.test.user_ids[0]), configs[0].evaluation_seed
    runs = [load_run(folder / run_folder(config)) for config in configs]
    origin = worlds.test.data.provenance.origin
    sessions = [observe_run(run, worlds, user, seed) for run in runs]
    return write_session_page(path, sessions, seed=seed, origin=origin, command="kuaifair demo")


def _standing(r_cum: Mapping[str, float]) -> str:
    """Returns where the method stands among those that do not know users' tastes, in a line."""
    r_cum = {name: round(value, 2) for name, value in r_cum.items()}  # as the table shows them
    own = r_cum[DEMO_METHOD]
    others = sorted(set(r_cum) - {DEMO_METHOD, "oracle"}, key=r_cum.__getitem__)
    sides = {
        "behind": [name for name in others if r_cum[name] > own],
        "level with": [name for name in others if r_cum[name] == own],
        "ahead of": [name for name in others if r_cum[name] < own],
    }
    told = {
        side: ", ".join(f"{method(name).title} ({r_cum[name]:.2f})" for name in names)
        for side, names in sides.items()
        if names
    }
    places = "; ".join(f"{side} {names}" for side, names in told.items())
    return (
        f"[bold]{method(DEMO_METHOD).title} stands[/bold] at R_cum {own:.2f}, one seed: {places}; "
        f"the Oracle has {r_cum['oracle']:.2f}."
    )


def _table(records: list[RunRecord]) -> Table:
    table = Table("method", *(column[0] for column in _COLUMNS.values()), "what it is")
    for column in table.columns[1:-1]:
        column.justify = "right"
        column.no_wrap = True
    for record, (name, meaning) in zip(records, DEMO_ROWS.items(), strict=True):
        figures = (f"{record.summary[key]:.{digits}f}" for key, (_, digits, _, _) in _COLUMNS.items())
        table.add_row(method(name).title, *figures, meaning)
    return table
