"""How many small faults in the code do its tests notice? Faults are those of Cosmic Ray, at places drawn at random.

    pip install cosmic-ray                                    # no dependency of this project
    python benchmarks/mutants.py metrics --sample 60 --folder mutants
    python benchmarks/mutants.py metrics --folder mutants --again        # those that survived, on changed tests
    python benchmarks/mutants.py table --folder mutants

Every mutant runs those tests of its area that call the changed function, up to the first that fails, in a fork of a
process that has imported other libraries but nothing of this project. Annotations and what is raised are not changed.
Linux alone.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import json
import os
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("gymnasium", "torch", "pandas", "scipy.stats", "scipy.special", "stable_baselines3", "sb3_contrib")
LIBRARIES += ("sklearn.linear_model", "pydantic", "hypothesis", "matplotlib.pyplot", "safetensors.torch", "pytest")
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "metrics": (
        tuple(f"kuaifair_env/metrics/{name}.py" for name in ("engagement", "fairness", "slate_statistics")),
        tuple(f"tests/kuaifair_env/test_metrics_{name}.py" for name in ("engagement", "fairness", "exposure")),
    ),
    "leave rules": (("kuaifair_env/abandonment.py",), ("tests/kuaifair_env/test_abandonment.py",)),
    "slate distribution": (
        ("hrl_policies/common/slates.py", "hrl_policies/hrl_ppo/ranking.py"),
        (
            "tests/hrl_policies/test_slates.py",
            "tests/hrl_policies/test_ranking_policy.py",
            # Training, which takes most of the time.
            "--deselect=tests/hrl_policies/test_ranking_policy.py::test_a_manager_learns_what_users_do_not_tolerate",
        ),
    ),
    "samplers": (
        ("kuaifair_env/seeding.py", "kuaifair_env/splits.py", "kuaifair_env/served_sessions.py", "dsrm/targets.py"),
        (
            "tests/kuaifair_env/test_simulator.py",
            "tests/kuaifair_env/test_world.py",
            "tests/dsrm/test_targets.py",
            "tests/dsrm/test_diffusion.py::test_row_noise_is_standard_normal_and_belongs_to_the_row",
            "tests/kuaifair_env/test_serving.py",
            # Trained agents, whose files take most of the time.
            "--deselect=tests/kuaifair_env/test_serving.py::test_a_service_that_was_stopped_goes_on_to_the_same_numbers",
        ),
    ),
    "belief": (("dsrm/belief.py", "dsrm/own_level.py"), ("tests/dsrm/test_belief.py",)),
    "statistics": (
        ("hrl_policies/study/statistics.py", "kuaifair_env/intervals.py"),
        ("tests/kuaifair_env/test_intervals.py", "tests/hrl_policies/test_statistics.py"),
    ),
}


@dataclass(frozen=True)
class Mutant:
    """A small fault: Cosmic Ray's operator, which of its places in a file, and the lines that it changes."""

    path: str
    operator: str
    occurrence: int
    change: str

    @property
    def line(self) -> int:
        """The line that is changed."""
        return int(self.change.split()[0].lstrip("-").split(",")[0])


class Calls:
    """A plugin of pytest that writes which functions each test calls, by file and first line.

    What is called before a test proper (imports, fixtures that several tests share) counts for all tests.

    Args:
        paths: Files whose functions count.
        record: File to write: function -> tests in the order of their duration, or None for all tests.
    """

    def __init__(self, paths: tuple[str, ...], record: Path) -> None:
        self._files = {str(ROOT / path): path for path in paths}
        self._record = record
        self._called: dict[str, dict[str, float] | None] = {}
        self._test: dict[str, float] | None = None
        sys.setprofile(self._note)

    def _note(self, frame: Any, event: str, _: Any) -> None:
        path = self._files.get(frame.f_code.co_filename) if event == "call" else None
        if path is None:
            return
        name = f"{path}:{frame.f_code.co_firstlineno}"
        if self._test is None:
            self._called[name] = None
        elif (tests := self._called.setdefault(name, {})) is not None:
            tests.update(self._test)

    def pytest_runtest_call(self, item: Any) -> None:
        self._test = {item.nodeid: 0.0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        for tests in self._called.values():
            if report.when == "call" and tests is not None and report.nodeid in tests:
                tests[report.nodeid] = report.duration
        self._test = None

    def pytest_sessionfinish(self) -> None:
        sys.setprofile(None)
        ordered = {
            name: tests if tests is None else sorted(tests, key=lambda test: (test.partition("::")[0], tests[test]))
            for name, tests in self._called.items()
        }
        self._record.write_text(json.dumps(ordered), "utf-8")


class Mutated(SourceFileLoader):
    """Imports a module from other source than its file's, and finds it."""

    def __init__(self, path: Path, source: str) -> None:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        super().__init__(name, str(path))
        self._source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self._source, self.path, "exec")


def places_of(path: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Returns the places of a file that can be changed: line and column, and operators with their occurrences."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast((ROOT / path).read_text("utf-8"))))
    places = defaultdict(list)
    for name in operator_names():
        if "Variable" not in name:
            operator = get_operator(name)()
            begins = [begin for node in nodes for begin, _ in operator.mutation_positions(node)]
            for occurrence, begin in enumerate(begins):
                places[begin].append((name, occurrence))
    return places


def drawn_mutants(paths: tuple[str, ...], sample: int, seed: int) -> tuple[list[Mutant], int]:
    """Returns mutants at places drawn at random, one a place, and the number of places."""
    rng = random.Random(seed)
    places = [(path, choices) for path in paths for choices in places_of(path).values()]
    mutants: list[Mutant] = []
    for path, choices in rng.sample(places, len(places)):
        operator, occurrence = rng.choice(choices)
        source, mutated = (ROOT / path).read_text("utf-8"), mutated_source(path, operator, occurrence)
        if skeleton(mutated) not in (None, skeleton(source)):
            mutants.append(Mutant(path, operator, occurrence, changed_lines(source, mutated)))
        if len(mutants) == sample:
            break
    return mutants, len(places)


def skeleton(source: str) -> str | None:
    """Returns what a source does: without annotations, docstrings and what is raised; None if it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.Raise):
            node.exc = None
    return ast.dump(tree)


def changed_lines(old: str, new: str) -> str:
    """Returns the lines that differ, with the number of the first."""
    lines = list(difflib.unified_diff(old.split("\n"), new.split("\n"), lineterm="", n=0))
    return f"{lines[2].split()[1]} " + " ".join(f"{line[0]} {line[1:].strip()}" for line in lines[3:])


def mutated_source(path: str, operator: str, occurrence: int) -> str:
    """Returns the source of a file with a fault."""
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator

    source = (ROOT / path).read_text("utf-8")
    return MutationVisitor.mutate_code(source, get_operator(operator)(), occurrence) or source


def passes(
    tests: Sequence[str], seconds: float, mutated: Mutated | None = None, plugins: Callable[[], list[Any]] = list
) -> bool:
    """Returns whether tests pass in a fork, with a module mutated, in so much processor time."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        sys.meta_path[:0] = [] if mutated is None else [mutated]
        import pytest

        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests], plugins())))
    return os.waitpid(child, 0)[1] == 0


def tests_of(mutant: Mutant, called: dict[str, list[str] | None], everything: Sequence[str]) -> Sequence[str]:
    """Returns the tests that may notice a fault; none where no test calls the function."""
    functions = [
        node
        for node in ast.walk(ast.parse((ROOT / mutant.path).read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno <= mutant.line <= (node.end_lineno or 0)
    ]
    if not functions:
        return everything
    function = max(functions, key=lambda node: node.lineno)
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    tests = called.get(f"{mutant.path}:{first}", [])
    return everything if tests is None else tests


def prepare() -> None:
    """Imports other libraries once for all forks."""
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MPLBACKEND="Agg")
    for name in LIBRARIES:
        importlib.import_module(name)
    assert not any(name.split(".")[0] in ("kuaifair_env", "dsrm", "hrl_policies") for name in sys.modules)


def run(area: str, folder: Path, sample: int, seed: int, again: bool) -> None:
    """Tries mutants of an area and keeps what became of each; goes on where the same draw was stopped."""
    paths, tests = AREAS[area]
    record = folder / f"{area.replace(' ', '-')}.json"
    content = json.loads(record.read_text("utf-8")) if record.exists() else {"tried": 0, "survived": []}
    survived = [Mutant(**mutant) for mutant in content["survived"]]
    tried = content["tried"]
    if again:
        chosen, survived = survived, []
    else:
        drawn, places = drawn_mutants(paths, sample, seed)
        draw = {"places": places, "seed": seed}
        if content | draw != content:
            tried, survived = 0, []
        chosen, content = drawn[tried:], draw
    prepare()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    folder.mkdir(parents=True, exist_ok=True)
    calls = folder / "calls.json"
    if not passes(tests, 600.0, plugins=lambda: [Calls(paths, calls)]):
        raise SystemExit(f"the tests of {area} fail without any fault")
    called = json.loads(calls.read_text("utf-8"))
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(f"{area}: {len(chosen)} mutants; tests take {seconds:.0f} s of processor time", flush=True)
    for number, mutant in enumerate(chosen, 1):
        start = time.monotonic()
        mutated = Mutated(ROOT / mutant.path, mutated_source(mutant.path, mutant.operator, mutant.occurrence))
        chosen_tests = tests_of(mutant, called, tests)
        alive = not chosen_tests or passes(chosen_tests, 3.0 * seconds + 10.0, mutated)
        survived += [mutant] if alive else []
        outcome = "SURVIVED" if alive else "killed"
        print(f"{number} {time.monotonic() - start:.0f} s {outcome} {mutant.path} {mutant.change}", flush=True)
        left = chosen[number:] if again else []
        done = {
            "tried": tried if again else tried + number,
            "survived": [asdict(other) for other in survived + left],
        }
        record.write_text(json.dumps(content | done, indent=1), "utf-8")


def table(folder: Path) -> str:
    """Returns what became of all mutants as Markdown."""
    lines = ["| area | places | mutants tried | killed | survived |", "|---|---:|---:|---:|---:|"]
    for area in AREAS:
        record = folder / f"{area.replace(' ', '-')}.json"
        if record.exists():
            numbers = json.loads(record.read_text("utf-8"))
            tried, survived = numbers["tried"], len(numbers["survived"])
            lines.append(f"| {area} | {numbers['places']:,} | {tried} | {tried - survived} | {survived} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("area", choices=[*AREAS, "table"])
    parser.add_argument("--sample", type=int, default=60, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--again", action="store_true", help="try those that survived again")
    parser.add_argument("--folder", type=Path, default=Path("mutants"), help="records")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.area == "table":
        print(table(folder))
    else:
        run(arguments.area, folder, arguments.sample, arguments.seed, arguments.again)


if __name__ == "__main__":
    main()
