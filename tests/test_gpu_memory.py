"""States that wait in the host's memory."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_correct import RECIPE, Setup

import dbf2gguf.correct
from dbf2gguf.activations import record_bytes
from dbf2gguf.correct import _keep_for, _Record, factorize_model
from dbf2gguf.factorize import Factors
from dbf2gguf.gpu_memory import OnHost
from dbf2gguf.progress import Stage
from dbf2gguf.work import Work

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("host") / "model")


def test_items_are_on_the_device_when_asked_for() -> None:
    """Whatever they are made of; what an item has twice is moved once."""
    shared = torch.arange(3.0)
    kept = OnHost(
        [_Record([shared], [None, shared], torch.ones(2)), (torch.zeros(1), None)], torch.device("meta")
    )
    record, pair = kept
    assert record.inputs[0].device.type == "meta"
    assert record.inputs[0] is record.residuals[1]
    assert record.residuals[0] is None
    assert record.output.shape == (2,)
    assert pair[0].device.type == "meta"
    assert pair[1] is None
    assert len(kept) == 2
    assert kept._items[0].inputs[0].device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_same_factors(setup: Setup, device: str) -> None:
    setup.model.to(device)

    def made(keep: Any) -> dict[str, Factors]:
        importance = {name: x.to(device) for name, x in setup.importance.items()}
        with Stage("factorize", 2, quiet=True) as stage:
            how = setup.source, setup.model, setup.plan, setup.rows, importance, RECIPE, 0, stage, Work(None)
            return dict(factorize_model(*how, keep=keep))

    plain, waited = made(list), made(partial(OnHost, device=torch.device(device)))
    setup.model.to("cpu")
    for name, factors in plain.items():
        for part, value in vars(factors).items():
            assert torch.equal(value, getattr(waited[name], part)), (name, part)


def test_states_wait_where_a_gpu_has_no_room(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    model: Any = SimpleNamespace(config=setup.model.config, parameters=lambda: iter([on_gpu]))
    states = len(setup.rows) * record_bytes(setup.model.config, setup.rows.shape[1])
    with Stage("factorize", 2) as stage:
        monkeypatch.setattr(dbf2gguf.correct, "free_bytes", lambda device: states)
        chosen: Any = _keep_for(model, setup.plan, setup.rows, stage)
        assert chosen.func is OnHost
        assert "states wait in the host's memory" in capfd.readouterr().err
        monkeypatch.setattr(dbf2gguf.correct, "free_bytes", lambda device: 2**40)
        assert _keep_for(model, setup.plan, setup.rows, stage) is list
    assert _keep_for(setup.model, setup.plan, setup.rows, stage) is list  # on a CPU


def test_what_a_row_leaves_behind(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """record_bytes is what the records of a block take, and no less."""
    record, sizes = dbf2gguf.correct._record, []

    def watched(*args: Any) -> Any:
        made = record(*args)
        tensors = {id(t): t for t in [*made.inputs, *made.residuals, made.output] if t is not None}
        sizes.append(sum(t.nbytes for t in tensors.values()) / len(made.output))
        return made

    monkeypatch.setattr(dbf2gguf.correct, "_record", watched)
    setup.corrected()
    state = 4 * setup.rows.shape[1] * setup.model.config.hidden_size
    assert (
        max(sizes) + state <= record_bytes(setup.model.config, setup.rows.shape[1]) <= max(sizes) + 2 * state
    )
