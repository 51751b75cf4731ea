"""runtime.bench: what it writes, never how fast."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from make_gguf import write_model

import runtime
from runtime.bench import __main__ as program
from runtime.bench import decode, kernels, machine, peer, stages, synthetic
from runtime.bench.report import Table, count_text, mean_and_sd, ratio_of_medians, size_text
from runtime.config import ADJACENT, Config, kv_bytes_per_token
from runtime.errors import BackendError, OptionError
from runtime.format import linear_bits
from runtime.model import load_model_file

C_BUILT = machine.find_core() is not None
needs_c = pytest.mark.skipif(not C_BUILT, reason="the C core is not built")

TINY = synthetic.Shape(
    "tiny",
    Config(
        n_layers=2, d_model=256, d_ff=512, n_heads=4, n_kv_heads=2, head_dim=64, n_vocab=300,
        n_ctx_train=128, norm_eps=1e-5, rope_theta=10000.0, rope_dims=64, rope_pairing=ADJACENT,
    ),
    tied=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs a true bandwidth."""
    monkeypatch.setattr(machine, "streaming_bytes", lambda: 1 << 20)
    measure = machine.read_bandwidth
    monkeypatch.setattr(machine, "read_bandwidth", lambda n, s=0.0, b=None: measure(n, 0.001, b))


def run(*args: str | Path) -> int:
    return program.main([str(a) for a in args])


# ---- statistics --------------------------------------------------------------------------------------------


def test_statistics() -> None:
    assert mean_and_sd([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == (5.0, pytest.approx(math.sqrt(32 / 7)))
    assert mean_and_sd([3.0]) == (3.0, 0.0)
    assert ratio_of_medians([1.0, 6.0, 100.0], [3.0, 2.0, 1.0]) == 3.0
    assert ratio_of_medians([1.0], [0.0]) == math.inf
    assert (size_text(46146704), size_text(3 << 30)) == ("44.01 MiB", "3.00 GiB")
    assert (count_text(134515008), count_text(1.1e9)) == ("134.52 M", "1.10 B")


def test_tables() -> None:
    rows = [{"a": 1, "b": [1, 2], "c": None}, {"a": 2, "b": [], "c": "x,|y"}]
    columns = {"A:": lambda r: r["a"], "C": lambda r: r["c"] or ""}
    texts = {}
    for form in ("md", "csv", "json"):
        out = io.StringIO()
        table = Table(out, form, columns)
        for row in rows:
            table.add(row)
        table.close()
        texts[form] = out.getvalue()
    assert texts["md"] == "| A | C |\n| ---: | --- |\n| 1 |  |\n| 2 | x,\\|y |\n"
    assert list(csv.reader(io.StringIO(texts["csv"]))) == [["a", "c"], ["1", ""], ["2", "x,|y"]]
    assert json.loads(texts["json"]) == rows


def test_plan() -> None:
    cases = decode.plan([128, 0], [64], [0, 512])
    assert [c.name for c in cases] == ["pp128", "pp128 @ d512", "tg64", "tg64 @ d512"]
    assert [c.tokens for c in cases] == [128, 128, 64, 64]
    for bad in (([-1], [1], [0]), ([1], [1 << 30], [0]), ([1], [1], [-1]), ([0], [0], [0])):
        with pytest.raises(OptionError):
            decode.plan(*bad)


# ---- a file ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf")


OPTIONS = ("-p", "5", "-n", "3", "-t", "1,2", "-r", "2", "-d", "0,4")


@needs_c
def test_file_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *OPTIONS, "-o", "json") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no progress
    rows = json.loads(out)
    names = ["pp5", "pp5 @ d4", "tg3", "tg3 @ d4"]
    assert [(r["n_threads"], r["test"]) for r in rows] == [(t, n) for t in (1, 2) for n in names]
    file = load_model_file(model)
    kv = file.config.n_layers * file.config.n_kv_heads * file.config.head_dim
    for row in rows:
        tokens = row["n_prompt"] or row["n_gen"]
        assert row["model_size"] == sum(t.nbytes for t in file.file.tensors.values())
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 2
        for ns, rate in zip(row["samples_ns"], row["samples_ts"], strict=True):
            assert rate == pytest.approx(tokens / ns * 1e9, rel=1e-3)
        mean, sd = mean_and_sd(row["samples_ts"])
        assert (row["avg_ts"], row["stddev_ts"]) == (pytest.approx(mean), pytest.approx(sd, abs=1e-3))
        assert row["backend"] == "c"
        assert row["file_size"] == model.stat().st_size
        assert row["kv_cache_size"] == 2 * 2 * kv * (4 + 5)  # float16 keys and values; d4 and pp5
        assert row["peak_rss"] > 1 << 20
        peak = row["peak_rss_less_kv_per_file"] * row["file_size"] + row["kv_cache_size"]
        assert peak == pytest.approx(row["peak_rss"], rel=1e-3)
        assert row["load_bytes_per_s"] == pytest.approx(row["file_size"] / row["load_seconds"], rel=0.05)
        assert (row["kv_type"], row["kv_bytes_per_token"]) == ("f16", kv_bytes_per_token(file.config, "f16"))
        assert (row["weight_bytes_per_token"] is None) == (row["n_gen"] == 0)
        if row["n_gen"]:
            wanted = row["weight_bytes_per_token"] * tokens * 2 / sum(row["samples_ns"]) * 1e9
            assert row["share_of_read_bandwidth"] == pytest.approx(
                wanted / row["read_bandwidth"], rel=1e-3, abs=1e-4
            )
    file.close()


@needs_c
@pytest.mark.parametrize("form", ["md", "csv"])
def test_file_as_text(model: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *OPTIONS, "-o", form) == 0
    out = capsys.readouterr().out
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert len(rows) == 8
        wanted = {"model_type", "model_size", "model_n_params", "n_threads", "test", "avg_ts", "stddev_ts"}
        assert wanted <= set(rows[0])
        assert None not in rows[0]
        return
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert lines[0][:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert len(lines) == 10
    assert {len(line) for line in lines} == {len(lines[0])}
    assert all("±" in line[6] for line in lines[2:])
    assert [line[5] for line in lines[2:6]] == ["pp5", "pp5 @ d4", "tg3", "tg3 @ d4"]


@needs_c
def test_int8_activations(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-p", "5", "-n", "0", "-t", "1", "-r", "1", "--activations", "int8")
    for extra in ((), ("--stages",)):
        assert run(model, *options, *extra, "-o", "json") == 0
        assert {r["activations"] for r in json.loads(capsys.readouterr().out)} == {"int8"}
    assert run(model, *options) == 0
    assert " int8 |" in capsys.readouterr().out


@needs_c
def test_kv_type(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.gguf"
    synthetic.write_dbf(path, TINY, 1.5, seed=3)
    for extra in ((), ("--stages",)):
        assert (
            run(path, "-p", "3", "-n", "2", "-t", "1", "-r", "1", "--kv-type", "q8_0", *extra, "-o", "json")
            == 0
        )
        assert {r["kv_type"] for r in json.loads(capsys.readouterr().out)} == {"q8_0"}
    assert run(model, *OPTIONS, "--kv-type", "q8_0") == 1
    assert "8 dimensions (head_dim), no multiple of 32; take f16" in capsys.readouterr().err


def test_facts(model: Path) -> None:
    """Sizes against the tensors of the file; the head is the embedding there."""
    file = load_model_file(model)
    about = decode.facts(file)
    c = file.config
    linears = synthetic.linear_shapes(c)
    norms = c.d_model * (1 + 2 * c.n_layers)
    assert about.n_params == sum(r * k for r, k in linears.values()) + norms + c.n_vocab * c.d_model
    assert about.bytes_per_token == about.size + 4 * c.d_model  # the table as head, and one row of it
    file.close()


def test_runner_evaluates_what_a_case_says() -> None:
    calls: list[tuple[int, int, int]] = []

    class Recorder:
        n_ctx = 1200

        def eval(self, tokens: Any, pos: int, n_logits: int) -> None:
            calls.append((tokens.size, pos, n_logits))

    runner = decode.Runner(Recorder(), 7)
    runner.prepare(decode.Case(600, 0, 520))
    assert calls == [(512, 0, 0), (8, 512, 0), (512, 520, 0), (88, 1032, 1)]
    calls.clear()
    runner.prepare(decode.Case(0, 3, 2))
    runner.run(decode.Case(0, 3, 2))
    assert calls == [(2, 0, 0), (1, 2, 1), (1, 2, 1), (1, 3, 1), (1, 4, 1)]


# ---- stages ------------------------------------------------------------------------------------------------


@needs_c
def test_stages(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *OPTIONS, "--stages", "-o", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    tests = [(t, name) for t in (1, 2) for name in ("pp5", "pp5 @ d4", "tg3", "tg3 @ d4")]
    names = [r["stage"] for r in rows[: len(rows) // len(tests)]]
    assert names[-1] == "outside the C core"
    assert len(set(names)) == len(names) == 8
    assert [(r["n_threads"], r["test"], r["stage"]) for r in rows] == [(*t, n) for t in tests for n in names]
    for i in range(0, len(rows), len(names)):
        some = rows[i : i + len(names)]
        total = sum(r["us_per_token"] for r in some)
        assert sum(r["share"] for r in some) == pytest.approx(1, abs=1e-3)
        for r in some:
            assert r["us_per_token"] >= 0, r
            assert r["share"] == pytest.approx(r["us_per_token"] / total, abs=1e-3)
    assert run(model, *OPTIONS, "--stages") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_stages_need_c(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numba")
    assert run(model, *OPTIONS, "--stages", "--backend", "numba") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: the numba backend does not measure its stages")


def test_median_run() -> None:
    """Of the repetitions, the one in the middle, with its own stages."""

    class Backend:
        n_ctx = 10

        def start_stages(self) -> None:
            pass

        def stop_stages(self) -> dict[str, float]:
            return {"all": times[0]}

    class Runner(decode.Runner):
        def run(self, case: decode.Case) -> float:
            return times.pop(0) and times[0]

    times = [9.0, 5.0, 1.0, 3.0, 4.0]
    runner = Runner(Backend(), 7)
    assert stages.median_run(runner.backend, runner, decode.Case(0, 1), 4) == (3.0, {"all": 3.0})


# ---- random models -----------------------------------------------------------------------------------------


def test_shapes() -> None:
    """Numbers of parameters, as the real models have them."""
    counts = {"smollm2-135m": 134_515_008, "1.1b": 1_100_048_384, "7b": 6_738_415_616}
    for name, shape in synthetic.SHAPES.items():
        c = shape.config
        total = sum(rows * cols for rows, cols in synthetic.linear_shapes(c).values())
        total += c.n_vocab * c.d_model * (1 if shape.tied else 2) + c.d_model * (1 + 2 * c.n_layers)
        assert total == counts[name], name


@pytest.mark.parametrize("name", list(synthetic.SHAPES))
@pytest.mark.parametrize("bpw", [1.0, 1.2, 2.0])
def test_ranks_pay_what_was_asked(name: str, bpw: float) -> None:
    c = synthetic.SHAPES[name].config
    shapes = synthetic.linear_shapes(c)
    ranks = {t.name[:-8]: t.shape[0] for t in synthetic._dbf_tensors(c, bpw) if t.name.endswith(".dbf_mid")}
    assert list(ranks) == list(shapes)
    actual = sum(linear_bits(*shapes[n], ranks[n]) for n in shapes) / sum(r * k for r, k in shapes.values())
    assert bpw * 0.995 <= actual <= bpw


@pytest.mark.parametrize("tied", [True, False])
def test_random_model_is_valid(tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "r.gguf"
    shape = synthetic.Shape("tiny", TINY.config, tied)
    actual = synthetic.write_dbf(path, shape, 1.5, seed=3)
    assert os.listdir(tmp_path) == ["r.gguf"]
    file = load_model_file(path)
    assert file.metadata["dbf.bits_per_weight"] == pytest.approx(actual)
    assert decode.facts(file).bits_per_weight == pytest.approx(actual)
    assert (file.weights.head is file.weights.embed) == tied
    file.close()
    again = tmp_path / "again.gguf"
    synthetic.write_dbf(again, shape, 1.5, seed=3)
    assert again.read_bytes() == path.read_bytes()


def test_random_model_runs_and_talks(tmp_path: Path) -> None:
    path = tmp_path / "r.gguf"
    synthetic.write_dbf(path, TINY, 1.5, seed=3)
    with runtime.load(path, n_threads=1, n_ctx=64) as model:
        ids = model.tokenizer.encode("café, two words")
        assert model.tokenizer.decode(ids, skip_special=True) == "café, two words"
        assert model.tokenizer.decode([290, 291]) == " word290 word291"
        logits = model.logits(ids)
        assert np.isfinite(logits).all()
        assert 0.1 < logits.std() < 100
        assert len(list(model.generate(ids, max_tokens=3))) <= 3


def dequantize(tensor: gguf.ReaderTensor) -> Any:
    if tensor.tensor_type != synthetic.Q1_0:  # not all versions of gguf know it
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    blocks = tensor.data.reshape(-1, 18)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return scales * (2.0 * np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") - 1.0)


@pytest.mark.parametrize("kind", [*peer.TYPES, Type.IQ4_NL])
def test_random_blocks_are_finite(tmp_path: Path, kind: Type) -> None:
    path = tmp_path / f"{kind.name}.gguf"
    bits = synthetic.write_ggml(path, TINY, kind, seed=1)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    assert bits == 8 * nbytes / block
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        values = dequantize(tensor)
        assert np.isfinite(values).all(), tensor.name
        if tensor.name.endswith("ffn_down.weight"):
            assert tensor.tensor_type == kind
            assert 0.3 < np.std(values) * 512**0.5 < 3


def test_rows_that_fit_no_block(tmp_path: Path) -> None:
    """They take what llama-quantize falls back to; where that is nothing, no file is left."""
    narrow = synthetic.Shape("narrow", replace(TINY.config, d_model=96), tied=True)
    for kind, other in ((Type.TQ1_0, Type.Q4_0), (Type.IQ1_S, Type.IQ4_NL)):
        path = tmp_path / f"{kind.name}.gguf"
        bits = synthetic.write_ggml(path, narrow, kind, seed=1)
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        assert tensors["blk.0.ffn_down.weight"].tensor_type == kind  # 512 columns
        assert tensors["blk.0.ffn_up.weight"].tensor_type == other  # 96
        linears = [t for name, t in tensors.items() if name.startswith("blk.") and t.shape.size == 2]
        assert bits == 8 * sum(t.n_bytes for t in linears) / sum(t.n_elements for t in linears)
        path.unlink()
    with pytest.raises(OptionError, match="Q1_0: rows of 96 weights are no multiple of 128"):
        synthetic.write_ggml(tmp_path / "x.gguf", narrow, synthetic.Q1_0, seed=1)
    assert os.listdir(tmp_path) == []


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.gguf"
    path.write_text("old")

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic.Tensor, "random", fail)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_dbf(path, TINY, 1.5, seed=1)
    assert os.listdir(tmp_path) == ["r.gguf"]
    assert path.read_text() == "old"


@needs_c
def test_synthetic_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(synthetic.SHAPES, "1.1b", TINY)
    kept = tmp_path / "kept.gguf"
    options = ("--synthetic", "1.1b", "--bpw", "2", "-p", "4", "-n", "0", "-r", "1", "-t", "1", "-o", "json")
    assert run(*options, "--keep", kept) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["model_filename"] == str(kept)
    assert 1.95 < row["bits_per_weight"] <= 2
    assert kept.stat().st_size > row["model_size"]
    assert run(*options) == 0
    assert not Path(json.loads(capsys.readouterr().out)[0]["model_filename"]).exists()


# ---- kernels -----------------------------------------------------------------------------------------------


@needs_c
def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--kernels", "--shapes", "16x24,67x100", "--heads", "70x256,9x32", "--batch", "3,43")
    options += ("--seconds", "0.001")
    assert run(*options, "-o", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    core = machine.find_core()
    assert core is not None
    assert core.isas[0] == "scalar"
    signs = ("sign_gemv", "sign_gemv8", "sign_gemm")
    work = {(kernel, r, c): n for r, c, n in ((16, 24, 16 * 3), (67, 100, 67 * 13)) for kernel in signs}
    work |= {("head f16", 70, 256): 70 * 512, ("head f16", 9, 32): 9 * 64}
    work |= {("head q8_0", 70, 256): 70 * 8 * 34, ("head q8_0", 9, 32): 9 * 34}
    work |= {("head q6_k", 70, 256): 70 * 210}
    work |= {("head q4_0", 70, 256): 70 * 8 * 18, ("head q4_0", 9, 32): 9 * 18}
    wanted = [
        (isa, *kernel, batch, where)
        for isa in core.isas
        for kernel in work
        for batch in ((3, 43) if kernel[0] not in signs else (43,) if kernel[0] == "sign_gemm" else (3,))
        for where in ("cache", "dram")
    ]
    keys = ("isa", "kernel", "rows", "cols", "batch", "where")
    assert [tuple(row[k] for k in keys) for row in rows] == wanted
    for row in rows:
        rate = row["rows"] * row["cols"] * row["batch"] / row["seconds"] / 1e9
        assert row["gsigns_per_s"] == pytest.approx(rate, abs=1e-3)
        nbytes = work[row["kernel"], row["rows"], row["cols"]]
        share = nbytes / row["seconds"] / row["read_bandwidth"]
        assert row["share_of_read_bandwidth"] == pytest.approx(share, rel=1e-3, abs=1e-4)
    assert run(*options) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(wanted)


@needs_c
def test_kernels_leave_the_active_set_alone() -> None:
    core = machine.find_core()
    assert core is not None
    before = core.active
    with core.use("scalar"):
        assert core.active == "scalar"
    assert core.active == before
    with pytest.raises(BackendError, match="nonsense"), core.use("nonsense"):
        pass


@needs_c
def test_a_matrix_beyond_the_caches_has_no_cache_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "last_level_cache", lambda: 100)
    rows = list(kernels.bench([(16, 24), (67, 100)], [(2, 32)], [1], 0.001, 1 << 16))
    small = ("sign_gemv", "sign_gemv8", "head q8_0", "head q4_0")
    wanted = {(kernel, where) for kernel in small for where in ("cache", "dram")} | {("head f16", "dram")}
    assert {(r["kernel"], r["where"]) for r in rows if r["rows"] != 67} == wanted
    assert {r["where"] for r in rows if r["rows"] == 67} == {"dram"}


@needs_c
def test_kernel_options_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--kernels", "--shapes", "0x8", "--seconds", "0") == 1
    assert run("--kernels", "--shapes", "8x8", "--heads", "0x32", "--seconds", "0") == 1
    assert run("--kernels", "--batch", "0", "--shapes", "8x8", "--seconds", "0") == 1
    assert run("--kernels", "--seconds", "nan") == 1
    assert capsys.readouterr().err.count("error: ") == 4


# ---- llama.cpp ---------------------------------------------------------------------------------------------


def test_peer_that_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert run("--synthetic", "7b", "--peer") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --peer needs llama-cpp-python")
    assert err.count("\n") == 1


class StandIn(ModuleType):
    """llama_cpp, as far as it is called; refuses a type, or does what `spoilt` says."""

    llama_log_callback = staticmethod(lambda log: log)

    def __init__(self, refused: str = "", spoilt: str = "") -> None:
        super().__init__("llama_cpp")
        self.refused, self.spoilt = refused, spoilt
        self.calls: list[tuple[Any, ...]] = []
        self.pos = 0

    def llama_log_set(self, log: Any, data: Any) -> None:
        self.log = log

    def llama_backend_init(self) -> None:
        pass

    def llama_model_default_params(self) -> SimpleNamespace:
        return SimpleNamespace(n_gpu_layers=-1)

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace(n_batch=2048)

    def llama_model_load_from_file(self, path: bytes, params: SimpleNamespace) -> str | None:
        assert params.n_gpu_layers == 0
        name = Path(path.decode()).stem
        if name == self.refused:
            self.log(4, b"loading\nerror loading model: what", None)
            self.log(4, b" a type\nmore\n", None)
            return None
        self.log(2, b"load_tensors:   CPU_REPACK model buffer size =   61.88 MiB\n", None)
        return name

    def llama_init_from_model(self, model: str, params: SimpleNamespace) -> str | None:
        assert params.n_ctx == 6
        self.threads = params.n_threads, params.n_threads_batch
        return None if self.spoilt == "context" else model

    def llama_n_threads(self, context: str) -> int:
        return 7 if self.spoilt == "threads" else self.threads[0]

    def llama_n_threads_batch(self, context: str) -> int:
        return int(self.threads[1])

    def llama_get_memory(self, context: str) -> str:
        return context

    def llama_model_get_vocab(self, model: str) -> str:
        return model

    def llama_vocab_n_tokens(self, vocab: str) -> int:
        return 300

    def llama_get_logits_ith(self, context: str, i: int) -> Any:
        assert i == -1
        values = [float(k % 7) for k in range(300)]
        if self.spoilt == "logits":
            values[5] = math.nan
        return ctypes.cast((ctypes.c_float * 300)(*values), ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, memory: str, sequence: int, begin: int, end: int) -> None:
        assert (sequence, end) == (0, -1)
        self.pos = begin

    def llama_batch_get_one(self, tokens: Any, n: int) -> list[int]:
        return list(tokens[:n])

    def llama_decode(self, context: str, batch: list[int]) -> int:
        assert all(0 <= token < 300 for token in batch)
        self.calls.append((context, len(batch), self.pos))
        self.pos += len(batch)
        return 1 if self.spoilt == "decode" else 0

    def llama_synchronize(self, context: str) -> None:
        pass

    def llama_free(self, context: str) -> None:
        self.calls.append((context, 0, 0))

    def llama_model_free(self, model: str) -> None:
        self.calls.append((model, 0, 1))

    def llama_print_system_info(self) -> bytes:
        return b"CPU : AVX2 = 1 | REPACK = 1 | "


PEER_OPTIONS = ("--synthetic", "1.1b", "--peer", "-p", "4", "-n", "2", "-d", "2", "-t", "1", "-r", "3")


@needs_c
def test_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a stand-in that takes all types but one: alternation, bookkeeping, notes."""
    module = StandIn(refused="IQ1_S")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setitem(synthetic.SHAPES, "1.1b", TINY)
    assert run(*PEER_OPTIONS, "-o", "json") == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    kinds = [t.name for t in peer.TYPES if t.name != "IQ1_S"]
    assert [(r["type"], r["test"]) for r in rows] == [(k, t) for k in kinds for t in ("pp4 @ d2", "tg2 @ d2")]
    for row in rows:
        assert len(row["samples_ts"]) == len(row["dbf_samples_ts"]) == row["repetitions"] == 3
        assert row["dbf_ratio"] == pytest.approx(
            ratio_of_medians(row["dbf_samples_ts"], row["samples_ts"]), abs=1e-4
        )
        assert row["model"] == "tiny"
        assert row["peer_buffers"] == "CPU_REPACK 62"
        assert row["peer_features"] == "CPU : AVX2 = 1 | REPACK = 1"
    bits = {row["type"]: row["bits_per_weight"] for row in rows}
    assert bits == pytest.approx(
        {"Q1_0": 1.125, "TQ1_0": 1.6875, "TQ2_0": 2.0625, "IQ2_XXS": 2.0625, "Q2_K": 2.625, "Q4_0": 4.5,
         "Q8_0": 8.5}, abs=1e-4,
    )  # fmt: skip
    assert "refuses IQ1_S: error loading model: what a type\n" in err
    calls = [call for call in module.calls if call[0] == "Q4_0"]
    assert calls == (
        [("Q4_0", 2, 0)]
        + [("Q4_0", 2, 0), ("Q4_0", 4, 2)] + [("Q4_0", 4, 2)] * 3
        + [("Q4_0", 2, 0), ("Q4_0", 1, 2)] + [("Q4_0", 1, 2), ("Q4_0", 1, 3)] * 3
        + [("Q4_0", 0, 0), ("Q4_0", 0, 1)]
    )  # fmt: skip
    assert run(*PEER_OPTIONS) == 0
    assert "DBF / type" in capsys.readouterr().out


@needs_c
@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("context", "it does not say why"),
        ("threads", "it uses 7 and 1 threads instead of 1"),
        ("logits", "logits of a random model are no sane numbers"),
        ("decode", "llama_decode returns 1"),
    ],
)
def test_peer_that_fails(
    spoilt: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", StandIn(spoilt=spoilt))
    monkeypatch.setitem(synthetic.SHAPES, "1.1b", TINY)
    assert run(*PEER_OPTIONS, "-o", "json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert err.count(message) == len(peer.TYPES)


@needs_c
def test_the_real_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """llama.cpp itself, where it is installed, takes every type and makes numbers of random blocks."""
    pytest.importorskip("llama_cpp")
    monkeypatch.setitem(synthetic.SHAPES, "1.1b", TINY)
    assert run(*PEER_OPTIONS, "-o", "json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [r["type"] for r in json.loads(out)[::2]] == [t.name for t in peer.TYPES]


# ---- the machine, errors -----------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--info", "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu"]
    assert found["default_threads"] >= 1
    assert found["backend"] in ("c", "numba", "none")
    if C_BUILT:
        assert found["isa"] in found["isas"]
    assert run("--info") == 0
    out = capsys.readouterr().out
    for word in ("cpu", "usable cpus", "caches", "instruction sets", "demoted", "backend"):
        assert f"\n{word} " in f"\n{out}", word


def test_caches_are_plausible() -> None:
    for name, size in machine.caches().items():
        assert 1024 <= size <= 1 << 34, name
    assert (machine._bytes("36608K"), machine._bytes("2M"), machine._bytes("")) == (36608 << 10, 2 << 20, 0)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_bandwidth_without_c(monkeypatch: pytest.MonkeyPatch, n_threads: int) -> None:
    monkeypatch.setattr(machine, "find_core", lambda: None)
    assert machine.read_bandwidth(n_threads, 0.0, 1 << 20) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cext", None)
        with pytest.raises(BackendError, match="the C core is not built"):
            list(kernels.bench([(8, 8)], [], [1], 0.0))


def test_peak_rss() -> None:
    if machine.reset_peak_rss():
        before = machine.peak_rss()
        block = np.ones(64 << 20, np.uint8)
        assert machine.peak_rss() >= before + block.size // 2
    assert machine.peak_rss() > 1 << 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "wanted one of"),
        (("a.gguf", "--info"), "wanted one of"),
        (("--kernels", "--peer"), "--peer goes with --synthetic"),
        (("--synthetic", "7b", "--peer", "--kv-type", "q8_0"), "leave out --kv-type q8_0"),
        (("--synthetic", "7b", "--peer", "--activations", "int8"), "leave out --activations int8"),
        (("--kernels", "--stages"), "--stages goes with"),
        (("--synthetic", "7b", "--peer", "--stages"), "--stages goes with"),
        (("a.gguf", "--keep", "b.gguf"), "--keep goes with --synthetic"),
        (("--synthetic", "7b", "--peer", "--backend", "numba"), "numba"),
        (("/nonexistent.gguf",), "/nonexistent.gguf: No such file"),
        (("a.gguf", "-r", "0"), "-r 0"),
        (("a.gguf", "-p", "0", "-n", "0"), "nothing to do"),
        (("a.gguf", "-p", "-5"), "-p -5"),
        (("--synthetic", "7b", "--bpw", "0.001"), "--bpw 0.001 is out of range"),
        (("--synthetic", "7b", "--seed", "-1"), "--seed -1"),
        (("--synthetic", "smollm2-135m", "--keep", "/nonexistent/x.gguf"), "No such file"),
    ],
)
def test_errors(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@needs_c
def test_progress_is_for_terminals(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one, each note replaces the last, and nothing of them is left when a result or an error comes."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(model, *OPTIONS) == 0
    notes = capsys.readouterr().err.split("\r\x1b[K")
    assert "1 thread, pp5: 2/2" in notes
    assert "2 threads, tg3 @ d4: warm-up" in notes
    assert notes[-1] == ""
    assert run(model.with_name("missing.gguf")) == 1
    assert capsys.readouterr().err.split("\r\x1b[K")[-1].startswith("error: ")


def test_threads_out_of_range(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "-t", "0", "-p", "1", "-n", "0") == 1
    assert "threads is 0" in capsys.readouterr().err


@pytest.mark.parametrize("args", [("-p", "a"), ("-t", "1,"), ("--shapes", "8*8"), ("-o", "xml")])
def test_usage(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        run("--kernels", *args)
    assert e.value.code == 2
    assert "usage: python -m runtime.bench" in capsys.readouterr().err


@needs_c
def test_ctrl_c(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decode.Runner, "run", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert run(model, "-o", "json") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "\n")
