"""The same shape on llama.cpp, through llama-cpp-python: DBF and each of llama.cpp's types by turns.

Embedding and head are Q8_0 on both sides; only the linear layers differ, and all of them are of the one type
(llama-quantize would give some a larger one). Random blocks are as fast as real ones. llama.cpp is called as
llama-bench calls it, with its default settings: batches of 2048 tokens in parts of 512, logits of the last
token alone, flash attention and repacking of weights as it chooses.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

import runtime
from runtime.bench import machine
from runtime.bench.decode import Case, Runner, context_of, facts, progress
from runtime.bench.report import Row, median, ratio_of_medians
from runtime.bench.synthetic import Q1_0, Shape, write_ggml
from runtime.errors import BackendError, OptionError

PACKAGE = "llama-cpp-python"
TYPES = (Q1_0, Type.TQ1_0, Type.TQ2_0, Type.IQ1_S, Type.IQ2_XXS, Type.Q2_K, Type.Q4_0, Type.Q8_0)
REST = 0.05
"""Seconds between two runs: threads of the other side may still spin, waiting for more work."""


def find() -> Any:
    """The module llama_cpp.

    Raises BackendError if it is not installed.
    """
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as e:  # the last two: its compiled library does not load
        raise BackendError(f"--peer needs {PACKAGE} ({e}); run: pip install {PACKAGE}") from e


class RefusedError(Exception):
    """llama.cpp does not run a file; the text is what it says about it."""


_logs: list[Any] = []  # llama.cpp calls them until the process ends


class PeerBackend:
    """llama.cpp, with as much of runtime.backend's Backend as Runner needs.

    Attributes: buffers, the places of the weights and their MiB, as llama.cpp logs them ("CPU_REPACK 60").

    Raises RefusedError if llama.cpp cannot load the file, or makes no numbers of it.
    """

    def __init__(self, llama_cpp: Any, path: Path, n_threads: int, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self._api = llama_cpp
        self._model: Any = None
        self._context: Any = None
        self._memory: Any = None
        self._text = ""
        _logs.append(llama_cpp.llama_log_callback(self._log))
        llama_cpp.llama_log_set(_logs[-1], ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        try:
            self._open(path, n_threads)
        except BaseException:
            self.close()
            raise
        sizes = re.findall(r"(\S+) model buffer size = *([\d.]+) MiB", self._text)
        self.buffers = ", ".join(f"{name} {float(size):.0f}" for name, size in sizes)

    def _open(self, path: Path, n_threads: int) -> None:
        api = self._api
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RefusedError(self._reason())
        params = api.llama_context_default_params()
        params.n_ctx = self.n_ctx
        params.n_threads = params.n_threads_batch = n_threads
        params.op_offload = params.offload_kqv = False
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RefusedError(self._reason())
        used = (api.llama_n_threads(self._context), api.llama_n_threads_batch(self._context))
        if used != (n_threads, n_threads):
            raise RefusedError(f"it uses {used[0]} and {used[1]} threads instead of {n_threads}")
        self._memory = api.llama_get_memory(self._context)
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.eval(np.ones(2, np.int32), 0, 1)
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, -1), shape=(n_vocab,))
        if not (np.isfinite(logits).all() and 1e-3 < logits.std() < 1e3):
            raise RefusedError(f"logits of a random model are no sane numbers: {logits[:4]}")

    def _log(self, level: int, text: bytes, user_data: object) -> None:
        self._text += text.decode("utf-8", "replace")

    def _reason(self) -> str:
        lines = [line for line in self._text.splitlines() if "error" in line or "invalid" in line]
        return lines[0] if lines else "it does not say why"

    def eval(self, tokens: NDArray[np.int32], pos: int, n_logits: int) -> None:
        """Run tokens at position pos; what the cache holds beyond is forgotten. Logits stay inside."""
        api = self._api
        api.llama_memory_seq_rm(self._memory, 0, pos, -1)
        batch = api.llama_batch_get_one(tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), tokens.size)
        code = api.llama_decode(self._context, batch)
        if code:
            raise RefusedError(f"llama_decode returns {code}: {self._reason()}")
        api.llama_synchronize(self._context)

    def close(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._context = self._model = None


@dataclass(frozen=True)
class Peer:
    """One of llama.cpp's files, and what is the same in all of its rows."""

    llama_cpp: Any
    model: str
    path: Path
    kind: Type
    bits_per_weight: float  # of the linear layers


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
    with tempfile.TemporaryDirectory(prefix="dbf-bench-") as folder:
        for kind in types:
            path = Path(folder) / f"{kind.name}.gguf"
            try:
                bits = write_ggml(path, shape, kind, seed, progress)
                peer = Peer(llama_cpp, shape.name, path, kind, bits)
                for n in threads:
                    yield from _both(peer, dbf, cases, n, repeats)
            except OptionError as e:
                progress("")
                note(f"skipped: {e}")
            except RefusedError as e:
                progress("")
                note(f"skipped: {PACKAGE} {_version()} refuses {kind.name}: {e}")
            finally:
                path.unlink(missing_ok=True)


def _both(peer: Peer, dbf: Path, cases: Sequence[Case], n_threads: int | None, repeats: int) -> Iterator[Row]:
    n_ctx = context_of(cases)
    with runtime.load(dbf, backend="c", n_threads=n_threads, n_ctx=n_ctx) as model:
        about, n_vocab = facts(model.file), model.file.config.n_vocab
        n = model.backend.n_threads
        theirs = PeerBackend(peer.llama_cpp, peer.path, n, n_ctx)
        try:
            runners = Runner(model.backend, n_vocab), Runner(theirs, n_vocab)
            for case in cases:
                when = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
                rates = _alternate(*runners, case, repeats, f"{peer.kind.name}, {n} threads, {case.name}")
                yield {
                    "cpu_info": machine.cpu_name(),
                    "isa": getattr(machine.find_core(), "active", None),
                    "model": peer.model,
                    "type": peer.kind.name,
                    "bits_per_weight": round(peer.bits_per_weight, 4),
                    "dbf_bits_per_weight": round(about.bits_per_weight, 4),
                    "n_threads": n,
                    "test": case.name,
                    "n_prompt": case.n_prompt,
                    "n_gen": case.n_gen,
                    "n_depth": case.n_depth,
                    "size": peer.path.stat().st_size,
                    "dbf_size": dbf.stat().st_size,
                    "median_ts": round(median(rates[1]), 3),
                    "dbf_median_ts": round(median(rates[0]), 3),
                    "dbf_ratio": round(ratio_of_medians(*rates), 4),
                    "repetitions": repeats,
                    "samples_ts": rates[1],
                    "dbf_samples_ts": rates[0],
                    "test_time": when,
                    "peer": f"{PACKAGE} {_version()}",
                    "peer_features": peer.llama_cpp.llama_print_system_info().decode().strip(" |"),
                    "peer_buffers": theirs.buffers,
                }
        finally:
            theirs.close()


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
            time.sleep(REST)
            rates[which].append(case.tokens / (ours, theirs)[which].run(case))
    progress("")
    return rates


def _version() -> str:
    try:
        return version(PACKAGE.replace("-", "_"))
    except PackageNotFoundError:
        return "of unknown version"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: r["model"],
    "llama.cpp type": lambda r: r["type"],
    "bpw:": lambda r: f"{r['bits_per_weight']:.2f}",
    "file:": lambda r: f"{r['size'] / 2**20:.0f} MiB",
    "DBF bpw:": lambda r: f"{r['dbf_bits_per_weight']:.2f}",
    "DBF file:": lambda r: f"{r['dbf_size'] / 2**20:.0f} MiB",
    "threads:": lambda r: str(r["n_threads"]),
    "test:": lambda r: r["test"],
    "t/s (median):": lambda r: f"{r['median_ts']:.2f}",
    "DBF t/s (median):": lambda r: f"{r['dbf_median_ts']:.2f}",
    "DBF / type:": lambda r: f"{r['dbf_ratio']:.2f} x",
}
