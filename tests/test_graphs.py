"""CUDA graphs of text and distillation: the same as without. `pytest -m gpu` on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from stops import FragileWork, Stop
from test_distill import RECIPE, Setup

import dbf2gguf.distill
import dbf2gguf.factorize
import dbf2gguf.text
from dbf2gguf.attention import CAUSAL
from dbf2gguf.distill import distill
from dbf2gguf.factorize import Factors, factorize
from dbf2gguf.graphs import Later, Recorder, can_compile, reason
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


def test_whether_torch_can_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_in_vain(_function: object) -> None:
        error = RuntimeError("the compiler raised")
        error.inner_exception = ValueError("no C compiler\nat line 3")  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert can_compile.__wrapped__(torch.device("cpu"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch, "compile", compile_in_vain)
    assert not can_compile.__wrapped__(torch.device("cpu"))
    assert capsys.readouterr().err.endswith("which costs time: no C compiler\n")


@on_gpu
def test_recorded_calls() -> None:
    x = torch.zeros(3, device="cuda")
    add = Recorder("a test", warm_up=1)(lambda: x.add_(1).clone())
    assert [add()[0].item() for _ in range(4)] == [1, 2, 3, 4]


@on_gpu
def test_calls_that_warm_up_are_those_of_all_functions() -> None:
    x = torch.zeros(3, device="cuda")
    record = Recorder("a test", warm_up=1)
    called = []
    first, second = (record(lambda n=n: (called.append(n), x.add_(n))[1].clone()) for n in (1, 10))
    assert [step()[0].item() for step in (first, second, second, first, first)] == [1, 11, 21, 22, 23]
    assert called == [1, 10, 1]  # the first to warm up, then each to be recorded


def test_numbers_that_are_asked_for_later() -> None:
    assert float(Later(torch.tensor(1.5))) == 1.5


@on_gpu
def test_numbers_of_a_gpu_that_are_asked_for_later() -> None:
    """What is written in the same place afterwards does not change them."""
    x = torch.ones((), device="cuda")
    numbers = [Later(x.mul_(2)) for _ in range(3)]
    assert [float(number) for number in numbers] == [2, 4, 8]


@on_gpu
def test_factors_of_a_graph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit those without."""
    weight = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0)).cuda()

    def made() -> Factors:
        ones = [torch.ones(2, n, device="cuda") for n in (64, 96)]
        return factorize(weight, 48, *ones, iterations=20, seed=0)

    recorders: list[Recorder] = []

    def recorder(*args: Any, **options: Any) -> Recorder:
        recorders.append(Recorder(*args, **options))
        return recorders[-1]

    monkeypatch.setattr(dbf2gguf.factorize, "Recorder", recorder)
    recorded = made()
    assert len(recorders) == 1
    assert NO_GRAPH not in capsys.readouterr().err
    monkeypatch.setattr(dbf2gguf.factorize, "RECORDED_ITERATIONS", 1000)
    plain = made()
    assert len(recorders) == 1
    for field in fields(Factors):
        assert torch.equal(getattr(recorded, field.name), getattr(plain, field.name)), field.name


@on_gpu
def test_what_cannot_be_recorded_runs(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.zeros(3, device="cuda")
    here = torch.cuda.current_stream()
    for start in (0, 3):
        add = Recorder("what waits", warm_up=1)(lambda: x.add_(1)[0].item())
        assert [add() for _ in range(3)] == [start + 1, start + 2, start + 3]
        assert torch.cuda.current_stream() == here
    assert capsys.readouterr().err.count(f"{NO_GRAPH} of what waits: ") == 1  # it is not tried again


@on_gpu
def test_text_of_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three blocks: one that warms up and records, one that records what warmed up, one that plays; then
    without graphs, and compiled."""
    monkeypatch.setattr(dbf2gguf.text, "GPU_BATCH_TOKENS", 4 * 40)
    model = load_model(open_source(tiny_hf.write_folder(tmp_path / "model"), tmp_path), "cuda")

    def write() -> torch.Tensor:
        stage = Stage("text", 12 * 40, quiet=True)
        return self_written_rows(model, tiny_hf.tokenizer(), 12, 40, 0.5, 0, True, stage)

    recorded = write()
    assert NO_GRAPH not in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(dbf2gguf.text, "Recorder", lambda what, warm_up: lambda function: function)
        assert torch.equal(recorded, write())
    monkeypatch.setattr(dbf2gguf.text, "COMPILED_STEPS", 1)
    torch._dynamo.utils.counters.clear()
    compiled = write()  # rounds in another way, so that a text may take another turn
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # norms, MLPs, sampling
    assert NO_GRAPH not in capsys.readouterr().err
    assert torch.equal(compiled[:, 0], recorded[:, 0])
    assert (compiled == recorded).float().mean() > 0.5


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
