"""dbf2gguf export: the dense twin of a DBF file, by its bytes and as llama.cpp runs it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import pytest
import tiny_hf
from gguf import GGMLQuantizationType as Type
from make_gguf import tiny_config, tiny_weights, write_model

import runtime
from dbf2gguf import cli
from dbf2gguf.convert import convert
from dbf2gguf.export import LARGEST, OUT_TYPES, export
from dbf2gguf.from_gguf import gguf_to_hf
from runtime import Sampler
from runtime.config import ADJACENT, HALVES, Q8_0, Dense, Linear
from runtime.format import unpack
from runtime.gguf import GgufFile

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("DBF_TEST_GGUF", ROOT / "demo" / "smollm2-135m.gguf"))
PRECIOUS = b"an earlier twin"

CONFIG = tiny_config(d_model=64, head_dim=16, rope_dims=16, rope_pairing=ADJACENT)  # d_ff: 44, no whole block


def write(path: Path, change: Callable[..., None] | None = None, **options: Any) -> Path:
    return write_model(path, CONFIG, tiny_weights(CONFIG, **options), change=change)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf", bias=True)


def read(file: GgufFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return gguf.quants.dequantize(file.data(name), Type(info.type)).reshape(info.shape)


# The bytes ------------------------------------------------------------------------------------------------


def product(linear: Linear) -> np.ndarray:
    """The weight in float64."""
    a, b = unpack(linear.a).astype(float), unpack(linear.b, linear.cols).astype(float)
    s_out, s_mid, s_in = (s.astype(float) for s in (linear.s_out, linear.s_mid, linear.s_in))
    return s_out[:, None] * (a @ (s_mid[:, None] * b)) * s_in


def rounding(kind: str, wanted: np.ndarray) -> np.ndarray:
    """How far a stored weight may lie from the wanted one: half a step of its type, and float32's sums."""
    sums = 1e-6 * np.abs(wanted).max()
    if kind == "Q8_0":
        largest = np.abs(wanted.reshape(-1, 32)).max(-1, keepdims=True)
        step = largest / 127 * (0.5 + 127 * 2.0**-11)  # the block's scale is a float16
        return np.broadcast_to(step, (step.size, 32)).reshape(wanted.shape) + sums
    return np.abs(wanted) * 2.0 ** -{"F16": 11, "BF16": 8}[kind] + sums


@pytest.mark.parametrize("outtype", OUT_TYPES)
def test_weights(path: Path, tmp_path: Path, outtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "twin.gguf"
    assert cli.main(["export", str(path), str(out), "--outtype", outtype]) == 0
    said, err = capsys.readouterr()
    assert said == ""
    assert ("rows of 2 matrices fit no Q8_0 and are F16" in err) == (outtype == "q8_0")  # ffn_down's: 44
    weights = tiny_weights(CONFIG, bias=True)
    with GgufFile(out) as twin, GgufFile(path) as file:
        for i, layer in enumerate(weights.layers):
            for name, part in layer.gguf_linears.items():
                kind = "F16" if name == "ffn_down" and outtype == "q8_0" else outtype.upper()
                assert twin.tensors[f"blk.{i}.{name}.weight"].type_name == kind
                got, wanted = read(twin, f"blk.{i}.{name}.weight"), product(part)
                assert (np.abs(got - wanted) <= rounding(kind, wanted)).all(), name
        assert twin.tensors["token_embd.weight"].type_name == outtype.upper()
        got, wanted = read(twin, "token_embd.weight"), read(file, "token_embd.weight")
        assert (np.abs(got - wanted) <= rounding(outtype.upper(), wanted)).all()
        vectors = [name for name in file.tensors if name.endswith(("norm.weight", ".bias"))]
        assert len(vectors) == 5 + 6
        for name in vectors:
            assert twin.tensors[name].type_name == "F32"
            assert np.array_equal(twin.data(name), file.data(name))
        assert {n.replace(".dbf_a", ".weight") for n in file.tensors if ".dbf_" not in n or "_a" in n} == set(
            twin.tensors
        )


def test_matrices_of_the_same_type_are_copied(tmp_path: Path) -> None:
    """Bit for bit: Q8_0 is not dequantized and quantized again."""
    data = np.random.default_rng(3).integers(-120, 121, (300, 68)).astype(np.int8).view(np.uint8)
    data[:, [0, 34]], data[:, [1, 35]] = 0x66, 0x2E  # scales, 0.1

    def change(_meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays["token_embd.weight"] = arrays["output.weight"] = (data, Type.Q8_0)

    path = write(tmp_path / "m.gguf", change)
    export(path, tmp_path / "q.gguf", outtype="q8_0", quiet=True)
    export(path, tmp_path / "f.gguf", outtype="f16", quiet=True)
    values = gguf.quants.dequantize(data, Type.Q8_0)
    with GgufFile(tmp_path / "q.gguf") as same, GgufFile(tmp_path / "f.gguf") as other:
        for name in ("token_embd.weight", "output.weight"):
            assert np.array_equal(same.data(name), data)
            assert np.array_equal(other.data(name), values.astype(np.float16))
    assert Dense(Q8_0, 300, 64, data).rows == 300


def test_metadata(tmp_path: Path) -> None:
    """Every key with its value and its type; of ours, only a note in the description."""

    def change(meta: dict[str, Any], _arrays: dict[str, Any]) -> None:
        meta |= {"general.name": "Tiny", "general.description": "A cat", "general.file_type": 1024}
        meta |= {"tokenizer.ggml.scores": [0.5, -1.0], "tokenizer.ggml.tokens": ["a", "ü"], "x.flags": [True]}
        meta |= {"dbf.bits_per_weight": 1.25, "dbf.quality.ppl": 2.0, "dbf.recipe.preset": "fast"}

    path, out = write(tmp_path / "m.gguf", change), tmp_path / "twin.gguf"
    export(path, out, outtype="bf16", quiet=True)
    with GgufFile(path) as file, GgufFile(out) as twin:
        ours, theirs = file.metadata, twin.metadata
        kept = {k for k in ours if not k.startswith("dbf.")}
        assert set(theirs) == kept
        for key in kept - {"general.file_type", "general.description"}:
            assert (theirs[key], theirs.kind(key)) == (ours[key], ours.kind(key)), key
        assert theirs["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
        assert theirs["general.description"].startswith("A cat (Double Binary Factorization of 1.250 bits")


def test_stock_reader(path: Path, tmp_path: Path) -> None:
    """gguf's own reader knows every tensor, in a process that never heard of DBF1."""
    out = tmp_path / "twin.gguf"
    export(path, out, quiet=True)
    code = (
        "import sys, gguf\nfor t in gguf.GGUFReader(sys.argv[1]).tensors: print(t.name, t.tensor_type.name)"
    )
    run = subprocess.run([sys.executable, "-c", code, out], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 1 + 1 + 2 * (2 + 7 + 3)
    assert "blk.1.ffn_down.weight F16" in lines
    assert not any("dbf" in line for line in lines)


def test_memory(tmp_path: Path) -> None:
    """One tensor at a time: the peak is some of the largest matrix in float32, not the model."""
    sizes = {"d_model": 256, "d_ff": 512, "n_heads": 8, "n_kv_heads": 8, "head_dim": 32, "rope_dims": 32}
    config = tiny_config(**sizes, n_layers=24, rope_pairing=ADJACENT)
    path = write_model(tmp_path / "m.gguf", config, tiny_weights(config, rank=128))
    out = tmp_path / "twin.gguf"
    tracemalloc.start()
    try:
        export(path, out, quiet=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    matrix = 512 * 256 * 4
    assert out.stat().st_size > 24 * matrix
    assert peak < 5 * matrix


def test_no_torch(path: Path, tmp_path: Path) -> None:
    code = "import sys; from dbf2gguf.cli import main; assert main() == 0; assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "export", path, tmp_path / "twin.gguf"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# Errors ---------------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], path: Path, out: Path, *options: str) -> str:
    """The one line that a failed export says; what was at `out` is untouched."""
    before = out.read_bytes() if out.is_file() else None
    beside = sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else None
    assert cli.main(["export", str(path), str(out), *options]) == 1
    said, err = capsys.readouterr()
    assert said == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert before == (out.read_bytes() if out.is_file() else None)
    assert beside == (sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else None)
    return err


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "twin.gguf").write_bytes(PRECIOUS)
    return tmp_path / "outputs" / "twin.gguf"


def test_bad_places(path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in fails(capsys, path.with_name("nowhere.gguf"), out)
    assert "is a folder" in fails(capsys, path, out.parent)
    assert "does not exist" in fails(capsys, path, out.parent / "nowhere" / "twin.gguf")
    assert "is an input, too" in fails(capsys, path, path)


def test_usage(path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", str(path), str(out), "--outtype", "q4_0"])
    assert "q4_0" in capsys.readouterr().err
    with pytest.raises(runtime.errors.OptionError, match="there are f16, bf16, q8_0"):
        export(path, out, outtype="q4_0")
    assert out.read_bytes() == PRECIOUS


def test_not_ours(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write(tmp_path / "plain.gguf", lambda meta, _: meta.pop("dbf.version"))
    assert "a plain GGUF file" in fails(capsys, plain, out)
    halves = write(tmp_path / "h.gguf", lambda meta, _: meta.update({"dbf.rope.pairing": "halves"}))
    assert "dbf.rope.pairing is 'halves'; llama.cpp wants 'adjacent'" in fails(capsys, halves, out)
    other = write_model(tmp_path / "o.gguf", CONFIG, tiny_weights(CONFIG), arch="wombat")
    assert "architecture 'wombat' cannot be exported; supported: gemma2" in fails(capsys, other, out)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(halves.read_bytes()[:-40])
    assert "cut.gguf: " in fails(capsys, cut, out)


def test_experts_that_llama_cpp_takes_otherwise(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(n_experts=3, n_experts_used=2, d_expert=20, d_ff=20, rope_pairing=ADJACENT)
    plain = tiny_weights(config)
    none = {"gate": None, "up": None, "down": None}
    without = replace(plain, layers=tuple(replace(layer, **none) for layer in plain.layers))
    file = write_model(tmp_path / "m.gguf", config, without)
    message = "llama.expert_weights_norm is False; llama.cpp takes True for 'llama'"
    assert message in fails(capsys, file, out)
    config = replace(config, norm_experts=1)
    file = write_model(tmp_path / "m.gguf", config, plain)
    assert "layer 0 has not the shared expert of 'llama'" in fails(capsys, file, out)
    file = write_model(tmp_path / "m.gguf", config, without, arch="granite")
    assert "architecture 'granite' with experts cannot be exported" in fails(capsys, file, out)
    file = write_model(tmp_path / "m.gguf", config, without)
    export(file, out, quiet=True)
    with GgufFile(out) as twin:
        assert twin.tensors["blk.1.ffn_up_exps.weight"].shape == (3, 20, 32)
        assert twin.tensors["blk.1.ffn_down_exps.weight"].shape == (3, 32, 20)
        got = read(twin, "blk.1.ffn_down_exps.weight").reshape(3, 32, 20)
        for values, expert in zip(got, without.layers[1].experts, strict=True):
            wanted = product(expert.down)
            assert (np.abs(values - wanted) <= rounding("F16", wanted)).all()


def test_weights_too_large(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(_meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        for part in ("dbf_out", "dbf_in"):
            arrays[f"blk.1.ffn_up.{part}"][0][:] = 3000

    path = write(tmp_path / "m.gguf", change)
    message = fails(capsys, path, out)
    assert "a weight of blk.1.ffn_up.weight is" in message
    assert f"F16 holds {LARGEST[Type.F16]:g} at most; take --outtype bf16" in message
    assert cli.main(["export", str(path), str(out), "--outtype", "bf16"]) == 0


def test_full_disk(
    path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(writer: gguf.GGUFWriter, *_args: Any) -> NoReturn:
        assert writer.fout is not None
        writer.fout[0].write(b"half of it")
        writer.fout[0].flush()
        assert len(list(out.parent.iterdir())) == 2  # the temporary file is beside the output
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", fill)
        assert "No space left on device" in fails(capsys, path, out)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, (1 << 30) - 999, 999))
    assert "the disk has 0.0 MiB free; the file needs 0.1 MiB" in fails(capsys, path, out)


def test_interrupt(
    path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupt)
    assert cli.main(["export", str(path), str(out)]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert out.read_bytes() == PRECIOUS
    assert len(list(out.parent.iterdir())) == 1


# llama.cpp ------------------------------------------------------------------------------------------------

needs_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)

BOUNDS = {"f16": (5e-3, 3e-2), "bf16": (2e-2, 1.5e-1), "q8_0": (6e-2, 6e-1)}
"""Difference of our logits and llama.cpp's over their standard deviation: root mean square, largest of all.

Ours come from activations of 14 bits (see test_convert.py); llama.cpp rounds each weight and, to multiply,
each activation to the twin's type: 11, 8 and about 7 significant bits. Measured on SmolLM2-135M at 2 bits per
weight: 1.5e-3 and 7e-3 (f16), 7e-3 and 4e-2 (bf16), 2.6e-2 and 1.4e-1 (q8_0); on the tiny models: 1.3e-3 and
8e-3, 9e-3 and 8e-2, 2.2e-2 and 1.4e-1 as a rule, once 0.44 (Gemma 3, 7 layers). Wrong signs, heads
or rotations: > 0.1 rms.
"""

GEMMA: dict[str, Any] = {
    "head_dim": 16, "num_hidden_layers": 7, "sliding_window": 7, "query_pre_attn_scalar": 16,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "gqa-tied": {},
    "biases-separate-head-llama3-rope": {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "odd-sizes": {
        "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 45,
    },
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "gemma3": {**GEMMA, "model_type": "gemma3_text"},
    "gemma3-linear-rope": {
        **GEMMA, "model_type": "gemma3_text", "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
    },
    "gemma2": {
        **GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0,
    },
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "tie_word_embeddings": False},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "pad_token_id": 0},
    **tiny_hf.EXPERTS,
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False, "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2"},
    "granite": {
        "model_type": "granite", "embedding_multiplier": 2.5, "attention_multiplier": 0.05,
        "residual_multiplier": 0.4, "logits_scaling": 8.0, "pad_token_id": 0,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    out = base / "out.gguf"
    convert(tiny_hf.write_folder(base / "model", **MODELS[request.param]), out, **tiny_hf.QUICK)
    return out


def open_in_llama_cpp(path: Path) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False)


def compare(
    path: Path, twin: Path, outtype: str, ids: list[int], n_greedy: int
) -> tuple[list[int], list[int]]:
    """Logits of `ids` within BOUNDS; then each of llama.cpp's greedy tokens is ours, too, or a near tie; and
    the runtime writes them up to the first such. Now and then a token passes other experts there, at a near
    tie of the router: with experts, the quarter of the tokens that differ most is left out.

    -> the greedy tokens of both, each on its own
    """
    export(path, twin, outtype=outtype, quiet=True)
    theirs = open_in_llama_cpp(twin)
    rms, most = BOUNDS[outtype]
    with runtime.load(path, backend="c", n_threads=1, n_ctx=128) as model:
        theirs.eval(ids)
        wanted = np.array(theirs.scores[: len(ids)])
        error = (model.logits(ids) - wanted) / wanted.std()
        ties = model.file.config.n_experts > 0
        error = error[np.square(error).mean(-1).argsort()][: len(ids) * 3 // 4 if ties else None]
        assert np.sqrt(np.square(error).mean()) < rms
        assert np.abs(error).max() < most
        tokens = [int(wanted[-1].argmax())]
        while len(tokens) < n_greedy:
            theirs.eval(tokens[-1:])
            tokens.append(int(theirs.scores[len(ids) + len(tokens) - 1].argmax()))
        ours = model.logits(ids + tokens[:-1], n_greedy)
        margin = ours.max(-1) - ours[np.arange(n_greedy), tokens]
        assert (np.sort(margin)[: n_greedy * 3 // 4 if ties else None] < 2 * most * wanted.std()).all()
        generated = list(model.engine.generate(ids, Sampler(temperature=0), n_greedy, frozenset()))
    tie = next((i for i, distance in enumerate(margin) if distance > 0), n_greedy)
    assert ties or tie > 0
    assert generated[:tie] == tokens[:tie]
    return generated, tokens


@needs_llama_cpp
@pytest.mark.parametrize("outtype", OUT_TYPES)
def test_llama_cpp(converted: Path, tmp_path: Path, outtype: str) -> None:
    ids = [1, 60, 7, 8, 90, 11, 12, 33, 200, 100, 44, 250, 17, 294, 3, 2, 60, 7, 8, 91]
    ours, theirs = compare(converted, tmp_path / "twin.gguf", outtype, ids, 24)
    assert len(ours) == len(theirs) == 24


@needs_llama_cpp
@pytest.mark.parametrize("model_type", ["mistral", "phi3"])
def test_a_window_that_llama_cpp_does_not_compute(
    tmp_path: Path, model_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives the same as far as the window goes; export says so. Read back, the twin has it still."""
    sizes = {"model_type": model_type, "sliding_window": 8, "pad_token_id": 0, "tie_word_embeddings": False}
    path, twin, ids = tmp_path / "out.gguf", tmp_path / "twin.gguf", list(range(40, 64))
    folder = tiny_hf.write_folder(tmp_path / "model", **sizes)
    convert(folder, path, **tiny_hf.QUICK)
    export(path, twin)
    arch = "llama" if model_type == "mistral" else model_type
    note = f"note: llama.cpp computes no sliding window in {arch!r}: what follows the first 8 tokens"
    assert note in capsys.readouterr().err
    theirs = open_in_llama_cpp(twin)
    theirs.eval(ids)
    wanted = np.array(theirs.scores[: len(ids)])
    with runtime.load(path, backend="c", n_threads=1, n_ctx=64) as model:
        error = np.abs(model.logits(ids) - wanted).max(-1) / wanted.std()
    most = BOUNDS["f16"][1]
    assert error[:8].max() < most
    assert error[8:].max() > 10 * most
    gguf_to_hf(twin, tmp_path / "back")
    there, back = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "back"))
    for key in ("model_type", "sliding_window", "max_position_embeddings"):
        assert back[key] == there[key]


def test_no_note_of_windows_that_llama_cpp_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(d_model=64, head_dim=16, rope_dims=16, rope_pairing=ADJACENT)
    for arch, pairing, length, noted in (
        ("llama", ADJACENT, 5, True),
        ("llama", ADJACENT, config.n_ctx_train, False),
        ("gemma2", HALVES, 5, False),
    ):
        c = replace(config, rope_pairing=pairing)
        plain = tiny_weights(c)
        weights = replace(plain, layers=tuple(replace(layer, window=length) for layer in plain.layers))
        export(write_model(tmp_path / "m.gguf", c, weights, arch=arch), tmp_path / "twin.gguf")
        assert ("computes no sliding window" in capsys.readouterr().err) == noted


@needs_llama_cpp
@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL.name} is not here; `make demo` makes it")
def test_llama_cpp_on_a_real_model(tmp_path: Path) -> None:
    """Of its own tokenizer, too: text, control tokens, and the greedy answer to a question."""
    with runtime.load(REAL, backend="c", n_threads=1, n_ctx=128) as model:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        text = model.tokenizer.render(question)
        ids = model.tokenizer.encode(text, add_special=False, parse_special=True)
    ours, theirs = compare(REAL, tmp_path / "twin.gguf", "f16", ids, 16)
    assert ours == theirs
    opened = open_in_llama_cpp(tmp_path / "twin.gguf")
    assert opened.tokenize(text.encode(), add_bos=False, special=True) == ids
