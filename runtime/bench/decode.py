"""Tokens per second of a model file, with llama-bench's tests: ppN reads a prompt, tgN writes N tokens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import runtime
from runtime.bench import machine
from runtime.bench.report import Row, count_text, mean_and_sd, size_text
from runtime.config import Layer, Linear, Weights
from runtime.engine import BATCH
from runtime.errors import OptionError
from runtime.format import linear_bits
from runtime.model import ModelFile

SEED = 1
MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class Case:
    """n_prompt tokens at once or n_gen tokens one by one, after n_depth tokens of context."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def tokens(self) -> int:
        return self.n_prompt or self.n_gen

    @property
    def name(self) -> str:
        what = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{what} @ d{self.n_depth}" if self.n_depth else what


def plan(prompts: Sequence[int], gens: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """The tests that -p, -n and -d ask for; 0 leaves a kind out.

    Raises OptionError if a number is out of range or nothing is left to do.
    """
    for option, values, least in (("-p", prompts, 0), ("-n", gens, 0), ("-d", depths, 0)):
        for value in values:
            if not least <= value <= MAX_TOKENS:
                raise OptionError(f"{option} {value}: wanted {least} to {MAX_TOKENS}")
    cases = [Case(p, 0, d) for d in depths for p in prompts if p]
    cases += [Case(0, n, d) for d in depths for n in gens if n]
    if not cases:
        raise OptionError("nothing to do: both -p and -n are 0")
    return cases


# ---- what a model is ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What does not depend on the run. Sizes are in bytes."""

    architecture: str
    size: int  # of all tensors
    n_params: int  # of the model that the file stands for
    bits_per_weight: float  # of the factorized layers
    bytes_per_token: int  # of weights that one token reads: all but the embedding, of which it is one row

    @property
    def model_type(self) -> str:
        return f"{self.architecture} {count_text(self.n_params)} DBF {self.bits_per_weight:.2f} bpw"


def facts(file: ModelFile) -> Facts:
    w = file.weights
    linears = [x for layer in w.layers for x in _linears(layer)]
    replaced = sum(x.rows * x.cols for x in linears)
    bits = sum(linear_bits(x.rows, x.cols, x.rank) for x in linears)
    bias = sum(x.rows for x in linears if x.bias is not None)
    norms = w.out_norm.size + sum(x.size for x in (w.out_norm_bias, w.positions) if x is not None)
    norms += sum(norm.size for layer in w.layers for norm in layer.norms.values())
    norms += sum(router.size for layer in w.layers for router in _routers(layer))
    head = 0 if w.head is w.embed else w.head.rows * w.head.cols
    return Facts(
        architecture=file.architecture,
        size=sum(t.nbytes for t in file.file.tensors.values()),
        n_params=replaced + bias + norms + head + w.embed.rows * w.embed.cols,
        bits_per_weight=bits / replaced,
        bytes_per_token=bytes_per_token(w, file.config.n_experts_used),
    )


def bytes_per_token(w: Weights, n_experts_used: int = 0) -> int:
    """Bytes of weights that one token reads, as they are in the file; the KV cache comes on top. Of experts,
    which may differ in size, the mean."""
    total: int = w.head.data.nbytes + w.out_norm.nbytes + w.embed.data.shape[1]
    total += 0 if w.positions is None else w.out_norm.nbytes
    total += 0 if w.out_norm_bias is None else w.out_norm_bias.nbytes
    for layer in w.layers:
        total += sum(norm.nbytes for norm in layer.norms.values())
        total += sum(router.nbytes for router in _routers(layer))
        total += sum(_nbytes(x) for x in layer.linears.values())
        experts = sum(_nbytes(x) for e in layer.experts for x in (e.gate, e.up, e.down))
        total += experts * n_experts_used // max(1, len(layer.experts))
    return total


def _nbytes(x: Linear) -> int:
    total = sum(part.nbytes for part in (x.a, x.b, x.s_out, x.s_mid, x.s_in))
    return total + (0 if x.bias is None else x.bias.nbytes)


def _routers(layer: Layer) -> list[NDArray[np.float32]]:
    return [x for x in (layer.router, layer.shared_gate) if x is not None]


def _linears(layer: Layer) -> Iterator[Linear]:
    yield from layer.gguf_linears.values()


# ---- timing ------------------------------------------------------------------------------------------------


class Evaluates(Protocol):
    """What a test needs of a backend."""

    n_ctx: int

    def eval(self, tokens: NDArray[np.int32], pos: int, n_logits: int) -> Any: ...


class Runner:
    """Runs tests on a backend with the same random tokens every time."""

    def __init__(self, backend: Evaluates, n_vocab: int) -> None:
        self.backend = backend
        tokens = np.random.default_rng(SEED).integers(0, n_vocab, backend.n_ctx)
        self._tokens = tokens.astype(np.int32)

    def prepare(self, case: Case) -> None:
        """Fill the KV cache up to the test's depth, then warm up."""
        if case.n_depth:
            self._eval(self._tokens[: case.n_depth], 0, 0)
        self.run(case if case.n_prompt else Case(0, 1, case.n_depth))

    def run(self, case: Case) -> float:
        """Seconds of one repetition."""
        begin = case.n_depth
        start = time.perf_counter()
        if case.n_prompt:
            self._eval(self._tokens[begin : begin + case.n_prompt], begin, 1)
        for pos in range(begin, begin + case.n_gen):
            self.backend.eval(self._tokens[pos : pos + 1], pos, 1)
        return time.perf_counter() - start

    def _eval(self, tokens: NDArray[np.int32], pos: int, n_logits: int) -> None:
        for i in range(0, tokens.size, BATCH):  # between two calls, Ctrl-C is heard
            batch = tokens[i : i + BATCH]
            self.backend.eval(batch, pos + i, n_logits if i + BATCH >= tokens.size else 0)


def measure(runner: Runner, case: Case, repeats: int, note: Callable[[str], None]) -> list[float]:
    """Seconds of each repetition of a test, after a warm-up."""
    note(f"{case.name}: warm-up")
    runner.prepare(case)
    seconds = []
    for i in range(repeats):
        note(f"{case.name}: {i + 1}/{repeats}")
        seconds.append(runner.run(case))
    return seconds


def progress(text: str) -> None:
    """Show what is going on, where stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """What one loading of a model gave."""

    about: Facts
    backend: str
    n_threads: int
    file_size: int
    load_seconds: float
    n_ctx: int
    seconds: tuple[list[float], ...]  # of each repetition of each case
    peak_rss: int
    kv_type: str
    kv_bytes_per_token: int
    activations: str


def context_of(cases: Sequence[Case]) -> int:
    """Positions that the KV cache needs."""
    return max(case.n_depth + case.tokens for case in cases)


def run(
    path: str,
    cases: Sequence[Case],
    n_threads: int | None,
    repeats: int,
    backend: str,
    kv_type: str,
    activations: str,
) -> Run:
    """Load a model and time all cases; n_threads None: the number of physical cores.

    The file is read through before: loading is timed from the system's page cache.
    """
    progress("loading the model")
    file_size = machine.read_through(path)
    n_ctx = context_of(cases)
    start = time.perf_counter()
    with runtime.load(
        path,
        backend=backend,
        n_threads=n_threads,
        n_ctx=n_ctx,
        kv_type=kv_type,
        activations=activations,
    ) as model:
        load_seconds = time.perf_counter() - start
        runner = Runner(model.backend, model.file.config.n_vocab)
        threads = model.backend.n_threads

        def note(text: str) -> None:
            progress(f"{threads} thread{'s' if threads > 1 else ''}, {text}")

        seconds = tuple(measure(runner, case, repeats, note) for case in cases)
        return Run(
            about=facts(model.file),
            backend=model.backend.name,
            n_threads=threads,
            file_size=file_size,
            load_seconds=load_seconds,
            n_ctx=n_ctx,
            seconds=seconds,
            peak_rss=machine.peak_rss(),
            kv_type=kv_type,
            kv_bytes_per_token=model.kv_bytes_per_token,
            activations=activations,
        )


def bench(
    path: str,
    cases: Sequence[Case],
    threads: Sequence[int | None],
    repeats: int,
    backend: str,
    kv_type: str = "f16",
    activations: str = "int16",
) -> Iterator[Row]:
    """Rows of all cases with each number of threads; None: the number of physical cores.

    The model is loaded once for each number of threads. Read bandwidth is measured after its cases, with the
    same number of threads; its buffer is no part of the peak memory.
    """
    machine.find_core()  # imported, and its self-test done, before anything is timed
    clean = True  # nothing but this model has raised the peak memory
    for n in threads:
        clean = machine.reset_peak_rss() or clean
        when = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        done = run(path, cases, n, repeats, backend, kv_type, activations)
        progress("read bandwidth")
        bandwidth = machine.read_bandwidth(done.n_threads)
        progress("")
        for case, seconds in zip(cases, done.seconds, strict=True):
            yield {
                **_about_run(path, done, case),
                "test_time": when,
                **_about_time(case, seconds),
                **_about_memory(case, seconds, done.about, bandwidth),
                **_about_loading(done, clean),
            }
        clean = False


def _about_run(path: str, done: Run, case: Case) -> dict[str, Any]:
    core, about = machine.find_core(), done.about
    return {
        "cpu_info": machine.cpu_name(),
        "backend": done.backend,
        "isa": core.active if core and done.backend == "c" else None,
        "model_filename": path,
        "model_type": about.model_type,
        "model_size": about.size,
        "model_n_params": about.n_params,
        "bits_per_weight": round(about.bits_per_weight, 5),
        "n_threads": done.n_threads,
        "kv_type": done.kv_type,
        "activations": done.activations,
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.n_depth,
        "test": case.name,
    }


def _about_time(case: Case, seconds: Sequence[float]) -> dict[str, Any]:
    ns = [round(s * 1e9) for s in seconds]
    rates = [case.tokens / s for s in seconds]
    (avg_ns, sd_ns), (avg, sd) = mean_and_sd(ns), mean_and_sd(rates)
    return {
        "avg_ns": round(avg_ns),
        "stddev_ns": round(sd_ns),
        "avg_ts": round(avg, 6),
        "stddev_ts": round(sd, 6),
        "samples_ns": ns,
        "samples_ts": [round(r, 6) for r in rates],
    }


def _about_memory(case: Case, seconds: Sequence[float], about: Facts, bandwidth: float) -> dict[str, Any]:
    """A prompt's tokens share what they read, so only generation has a share of the bandwidth."""
    used = about.bytes_per_token * case.tokens * len(seconds) / sum(seconds)
    return {
        "weight_bytes_per_token": about.bytes_per_token if case.n_gen else None,
        "read_bandwidth": round(bandwidth),
        "share_of_read_bandwidth": round(used / bandwidth, 4) if case.n_gen else None,
    }


def _about_loading(done: Run, clean: bool) -> dict[str, Any]:
    """clean: the peak is this run's own."""
    kv_cache = done.kv_bytes_per_token * done.n_ctx
    share = (done.peak_rss - kv_cache) / done.file_size
    return {
        "file_size": done.file_size,
        "kv_bytes_per_token": done.kv_bytes_per_token,
        "kv_cache_size": kv_cache,
        "peak_rss": done.peak_rss if clean else None,
        "peak_rss_less_kv_per_file": round(share, 4) if clean else None,
        "load_seconds": round(done.load_seconds, 4),
        "load_bytes_per_s": round(done.file_size / done.load_seconds),
    }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: r["model_type"],
    "size:": lambda r: size_text(r["model_size"]),
    "params:": lambda r: count_text(r["model_n_params"]),
    "backend": lambda r: " ".join(filter(None, (r["backend"], r["isa"], _small(r)))),
    "threads:": lambda r: str(r["n_threads"]),
    "test:": lambda r: r["test"],
    "t/s:": lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}",
    "read/token:": lambda r: size_text(r["weight_bytes_per_token"]) if r["n_gen"] else "",
    "of bandwidth:": lambda r: _share(r) if r["n_gen"] else "",
    "KV/token:": lambda r: f"{r['kv_bytes_per_token'] / 1024:.1f} KiB {r['kv_type']}",
    "peak RSS:": lambda r: _peak(r) if r["peak_rss"] else "",
    "load:": lambda r: f"{r['load_seconds']:.2f} s, {r['load_bytes_per_s'] / 1e9:.2f} GB/s",
}
"""The Markdown table: llama-bench's columns, then what a token reads and its share of the bandwidth, etc."""


def _small(row: Row) -> str | None:
    return row["activations"] if row["activations"] != "int16" else None


def _share(row: Row) -> str:
    return f"{row['share_of_read_bandwidth']:.0%} of {row['read_bandwidth'] / 1e9:.1f} GB/s"


def _peak(row: Row) -> str:
    return f"{size_text(row['peak_rss'])} = {row['peak_rss_less_kv_per_file']:.2f} x file + KV"
