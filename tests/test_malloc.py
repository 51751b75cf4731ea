"""Freed memory: kept while steps repeat, given back after."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from contextlib import nullcontext
from dbf2gguf.malloc import keeping_freed, return_freed
from dbf2gguf.peak_memory import resident

def step():
    kept = [torch.ones(2_000_000) for _ in range(12)]  # 8 MB each
    return sum(float(x[0]) for x in kept)

torch.set_num_threads(1)
with keeping_freed() if sys.argv[1] == "kept" else nullcontext():
    for _ in range(4):  # until the heap has its shape
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    held = resident()
return_freed()
print(faults, held, resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")
def test_repeated_steps_take_no_new_pages() -> None:
    """96 MB a step are 23 thousand pages; and all is given back in the end."""
    page = resource.getpagesize()
    results = {}
    for how in ("kept", "not"):
        run = subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True)
        results[how] = [int(x) for x in run.stdout.split()]
    faults, held, left = results["kept"]
    if results["not"][0] < 5 * 96e6 / page / 2:
        pytest.skip("this C library keeps freed memory anyway")
    assert faults < results["not"][0] / 20
    assert held - left > 80e6
