"""What a posterior over users' preferences costs per step, by model and batch; writes docs/results/preference_costs.md.

    python benchmarks/preference_costs.py --results docs/results

Networks have the sizes of :class:`dsrm.PretrainConfig` and untrained weights, which cost the same. Processor time of
one thread, medians over repeated runs with their range, each beside its ratio to a product of two float32 matrices,
(256, 64) x (64, 10,728), timed in between. The own level, which gives the evidence, is in belief_costs.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from belief_costs import Clock
from worlds import write_page

from dsrm.diffusion import Denoiser, DenoiserConfig
from dsrm.model import Standardiser, TrainedDenoiser
from dsrm.preference import ClosedForm, Evidence, LevelPrior, PreferenceModel, context_size
from dsrm.preference_mixture import MixturePreference, TastePrior
from dsrm.preference_networks import DiffusionPreference, RegressionPreference
from dsrm.preference_student import Student, student_network
from dsrm.pretraining import PretrainConfig, regression_network
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.store import machine

DIMENSION = 64
BATCHES = (1, 64)
RUNS, CALLS, IN_A_ROW = 5, 6, 8
MODES = ("closed form", "gaussian", "mixture of 8", "regression", "diffusion: student")
DRAWS = ("diffusion: mean, without student", "diffusion: one draw of each preference")


def models() -> dict[str, PreferenceModel]:
    """Returns a model of every sort, and the diffusion model with and without its student."""
    size, context = DIMENSION + 1, context_size(DIMENSION)
    config = PretrainConfig(mode="belief")
    schedule, inputs = config.noise_schedule(), 2 * size + 2
    shape = DenoiserConfig(DIMENSION, inputs, "velocity", config.network_width, config.network_blocks)
    condition = Standardiser(np.zeros(inputs, np.float32), np.ones(inputs, np.float32))
    state = Standardiser(np.zeros(DIMENSION, np.float32), np.ones(DIMENSION, np.float32))
    level = LevelPrior(np.zeros(context + 1, np.float32), 0.4, 0.5)
    normal = MixturePreference(level, _taste(1))
    student = Student(student_network(inputs, config.student.width, 2 * size), condition)
    denoiser = TrainedDenoiser(Denoiser(shape, schedule).eval(), condition, state)
    least_squares = TrainedDenoiser(regression_network(shape).eval(), condition, state)
    with_student, alone = (DiffusionPreference(denoiser, schedule, normal, 1.0, net) for net in (student, None))
    return {
        "closed form": ClosedForm(),
        "gaussian": normal,
        "mixture of 8": MixturePreference(level, _taste(8)),
        "regression": RegressionPreference(least_squares, normal, 1.0, np.ones(DIMENSION, np.float32)),
        "diffusion: student": with_student,
        "diffusion: alone": alone,
    }


def _taste(parts: int) -> TastePrior:
    covariances = np.tile(np.eye(DIMENSION, dtype=np.float32), (parts, 1, 1))
    slopes = np.zeros((context_size(DIMENSION) + 1, DIMENSION), np.float32)
    weights, means = np.full(parts, 1.0 / parts, np.float32), np.zeros((parts, DIMENSION), np.float32)
    return TastePrior(slopes, 0.3, weights, means, covariances)


def evidence(batch: int) -> Evidence:
    """Returns the evidence of random sessions."""
    generator = torch.Generator().manual_seed(0)
    size = DIMENSION + 1
    answers = torch.randn(batch, size, 3 * size, generator=generator) * 0.1
    precisions = torch.eye(size) + answers @ answers.mT
    contexts = torch.randn(batch, context_size(DIMENSION), generator=generator)
    means = torch.randn(batch, size, generator=generator)
    return Evidence(contexts, means, torch.linalg.inv(precisions), torch.full((size,), 0.7))


def row(call: Callable[[], object]) -> str:
    """Returns medians over runs: of a call among others like it with its range and ratio, and of a first one."""
    call()
    times, firsts, products = [], [], []
    for _ in range(RUNS):
        first, others = Clock(), Clock()
        for _ in range(CALLS):
            first.time(call)
            others.time(lambda: [call() for _ in range(IN_A_ROW)])
        times.append(np.median(others.times) / IN_A_ROW)
        firsts.append(np.median(first.times))
        products.append(others.product())
    spent, product = np.median(times), np.median(products)
    interval = f"{spent:.3f} [{min(times):.3f}, {max(times):.3f}]"
    return f"{interval} | {spent / product:.2f} | {np.median(firsts):.3f} | {np.median(firsts) / product:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    known = models()
    lines = []
    for batch in BATCHES:
        some = evidence(batch)
        diffusion = known["diffusion: alone"]
        assert isinstance(diffusion, DiffusionPreference)
        calls: dict[str, Callable[[], object]] = {name: partial(known[name].moments, some) for name in MODES}
        calls[DRAWS[0]] = partial(diffusion.own_means, some)
        calls[DRAWS[1]] = partial(diffusion.samples, some, 1, 0)
        lines += [f"| {name} | {batch} | {row(call)} |" for name, call in calls.items()]
    product = Clock()
    for _ in range(CALLS):
        product.time(lambda: None)
    page = [
        "# What a posterior over users' preferences costs",
        "",
        "| model: mean and spread | sessions | ms [range over runs] | ratio | first call, ms | ratio |",
        "|---|---:|---:|---:|---:|---:|",
        *lines,
        "",
        f"d = {DIMENSION}; medians over {RUNS} runs of medians of {CALLS} times. Ratio: to a (256, 64) x (64, 10,728) "
        f"product on the same thread, timed in between. {IN_A_ROW} calls in a row, and the first call after a product, "
        "which has emptied the caches. The evidence comes from the own level ([belief_costs.md](belief_costs.md)).",
        "",
        f"Made by: `python benchmarks/preference_costs.py` ({machine()}); the product took {product.product():.1f} ms.",
    ]
    write_page(arguments.results, "preference_costs.md", "\n".join(page))


if __name__ == "__main__":
    main()
