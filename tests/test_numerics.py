"""Results do not hang on threads, on the size of a batch, on kernels of linear algebra, or on single precision.

``docs/reliability.md`` states the tolerances. Run as ``__main__`` this file writes the figures to a file.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from dsrm.own_level import OwnLevel
from hrl_policies.common.slates import QuotaSlateDistribution, SlateDistribution
from kuaifair_env.metrics import absolute_difference, gini, item_exposure_gap, normalised_entropy, violation_rate

ITEMS, DIMENSION, SLATE, SESSIONS = 400, 32, 10, 256
TOLERANCES = {"posterior": 5e-5, "log_probabilities": 1e-4, "fairness": 1e-12}
"""Largest difference allowed of logits of beliefs, of log-probabilities of slates, and of metrics in [0, 1]."""
KERNELS = {
    "Haswell": {"OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    "Prescott": {"OPENBLAS_CORETYPE": "Prescott", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
}


def results(dtype: torch.dtype = torch.float32, sessions: slice = slice(None)) -> dict[str, np.ndarray]:
    """Returns posterior, log-probabilities and fairness of the same sessions, or of some of them."""
    rng = np.random.default_rng(0)
    units = rng.standard_normal((ITEMS, DIMENSION)) / np.sqrt(DIMENSION)
    features = torch.from_numpy(np.hstack([np.ones((ITEMS, 1)), units])).to(dtype)
    base = torch.from_numpy(rng.standard_normal((SESSIONS, ITEMS)))[sessions].to(dtype)
    shown = rng.random((SESSIONS, 3, ITEMS)).argsort(axis=2)[:, :, :SLATE][sessions]
    clicks = (rng.random((SESSIONS, 3, SLATE)) < 0.4)[sessions]
    popular = rng.random(ITEMS) < 0.3
    level = OwnLevel(features, len(base))
    for step in range(3):
        items = torch.from_numpy(shown[:, step])
        level.observe(torch.arange(len(base)), items, torch.from_numpy(clicks[:, step]), base)
        level.converge(base)
    slates = torch.from_numpy(shown[:, 0])
    in_front = torch.from_numpy(np.argsort(~popular[shown[:, 0]], axis=1, kind="stable"))
    groups = torch.from_numpy(popular).expand(len(base), -1)
    counts = groups.gather(1, slates).sum(dim=1)
    distributions = (
        SlateDistribution(level.logits(), SLATE).log_prob(slates),
        QuotaSlateDistribution(level.logits(), groups, counts, SLATE).log_prob(slates.gather(1, in_front)),
    )
    exposures = [np.bincount(session.ravel(), minlength=ITEMS) for session in shown]
    fairness = [
        (absolute_difference(one, popular), gini(one), item_exposure_gap(one, popular), normalised_entropy(one))
        for one in exposures
    ]
    return {
        "posterior": np.hstack([level.logits().numpy(), level.variances(slates).numpy()]).astype(np.float64),
        "log_probabilities": torch.stack(distributions, dim=1).numpy().astype(np.float64),
        "fairness": np.hstack([fairness, [[violation_rate(click)] for click in clicks]]),
    }


@pytest.fixture(scope="module")
def usual():
    return results()


def assert_equal(found, expected):
    for name, tolerance in TOLERANCES.items():
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_single_precision_agrees_with_double(usual):
    assert_equal(usual, results(torch.float64))


def test_a_session_alone_has_the_results_that_it_has_among_256(usual):
    for row in (0, 100, 255):
        chosen = slice(row, row + 1)
        assert_equal(results(sessions=chosen), {name: values[chosen] for name, values in usual.items()})


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_and_two_agree(usual, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            few = slice(64)
            assert_equal(results(sessions=few), {name: values[few] for name, values in usual.items()})
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_two_kernels_of_linear_algebra_agree(tmp_path):
    found = []
    for name, settings in KERNELS.items():
        path = tmp_path / f"{name}.npz"
        # As a script it would have this folder on sys.path, where tests/kuaifair_env hides an editable install.
        code = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
        subprocess.run([sys.executable, "-c", code, path], env=os.environ | settings, check=True, timeout=120)
        found.append(np.load(path))
    assert_equal(*found)


if __name__ == "__main__":
    np.savez(sys.argv[1], **results(sessions=slice(64)))
