"""Independent tasks on the CPU's cores: one thread each, every task with one thread of its own.

Matrices of a small model are too small for two cores to share: two products side by side take half the time
of one after the other on both. And what one thread computes does not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch

AHEAD = 2
"""Items that are taken, for each thread: the next one waits when it has finished one."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) of each item, in order, without gradients. At most torch.get_num_threads() run at a
    time; a single item gets all threads. Items are taken when they are soon to run: at most AHEAD times as
    many are waiting, running, or done and not asked for."""
    threads, items = torch.get_num_threads(), iter(items)
    first = list(islice(items, 2 if threads > 1 else 0))
    several, items = len(first) > 1, chain(first, items)
    del first
    if not several:
        yield from map(torch.no_grad()(function), items)  # none while it is suspended
        return

    stop = threading.Event()

    @torch.no_grad()
    def run(item: Item) -> Result:
        _task.stop = stop
        torch.set_num_threads(1)
        return function(item)

    pool = ThreadPoolExecutor(threads)
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(run, item))
            del item  # it may be large
            if len(begun) == AHEAD * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
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
