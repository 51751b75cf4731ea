"""What keeps a GPU busy, because launching thousands of small kernels from Python takes longer than they do:
CUDA graphs (work that is recorded once and then played again), and compiled modules."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from runtime.errors import first_line

Result = TypeVar("Result")
_failed: set[str] = set()
"""What could not be recorded, and is not tried again: a recording that fails keeps its memory."""


class Recorder:
    """Turns functions without arguments into such that are recorded, after a few calls that warm up.

    What they read and write must stay in its place, on the current device, and functions of one recorder
    share the memory of what they make: they must be called in the order of their first calls, and a result
    holds until the next call. One that cannot be recorded, because it waits for the GPU, say, runs as it is,
    with a note on stderr.
    """

    def __init__(self, what: str, warm_up: int, others: bool = False) -> None:
        """
        what     is recorded, for the note: once it has failed, nothing of the kind is recorded any more
        warm_up  calls, of all functions together, that run as they are first
        others   other threads, NCCL's say, may use the GPU while something is recorded
        """
        self.what, self.warm_up = what, warm_up
        self.mode = "thread_local" if others else "global"
        self.stream = _stream(torch.cuda.current_device())
        self.memory = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """The function, to be recorded."""
        graph: torch.cuda.CUDAGraph | None = None
        result: Result

        def run() -> Result:
            nonlocal graph, result
            self.warm_up -= 1
            here = torch.cuda.current_stream()
            if graph is None and self.warm_up < 0 and self.what not in _failed:
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(
                        graph, pool=self.memory, stream=self.stream, capture_error_mode=self.mode
                    ):
                        result = function()
                except RuntimeError as error:
                    graph = None
                    _failed.add(self.what)
                    torch.cuda.set_stream(here)  # torch leaves it where the recording was
                    print(f"note: no CUDA graph of {self.what}: {reason(error)}", file=sys.stderr)
            if graph is not None:
                graph.replay()
                return result
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                result = function()
            here.wait_stream(self.stream)
            return result

        return run


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """That of a GPU's recorders: always the same, for each keeps memory."""
    return torch.cuda.Stream(device)


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
        print(f"note: torch.compile does not work here, which costs time: {reason(error)}", file=sys.stderr)
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


def reason(error: Exception) -> str:
    """What went wrong first: the end of a recording that has failed fails, too, and torch.compile wraps what
    it meets in an error of its own."""
    first = error.__context__ or error
    return first_line(getattr(first, "inner_exception", first))
