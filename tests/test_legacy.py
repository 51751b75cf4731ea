"""Models with pytorch_model.bin: the same as with safetensors, and nothing that a pickle holds is run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from safetensors.torch import load_file

from dbf2gguf import legacy
from dbf2gguf.convert import convert
from dbf2gguf.source import open_source
from runtime.errors import BackendError, FormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose only weights are pytorch_model.bin, with the head beside the embedding, one memory."""
    path = tiny_hf.write_folder(tmp_path / "Tiny")
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (path / "model.safetensors").rename(tmp_path / "model.safetensors")
    torch.save(weights, path / legacy.NAME)
    return path


def shard(folder: Path) -> None:
    weights = torch.load(folder / legacy.NAME, weights_only=True)
    (folder / legacy.NAME).unlink()
    places = {}
    for number in range(3):
        name = f"pytorch_model-{number + 1:05}-of-00003.bin"
        part = {key: weights[key] for key in list(weights)[number::3]}
        torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / legacy.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("form", ["one", "sharded", "old"])
def test_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """As of the model with safetensors; written in parts of little memory."""
    monkeypatch.setattr(legacy, "PART_BYTES", 1 << 14)
    if form == "sharded":
        shard(folder)
    if form == "old":
        weights = torch.load(folder / legacy.NAME, weights_only=True)
        torch.save(weights, folder / legacy.NAME, _use_new_zipfile_serialization=False)
    source = open_source(folder, tmp_path)
    parts = sorted((tmp_path / "weights").glob("*.safetensors"))
    assert source.name == "Tiny"
    assert len(parts) > 3
    largest = max(t.nbytes for part in parts for t in load_file(part).values())
    assert all(part.stat().st_size < max(1 << 14, largest) + 4096 for part in parts)
    assert not list((tmp_path / "weights").glob("pytorch_model*"))
    convert(folder, tmp_path / "bin.gguf", **tiny_hf.QUICK)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    convert(folder, tmp_path / "safe.gguf", **tiny_hf.QUICK)
    assert (tmp_path / "bin.gguf").read_bytes() == (tmp_path / "safe.gguf").read_bytes()


def test_safetensors_are_preferred(folder: Path, tmp_path: Path) -> None:
    """The pickle beside them is not opened: here, it is none."""
    (folder / legacy.NAME).write_bytes(b"no pickle at all")
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    assert open_source(folder, tmp_path / "scratch").path == folder


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["archive", "old", "plain"])
def test_code_is_refused_and_not_run(folder: Path, tmp_path: Path, form: str) -> None:
    proof, file = tmp_path / "harm was done", folder / legacy.NAME
    weights = {"model.norm.weight": torch.ones(32), "harm": Harm(proof)}
    if form == "plain":
        file.write_bytes(pickle.dumps(Harm(proof)))
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=form == "archive")
    with pytest.raises(FormatError, match="which could run code and is refused: ") as raised:
        open_source(folder, tmp_path / "scratch")
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not proof.exists()
    if form == "plain":  # the harm would have been done
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert proof.exists()


def test_old_torch_is_not_trusted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    with pytest.raises(BackendError, match=r"torch 2.5.1\+cu124 cannot be trusted with pickles"):
        open_source(folder, tmp_path / "scratch")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 5}, {7: torch.ones(2)}, {}])
def test_not_weights(folder: Path, tmp_path: Path, content: Any) -> None:
    torch.save(content, folder / legacy.NAME)
    with pytest.raises(FormatError, match=r"wanted a dict of tensors by name|holds no tensors"):
        open_source(folder, tmp_path / "scratch")


def test_truncated(folder: Path, tmp_path: Path) -> None:
    file = folder / legacy.NAME
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: broken"):
        open_source(folder, tmp_path / "scratch")


def test_broken_index(folder: Path, tmp_path: Path) -> None:
    shard(folder)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(
        FormatError, match=r"00002-of-00003.bin: named in pytorch_model.bin.index.json but missing"
    ):
        open_source(folder, tmp_path / "a")
    for text in ("[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.bin"}}', "no"):
        (folder / legacy.INDEX).write_text(text)
        with pytest.raises(FormatError, match=r"index.json: not an index of checkpoint files"):
            open_source(folder, tmp_path / f"b{len(text)}")
