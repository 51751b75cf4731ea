"""Conversions whose weights and states lie in files: the same bytes, in memory that the layers do not add to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from test_convert import MODELS
from test_work import Stop

import dbf2gguf.convert
from dbf2gguf import calibrate, stream
from dbf2gguf.convert import convert
from dbf2gguf.factorize import Factors
from dbf2gguf.memory import Need, choose_streamed, parse_size
from dbf2gguf.progress import Stage
from dbf2gguf.source import linear_names, load_model, open_source
from dbf2gguf.stream import KeptFactors, OnDisk, Scratch, SignsOnly, stream_model
from dbf2gguf.work import Work
from runtime.errors import FormatError, OptionError

OPTIONS: dict[str, Any] = tiny_hf.QUICK | {"distill_steps": 0, "force": True}


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions are streamed however much memory there is."""
    monkeypatch.setattr(dbf2gguf.convert, "choose_streamed", lambda *_: True)


def rows(n: int = 6, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, tiny_hf.N_VOCAB, (n, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = tiny_hf.write_folder(tmp_path / "model", **MODELS[name])
    options = OPTIONS | {"calib": [tiny_hf.write_text(tmp_path / "text.txt")]}
    convert(model, tmp_path / "whole.gguf", **options)
    monkeypatch.setattr(dbf2gguf.convert, "load_model", lambda *_: pytest.fail("all weights were loaded"))
    monkeypatch.setattr(dbf2gguf.convert, "choose_streamed", lambda *_: True)
    convert(model, tmp_path / "streamed.gguf", **options)
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "streamed.gguf.work").exists()
