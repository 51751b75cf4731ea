"""What keeps a GPU busy, because launching thousands of small kernels from Python takes longer than they do:
CUDA graphs (work that is recorded once and then played again), streams side by side, compiled modules."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from runtime.errors import first_line

Result = TypeVar("Result")
SIDE_STREAMS = 8


class Recorder:
    """Turns functions without arguments into such that are recorded, after a few calls that warm up.

    What they read and write must stay in its place, and functions of one recorder share the memory of what
    they make: they must be called in the order of their first calls, and a result holds until the next call.
    One that cannot be recorded, because it waits for the GPU, say, runs as it is, with a note on stderr.
    """

    def __init__(self, warm_up: int, others: bool = False) -> None:
        """
        warm_up  calls, of all functions together, that run as they are first
        others   other threads, NCCL's say, may use the GPU while something is recorded
        """
        self.warm_up = warm_up
        self.mode = "thread_local" if others else "global"
        self.stream = _streams(torch.cuda.current_device())[0]
        self.memory = torch.cuda.graph_pool_handle()
        self.fails = False

    def __call__(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """The function, to be recorded."""
        graph: torch.cuda.CUDAGraph | None = None
        result: Result

        def run() -> Result:
            nonlocal graph, result
            self.warm_up -= 1
            if graph is None and self.warm_up < 0 and not self.fails:
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(
                        graph, pool=self.memory, stream=self.stream, capture_error_mode=self.mode
                    ):
                        result = function()
                except RuntimeError as error:
                    graph, self.fails = None, True
                    print(f"note: no CUDA graph of this model: {reason(error)}", file=sys.stderr)
            if graph is not None:
                graph.replay()
                return result
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result

        return run


def side_by_side(tasks: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Call functions that do not depend on each other: on a GPU, each on one of a few streams, so that small
    ones share it; on a CPU one after the other."""
    if device.type != "cuda":
        for task in tasks:
            task()
        return
    here, streams = torch.cuda.current_stream(device), _streams(device.index)[1:]
    for stream in streams[: len(tasks)]:
        stream.wait_stream(here)
    for task, stream in zip(tasks, itertools.cycle(streams), strict=False):
        with torch.cuda.stream(stream):
            task()
    for stream in streams[: len(tasks)]:
        here.wait_stream(stream)


@functools.cache
def _streams(device: int) -> list[torch.cuda.Stream]:
    """Of a GPU: that of recorders, and those of side_by_side. Always the same, for each keeps memory."""
    return [torch.cuda.Stream(device) for _ in range(1 + SIDE_STREAMS)]


class Later:
    """A number that the GPU may still be working on. Asking for it (`float`) does not wait for what the GPU
    is given after it."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._known = value, None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._known = torch.cuda.Event()
            self._known.record()

    def __float__(self) -> float:
        if self._known is not None:
            self._known.synchronize()
        return float(self._value)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works for a device: it wants a C compiler and, for GPUs, Triton. If not, a note
    on stderr says why."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds, none of them documented
        print(
            f"note: torch.compile does not work here, which costs time: {first_line(error)}", file=sys.stderr
        )
        return False
    return True


@contextmanager
def compiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules compiled while the context lasts: one compilation serves all that are alike."""
    modules = list(modules)
    for module in modules:
        module.compile()
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def reason(error: RuntimeError) -> str:
    """What went wrong first: the end of a recording that has failed fails, too, and torch.compile wraps what
    it meets in an error of its own."""
    first = error.__context__ or error
    return first_line(getattr(first, "inner_exception", first))
