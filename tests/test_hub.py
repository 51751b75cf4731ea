"""Models by their id on the hub, from a cache that the test makes as huggingface_hub does; no network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_hf
from huggingface_hub import constants, errors

from dbf2gguf import hub
from dbf2gguf.cli import main
from dbf2gguf.convert import convert
from dbf2gguf.hub import fetch, split_id
from dbf2gguf.source import open_source
from runtime.errors import FormatError, OptionError
from runtime.gguf import GgufFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with owner/Tiny-1M at COMMIT, which is main; the network is off."""
    snapshot = tmp_path / "hub" / "models--owner--Tiny-1M" / "snapshots" / COMMIT
    tiny_hf.write_folder(snapshot)
    blobs = snapshot.parents[1] / "blobs"  # the weights a link to a blob, as there
    blobs.mkdir()
    weights = snapshot / "model.safetensors"
    weights.rename(blobs / "f00d")
    weights.symlink_to(blobs / "f00d")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_ids() -> None:
    assert split_id("HuggingFaceTB/SmolLM2-135M-Instruct") == ("HuggingFaceTB/SmolLM2-135M-Instruct", None)
    assert split_id("a/b@v1.0") == ("a/b", "v1.0")
    assert split_id("a/b@refs/pr/3") == ("a/b", "refs/pr/3")
    for no_id in (
        "gpt2",
        "a/b/c",
        "/a/b",
        "./a",
        "../a",
        "a/..",
        "a b/c",
        "a/b@",
        "a/b@x@y",
        "",
        "a/",
        "~/a",
    ):
        assert split_id(no_id) is None, no_id
    with pytest.raises(OptionError, match=r"/tmp: no id of a model on the hub; wanted owner/name"):
        fetch("/tmp")


def test_from_the_cache(cache: Path, tmp_path: Path) -> None:
    """The same bytes as of the folder, but for its name: the model's on the hub."""
    out, folder_out = tmp_path / "out.gguf", tmp_path / "folder.gguf"
    convert("owner/Tiny-1M", out, **tiny_hf.QUICK)
    with GgufFile(out) as file:
        assert file.metadata["general.name"] == "Tiny-1M"
    shutil.copytree(cache, tmp_path / "Tiny-1M")
    convert(tmp_path / "Tiny-1M", folder_out, **tiny_hf.QUICK)
    assert folder_out.read_bytes() == out.read_bytes()


def test_revisions(cache: Path, tmp_path: Path) -> None:
    assert open_source("owner/Tiny-1M@main", tmp_path).path == cache
    source = open_source(f"owner/Tiny-1M@{COMMIT}", tmp_path)
    assert (source.path, source.name) == (cache, "Tiny-1M")
    with pytest.raises(FormatError, match=r"owner/Tiny-1M@v2: neither a folder or file here nor whole in"):
        open_source("owner/Tiny-1M@v2", tmp_path)


def test_a_folder_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_hf.write_folder(Path("owner") / "Tiny-1M", seed=1)
    assert open_source("owner/Tiny-1M", tmp_path / "scratch").path == Path("owner") / "Tiny-1M"


def test_offline_and_not_cached(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["owner/Other", str(tmp_path / "out.gguf"), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "error: owner/Other: neither a folder or file here nor whole in the hub's cache, and"
    )
    assert "HF_HUB_OFFLINE" in err
    assert err.count("\n") == 1


def test_an_incomplete_cache(cache: Path, tmp_path: Path) -> None:
    (cache / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=f"{COMMIT}: no .safetensors file in it"):
        open_source("owner/Tiny-1M", tmp_path)


# What the hub says ----------------------------------------------------------------------------------------


def response(status: int) -> Any:
    """What an HTTP library of huggingface_hub's gives."""

    class Response:
        status_code, headers, request, text = status, {}, None, ""

    return Response()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("403 Client Error", response=response(403)),
            "owner/Tiny-1M@v9: gated: accept its ",
        ),
        (
            errors.RepositoryNotFoundError("401", response=response(401)),
            "nor a model on the hub, or a private ",
        ),
        (errors.RevisionNotFoundError("404", response=response(404)), "the model has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("none"), "the hub cannot be reached; go online"),
        (
            errors.HfHubHTTPError("403 Forbidden\nmore", response=response(403)),
            "it: 403 Forbidden; run `hf auth",
        ),
        (errors.HfHubHTTPError("500 Oops", response=response(500)), "the hub refuses it: 500 Oops$"),
        (errors.HFValidationError("bad name"), "no id of a model on the hub: bad name"),
        (OSError(28, "No space left on device"), "cannot be fetched from the hub: .*No space left"),
        (RuntimeError("proxy\nmore"), "cannot be fetched from the hub: proxy$"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FormatError, match=message) as raised:
        fetch("owner/Tiny-1M@v9")
    assert "\n" not in str(raised.value)


def test_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights once, as safetensors; as .bin only where there are none; nothing in other formats."""
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "vocab.json", "merges.txt", "chat_template.jinja", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md",
        "consolidated.safetensors", "original/params.json", "onnx/model.onnx", "flax_model.msgpack",
        "training_args.bin", "model.gguf", "modeling_tiny.py",
    ]  # fmt: skip
    asked: list[dict[str, Any]] = []

    def download(repository_id: str, **kwargs: Any) -> str:
        assert repository_id == "owner/Tiny-1M"
        asked.append(kwargs)
        patterns = {k: kwargs[k] for k in ("allow_patterns", "ignore_patterns")}
        for name in filter_repo_objects(repository, **patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("owner/Tiny-1M@v1") == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(repository[:11])
    assert [call["revision"] for call in asked] == ["v1"]
    for path in tmp_path.iterdir():
        path.unlink()
    repository = ["config.json", "pytorch_model.bin", "training_args.bin"]
    assert hub.fetch("owner/Tiny-1M") == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
