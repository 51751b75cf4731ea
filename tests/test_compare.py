"""dbf2gguf.compare: padding, bits, rows, the table, and what it says where a peer is missing."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_hf
import torch
from gguf import GGMLQuantizationType as Type

from dbf2gguf.archs import ARCHS
from dbf2gguf.budget import linear_bits as bits_of_linear
from dbf2gguf.calibrate import output_importance
from dbf2gguf.compare import llama_cpp, onecomp, onecomp_child, plot, published
from dbf2gguf.compare.__main__ import COLUMNS, build_parser, main
from dbf2gguf.compare.padding import pad_heads, padded, whole
from dbf2gguf.compare.rows import (
    LLAMA_CPP,
    ORIGINAL,
    OURS,
    PUBLISHED,
    Protocol,
    Row,
    linear_bits,
    merged,
    read_rows,
    write_rows,
)
from dbf2gguf.convert import convert, make_plan
from dbf2gguf.progress import Stage
from dbf2gguf.source import linear_names, load_model, load_tokenizer, open_source
from dbf2gguf.write import write_dense
from runtime.bench.report import Table
from runtime.errors import FormatError, OptionError, UnsupportedModelError

PROTOCOL = Protocol("tiny", "text.txt", "0" * 64, 16, 3)


def row(series: str = LLAMA_CPP, name: str = "Q2_K", **changes: Any) -> Row:
    values: dict[str, Any] = {
        "bpw": 2.9375, "file_mib": 60.25, "ppl": 50.9, "ppl_error": 1.5, "kl": 0.84, "kl_error": 0.01,
        "kl_p99": 4.5, "same_top1": 0.54, "made_with": "llama-quantize, with an imatrix",
    }  # fmt: skip
    return Row(series, name, **{**values, **vars(PROTOCOL), **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text to score and one to calibrate on."""
    path = tmp_path_factory.mktemp("compare")
    tiny_hf.write_folder(path / "tiny", hidden_size=32, intermediate_size=64)
    tiny_hf.write_text(path / "text.txt")
    tiny_hf.write_text(path / "calib.txt", 400)
    convert(path / "tiny", path / "ours.gguf", **tiny_hf.QUICK)
    return path


# Padding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "width", "wanted"),
    [
        (9, 3, 64, 768, (12, 4)),  # SmolLM2-135M: groups stay as they are
        (14, 2, 64, 1024, (16, 2)),  # Qwen2.5-0.5B: groups grow from 7 to 8 instead of 28 heads in all
        (32, 8, 128, 4096, (32, 8)),
        (3, 3, 80, 256, (16, 16)),
        (9, 3, 64, 256, (16, 4)),  # 12 do not divide 256
    ],
)
def test_pad_heads(heads: int, kv_heads: int, head_dim: int, width: int, wanted: tuple[int, int]) -> None:
    assert pad_heads(heads, kv_heads, head_dim, width) == wanted


def test_heads_that_cannot_be_padded() -> None:
    with pytest.raises(UnsupportedModelError, match="5 heads of 256 in 1 groups"):
        pad_heads(5, 1, 256, 768)


def test_whole() -> None:
    assert [whole(n) for n in (1, 256, 257, 576)] == [256, 256, 512, 768]


@pytest.mark.parametrize(
    ("model_type", "changes", "tolerance"),
    [
        ("llama", {}, 2e-5),
        ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}, 2e-5),
        # 6 heads of 48 in 2 groups: 16 heads in 2 groups of 8, so rows move
        ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 48}, 2e-5),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, 2e-5),
        ("mistral", {"sliding_window": None}, 2e-5),
        ("qwen2", {}, 2e-5),
        ("qwen3", {}, 1e-4),  # its head norms' epsilon changes, too
    ],
)  # fmt: skip
def test_padded_logits(model_type: str, changes: dict[str, Any], tolerance: float) -> None:
    """In float64, with an epsilon large enough to be seen."""
    eps = 1e-6 if model_type == "qwen3" else 0.1
    model = tiny_hf.model(1, model_type, rms_norm_eps=eps, **changes)
    wider = padded(model, ARCHS[model_type])
    assert wider is not model
    for name, path in linear_names(wider, ARCHS[model_type]).items():
        assert wider.get_submodule(path).in_features % 256 == 0, name
    assert wider.get_input_embeddings().weight.shape[1] % 256 == 0
    ids = torch.randint(0, tiny_hf.N_VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    wanted = model.double()(ids).logits
    got = wider.double()(ids).logits
    assert wanted.std() > 0.5
    assert float((got - wanted).abs().max()) < tolerance


def test_nothing_to_pad() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_hf.model(**sizes)
    assert padded(model, ARCHS["llama"]) is model


def test_padded_file_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    """Through F16 in a GGUF file and back."""
    source = open_source(folder / "tiny", tmp_path)
    model = load_model(source)
    file = tmp_path / "padded.gguf"
    write_dense(file, source, padded(model, source.arch), load_tokenizer(source))
    again = load_model(open_source(file, tmp_path))
    ids = torch.arange(5, 25)[None]
    assert again.config.hidden_size == 256
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=2e-2)
    assert linear_bits(file)[0] == 16 * linear_bits(file)[1]


def test_dense_file_is_what_llama_cpp_knows(folder: Path, tmp_path: Path) -> None:
    """The same tensors as a GGUF written by llama.cpp's conventions, in F16."""
    source = open_source(folder / "tiny", tmp_path)
    write_dense(tmp_path / "a.gguf", source, load_model(source), load_tokenizer(source))
    tiny_hf.write_standard_gguf(tmp_path / "b.gguf", folder / "tiny")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    wanted = {t.name: t for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.tensor_type == (Type.F16 if tensor.data.ndim == 2 else Type.F32)
        assert np.array_equal(tensor.data, wanted[name].data.astype(tensor.data.dtype)), name


def test_weights_beyond_f16(folder: Path, tmp_path: Path) -> None:
    source = open_source(folder / "tiny", tmp_path)
    model = load_model(source)
    model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = 1e5
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.weight is too large for F16"):
        write_dense(tmp_path / "a.gguf", source, model, load_tokenizer(source))
    assert not (tmp_path / "a.gguf").exists()


# Bits ------------------------------------------------------------------------------------------------------


def write_quantized(path: Path, kinds: dict[str, Type], rows: int = 8, cols: int = 256) -> Path:
    """A GGUF of the given tensors, quantized by gguf-py."""
    writer = gguf.GGUFWriter(path, "llama")
    values = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    for name, kind in kinds.items():
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bits_of_a_quantized_file(tmp_path: Path) -> None:
    """Scales of the blocks count, embedding, head and norms do not."""
    kinds = {
        "token_embd.weight": Type.F16,
        "output.weight": Type.Q8_0,
        "blk.0.attn_norm.weight": Type.F32,
        "blk.0.attn_q.weight": Type.Q4_0,  # 4 bits and a float16 for 32 weights: 4.5
        "blk.0.ffn_down.weight": Type.Q8_0,  # 8.5
        "blk.1.attn_v.weight": Type.TQ2_0,  # 66 bytes for 256: 2.0625
        "blk.1.attn_q.bias": Type.F32,
    }
    bits, weights = linear_bits(write_quantized(tmp_path / "q.gguf", kinds))
    assert weights == 3 * 8 * 256
    assert bits == (4.5 + 8.5 + 2.0625) * 8 * 256


def test_bits_of_our_file(folder: Path) -> None:
    """Equal to the plan's, which counts signs, filler and scales."""
    source = open_source(folder / "tiny", folder)
    plan = make_plan(source, load_model(source), tiny_hf.QUICK["bpw"])
    bits, weights = linear_bits(folder / "ours.gguf")
    assert (bits, weights) == (plan.bits, plan.weights)
    assert bits == sum(bits_of_linear(*plan.shapes[name], rank) for name, rank in plan.ranks.items())


def test_bits_of_no_model(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no linear layers"):
        linear_bits(write_quantized(tmp_path / "q.gguf", {"token_embd.weight": Type.F16}))


def test_bits_of_onecomp() -> None:
    rank, rows, cols = 10, 6, 8
    vectors = {"dbf_mid": torch.zeros(rank), "dbf_Da": torch.zeros(rows), "dbf_Db": torch.zeros(cols)}
    found = onecomp_child.bits_of(SimpleNamespace(**vectors))
    assert found == (rank * rows + rank * cols + 16 * (rank + rows + cols), rows * cols)
    one = SimpleNamespace(
        A_sign=torch.zeros(rows, rank), B_sign=torch.zeros(rank, cols), A_amp=torch.zeros(rows, 2),
        B_amp=torch.zeros(cols, 2), Q_U_amp=torch.zeros(rank, 2), Q_V_amp=torch.zeros(rank, 2),
    )  # fmt: skip
    found = onecomp_child.bits_of(SimpleNamespace(get_MDBF_params_list=lambda: [one, one]))
    assert found == (2 * (rank * (rows + cols) + 16 * 2 * (rows + cols + 2 * rank)), rows * cols)


# Rows and table --------------------------------------------------------------------------------------------


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [row(), row(OURS, "a, b.gguf", made_with='of "text"\nand more'), row(ORIGINAL, "x", file_mib=None)]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv", PROTOCOL) == rows


@pytest.mark.parametrize("change", [{"ctx": 17}, {"chunks": 4}, {"model": "other"}, {"text_sha256": "1" * 64}])
def test_rows_of_another_protocol(tmp_path: Path, change: dict[str, Any]) -> None:
    write_rows(tmp_path / "rows.csv", [row(), row(name="Q3_K_S", **change)])
    with pytest.raises(FormatError, match="row 2 was measured with"):
        read_rows(tmp_path / "rows.csv", PROTOCOL)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("series,", "serie,", "its columns are"), ("llama.cpp,", "unknown,", "series"), ("50.9", "x", "row 1")],
)
def test_rows_that_are_none(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [row()])
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        read_rows(path, PROTOCOL)


def test_merged() -> None:
    rows = [row(OURS, "b", bpw=1.2), row(OURS, "a", bpw=2.0), row(), row(ORIGINAL, "x"), row(OURS, "b", ppl=9.0)]
    assert [(r.series, r.name) for r in merged(rows)] == [
        (ORIGINAL, "x"), (LLAMA_CPP, "Q2_K"), (OURS, "b"), (OURS, "a"),
    ]  # fmt: skip
    assert merged(rows)[2].ppl == 9.0


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(sys.stdout, "md", COLUMNS)
    table.add(row().cells())
    table.add(row(ORIGINAL, "bfloat16", file_mib=None, bpw=16, kl=0.0).cells())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | type | bpw of linears | file, MiB | perplexity | mean KL | same top-1 |"
    assert lines[2] == "| llama.cpp | Q2_K | 2.94 | 60.2 | 50.90 ± 1.50 | 0.840 | 54.0% |"
    assert lines[3] == "| original | bfloat16 | 16.00 | – | 50.90 ± 1.50 | 0.000 | 54.0% |"
