"""What glibc's malloc does with freed memory. Nothing, where another C library is in its place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
RETURNED_BYTES = 1 << 17  # glibc's own threshold, until it learns of larger blocks
LARGEST_BLOCK = 1 << 25  # the largest that it takes from its heap
KEPT_BYTES = 10**9  # free at the heap's end that are kept for what comes next
USUAL_KEPT_BYTES = 2 * LARGEST_BLOCK  # what it keeps once it has seen blocks of LARGEST_BLOCK


def return_freed(from_now_on: bool = False) -> None:
    """Give freed memory back to the system: glibc keeps what threads have freed, gigabytes after some stages.

    from_now_on  at once what has RETURNED_BYTES or more, until the process ends
    """
    if from_now_on:
        _call("mallopt", M_MMAP_THRESHOLD, RETURNED_BYTES)
    _call("malloc_trim", 0)


@contextmanager
def keeping_freed() -> Iterator[None]:
    """Freed memory stays with the process while the context lasts: steps that make the same tensors again and
    again otherwise get pages from the system each time, which it fills with zeros first."""
    _call("mallopt", M_MMAP_THRESHOLD, LARGEST_BLOCK)
    _call("mallopt", M_TRIM_THRESHOLD, KEPT_BYTES)
    try:
        yield
    finally:
        _call("mallopt", M_TRIM_THRESHOLD, USUAL_KEPT_BYTES)


def _call(name: str, *values: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # other C libraries
        ctypes.CDLL(None)[name](*values)
