"""The memory that this process holds while something runs."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

from runtime.cli import peak_rss

SECONDS = 0.05  # between two looks
STATM = Path("/proc/self/statm")


class PeakMemory:
    """The most resident memory while the context lasts, `bytes`, known when it ends.

    Exact where the process never held more before, a figure that the system keeps; otherwise the largest of
    samples, or, where there is no /proc, the most that the process ever held.
    """

    bytes = 0

    def __enter__(self) -> PeakMemory:
        self._before, self._sampled = peak_rss(), resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._sampled is not None:
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(SECONDS):
            self._sampled = max(self._sampled or 0, resident() or 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._sampled is not None:
            self._thread.join()
        peak = peak_rss()
        self.bytes = peak if peak > self._before or self._sampled is None else self._sampled


def resident() -> int | None:
    """Bytes of resident memory now; None where the system has no /proc."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
