"""The memory of a stage."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from dbf2gguf import peak_memory
from dbf2gguf.peak_memory import PeakMemory, resident
from dbf2gguf.progress import Stage
from runtime.cli import peak_rss

MIB = 1 << 20
needs_proc = pytest.mark.skipif(not peak_memory.STATM.exists(), reason="the system has no /proc")


def hold(mib: int) -> None:
    """So much memory, long enough to be seen."""
    held = np.ones(mib * MIB, np.uint8)
    time.sleep(4 * peak_memory.SECONDS)
    assert held[-1] == 1


@needs_proc
def test_less_than_before_is_seen() -> None:
    """A later stage that needs less is told apart from an earlier one that needed more."""
    with PeakMemory() as large:
        hold(400)
    before = resident()
    assert before is not None
    with Stage("small", 1, quiet=True) as small:
        hold(100)
    assert before + 99 * MIB < small.peak_memory < before + 200 * MIB
    assert large.bytes > small.peak_memory + 200 * MIB


def test_a_new_peak_is_exact() -> None:
    """Even one that passes between two looks."""
    with PeakMemory() as watched:
        np.ones(max(0, peak_rss() - (resident() or 0)) + 64 * MIB, np.uint8)
    assert watched.bytes == peak_rss()


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "STATM", Path("/nowhere"))
    assert resident() is None
    with PeakMemory() as watched:
        hold(1)
    assert watched.bytes == peak_rss()
