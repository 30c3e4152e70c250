"""Peak memory is that of one run, not of what the process did before."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import hrl_policies.study.memory as memory
from hrl_policies.study.memory import PeakMemory

LARGE = 200 * 2**20


def test_a_large_array_shows_while_measured_even_after_it_is_gone():
    peak = PeakMemory()
    before = peak.mib()
    array = np.ones(LARGE, np.uint8)
    del array
    assert before is not None and peak.mib() > before + 150


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets earlier peaks")
def test_what_was_freed_before_does_not_count():
    first = PeakMemory()
    array = np.ones(LARGE, np.uint8)
    del array
    grown = first.mib()
    assert PeakMemory().mib() < grown - 150


def test_elsewhere_it_is_the_peak_of_the_process(monkeypatch, tmp_path):
    pytest.importorskip("resource")
    monkeypatch.setattr(memory, "_RESET", tmp_path / "no/clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "no/status")
    assert PeakMemory().mib() == pytest.approx(_largest_ever(), rel=0.01)


def _largest_ever():
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 2**10)
