"""runtime.perplexity against llama-perplexity's definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeModule
from make_gguf import tokenizer_json, write_model

import runtime
from runtime import perplexity
from runtime.errors import BackendError, OptionError
from runtime.perplexity import Comparison, chunks, score, token_kl, token_nll
from runtime.tokenizer import Tokenizer


def test_chunks() -> None:
    assert chunks(list(range(11)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chunks(list(range(11)), 4, 1) == [[0, 1, 2, 3]]
    assert chunks(list(range(11)), 4, 9, bos_id=77) == [[77, 1, 2, 3], [77, 5, 6, 7]]
    for ids, ctx, n in (([1] * 3, 4, None), ([1] * 9, 3, None), ([1] * 9, 4, 0)):
        with pytest.raises(OptionError, match="perplexity"):
            chunks(ids, ctx, n)


@pytest.mark.parametrize("ctx", [4, 5, 8, 33])
@pytest.mark.parametrize("last_only", [False, True])
def test_score(ctx: int, last_only: bool) -> None:
    """A bigram table as model: the sums written out as in llama.cpp's perplexity.cpp."""
    rng = np.random.default_rng(ctx)
    table = rng.standard_normal((20, 20)).astype(np.float32) * 3
    pieces = chunks(rng.integers(0, 20, 7 * ctx + 1).tolist(), ctx)
    nll = nll2 = 0.0
    count = 0
    for ids in pieces:
        first = ctx // 2
        for j in range(ctx - 1 - first):
            row = table[ids[first + j]].astype(np.float64)
            v = -(row[ids[first + j + 1]] - np.log(np.exp(row).sum()))
            nll, nll2 = nll + v, nll2 + v * v
            count += 1
    nll, nll2 = nll / count, nll2 / count
    seen: list[tuple[int, float]] = []

    def logits(ids: list[int]) -> Any:
        rows = table[ids]
        return rows[ctx // 2 :] if last_only else rows

    got = score(logits, pieces, lambda n, ppl: seen.append((n, ppl)))
    assert got.tokens == count == 7 * (ctx - 1 - ctx // 2)
    assert got.ppl == pytest.approx(math.exp(nll), rel=1e-6)
    assert got.error == pytest.approx(math.sqrt((nll2 - nll * nll) / (count - 1)) * math.exp(nll), rel=1e-5)
    assert [n for n, _ in seen] == list(range(1, 8))
    assert seen[-1][1] == got.ppl
    assert str(got) == f"Final estimate: PPL = {got.ppl:.4f} ± {got.error:.5f}"


def test_nll_of_large_logits() -> None:
    logits = np.array([[1e4, 0.0], [-1e4, -1e4]], np.float32)
    assert token_nll(logits, [0, 1]).tolist() == [0.0, pytest.approx(math.log(2))]
    assert token_nll(logits.astype(np.float16), [1, 1])[0] == pytest.approx(1e4)


def test_kl() -> None:
    base, logits = np.random.default_rng(0).standard_normal((2, 5, 30)) * 3
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (base, logits))
    assert token_kl(base, logits) == pytest.approx((p * np.log(p / q)).sum(1), rel=1e-9)
    assert token_kl(base, base + 7) == pytest.approx(np.zeros(5), abs=1e-12)  # softmax knows no offset
    assert np.isfinite(token_kl(base * 1000, logits)).all()  # probabilities of 0


@pytest.mark.parametrize("last_only", [False, True])
def test_comparison(last_only: bool) -> None:
    """Only predictions that `score` counts are compared."""
    tables = np.random.default_rng(1).standard_normal((2, 20, 20)).astype(np.float32) * 2
    pieces = chunks(np.random.default_rng(2).integers(0, 20, 40).tolist(), 8)

    def logits(table: int) -> Any:
        return lambda ids: tables[table][ids[4:] if last_only else ids]

    comparison = Comparison(logits(0), logits(1))
    assert score(comparison, pieces) == score(logits(0), pieces)
    got = comparison.result()
    seen = [token for ids in pieces for token in ids[4:-1]]
    kl = token_kl(tables[1][seen], tables[0][seen])
    assert got.kl_mean == pytest.approx(kl.mean())
    assert got.kl_error == pytest.approx(kl.std(ddof=1) / math.sqrt(len(kl)))
    assert got.kl_p99 == pytest.approx(np.quantile(kl, 0.99))
    assert got.base_ppl == pytest.approx(score(logits(1), pieces).ppl)
    assert got.same_top1 == np.mean(tables[1][seen].argmax(1) == tables[0][seen].argmax(1))


def test_comparison_of_other_vocabularies() -> None:
    with pytest.raises(OptionError, match="not models of one vocabulary"):
        Comparison(lambda ids: np.zeros((8, 20)), lambda ids: np.zeros((8, 21)))([1] * 8)


def test_uniform() -> None:
    got = score(lambda ids: np.zeros((len(ids), 50)), chunks([1] * 64, 16))
    assert got.ppl == pytest.approx(50)
    assert got.error == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("rows", [np.zeros((3, 9)), np.zeros((9, 9)), np.zeros(8), np.full((8, 9), np.nan)])
def test_bad_logits(rows: Any) -> None:
    with pytest.raises(BackendError, match="perplexity"):
        score(lambda ids: rows, chunks([1] * 8, 8))


def test_special_tokens_in_the_text_are_text() -> None:
    tokenizer = Tokenizer(tokenizer_json(), bos_id=1, eos_id=2)
    assert not {0, 1, 2} & set(tokenizer.encode("<|endoftext|> <|im_start|>"))


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
def test_program(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
    add_bos: bool,
) -> None:
    fake = FakeModule()
    monkeypatch.setattr(runtime, "backend", fake, raising=False)
    model = write_model(
        tmp_path / "m.gguf", change=lambda meta, _: meta.update({"tokenizer.ggml.add_bos_token": add_bos})
    )
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat. " * 30, encoding="utf-8")
    args = [str(model), str(text), "--ctx", "16", "--chunks", "3", "--backend", "c", "-t", "2"]
    assert perplexity.main([*args, "--json"] if as_json else args) == 0
    out, err = capsys.readouterr()
    assert fake.asked == {
        "backend": "c", "n_threads": 2, "n_ctx": 16, "kv_type": "f16", "activations": "int16",
    }  # fmt: skip
    assert [call[:2] for call in fake.loaded[0].calls] == [(16, 0)] * 3
    assert err.startswith("[1]")
    assert err.rstrip().endswith(",")
    if as_json:
        result = json.loads(out)
        assert (result["chunks"], result["ctx"], result["tokens"]) == (3, 16, 21)
        assert result["ppl"] > 1
    else:
        assert out.startswith("Final estimate: PPL = ")
        assert out.count("\n") == 1
    assert (fake.loaded[0].cache[0] == 1) is add_bos
    assert fake.loaded[0].closed


def test_program_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "backend", FakeModule(), raising=False)
    model, text = write_model(tmp_path / "m.gguf"), tmp_path / "t.txt"
    assert perplexity.main([str(model), str(text)]) == 1
    assert capsys.readouterr().err == f"error: {text}: No such file or directory\n"
    text.write_text("short", encoding="utf-8")
    assert perplexity.main([str(model), str(text)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: perplexity: the text has ")
    assert "smaller --ctx" in err


def test_program_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeModule()
    monkeypatch.setattr(runtime, "backend", fake, raising=False)
    model = write_model(tmp_path / "m.gguf")
    text = tmp_path / "t.txt"
    text.write_text("the cat sat on the mat. " * 30, encoding="utf-8")
    args = [str(model), str(text), "--ctx", "16", "--chunks", "3", "--kl-base", str(model)]
    args += ["--activations", "int8", "--kv-type", "q8_0"]
    assert perplexity.main(args) == 0
    out = capsys.readouterr().out
    assert "Mean KLD = 0.000000 ± 0.000000" in out
    assert "Same top token = 100.000%" in out
    assert out.splitlines()[-1].startswith("Final estimate: PPL = ")
    assert fake.asked["activations"] == "int16"  # of the base, which is loaded last
    assert fake.asked["kv_type"] == "f16"
    assert perplexity.main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kl_mean"] == 0
    assert result["base_ppl"] == result["ppl"]
    assert result["kl_base"] == str(model)
    assert all(backend.closed for backend in fake.loaded)
