"""Where the training time of each method goes; writes docs/results/training_profile.md.

    python benchmarks/training_profile.py --results docs/results [--methods a2c td3 ...]

One thread, KuaiRand twin (5,011 candidates), sessions of Max Len 30, settings of the zoo, after a warm-up in which
nothing is measured. Sessions: choosing slates, simulating, and copying into buffers. Updates: everything in the
algorithm's ``train`` (or, offline, its gradient step). The operators are those of torch's profiler, by their own time.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from dsrm.baselines import IdentityPurifier
from hrl_policies.common.offline import OfflineAlgorithm
from hrl_policies.study import PurifierIdentity, plan_run
from hrl_policies.study.progress import calibration_seconds
from hrl_policies.study.runner import build_policy, single_threaded
from hrl_policies.study.store import machine
from hrl_policies.study.tables import Cell, Measured, ResultTable
from hrl_policies.worlds import WorldPair, load_worlds
from hrl_policies.zoo import learners, load_settings, method
from kuaifair_env.files import write_text_atomically

WORLD = "KuaiFair-KuaiRandTwin-v0"
WARM_UP, STEPS, PROFILED = 4_096, 16_384, 4_096
OFFLINE = {"WARM_UP": 50, "STEPS": 300, "PROFILED": 100}
OPERATORS = 3


class Timer:
    """Adds up the processor time that is spent in a function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.process_time() - start

        return timed


def built(name: str, pair: WorldPair) -> Any:
    """Returns an untrained model; a purifier costs little beside the rest, so an identity stands in for it."""
    overrides = {"learning_starts": 64} if "learning_starts" in load_settings(name).hyperparameters else {}
    purifier = IdentityPurifier() if method(name).purifier else None
    identity = PurifierIdentity("identity", "") if purifier else None
    config = plan_run(name, pair.name, seed=1, overrides=overrides, purifier=identity)
    return build_policy(config, pair, purifier)


def operators(model: Any, steps: int) -> str:
    """Returns the torch operators that take most time, with their shares of all time in torch."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model.learn(steps, log_interval=None, reset_num_timesteps=False)
    events = [event for event in found.key_averages() if event.key.startswith(("aten::", "Optimizer", "autograd"))]
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:OPERATORS]
    return ", ".join(
        f"{event.key.removeprefix('aten::').partition('#')[0]} {event.self_cpu_time_total / total:.0%}"
        for event in largest
    )


def line(name: str, pair: WorldPair, unit: float) -> tuple[Cell, ...]:
    """Measures a method."""
    model = built(name, pair)
    offline = isinstance(model, OfflineAlgorithm)
    warm_up, steps, profiled = OFFLINE.values() if offline else (WARM_UP, STEPS, PROFILED)
    model.learn(warm_up, log_interval=None)
    timer, part = Timer(), "_update" if offline else "train"
    setattr(model, part, timer.around(getattr(model, part)))
    before, start = model.num_timesteps, time.process_time()
    model.learn(steps, log_interval=None, reset_num_timesteps=False)
    seconds, taken = time.process_time() - start, model.num_timesteps - before
    delattr(model, part)
    each = seconds / taken
    return (
        method(name).title,
        "gradient step" if offline else "slate shown",
        Measured(each * 1e6, 0),
        Measured(each / unit, 2),
        f"{timer.seconds / seconds:.0%}",
        operators(model, profiled),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=learners())
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    single_threaded()
    pair = load_worlds(WORLD)
    unit = calibration_seconds()
    rows = []
    for name in arguments.methods:
        rows.append(line(name, pair, unit))
        print(*rows[-1], sep=" | ", flush=True)
    table = ResultTable(
        title="Training steps, profiled",
        header=(
            "method",
            "a step is",
            "us per step",
            "calibration products",
            "in updates",
            "torch operators",
        ),
        rows=tuple(rows),
        notes=(
            f"{WORLD} (twin), 5,011 candidates, 64 sessions at once, one thread; processor time. A calibration product "
            f"takes {unit * 1e6:.0f} us here ({machine()}; {platform.processor() or platform.machine()}).",
            "in updates: the share of the time in gradient updates; the rest is spent on sessions. torch operators: "
            "those with most time of their own, with their shares of all time in torch operators.",
            "Made by: python benchmarks/training_profile.py --results RESULTS",
        ),
    )
    text = table.markdown()
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "training_profile.md", text + "\n")


if __name__ == "__main__":
    main()
