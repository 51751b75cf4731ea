"""The processes that torchrun started: the first converts, the others help it to distil.

    torchrun --standalone --nproc-per-node 2 -m dbf2gguf MODEL OUT

Each has a GPU of its own (NCCL), or they share the CPU (gloo). What they tell each other apart from
gradients always goes through gloo, which waits without a GPU.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import BackendError, first_line

PATIENCE = timedelta(days=30)  # others wait for whole stages of the first; torchrun ends who waits in vain


class GoneError(BackendError):
    """Another process of the team has ended before its time."""


class Team:
    """`size` processes, of which this is number `rank`, from 0. A team of one is alone and shares nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def share(self, value: Any = None) -> Any:
        """What the first process gives, in every process. Tensors must be on the CPU.

        Raises GoneError if another process has ended.
        """
        if self.size == 1:
            return value
        box = [value]
        with _others_needed():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def part(self, n: int) -> slice:
        """This process's part of n things: parts are consecutive, and their sizes differ by one at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all processes, in place; the result is the same bits in every process, and in
        every run of so many processes.

        Raises GoneError if another process has ended.
        """
        if self.size == 1:
            return
        with _others_needed():
            for pending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                pending.wait()


ALONE = Team()


def torchrun_size() -> int:
    """How many processes torchrun started; 1 without it."""
    torchrun = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ["WORLD_SIZE"]) if torchrun else 1


def local_rank() -> tuple[int, int]:
    """This process's number among those of torchrun on this machine, and how many they are."""
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team of torchrun's processes for as long as the context lasts, ALONE without torchrun.

    device  cpu or cuda:N, where this process computes

    torchrun ends all processes once one has failed; as after Ctrl-C, the context's files are removed.
    Raises BackendError if the processes cannot reach each other.
    """
    if torchrun_size() == 1:
        yield ALONE
        return
    # its functions hold the group of processes that there is when they are first imported, as their default
    # argument: past its end, which then aborts a process as it leaves
    import_module("torch.distributed.nn")
    before = signal.signal(signal.SIGTERM, leave)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except RuntimeError as error:
            raise BackendError(f"torchrun: the processes do not reach each other: {error}") from error
        team = Team(dist.get_rank(), dist.get_world_size())
        try:
            yield team
            team.sum([torch.zeros(1)])  # all are done
            dist.destroy_process_group()
        except BaseException:
            if device != "cpu":
                _abort()
            raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _abort() -> None:
    """End what the GPU waits for in vain; else the process might not end."""
    with suppress(AttributeError, RuntimeError, ValueError):  # torch calls it experimental
        dist.distributed_c10d._abort_process_group()


def leave(signum: int, _frame: object) -> None:
    """A handler of signals: end, but cleaning up on the way."""
    raise SystemExit(128 + signum)


@contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise GoneError(
            "torchrun: another process has ended; what is finished is kept, and the same command goes on "
            f"({first_line(error)})"
        ) from error
