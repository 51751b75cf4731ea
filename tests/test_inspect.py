"""dbf2gguf inspect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from make_gguf import tiny_config, tiny_weights, write, write_model

from dbf2gguf import cli
from dbf2gguf.budget import linear_bits
from dbf2gguf.inspect import escape

ROOT = Path(__file__).parents[1]


def receipt(meta: dict[str, Any], _arrays: dict[str, Any]) -> None:
    meta["general.name"] = "Tiny"
    meta["dbf.quality.ppl"] = 23.456789
    meta["dbf.quality.text_sha256"] = "ab" * 32
    meta["dbf.recipe.preset"] = "fast"
    meta["dbf.recipe.distill_kl"] = str([0.5] * 100)
    meta["dbf.sign_bits_per_weight"] = 2.25
    meta["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(300)]


def run(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> str:
    assert cli.main(["inspect", str(path), *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf", change=receipt)


def expected_bpw() -> float:
    """The bits of make_gguf's model by the arithmetic of the converter."""
    c, w = tiny_config(), tiny_weights(tiny_config())
    linears = [x for y in w.layers for x in (y.q, y.k, y.v, y.o, y.gate, y.up, y.down)]
    assert c.n_layers == 2
    bits = sum(linear_bits(x.rows, x.cols, x.rank) for x in linears)
    return bits / sum(x.rows * x.cols for x in linears)


def test_summary(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, path)
    lines = {line.split("  ")[1]: line for line in out.splitlines() if line.startswith("  ")}
    assert lines["name"].endswith(" Tiny")
    assert "llama, 2 layers, width 32, feed-forward 44, 4 heads, 2 KV heads" in lines["architecture"]
    assert f"{path.stat().st_size / 2**20:.2f} MiB" in lines["file"]
    assert f"{expected_bpw():.4f} bits per weight of 14592 weights" in lines["linear layers"]
    assert "signs alone 2.2500" in lines["linear layers"]
    assert "    2 x ffn_down               32     44          24   2.500" in out
    assert "quality (dbf.quality.*)" in out
    assert "recipe (dbf.recipe.*)" in out
    assert lines["ppl"].endswith(" 23.4568")
    assert lines["preset"].endswith(" fast")
    assert lines["tokenizer.ggml.tokens"].endswith("[300 values]")
    assert "(500 characters)" in lines["distill_kl"]  # long strings are shortened
    assert max(map(len, out.splitlines())) < 140
    assert "blk.0.attn_q.dbf_a" not in out


def test_ranks_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(_meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        for part, cut in (("dbf_a", np.s_[:, :1]), ("dbf_b", np.s_[:8]), ("dbf_mid", np.s_[:8])):
            array, kind = arrays[f"blk.1.ffn_up.{part}"]
            arrays[f"blk.1.ffn_up.{part}"] = (np.ascontiguousarray(array[cut]), kind)

    out = run(capsys, write_model(tmp_path / "m.gguf", change=change))
    assert "    2 x ffn_up                 44     32        8-24" in out


def test_tensors(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, path, "--tensors")
    (line,) = (x for x in out.splitlines() if x.startswith("  blk.1.ffn_down.dbf_b"))
    assert line.split() == ["blk.1.ffn_down.dbf_b", "DBF1", "24", "x", "48", "144", "bytes"]
    assert sum(" bytes" in x for x in out.splitlines()) == 76


def test_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, path, "--json"))
    assert found["bytes"] == path.stat().st_size
    assert found["gguf_version"] == 3
    assert found["linear_bits_per_weight"] == pytest.approx(expected_bpw())
    assert found["weights"] == 14592 + 300 * 32 + 5 * 32
    assert found["file_bits_per_weight"] == found["bytes"] * 8 / found["weights"]
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"length": 300}
    assert found["metadata"]["dbf.quality.text_sha256"] == "ab" * 32
    assert found["metadata"]["tokenizer.ggml.add_bos_token"] is False
    assert len(found["tensors"]) == 76
    entry = {"name": "blk.0.attn_q.dbf_a", "type": "DBF1", "shape": [32, 24], "bytes": 96}
    assert entry in found["tensors"]


def test_plain_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No factors: no table of them, and the bits of the whole file."""
    blocks = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    arrays = {
        "token_embd.weight": (blocks, gguf.GGMLQuantizationType.Q8_0),
        "x": (np.ones(3, np.float32), None),
    }
    path = write(tmp_path / "p.gguf", "llama", {"llama.block_count": 1}, arrays)
    out = run(capsys, path)
    assert "linear layers" not in out
    assert "quality" not in out
    assert "Q8_0               1" in out
    assert "of 259 weights" in out
    found = json.loads(run(capsys, path, "--json"))
    assert found["linear_bits_per_weight"] == 0
    assert found["weights"] == 259


def test_no_tensors_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.gguf", "llama", {"x": 1}, {})
    assert "of 0 weights" in run(capsys, path, "--tensors")
    assert json.loads(run(capsys, path, "--json"))["tensors"] == []


HOSTILE = "a\x1b]0;owned\x07\x1b[31m\r\n\x9b2J\u202egpj\x00"


def test_hostile_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No control character of the file reaches the terminal, wherever it stands."""

    def change(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        meta["general.name"] = HOSTILE
        meta["general." + HOSTILE] = HOSTILE * 50
        meta["dbf.recipe." + HOSTILE] = HOSTILE
        meta["dbf.quality.ppl"] = float("nan")
        meta["llama.block_count"] = HOSTILE
        arrays["blk.0.\x1b[2J.dbf_a"] = (np.ones(3, np.float32), None)
        arrays["\x1b[1mx"] = (np.ones(3, np.float32), None)

    path = write_model(tmp_path / "m.gguf", change=change)
    out = run(capsys, path, "--tensors")
    assert all(c.isprintable() or c == "\n" for c in out)
    assert r"a\x1b]0;owned\x07\x1b[31m\r\n\x9b2J\u202egpj\x00" in out
    assert "1 linear layers, first" in out  # of the five tensors, one
    found = run(capsys, path, "--json")
    assert found.isascii()
    assert all(c.isprintable() or c == "\n" for c in found)
    assert json.loads(found)["metadata"]["general.name"] == HOSTILE
    assert json.loads(found)["metadata"]["dbf.quality.ppl"] == "nan"


def test_escape() -> None:
    assert escape("naïve 日本 🙂 \\") == "naïve 日本 🙂 \\"
    assert escape("\t\x7f\x85\ue000\U000e0001") == r"\t\x7f\x85\ue000\U000e0001"


@pytest.mark.parametrize("size", [0, 3, 24, 500, -40])
def test_truncated(path: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])
    assert cli.main(["inspect", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}: ")
    assert err.count("\n") == 1


def test_missing_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        assert cli.main(["inspect", str(path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"error: {path}: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_process(tmp_path: Path, encoding: str) -> None:
    """Any terminal, and no torch: an inspection is quick."""
    path = write_model(tmp_path / "m.gguf", change=lambda meta, _: meta.update({"general.name": "naïve 🙂"}))
    code = "import sys; from dbf2gguf.cli import main; main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "inspect", str(path)]
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "PATH": ""}
    run = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    wanted = "naïve 🙂" if encoding == "utf-8" else r"na\xefve \U0001f642"
    assert wanted in run.stdout.decode(encoding)
