"""Where the time of a token goes: the stages of the C core's forward pass, on its first thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import runtime
from runtime.backend import Backend
from runtime.bench import machine
from runtime.bench.decode import Case, Runner, context_of, progress
from runtime.bench.report import Row

OUTSIDE = "outside the C core"
"""What is left of a token's time: Python's part."""


def bench(
    path: str,
    cases: Sequence[Case],
    threads: Sequence[int | None],
    repeats: int,
    backend: str,
    kv_type: str = "f16",
    activations: str = "int16",
) -> Iterator[Row]:
    """Rows of all stages of all cases with each number of threads; None: the number of physical cores.

    Of the repetitions, the one of median time is told, so that the stages add up to it. "barriers" is what
    the first thread waits for the others, and for the pool to start and stop.

    Raises BackendError if the backend has no stages.
    """
    core = machine.find_core()
    n_ctx = context_of(cases)
    for n in threads:
        progress("loading the model")
        with runtime.load(
            path, backend=backend, n_threads=n, n_ctx=n_ctx, kv_type=kv_type, activations=activations
        ) as model:
            runner = Runner(model.backend, model.file.config.n_vocab)
            for case in cases:
                progress(f"{model.backend.n_threads} threads, {case.name}")
                runner.prepare(case)
                total, spent = median_run(model.backend, runner, case, repeats)
                progress("")
                for stage, seconds in {**spent, OUTSIDE: total - sum(spent.values())}.items():
                    yield {
                        "isa": core.active if core else None,
                        "n_threads": model.backend.n_threads,
                        "kv_type": kv_type,
                        "activations": activations,
                        "test": case.name,
                        "n_prompt": case.n_prompt,
                        "n_gen": case.n_gen,
                        "n_depth": case.n_depth,
                        "stage": stage,
                        "us_per_token": round(seconds / case.tokens * 1e6, 3),
                        "share": round(seconds / total, 5),
                    }


def median_run(backend: Backend, runner: Runner, case: Case, repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of the repetition of median time, and of its stages."""
    runs = []
    for _ in range(repeats):
        backend.start_stages()
        total = runner.run(case)
        runs.append((total, backend.stop_stages()))
    return sorted(runs, key=lambda run: run[0])[(repeats - 1) // 2]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "threads:": lambda r: str(r["n_threads"]),
    "test:": lambda r: r["test"],
    "stage": lambda r: r["stage"],
    "µs/token:": lambda r: f"{r['us_per_token']:.1f}",
    "share:": lambda r: f"{r['share']:.1%}",
}
