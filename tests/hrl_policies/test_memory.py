"""Peak memory is that of one run, not of what the process did before."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import hrl_policies.study.run_log as memory
from hrl_policies.study.run_log import PeakMemory

LARGE = 200 * 2**20


@pytest.fixture
def forgetful():
    """Skips where the system does not let a process forget its earlier peaks (such as in some containers)."""
    allocate(LARGE)
    try:
        memory._RESET.write_text(memory._RESET_PEAK, encoding="ascii")
        held, peak = memory._status("VmRSS"), memory._status("VmHWM")
    except OSError as error:
        pytest.skip(f"this system does not let a process forget its earlier peaks: {error}")
    if held is None or peak is None or peak > held + LARGE // 2:
        pytest.skip("this system does not forget earlier peaks of a process, though it takes the order to")


@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """A system that remembers peaks, and tells nothing but the largest ever: macOS, say."""
    pytest.importorskip("resource")
    monkeypatch.setattr(memory, "_RESET", tmp_path / "no/clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "no/status")


def allocate(size):
    """Touches so many bytes and lets them go."""
    array = np.ones(size, np.uint8)
    del array


def test_a_large_array_shows_while_measured_even_after_it_is_gone(forgetful):
    peak = PeakMemory()
    before = peak.mib()
    allocate(LARGE)
    assert peak.mib() > before + 150


def test_what_was_freed_before_does_not_count(forgetful):
    first = PeakMemory()
    allocate(LARGE)
    grown = first.mib()
    assert PeakMemory().mib() < grown - 150


def test_elsewhere_a_peak_below_an_earlier_one_is_not_known(remembering):
    allocate(2 * LARGE)
    peak = PeakMemory()
    allocate(LARGE)
    assert peak.mib() is None


def test_elsewhere_a_new_peak_of_the_process_is_that_of_the_run(remembering, monkeypatch):
    peak = PeakMemory()
    new = memory._peak_of_process() + LARGE
    monkeypatch.setattr(memory, "_peak_of_process", lambda: new)
    assert peak.mib() == pytest.approx(new / 2**20, abs=0.1)


def test_elsewhere_it_is_the_largest_that_the_process_ever_held(remembering):
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory._peak_of_process() == largest * (1 if sys.platform == "darwin" else 2**10)


@pytest.mark.parametrize(("before", "known"), [(0, True), (LARGE, False)])
def test_a_container_that_forbids_forgetting_tells_what_it_can(monkeypatch, tmp_path, before, known):
    """The status is readable there, so a process without an earlier peak knows its own."""
    status = tmp_path / "status"
    monkeypatch.setattr(memory, "_RESET", tmp_path / "no/clear_refs")
    monkeypatch.setattr(memory, "_STATUS", status)
    held = 300 * 2**20
    status.write_text(f"VmHWM:\t{(held + before) // 1024} kB\nVmRSS:\t{held // 1024} kB\n", encoding="ascii")
    peak = PeakMemory()
    assert peak.mib() == (300.0 if known else None)
    status.write_text(f"VmHWM:\t{(held + 2 * LARGE) // 1024} kB\nVmRSS:\t{held // 1024} kB\n", encoding="ascii")
    assert peak.mib() == 700.0


def test_a_system_that_tells_nothing_gives_none(remembering, monkeypatch):
    monkeypatch.setattr(memory, "_peak_of_process", lambda: None)
    assert PeakMemory().mib() is None
