"""CUDA graphs of text and distillation: the same as without. `pytest -m gpu` on a machine with a GPU."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import tiny_hf
import torch

import dbf2gguf.distill
import dbf2gguf.text
from dbf2gguf.factorize import Factors
from dbf2gguf.graphs import Recorder
from dbf2gguf.progress import Stage
from dbf2gguf.source import load_model, open_source
from dbf2gguf.text import self_written_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_recorded_calls() -> None:
    x = torch.zeros(3, device="cuda")
    add = Recorder(warm_up=1)(lambda: x.add_(1).clone())
    assert [add()[0].item() for _ in range(4)] == [1, 2, 3, 4]


def test_what_cannot_be_recorded_runs(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.zeros(3, device="cuda")
    add = Recorder(warm_up=1)(lambda: x.add_(1)[0].item())  # waits for the GPU
    assert add() == 1
    assert [add() for _ in range(2)] == [2, 3]
    assert "note: no CUDA graph" in capsys.readouterr().err


def test_text_of_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks: one that warms up, one that records, one that plays; then without graphs."""
    monkeypatch.setattr(dbf2gguf.text, "GPU_BATCH_TOKENS", 4 * 40)
    model = load_model(open_source(tiny_hf.write_folder(tmp_path / "model"), tmp_path), "cuda")

    def write() -> torch.Tensor:
        stage = Stage("text", 12 * 40, quiet=True)
        return self_written_rows(model, tiny_hf.tokenizer(), 12, 40, 0.5, 0, True, stage)

    recorded = write()
    monkeypatch.setattr(dbf2gguf.text, "Recorder", lambda warm_up: lambda function: function)
    assert torch.equal(recorded, write())


def test_distillation_with_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL falls as it does without, as far as bfloat16 and compiled layers allow."""
    from test_distill import Setup

    def train(steps_that_pay: int) -> list[float]:
        monkeypatch.setattr(dbf2gguf.distill, "COMPILED_STEPS", steps_that_pay)
        setup = Setup()
        setup.model.cuda()
        for name, f in setup.factors.items():
            setup.factors[name] = Factors(*(getattr(f, part.name).cuda() for part in fields(f)))
        return setup.train(setup.student())

    recorded, plain = train(1), train(10**6)
    assert recorded == pytest.approx(plain, rel=0.05)
    assert recorded[-1] < recorded[0]
