"""CUDA graphs of text and distillation: the same as without. `pytest -m gpu` on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import tiny_hf
import torch
from stops import FragileWork, Stop
from test_distill import RECIPE, Setup

import dbf2gguf.distill
import dbf2gguf.text
from dbf2gguf.attention import CAUSAL
from dbf2gguf.distill import distill
from dbf2gguf.factorize import Factors
from dbf2gguf.graphs import Recorder, reason
from dbf2gguf.progress import Stage
from dbf2gguf.source import load_model, open_source
from dbf2gguf.text import self_written_rows
from dbf2gguf.work import Work

NO_GRAPH = "note: no CUDA graph"


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def setup_on_gpu() -> Setup:
    setup = Setup()
    setup.model.cuda().set_attn_implementation(CAUSAL)  # as load_model has it on a GPU
    for name, f in setup.factors.items():
        setup.factors[name] = Factors(*(getattr(f, part.name).cuda() for part in fields(f)))
    return setup


def test_the_reason() -> None:
    """Of the first error, and of what the compiler met, not of the compiler's."""
    first, last = RuntimeError("waits for the GPU\nat line 3"), RuntimeError("the end")
    last.__context__ = first
    assert reason(RuntimeError("no room")) == "no room"
    assert reason(last) == "waits for the GPU"
    first.inner_exception = ValueError("no such kernel")  # type: ignore[attr-defined]
    assert reason(last) == "no such kernel"


@on_gpu
def test_recorded_calls() -> None:
    x = torch.zeros(3, device="cuda")
    add = Recorder(warm_up=1)(lambda: x.add_(1).clone())
    assert [add()[0].item() for _ in range(4)] == [1, 2, 3, 4]


@on_gpu
def test_what_cannot_be_recorded_runs(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.zeros(3, device="cuda")
    add = Recorder(warm_up=1)(lambda: x.add_(1)[0].item())  # waits for the GPU
    assert add() == 1
    assert [add() for _ in range(2)] == [2, 3]
    assert NO_GRAPH in capsys.readouterr().err


@on_gpu
def test_text_of_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three blocks: one that warms up, one that records, one that plays; then without graphs."""
    monkeypatch.setattr(dbf2gguf.text, "GPU_BATCH_TOKENS", 4 * 40)
    model = load_model(open_source(tiny_hf.write_folder(tmp_path / "model"), tmp_path), "cuda")

    def write() -> torch.Tensor:
        stage = Stage("text", 12 * 40, quiet=True)
        return self_written_rows(model, tiny_hf.tokenizer(), 12, 40, 0.5, 0, True, stage)

    recorded = write()
    assert NO_GRAPH not in capsys.readouterr().err
    monkeypatch.setattr(dbf2gguf.text, "Recorder", lambda warm_up: lambda function: function)
    assert torch.equal(recorded, write())


@on_gpu
def test_distillation_with_a_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The KL falls as it does without. Compiled layers round in another way, and which kernels the compiler
    finds fastest differs from run to run: after some ten steps the KLs part, by 4 to 7 %."""

    def train(steps_that_pay: int) -> list[float]:
        monkeypatch.setattr(dbf2gguf.distill, "COMPILED_STEPS", steps_that_pay)
        setup = setup_on_gpu()
        return setup.train(setup.student())

    recorded, plain = train(1), train(10**6)
    assert NO_GRAPH not in capsys.readouterr().err
    assert recorded[:10] == pytest.approx(plain[:10], rel=0.03)
    assert sum(recorded) == pytest.approx(sum(plain), rel=0.03)
    assert sum(recorded[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.05)
    assert recorded[-1] < 0.7 * recorded[0]


@on_gpu
def test_a_graph_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates fall as they would have: the recorded step reads them where they are written."""
    monkeypatch.setattr(dbf2gguf.distill, "COMPILED_STEPS", 1)
    monkeypatch.setattr(dbf2gguf.distill, "SAVE_SECONDS", 0.0)

    def train(work: Work) -> list[float]:
        setup = setup_on_gpu()
        stage = Stage("distil", RECIPE.distill_steps, quiet=True)
        return distill(setup.model, setup.student(), setup.rows, RECIPE, 0, stage, work)

    FragileWork(monkeypatch).left = 12
    with pytest.raises(Stop):
        train(Work(tmp_path))
    resumed, straight = train(Work(tmp_path)), train(Work(None))
    assert resumed == pytest.approx(straight, rel=0.02)
