"""Tasks of test_executors.py, in a module that other processes can import quickly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from dbf2gguf.factorize import Factors, factorize


def pid() -> int:
    return os.getpid()


def threads() -> tuple[int, int, bool]:
    """The process, its threads, and whether gradients are recorded."""
    return os.getpid(), torch.get_num_threads(), torch.is_grad_enabled()


def fail() -> None:
    raise ZeroDivisionError("of no use")


def die(tester: int) -> None:
    assert os.getpid() != tester
    os.kill(os.getpid(), signal.SIGKILL)


def factors(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 96, 160, generator=generator)
    ones_in, ones_out = torch.ones(1, 160), torch.ones(1, 96)
    return factorize(weight, 64, ones_in, ones_out, iterations=6, seed=seed)


def slow_factors(seed: int, folder: str) -> Factors:
    """After a while; the folder tells who began."""
    Path(folder, f"{seed}-{os.getpid()}").touch()
    time.sleep(1.5)
    return factors(seed)
