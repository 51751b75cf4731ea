"""CUDA graphs: work on a GPU that is recorded once and then played again, because launching thousands of
small kernels from Python takes longer than they do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from runtime.errors import first_line

Result = TypeVar("Result")


class Recorder:
    """Turns functions without arguments into such that are recorded, after a few calls that warm up.

    What they read and write must stay in its place, and functions of one recorder share the memory of what
    they make: they must be called in the order of their first calls, and a result holds until the next call.
    One that cannot be recorded, because it waits for the GPU, say, runs as it is, with a note on stderr.
    """

    def __init__(self, warm_up: int, others: bool = False) -> None:
        """others: other threads, NCCL's say, may use the GPU while something is recorded"""
        self.warm_up = warm_up
        self.mode = "thread_local" if others else "global"
        self.stream = torch.cuda.Stream()
        self.memory = torch.cuda.graph_pool_handle()
        self.fails = False

    def __call__(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """The function, to be recorded."""
        calls = 0
        graph: torch.cuda.CUDAGraph | None = None
        result: Result

        def run() -> Result:
            nonlocal calls, graph, result
            calls += 1
            if calls == self.warm_up + 1 and not self.fails:
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


def reason(error: RuntimeError) -> str:
    """What went wrong first: the end of a recording that has failed fails, too, and torch.compile wraps what
    it meets in an error of its own."""
    first = error.__context__ or error
    return first_line(getattr(first, "inner_exception", first))
