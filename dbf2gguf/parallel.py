"""Independent tasks on the CPU's cores: one thread each, every task with one thread of its own.

Matrices of a small model are too small for two cores to share: two products side by side take half the time
of one after the other on both. And what one thread computes does not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) of each item, in order, without gradients. At most torch.get_num_threads() run at a
    time; a single item gets all threads."""
    items = list(items)
    threads = torch.get_num_threads()
    if len(items) < 2 or threads < 2:
        yield from map(torch.no_grad()(function), items)  # none while it is suspended
        return

    stop = threading.Event()

    @torch.no_grad()
    def run(item: Item) -> Result:
        _task.stop = stop
        torch.set_num_threads(1)
        return function(item)

    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(run, items)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def stop_if_unwanted() -> None:
    """Long tasks call this now and then: it ends them after Ctrl-C or another's error.

    Raises UnwantedError.
    """
    stop = getattr(_task, "stop", None)
    if stop is not None and stop.is_set():
        raise UnwantedError


class UnwantedError(Exception):
    """Nobody waits for the result of this task any more."""


_task = threading.local()
