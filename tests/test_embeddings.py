"""dbf2gguf.compare.embeddings: types of the embedding and the head, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch

from dbf2gguf.compare.embeddings import main
from dbf2gguf.convert import convert
from dbf2gguf.evaluate import measure
from dbf2gguf.progress import Stage
from dbf2gguf.source import load_model, load_tokenizer, open_source
from dbf2gguf.write import dequantized
from runtime import perplexity


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings")
    tiny_hf.write_folder(path / "tiny", tie_word_embeddings=request.param)
    tiny_hf.write_text(path / "text.txt")
    convert(path / "tiny", path / "ours.gguf", **tiny_hf.QUICK)
    return path


def arguments(folder: Path, *more: str) -> list[str]:
    text = ["--text", str(folder / "text.txt"), "--ctx", "16", "--chunks", "3", "-q"]
    return [str(folder / "tiny"), *more, *text]


def test_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(folder, str(folder / "ours.gguf"), "--types", "f16,q8_0,q6_k,q5_0,q4_0", "-o", "json")
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "skipped original q6_k: rows of 32 are no multiples of 256" in err
    rows = {(row["model"], row["type"]): row for row in json.loads(out)}
    kinds = ("f16", "q8_0", "q5_0", "q4_0")
    assert list(rows) == [(name, kind) for name in ("original", "ours.gguf") for kind in kinds]

    kls = [rows["original", kind]["kl"] for kind in kinds]
    assert 0 <= kls[0] < 1e-5
    assert kls == sorted(kls)
    assert [rows["original", kind]["bits"] for kind in kinds] == [16, 8.5, 5.5, 4.5]

    source = open_source(folder / "tiny", folder)
    model = load_model(source)
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = sum(m.numel() for m in matrices.values())
    assert rows["original", "q4_0"]["mib"] == weights * 4.5 / 8 / 2**20

    for weight in matrices.values():
        weight.copy_(dequantized(weight, "q4_0"))
    tokens = load_tokenizer(source)((folder / "text.txt").read_text(encoding="utf-8"))["input_ids"]
    pieces = torch.tensor(perplexity.chunks(tokens, 16, 3))
    quality = measure(load_model(source), model, pieces, Stage("", 3, quiet=True))
    assert rows["original", "q4_0"]["kl"] == pytest.approx(quality.kl_mean, rel=1e-4)
    assert rows["original", "q4_0"]["ppl"] == pytest.approx(quality.ppl, rel=1e-5)

    args = [str(folder / "ours.gguf"), str(folder / "text.txt"), "--ctx", "16", "--chunks", "3", "-t", "1"]
    assert perplexity.main([*args, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["ppl"]
    for kind in ("f16", "q8_0"):  # it is stored as Q8_0 already
        assert rows["ours.gguf", kind]["ppl"] == pytest.approx(said, rel=2e-3)


def test_markdown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--types", "q8_0")) == 0
    head, rule, line = capsys.readouterr().out.splitlines()
    assert head == "| model | type | bits | MiB | perplexity | mean KL | same top-1 |"
    assert rule.count("---:") == 5
    assert line.startswith("| original | q8_0 | 8.50 |")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--types", "q8_0,q3_k"], "--types: 'q3_k' is unknown; there are f16, q8_0, q6_k, q4_0, "),
        (["nothing.gguf"], "nothing.gguf: no such file"),
        (["-t", "0"], "--threads is 0; wanted 1 or more"),
    ],
)
def test_options(folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, *more)) == 1
    assert message in capsys.readouterr().err


def test_a_file_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_hf.write_folder(tmp_path / "wide", hidden_size=64)
    convert(tmp_path / "wide", tmp_path / "wide.gguf", **tiny_hf.QUICK)
    assert main(arguments(folder, str(tmp_path / "wide.gguf"), "--types", "f16")) == 1
    assert "its embedding is (300, 64), that of" in capsys.readouterr().err
