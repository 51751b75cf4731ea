"""The same shape on llama.cpp, through llama-cpp-python: DBF and each of llama.cpp's types by turns.

Embedding and head are Q8_0 on both sides; only the linear layers differ. Random blocks are as fast as
real ones.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

import runtime
from runtime.bench.decode import Case, Runner, progress
from runtime.bench.report import Row, median, ratio_of_medians
from runtime.bench.synthetic import Shape, write_ggml
from runtime.errors import BackendError, OptionError

PACKAGE = "llama-cpp-python"
TYPES = (Type.Q4_0, Type.Q8_0, Type.TQ1_0, Type.TQ2_0, Type.IQ1_S, Type.IQ2_XXS, Type.Q2_K)


def find() -> Any:
    """The module llama_cpp.

    Raises BackendError if it is not installed.
    """
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as e:  # the last two: its compiled library does not load
        raise BackendError(f"--peer needs {PACKAGE} ({e}); run: pip install {PACKAGE}") from e


class PeerBackend:
    """llama.cpp, with as much of runtime.backend's Backend as Runner needs."""

    def __init__(self, llama_cpp: Any, path: Path, n_threads: int, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self._llama = llama_cpp.Llama(
            model_path=str(path),
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def eval(self, tokens: NDArray[Any], pos: int, n_logits: int) -> None:
        """Run tokens at position pos; what the cache holds beyond is forgotten. Logits stay inside."""
        self._llama.n_tokens = pos
        self._llama.eval(tokens.tolist())

    def close(self) -> None:
        self._llama.close()


def bench(
    dbf: Path,
    shape: Shape,
    cases: Sequence[Case],
    threads: Sequence[int | None],
    repeats: int,
    seed: int,
    note: Callable[[str], None],
    types: Sequence[Type] = TYPES,
) -> Iterator[Row]:
    """Rows of every type, number of threads and test; note takes what was left out, and why.

    Repetitions of DBF and of the type alternate, so that a change of the machine's mood hits both.

    Raises BackendError if llama-cpp-python is not installed.
    """
    llama_cpp = find()
    n_ctx = max(case.n_depth + case.tokens for case in cases)
    with tempfile.TemporaryDirectory(prefix="dbf-bench-") as folder:
        for kind in types:
            path = Path(folder) / f"{kind.name}.gguf"
            try:
                write_ggml(path, shape, kind, seed, progress)
                for n in threads:
                    yield from _both(llama_cpp, dbf, path, kind, cases, n, n_ctx, repeats)
            except OptionError as e:
                progress("")
                note(f"skipped: {e}")
            except (ValueError, RuntimeError) as e:  # what llama-cpp-python raises for a file it cannot read
                progress("")
                note(f"skipped: {PACKAGE} {_version()} refuses {kind.name}: {e}")
            finally:
                path.unlink(missing_ok=True)


def _both(
    llama_cpp: Any,
    dbf: Path,
    path: Path,
    kind: Type,
    cases: Sequence[Case],
    n_threads: int | None,
    n_ctx: int,
    repeats: int,
) -> Iterator[Row]:
    with runtime.load(dbf, backend="c", n_threads=n_threads, n_ctx=n_ctx) as model:
        n_vocab = model.file.config.n_vocab
        n = model.backend.n_threads
        peer = PeerBackend(llama_cpp, path, n, n_ctx)
        try:
            ours, theirs = Runner(model.backend, n_vocab), Runner(peer, n_vocab)
            for case in cases:
                rates = _alternate(ours, theirs, case, repeats, f"{kind.name}, {n} threads, {case.name}")
                yield {
                    "type": kind.name,
                    "n_threads": n,
                    "test": case.name,
                    "n_prompt": case.n_prompt,
                    "n_gen": case.n_gen,
                    "n_depth": case.n_depth,
                    "size": path.stat().st_size,
                    "dbf_size": dbf.stat().st_size,
                    "median_ts": median(rates[1]),
                    "dbf_median_ts": median(rates[0]),
                    "dbf_ratio": ratio_of_medians(*rates),
                    "samples_ts": rates[1],
                    "dbf_samples_ts": rates[0],
                    "peer": f"{PACKAGE} {_version()}",
                }
        finally:
            peer.close()


def _alternate(
    ours: Runner, theirs: Runner, case: Case, repeats: int, label: str
) -> tuple[list[float], list[float]]:
    """Tokens per second of both, in turns; in each round the other one begins."""
    rates: tuple[list[float], list[float]] = ([], [])
    progress(f"{label}: warm-up")
    for runner in (ours, theirs):
        runner.prepare(case)
    for i in range(repeats):
        progress(f"{label}: {i + 1}/{repeats}")
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            rates[which].append(case.tokens / (ours, theirs)[which].run(case))
    progress("")
    return rates


def _version() -> str:
    try:
        return version(PACKAGE.replace("-", "_"))
    except PackageNotFoundError:
        return "of unknown version"


def _ratio(row: Row) -> str:
    return f"{row['dbf_ratio']:.2f} x"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "llama.cpp type": lambda r: r["type"],
    "file:": lambda r: f"{r['size'] / 2**20:.0f} MiB",
    "DBF file:": lambda r: f"{r['dbf_size'] / 2**20:.0f} MiB",
    "threads:": lambda r: str(r["n_threads"]),
    "test:": lambda r: r["test"],
    "t/s (median):": lambda r: f"{r['median_ts']:.2f}",
    "DBF t/s (median):": lambda r: f"{r['dbf_median_ts']:.2f}",
    "DBF / type:": _ratio,
}
