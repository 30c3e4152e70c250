"""``kuaifair demo``: the whole job in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hrl_policies.study import RunRecord, plan_run, result_tables, run_study
from hrl_policies.worlds import load_worlds
from hrl_policies.zoo import controls

if TYPE_CHECKING:
    from rich.console import Console

DEMO_ENV = "KuaiFair-Toy-v0"
DEMO_STEPS = {"a2c": 500_000, "td3": 60_000}
DEMO_MAX_LEN = 30

_INTRODUCTION = f"""[bold]KuaiFair demo[/bold]: {DEMO_ENV}, a synthetic twin of a few hundred users and items.
Two agents learn in a training world that was fitted on a popularity-biased log. Then they and all controls meet the \
same held-out users in a test world, where clicks follow true taste.
"""

_READING = """[bold]What this shows[/bold]
- The job runs end to end: data, two worlds, training, judging, and controls, all from one command.
- What ends sessions is the violation rate: Len follows from R_each and that rate by a law that no method escapes.
- QuotaGreedy, which learns nothing by reinforcement, never breaks the bound. An agent is worth something here only \
where it beats that row; the two oracles say how much could be won at most.
[bold]What it does not show[/bold]
- Nothing about real users: the toy world is synthetic, and far too small.
- Nothing about which agent is better: one training seed, short training, hardly any tuning.
- Nothing about the paper's own method, which this release does not hold yet."""


def run_demo(
    console: Console, *, seed: int, steps: int | None, output: Path | None, progress: bool
) -> list[RunRecord]:
    """Trains two agents briefly, judges them and all controls, and prints a table with its reading.

    Args:
        console: Where to print.
        seed: Training seed.
        steps: Training steps of each agent; None takes the demo's own.
        output: Folder for the runs; None keeps none.
        progress: Whether to show progress bars.

    Returns:
        The records behind the table.
    """
    import tempfile

    from kuaifair_env.batch import SessionConfig

    console.print(_INTRODUCTION)
    with console.status("making the worlds (once; then they come from the cache)"):
        worlds = load_worlds(DEMO_ENV)
        _ = worlds.scorer
    session = SessionConfig(max_len=DEMO_MAX_LEN)
    cells = [
        plan_run(name, DEMO_ENV, seed=seed, session=session, total_steps=steps or own_steps)
        for name, own_steps in DEMO_STEPS.items()
    ]
    cells += [plan_run(name, DEMO_ENV, seed=seed, session=session) for name in controls()]
    with tempfile.TemporaryDirectory(prefix="kuaifair-demo-") as scratch:
        records = run_study(cells, output or scratch, {DEMO_ENV: worlds}, progress=progress)
    for table in result_tables(records, "kuaifair demo"):
        table.show(console)
    console.print(_READING)
    if output is not None:
        console.print(f"Run folders: {output}", soft_wrap=True)
    return records
