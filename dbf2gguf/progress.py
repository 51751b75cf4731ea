"""Progress of long work on stderr: a bar with ETA on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

from dbf2gguf.peak_memory import PeakMemory

LINE_SECONDS = 20.0


class Stage:
    """A named stage of `total` steps; a context manager that also measures its wall-clock time and the most
    memory that the process holds meanwhile, in bytes.

    with Stage("distil", 64) as stage:
        for ...:
            stage.step(note="KL 0.93")
    """

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self.name, self.total, self.quiet = name, total, quiet
        self.seconds, self.peak_memory = 0.0, 0
        self._memory = PeakMemory()
        self._done, self._note = 0, ""
        self._lock = threading.Lock()
        self._bar: tqdm | None = None

    def __enter__(self) -> Stage:
        self._start = self._last_line = time.monotonic()
        self._memory.__enter__()
        if self.quiet:
            return self
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total, desc=f"{self.name:<12}", file=sys.stderr, dynamic_ncols=True)
        else:
            print(f"{self.name}: started", file=sys.stderr, flush=True)
        return self

    def step(self, note: str = "", n: int = 1) -> None:
        """Report `n` finished steps and, in `note`, the state of the work. Threads may call it."""
        with self._lock:
            self._step(note, n)

    def _step(self, note: str, n: int) -> None:
        self._done += n
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(n)
        elif not self.quiet:
            now = time.monotonic()
            if now - self._last_line >= LINE_SECONDS and 0 < self._done < self.total:
                self._last_line = now
                left = (now - self._start) * (self.total - self._done) / self._done
                self._line(f"{self._done}/{self.total}, {_clock(left)} left")

    def say(self, text: str) -> None:
        """A line of its own, beside the state of the work."""
        if not self.quiet:
            tqdm.write(f"{self.name}: {text}", file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._start
        self._memory.__exit__(kind, error, trace)
        self.peak_memory = self._memory.bytes
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and kind is None:
            self._line(f"done in {_clock(self.seconds)}")

    def _line(self, text: str) -> None:
        note = f" ({self._note})" if self._note else ""
        print(f"{self.name}: {text}{note}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
