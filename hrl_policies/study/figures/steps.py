"""The paper's Fig. 6: how many diffusion steps purify best."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hrl_policies.study.figures.style import Look, draw_law, grid, legend_beside, looks
from kuaifair_env.errors import ArtifactError
from kuaifair_env.figure_files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP_FIGURES = {"len": "Len", "r_each": "R_each", "r_cum": "R_cum", "ad": "AD", "violation_rate": "violation rate",
                "auc": "AUC of unbiased clicks"}  # fmt: skip
"""What may be drawn over diffusion steps, and how its axis is called."""

_LAW = ("len_floor", "len_ceiling")


@dataclass(frozen=True)
class StepResult:
    """What one purifier led to.

    Attributes:
        world: Which world, with the kind of its data.
        levels: Noise levels K that it was trained with.
        steps: Evaluations that its sampler takes.
        seed: Seed of pretraining, or of training on its states.
        figures: Figures by name; see ``STEP_FIGURES``. With ``len`` go ``len_floor`` and ``len_ceiling``.
    """

    world: str
    levels: int
    steps: int
    seed: int
    figures: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.levels < 1 or self.steps < 1:
            raise ValueError(f"levels and steps are at least 1, got {self.levels} and {self.steps}")
        missing = [name for name in _LAW if name not in self.figures]
        if "len" in self.figures and missing:
            raise ValueError(
                f"a result with len needs {' and '.join(missing)} too: Len says little without its floor and ceiling"
            )


def read_step_results(path: str | Path) -> list[StepResult]:
    """Reads a CSV with the columns ``world, levels, steps, seed`` and one for each figure.

    Raises:
        ArtifactError: If it is missing or holds something else.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as stream:
            return [_result(row) for row in csv.DictReader(stream)]
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {path}") from None
    except KeyError as error:
        raise ArtifactError(f"{path} has no column {error}; it needs world, levels, steps and seed") from None
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} does not hold results of a study of diffusion steps: {error}") from error


def draw_diffusion_steps(
    path: str | Path, results: Sequence[StepResult], figures: Sequence[str] = ("len", "r_cum", "ad")
) -> None:
    """Draws figures over the number of sampler steps, a line for each number of noise levels, a row for each world.

    The paper moves both together; where a study moves them apart, they have lines of their own. A line is the mean over
    seeds, which are dots. Len has its floor and ceiling.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        results: What was measured.
        figures: Names in ``STEP_FIGURES``, one column each.

    Raises:
        ValueError: If there are no results, or one lacks a figure.
    """
    if not results:
        raise ValueError("there are no results of diffusion steps to draw")
    for name in figures:
        if name not in STEP_FIGURES:
            raise ValueError(f"unknown figure {name!r}; choose {', '.join(STEP_FIGURES)}")
        for one in results:
            if name not in one.figures:
                raise ValueError(
                    f"the result of {one.world}, {one.levels} levels, {one.steps} steps, seed {one.seed} has no "
                    f"{name!r}"
                )
    worlds = list(dict.fromkeys(one.world for one in results))
    together = all(one.levels == one.steps for one in results)
    kinds = (
        ["steps = levels"]
        if together
        else [f"{levels} levels" for levels in sorted({r.levels for r in results})]
    )
    look = looks(kinds)
    figure, axes = grid(len(worlds), len(figures), 3.3, 2.7)
    for row, world in zip(axes, worlds, strict=True):
        own = [one for one in results if one.world == world]
        for axis, name in zip(row, figures, strict=True):
            for kind in kinds:
                chosen = own if together else [one for one in own if f"{one.levels} levels" == kind]
                _draw(axis, chosen, name, kind, look[kind])
            if name == "len":
                draw_law(axis, *([one.figures[end] for one in own] for end in _LAW))
            _label(axis, own, STEP_FIGURES[name])
        row[0].set_title(world, loc="left", fontsize=10)
    legend_beside(figure, axes, "line: mean of seeds\ndots: seeds")
    save_figure(figure, path)


def _draw(axis: Axes, results: Sequence[StepResult], figure: str, label: str, look: Look) -> None:
    if not results:
        return
    steps = sorted({one.steps for one in results})
    values = [[one.figures[figure] for one in results if one.steps == at] for at in steps]
    axis.plot(
        steps,
        [float(np.mean(one)) for one in values],
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markersize=6,
        linewidth=1.4,
        label=label,
    )
    for at, one in zip(steps, values, strict=True):
        axis.plot([at] * len(one), one, ".", color=look.colour, markersize=5, alpha=0.6)


def _label(axis: Axes, results: Sequence[StepResult], name: str) -> None:
    axis.set_xscale("log")
    steps = sorted({one.steps for one in results})
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    axis.set_xlabel("diffusion steps")
    axis.set_ylabel(name)


def _result(row: Mapping[str, str]) -> StepResult:
    keys = ("world", "levels", "steps", "seed")
    world, levels, steps, seed = (row[name] for name in keys)
    figures = {name: float(text) for name, text in row.items() if name not in keys and text != ""}
    return StepResult(world, int(levels), int(steps), int(seed), figures)
