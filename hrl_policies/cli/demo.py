"""``kuaifair demo``: the whole job in miniature."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from hrl_policies.study import PurifierIdentity, RunConfig, RunRecord, plan_run, result_tables, run_study
from hrl_policies.study.figures import draw_results
from hrl_policies.study.progress import progress_for
from hrl_policies.worlds import WorldPair, load_worlds
from hrl_policies.zoo import controls, method

if TYPE_CHECKING:
    from rich.console import Console

DEMO_ENV = "KuaiFair-Toy-v0"
DEMO_STEPS = {"a2c": 500_000, "hrl": 100_000, "dsrm-hrl": 100_000}
DEMO_MAX_LEN = 30
DEMO_PURIFIED = ("a2c", "dsrm-hrl", "quota-greedy", "session-quota")
DEMO_ROUNDS = 3
DEMO_FIGURE = "kuaifair-demo.png"

_INTRODUCTION = f"""[bold]KuaiFair demo[/bold]: {DEMO_ENV}, a synthetic twin of a few hundred users and items.
Agents learn in a training world that was fitted on a popularity-biased log: A2C and HRL on observed states, A2C and \
DSRM-HRL on states that DSRM purified, and both on states with as much noise instead. Then they and all controls meet \
the same held-out users in a test world, where clicks follow true taste.
"""

_READING = """[bold]What this shows[/bold]
- The job runs end to end: data, two worlds, purification, training, evaluation, and controls, all from one command.
- What ends sessions is the violation rate: Len follows from R_each and that rate by a formula that no method escapes.
- QuotaGreedy, which learns nothing by reinforcement, never breaks the bound; SessionQuota also counts the clicks of \
the session. An agent is worth something here only where it beats those rows; the two oracles say how much could be won.
- Purified states are worth something only where "+ profile" beats both the plain row and "+ noise" (DSRM-HRL's plain \
row is HRL). The controls on purified states say what they are worth without any learning by reinforcement.
[bold]What it does not show[/bold]
- Nothing about real users: the toy world is synthetic, and far too small.
- Nothing about which agent is better: one training seed, short training, hardly any tuning. docs/results has seeds \
and intervals."""


def run_demo(
    console: Console, *, seed: int, steps: int | None, output: Path | None, progress: bool
) -> list[RunRecord]:
    """Trains agents briefly, evaluates them and all controls, prints a table with its reading, and draws a figure.

    Args:
        console: Where to print.
        seed: Training seed.
        steps: Training steps of each agent; None takes the demo's own.
        output: Folder for the runs and the figure; None keeps no run, and puts the figure into the present folder.
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

    def plan(name: str, purifier: PurifierIdentity | None) -> RunConfig:
        own = (steps or DEMO_STEPS[name]) if method(name).learns else None
        return plan_run(name, DEMO_ENV, seed=seed, session=session, total_steps=own, purifier=purifier)

    runs = [plan(name, None) for name in ("a2c", "hrl", *controls())]
    with tempfile.TemporaryDirectory(prefix="kuaifair-demo-") as scratch:
        purifiers = _purifiers(worlds, seed, Path(output or scratch), progress)
        runs += [plan(name, identity) for identity in purifiers for name in DEMO_PURIFIED]
        with progress_for(console, 1) if progress else nullcontext() as callback:
            result = run_study(
                runs,
                output or scratch,
                {DEMO_ENV: worlds},
                purifiers=purifiers,
                callback=callback,
                retry_failed=True,
            )
        records = result.raise_for_failures().records
    for table in result_tables(records, "kuaifair demo"):
        table.show(console)
    console.print(_READING)
    figure = Path() / DEMO_FIGURE if output is None else output / DEMO_FIGURE
    draw_results(figure, records)
    console.print(f"Figure: {figure}", soft_wrap=True)
    if output is not None:
        console.print(f"Run folders: {output}", soft_wrap=True)
    return records


def _purifiers(worlds: WorldPair, seed: int, folder: Path, progress: bool) -> dict[PurifierIdentity, Path]:
    """Pretrains DSRM briefly and makes its noise control, unless the folder holds them."""
    from dsrm.pretrain import PretrainConfig, noise_like, pretrain
    from dsrm.purifier import load_purifier, save_purifier
    from dsrm.training import TrainingConfig

    profile, noise = folder / "profile.safetensors", folder / "noise.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if not profile.exists():
        config = PretrainConfig(mode="profile", seed=seed, training=TrainingConfig(rounds=DEMO_ROUNDS))
        save_purifier(pretrain(worlds.train, config, progress=progress), profile)
    if not noise.exists():
        save_purifier(noise_like(load_purifier(profile), worlds.train, seed), noise)
    return {PurifierIdentity.of_file(path): path for path in (profile, noise)}
