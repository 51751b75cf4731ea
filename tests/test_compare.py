"""dbf2gguf.compare: padding, bits, rows, the table, and what it says where a peer is missing."""

from __future__ import annotations

import json
import shutil
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
from make_gguf import write_model

from dbf2gguf.archs import ARCHS
from dbf2gguf.budget import linear_bits as bits_of_linear
from dbf2gguf.calibrate import input_importance
from dbf2gguf.compare import llama_cpp, onecomp, onecomp_child, plot, published
from dbf2gguf.compare.__main__ import COLUMNS, main
from dbf2gguf.compare.llama_cpp import MissingPeerError
from dbf2gguf.compare.padding import pad_heads, padded, unpadded, whole
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
from runtime import perplexity
from runtime.bench.report import Table
from runtime.errors import FormatError, UnsupportedModelError

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


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo2", "phi3", "gpt2", "mixtral", "qwen2_moe"])
def test_families_that_cannot_be_padded(model_type: str) -> None:
    """Their norms are not at Llama's places, are added to, or subtract a mean; or linears are fused."""
    with pytest.raises(UnsupportedModelError, match=f"{model_type} cannot be padded to rows of whole 256s"):
        padded(tiny_hf.model(), ARCHS[model_type])


def test_heads_that_cannot_be_padded() -> None:
    with pytest.raises(UnsupportedModelError, match="5 heads of 256 in 1 groups cannot be padded"):
        pad_heads(5, 1, 256, 768)


def test_whole() -> None:
    assert [whole(n) for n in (1, 256, 257, 576)] == [256, 256, 512, 768]


PADDED = pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}),
        # 6 heads of 48 in 2 groups: 16 heads in 2 groups of 8, so rows move
        ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 48}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"rms_norm_eps": 1e-6}),  # small: its head norms get another one
    ],
)


@PADDED
def test_padded_logits(model_type: str, changes: dict[str, Any]) -> None:
    """With an epsilon large enough to be seen."""
    model = tiny_hf.model(1, model_type, **{"rms_norm_eps": 0.1, **changes})
    wider = padded(model, ARCHS[model_type])
    assert wider is not model
    for name, path in linear_names(wider, ARCHS[model_type]).items():
        assert wider.get_submodule(path).in_features % 256 == 0, name
    assert wider.get_input_embeddings().weight.shape[1] % 256 == 0
    ids = torch.randint(0, tiny_hf.N_VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    wanted = model.double()(ids).logits
    got = wider.double()(ids).logits
    assert wanted.std() > 0.5
    assert float((got - wanted).abs().max()) < 2e-5


@PADDED
def test_unpadded(model_type: str, changes: dict[str, Any]) -> None:
    """What quantizers do to columns that only zeros meet is dropped; the rest is kept."""
    arch = ARCHS[model_type]
    model = tiny_hf.model(1, model_type, **{"rms_norm_eps": 0.1, **changes})
    wider = padded(model, arch)
    for name, values in unpadded(wider, model, arch).named_parameters():
        assert torch.allclose(values, model.get_parameter(name), rtol=1e-6), name
    for path in linear_names(wider, arch).values():
        rows = wider.get_submodule(path).weight
        rows[rows.any(1)] += 0.01 * torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    narrow = unpadded(wider, model, arch)
    assert (narrow is wider) == ("head_dim" in changes)  # groups grow, and their new heads are heard now
    ids = torch.randint(0, tiny_hf.N_VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    tolerance = 0.05 if model_type == "qwen3" else 1e-4  # its head norms have another epsilon
    assert torch.allclose(narrow(ids).logits, wider(ids).logits, atol=tolerance)
    assert not torch.allclose(narrow(ids).logits, model(ids).logits, atol=0.1)


@pytest.mark.parametrize(
    ("name", "place"), [("model.layers.1.mlp.down_proj", (40, 0)), ("model.embed_tokens", (7, 40))]
)
def test_padding_that_is_not_zero(name: str, place: tuple[int, int]) -> None:
    model = tiny_hf.model()
    wider = padded(model, ARCHS["llama"])
    wider.get_submodule(name).weight[place] = 0.01
    assert unpadded(wider, model, ARCHS["llama"]) is wider
    assert unpadded(model, model, ARCHS["llama"]) is model


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


@pytest.mark.parametrize(
    "change", [{"ctx": 17}, {"chunks": 4}, {"model": "other"}, {"text_sha256": "1" * 64}]
)
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
    """The last of a name stays; bits fall within a series."""
    rows = [row(OURS, "b", bpw=1.2), row(OURS, "a", bpw=2.0), row(), row(ORIGINAL, "x")]
    found = merged([*rows, row(OURS, "b", bpw=1.2, ppl=9.0)])
    assert [(r.series, r.name) for r in found] == [
        (ORIGINAL, "x"), (LLAMA_CPP, "Q2_K"), (OURS, "a"), (OURS, "b"),
    ]  # fmt: skip
    assert found[-1].ppl == 9.0


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(sys.stdout, "md", COLUMNS)
    table.add(row().cells())
    table.add(row(ORIGINAL, "bfloat16", file_mib=None, bpw=16, kl=0.0).cells())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | type | bpw of linears | file, MiB | perplexity | mean KL | same top-1 |"
    assert lines[2] == "| llama.cpp | Q2_K | 2.94 | 60.2 | 50.90 ± 1.50 | 0.840 | 54.0% |"
    assert lines[3] == "| original | bfloat16 | 16.00 | – | 50.90 ± 1.50 | 0.000 | 54.0% |"


# The program -----------------------------------------------------------------------------------------------

MEASURED = ["--ctx", "16", "--chunks", "3", "-q", "-t", "1"]

IMATRIX = """
import sys
if "--version" in sys.argv:
    print("version: 8000 (abc)", file=sys.stderr)
    sys.exit()
out, text = (sys.argv[sys.argv.index(option) + 1] for option in ("-o", "-f"))
assert len(open(text, encoding="utf-8").read()) > 100
open(out, "w").write("importances")
"""

QUANTIZE = """
import sys
import gguf
_, _, imatrix, source, out, kind, *_ = sys.argv
if kind == "Q9":
    sys.exit("there is no Q9")
assert open(imatrix).read() == "importances"
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(out, "llama")
for field in reader.fields.values():
    if not field.name.startswith("GGUF.") and field.name != "general.architecture":
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], element)
for tensor in reader.tensors:
    matrix = tensor.data.ndim == 2
    qtype = gguf.GGMLQuantizationType[kind] if matrix else tensor.tensor_type
    data = gguf.quants.quantize(tensor.data.astype("float32"), qtype) if matrix else tensor.data
    writer.add_tensor(tensor.name, data, raw_dtype=qtype)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
if kind == "Q5_0":
    print("WARNING: 3 of 14 tensor(s) required fallback quantization")
"""


def write_program(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def llama_bin(tmp_path: Path) -> Path:
    """llama-quantize and llama-imatrix, as far as they are used; the quantizers are gguf-py's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder / "llama-imatrix", IMATRIX)
    write_program(folder / "llama-quantize", QUANTIZE)
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return [str(folder / "tiny"), *more, "--text", str(folder / "text.txt"), *MEASURED]


def calibrated(folder: Path) -> list[str]:
    return ["--calib", str(folder / "calib.txt"), "--calib-rows", "4"]


def by_name(text: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(text)}


def test_ours_is_what_the_runtime_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(folder, str(folder / "ours.gguf")), "--peers", "none", "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = by_name(out)
    assert rows["float32"]["kl"] == 0
    assert rows["float32"]["same_top1"] == 1
    assert rows["float32"]["bpw"] == 32
    found = rows["ours.gguf"]
    assert main_perplexity(folder, "ours.gguf", capsys) == pytest.approx(found["ppl"], abs=1e-4)
    assert found["kl"] > 0
    assert found["file_mib"] == round((folder / "ours.gguf").stat().st_size / 2**20, 2)
    assert "distill_steps 2" in found["made_with"]


def main_perplexity(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> float:
    args = [str(folder / name), str(folder / "text.txt"), "--ctx", "16", "--chunks", "3", "-t", "1", "--json"]
    assert perplexity.main(args) == 0
    return float(json.loads(capsys.readouterr().out)["ppl"])


def test_llama_cpp(folder: Path, llama_bin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*arguments(folder), *calibrated(folder), "--peers", "llama.cpp", "--llama-bin", str(llama_bin)]
    assert main([*args, "--types", "F16,Q8_0,Q9,Q4_0,Q5_0", "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "skipped llama.cpp Q9: llama-quantize ends with code 1: there is no Q9",
        "skipped llama.cpp Q5_0: llama-quantize Q5_0: 3 of 14 tensor(s) required fallback: rows of these are "
        "no multiples of the type's blocks",
    ]
    rows = by_name(out)
    assert list(rows) == ["float32", "F16", "Q8_0", "Q4_0"]
    assert [rows[name]["bpw"] for name in ("F16", "Q8_0", "Q4_0")] == [16, 8.5, 4.5]
    assert 0 <= rows["F16"]["kl"] < 1e-4 < rows["Q8_0"]["kl"] * 10 < rows["Q4_0"]["kl"]
    assert rows["F16"]["ppl"] == pytest.approx(rows["float32"]["ppl"], rel=1e-3)
    assert (
        "8000 (abc), imatrix of 512 tokens of calib.txt; padded: width 32 -> 256" in rows["Q4_0"]["made_with"]
    )


def test_kept_files_are_used(
    folder: Path, llama_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*arguments(folder), *calibrated(folder), "--peers", "llama.cpp", "--llama-bin", str(llama_bin)]
    args += ["--types", "Q8_0", "--keep", str(tmp_path / "kept")]
    assert main(args) == 0
    write_program(llama_bin / "llama-quantize", "raise SystemExit('not again')")
    before = (tmp_path / "kept/Q8_0.gguf").stat().st_mtime_ns
    assert main(args) == 0
    assert (tmp_path / "kept/Q8_0.gguf").stat().st_mtime_ns == before
    kept = sorted(p.name for p in (tmp_path / "kept").iterdir())
    assert kept == ["Q8_0.gguf", "f16.gguf", "imatrix.gguf", "origin.txt"]
    capsys.readouterr()
    assert main([*args, "--seed", "1"]) == 1
    assert "holds files of another model, seed or calibration text" in capsys.readouterr().err


def test_missing_peers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Skipped, with a line that says how to get them; the rest goes on."""
    python = write_program(tmp_path / "python", "raise ModuleNotFoundError(\"No module named 'onecomp'\")")
    args = [*arguments(folder), *calibrated(folder), "--llama-bin", str(tmp_path)]
    args += ["--onecomp-python", str(python), "--published", "4", "--published-iterations", "2"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        f"skipped llama.cpp: no llama-quantize and no llama-imatrix in {tmp_path}; build"
    )
    assert lines[1].startswith(
        f"skipped onecomp: {python} cannot import onecomp (ModuleNotFoundError: No module"
    )
    assert lines[1].endswith("V/bin/pip install onecomp; then give --onecomp-python V/bin/python")
    assert [line.split(" | ")[0] for line in out.splitlines()[2:]] == ["| original", "| DBF as published"]


def test_a_peer_that_fails_late(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured before is printed all the same."""
    args = [*arguments(folder), *calibrated(folder), "--peers", "published", "--published", "99"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert err.startswith("skipped published: ")
    assert "99" in err
    assert "| original " in out


def test_the_size_of_the_original(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what it was read from: weights of its type, or a GGUF file."""
    file = tiny_hf.write_standard_gguf(tmp_path / "m.gguf", folder / "tiny")
    for model, size in ((folder / "tiny", (folder / "tiny/model.safetensors").stat().st_size), (file, None)):
        assert main([str(model), *arguments(folder)[1:], "--peers", "none", "-o", "json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["file_mib"] == pytest.approx((size or file.stat().st_size) / 2**20, rel=0.05)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    assert main([*arguments(folder), "--peers", "none"]) == 1
    assert "the original's logits, in $TMPDIR, needs" in capsys.readouterr().err


def test_one_tool_is_missing(tmp_path: Path, llama_bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (llama_bin / "llama-quantize").unlink()
    monkeypatch.setenv("PATH", str(llama_bin))
    with pytest.raises(MissingPeerError, match=r"^no llama-quantize on PATH; build"):
        llama_cpp.find_tools(None)
    with pytest.raises(MissingPeerError, match="no such program; it needs Python"):
        onecomp.find(str(tmp_path / "python"))


ONECOMP = """
import torch
from types import SimpleNamespace as DBFResult
from transformers import AutoModelForCausalLM
__version__ = "1.4"


class DBF:
    option = "iters"
    def __init__(self, target_bits, **options):
        self.target_bits, self.results = target_bits, {}
        setattr(self, self.option, options.get(self.option, 600))


class MDBF(DBF):
    option = "admm_outer_iters"
    def __init__(self, **options):
        raise RuntimeError("something in MDBF")


def CalibrationConfig(calibration_dataset, max_length, num_calibration_samples, strategy, batch_size):
    assert len(open(calibration_dataset, encoding="utf-8").read()) > 100
    assert (max_length, num_calibration_samples, strategy) == (128, 4, "concat_chunk")


def ModelConfig(path, dtype, device):
    return path


class Runner:
    def __init__(self, model_config, quantizer, calibration_config, qep):
        self.path, self.quantizer = model_config, quantizer

    def run(self):
        print("what it says")
        zeros = torch.zeros
        for name in "ab":
            self.quantizer.results[name] = DBFResult(dbf_mid=zeros(8), dbf_Da=zeros(32), dbf_Db=zeros(64))

    def save_dequantized_model(self, out):
        model = AutoModelForCausalLM.from_pretrained(self.path)
        model.model.layers[0].mlp.up_proj.weight.data *= 0.5
        model.save_pretrained(out)
"""


def test_onecomp(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Through the child process, with a package that has onecomp's names."""
    (tmp_path / "onecomp.py").write_text(ONECOMP, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = [*arguments(folder), *calibrated(folder), "--peers", "onecomp", "--onecomp", "mdbf:1,dbf:1.5"]
    steps: list[str] = []
    monkeypatch.setattr(Stage, "step", lambda stage, note="", n=1: steps.append(stage.name))
    assert main([*args, "--onecomp-iterations", "7", "-o", "json"]) == 0
    assert steps.count("quantize DBF 1.5") == 2
    out, err = capsys.readouterr()
    assert err == "skipped onecomp MDBF 1: onecomp ends with code 1: RuntimeError: something in MDBF\n"
    found = by_name(out)["DBF 1.5"]
    bits = 8 * (32 + 64) + 16 * (8 + 32 + 64)
    assert found["bpw"] == round(bits / (32 * 64), 4)
    assert found["kl"] > 0
    assert found["file_mib"] is None
    assert found["made_with"].startswith("onecomp 1.4 on c")
    assert ", 7 iterations, calibrated on 512 tokens of calib.txt" in found["made_with"]


def test_published(folder: Path) -> None:
    """Importances weigh errors as they should: weighted, the error is smaller than that of plain factors."""
    source = open_source(folder / "tiny", folder)
    model = load_model(source)
    names = linear_names(model, source.arch)
    rows = torch.randint(0, tiny_hf.N_VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    path = names["blk.1.ffn_down"]
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    inputs = input_importance(model, names, rows, 3, Stage("", 4, quiet=True))
    hook.remove()
    moment = torch.cat(seen).square().mean((0, 1))
    assert torch.allclose(inputs["blk.1.ffn_down"].square(), moment / moment.mean(), rtol=1e-3, atol=1e-5)
    assert not model.get_submodule(path)._forward_pre_hooks

    plan = make_plan(source, model, 4.0)
    flat = {n: torch.ones(cols) for n, (_, cols) in plan.shapes.items()}
    outputs = {n: torch.ones(rows) for n, (rows, _) in plan.shapes.items()}
    skewed = {n: torch.linspace(0.05, 2, len(v)) for n, v in flat.items()}
    errors = []
    for importance in (skewed, flat):
        factors = published.factorize_each(
            model, names, plan, importance, outputs, 10, 0, Stage("", 14, quiet=True)
        )
        assert factors.keys() == names.keys()
        lost = [
            ((f.dense()[0] - model.get_submodule(names[n]).weight) * skewed[n]).square().sum()
            for n, f in factors.items()
        ]
        errors.append(float(torch.stack(lost).sum()))
    assert errors[0] < 0.9 * errors[1]


def test_rows_are_reused_saved_and_drawn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one command that adds our rows to the peers': nothing else is run again."""
    saved = tmp_path / "rows.csv"
    args = [*arguments(folder), *calibrated(folder), "--peers", "published", "--published", "4"]
    assert main([*args, "--published-iterations", "2", "--save", str(saved)]) == 0
    capsys.readouterr()
    peers = saved.read_text(encoding="utf-8").splitlines()
    assert len(peers) == 3
    args = [*arguments(folder, str(folder / "ours.gguf")), "--with", str(saved), "--save", str(saved)]
    assert main([*args, "-o", "csv"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[:3] == peers
    assert out == saved.read_text(encoding="utf-8")
    assert out.splitlines()[3].startswith("dbf2gguf,ours.gguf,")
    assert main([*arguments(folder), "--with", str(saved), "-o", "csv"]) == 0  # nothing to measure
    assert capsys.readouterr().out == out
    older, both = tmp_path / "older.csv", tmp_path / "both.csv"
    older.write_text(
        "\n".join([*peers[:2], peers[2].replace("published,4,", "published,3,")]), encoding="utf-8"
    )
    from_two = [
        *arguments(folder),
        "--with",
        str(older),
        "--with",
        str(saved),
        "--save",
        str(both),
        "-o",
        "csv",
    ]
    assert main(from_two) == 0
    assert capsys.readouterr().out == both.read_text(encoding="utf-8")
    assert len(both.read_text(encoding="utf-8").splitlines()) == len(out.splitlines()) + 1
    assert main([*arguments(folder), "--with", str(saved), "--chunks", "2"]) == 1
    assert "row 1 was measured with" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(folder: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(), row(OURS, "a", bpw=1.2, ppl=66.0), row(OURS, "b", bpw=2.0, ppl=44.0)]
    rows += [row(PUBLISHED, "1.2", bpw=1.2, ppl=1250.0), row(ORIGINAL, "bfloat16", bpw=16, ppl=23.5)]
    files = [tmp_path / f"{n}{suffix}" for n in "ab"]
    for file in files:
        plot.plot(file, rows, suffix[1:])
    content = files[0].read_bytes()
    assert content == files[1].read_bytes()
    assert len(content) > 10000
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_a_line_for_each_preset() -> None:
    """`best` first; what names no preset is a line of its own."""
    ours = [
        ("best-2", 2.0, "preset best"),
        ("best-1", 1.0, "preset best"),
        ("mid", 1.5, "preset balanced"),
        ("x", 1.2, ""),
    ]
    rows = [
        row(),
        *(row(OURS, name, bpw=bpw, made_with=f"dbf2gguf: {how}, text a.txt") for name, bpw, how in ours),
    ]
    found = plot.curves(rows)
    assert [(label, [r.name for r in points]) for label, _, points in found] == [
        ("dbf2gguf, best", ["best-1", "best-2"]),
        ("dbf2gguf", ["x"]),
        ("dbf2gguf, balanced", ["mid"]),
        ("llama.cpp", ["Q2_K"]),
    ]
    assert [style["linestyle"] for _, style, _ in found] == ["-", "--", ":", ""]


def test_plot_through_the_program(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    args = [
        *arguments(folder, str(folder / "ours.gguf")),
        "--peers",
        "none",
        "--plot",
        str(tmp_path / "p.svg"),
    ]
    assert main(args) == 0
    assert (tmp_path / "p.svg").stat().st_size > 10000


def test_no_matplotlib(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*arguments(folder), "--peers", "none", "--plot", "p.png"]) == 1
    assert capsys.readouterr().err == (
        "error: --plot needs the package matplotlib; run: pip install 'dbf2gguf[plot]'\n"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peers", "gptq"], "--peers: 'gptq' is unknown; there are llama.cpp, published, onecomp, none"),
        (["--peers", "published"], "--calib: peers need text to calibrate on; or say --peers none"),
        (["--plot", "p.gif"], "--plot p.gif: wanted a name that ends in .png, .svg, .pdf"),
        (["--onecomp", "gptq:2"], "methods are dbf, mdbf"),
        (["--onecomp", "dbf"], "wanted METHOD:BITS such as dbf:1.5"),
        (["--published-iterations", "0"], "--published-iterations is 0; wanted 1 or more"),
        (["--peers", "published", "--calib", "calib.txt", "--calib-rows", "9999"], "rows of 128 tokens; see"),
        (["--peers", "none", "--chunks", "0"], "0 chunks, wanted 1 or more"),
        (["--peers", "none", "-t", "0"], "--threads is 0; wanted 1 or more"),
        (["--save", "none/rows.csv"], "does not exist"),
    ],
)
def test_errors(
    folder: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert main([*arguments(folder), *more]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_files_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(folder, str(tmp_path / "x.gguf")), "--peers", "none"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'x.gguf'}: no such file\n"
    other = write_model(tmp_path / "other.gguf", change=adds_bos)
    assert main([*arguments(folder, str(other)), "--peers", "none"]) == 1
    assert f"{other}: its tokens of {folder / 'text.txt'} are not those of" in capsys.readouterr().err


def adds_bos(meta: dict[str, Any], _tensors: object) -> None:
    meta["tokenizer.ggml.add_bos_token"] = True


def test_the_context_is_too_long(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(folder), "--ctx", "200", "--peers", "none"]) == 1
    assert "--ctx is 200; this model was trained for 128 tokens" in capsys.readouterr().err


def test_the_context_is_longer_than_a_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's quantizers would be measured as another model."""
    tiny_hf.write_folder(tmp_path / "tiny", model_type="mistral", sliding_window=20)
    tiny_hf.write_text(tmp_path / "text.txt")
    options = ["--text", str(tmp_path / "text.txt"), "--ctx", "24", "--chunks", "2", "--peers", "none"]
    assert main([str(tmp_path / "tiny"), *options]) == 1
    assert "for 20 tokens, or has a sliding window of so many" in capsys.readouterr().err


def test_a_peer_that_fails(folder: Path, llama_bin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows measured before it are kept."""
    write_program(llama_bin / "llama-imatrix", IMATRIX.split("out, text")[0] + "sys.exit('out of luck')")
    args = [*arguments(folder), *calibrated(folder), "--peers", "llama.cpp", "--llama-bin", str(llama_bin)]
    assert main([*args, "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == "skipped llama.cpp: llama-imatrix ends with code 1: out of luck\n"
    assert list(by_name(out)) == ["float32", "F16"]
