"""Calibration text out of parquet files and data sets: as of JSON lines, and no more is read than wanted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_hf

from dbf2gguf import tables
from dbf2gguf.cli import main
from dbf2gguf.convert import convert
from dbf2gguf.tables import Dataset, dataset_of, entries
from dbf2gguf.text import COLUMNS, _documents, rows_from_files
from runtime.errors import BackendError, FormatError, OptionError
from runtime.gguf import GgufFile

TURNS = [{"role": "user", "content": "Who sat?"}, {"role": "assistant", "content": "The cat sat on the mat."}]

KINDS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"the cat sat on mat {n}", "id": n} for n in range(200)],
    "messages": [{"messages": TURNS, "id": n} for n in range(100)],
    "prompt": [{"prompt": f"Who sat {n}?", "response": "The cat."} for n in range(100)],
    "question": [{"question": f"Who sat {n}?", "answer": "The cat.", "source": "x"} for n in range(100)],
    "task": [{"instruction": "Who sat?", "input": f"cat {n}", "output": "The cat."} for n in range(100)],
    "some null": [
        {"text": None if n % 2 else "the hat", "messages": TURNS if n % 2 else None} for n in range(90)
    ],
}


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 50) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=group
    )
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Iterator[dict[str, Any]] | Exception) -> list[Any]:
    """A package datasets whose every data set streams `rows`; the calls that it gets."""
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        calls.append((args, kwargs))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


# Parquet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_is_jsonl(tmp_path: Path, kind: str) -> None:
    """The same documents; their order is that of the row groups, which the seed decides."""
    tokenizer, rows = tiny_hf.tokenizer(), KINDS[kind]
    wanted = list(_documents(write_jsonl(tmp_path / "t.jsonl", rows), tokenizer, 0))
    table = write_parquet(tmp_path / "t.parquet", rows, 30)
    got = [list(_documents(table, tokenizer, seed)) for seed in (0, 0, 1)]
    assert sorted(got[0]) == sorted(wanted)
    assert got[0] == got[1]
    if kind == "text":
        assert got[2] != got[0]
        groups = [wanted[start : start + 30] for start in range(0, 200, 30)]
        assert all(any(got[0][i : i + len(g)] == g for i in range(200)) for g in groups)


def test_places_are_named(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "t.parquet", [{"text": str(n)} for n in range(100)], 30)
    assert {row["text"]: where for where, row in entries(table, COLUMNS, 3)} == {
        str(n): f"{table}, row {n + 1}" for n in range(100)
    }


def test_no_more_is_read_than_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 row groups, and of their columns."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "the cat sat on the mat " * 4, "other": "x" * 100} for _ in range(20000)]
    table = write_parquet(tmp_path / "t.parquet", rows, 200)
    read: list[int] = []
    original = parquet.ParquetFile.iter_batches

    def counted(self: Any, size: int, **kwargs: Any) -> Iterator[Any]:
        assert kwargs["columns"] == ["text"]
        for batch in original(self, size, **kwargs):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    got = rows_from_files([table], tiny_hf.tokenizer(), 30, 24, 0)
    assert got.shape == (30, 24)
    assert sum(read) == tables.BATCH_ROWS


def test_a_conversion_with_parquet(tmp_path: Path) -> None:
    folder = tiny_hf.write_folder(tmp_path / "model")
    table = write_parquet(tmp_path / "t.parquet", KINDS["text"])
    report = convert(folder, tmp_path / "out.gguf", calib=[table], **tiny_hf.QUICK)
    assert report.quality is not None
    with GgufFile(tmp_path / "out.gguf") as file:
        assert file.metadata["dbf.recipe.text"] == "t.parquet"


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 but no more")
    with pytest.raises(FormatError, match=r"bad\.parquet: cannot be read as parquet: "):
        list(entries(bad, COLUMNS, 0))
    other = write_parquet(tmp_path / "other.parquet", [{"a": 1, "b": 2}])
    with pytest.raises(FormatError, match=r"other\.parquet: has the columns a, b; wanted answer or "):
        list(entries(other, COLUMNS, 0))
    half = write_parquet(tmp_path / "half.parquet", [{"prompt": "Who?"}])
    with pytest.raises(FormatError, match=r"half\.parquet, row 1: wanted an object with 'text', 'messages'"):
        list(_documents(half, tiny_hf.tokenizer(), 0))


def test_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before any work."""
    folder, table = tiny_hf.write_folder(tmp_path / "model"), tmp_path / "t.parquet"
    table.write_bytes(b"PAR1")
    for name, package in (("pyarrow", str(table)), ("datasets", "hf:owner/name")):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.parquet", None)
        assert main([str(folder), str(tmp_path / "out.gguf"), "--calib", package]) == 1
        err = capsys.readouterr().err
        assert err.startswith(
            f"error: {package}: reading it needs the package {name}; run: pip install 'dbf2g"
        )
    assert {path.name for path in tmp_path.iterdir()} == {"model", "t.parquet"}


# Data sets ------------------------------------------------------------------------------------------------


def test_names() -> None:
    def of(name: str) -> Dataset | None:
        return dataset_of(Path(name))

    assert of("hf:owner/name") == Dataset("owner/name")
    assert of("hf:owner/name@v1:config:test:body") == Dataset("owner/name", "v1", "config", "test", "body")
    assert of("hf:wikitext:wikitext-2-raw-v1") == Dataset("wikitext", None, "wikitext-2-raw-v1")
    assert of("hf:owner/name::validation") == Dataset("owner/name", split="validation")
    assert of("hf:owner/name:::body") == Dataset("owner/name", column="body")
    assert of("text.txt") is None
    assert of("hf/text.txt") is None
    for bad in ("hf:", "hf:a/b/c", "hf:a b", "hf:a:b:c:d:e", "hf:a/b::train[:10%]"):
        with pytest.raises(OptionError, match=r"no name of a data set; wanted hf:owner/name\[@revision\]"):
            of(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_is_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    calls = fake_datasets(monkeypatch, iter(KINDS[kind]))
    tokenizer = tiny_hf.tokenizer()
    got = list(_documents(Path("hf:owner/name@v1:config:test"), tokenizer, 0))
    assert got == list(_documents(write_jsonl(tmp_path / "t.jsonl", KINDS[kind]), tokenizer, 0))
    options = {"split": "test", "revision": "v1", "streaming": True}
    assert calls == [(("owner/name", "config"), options)]


def test_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any name, text or messages."""
    rows = [{"body": "the cat", "talk": TURNS, "text": "no"}]
    tokenizer = tiny_hf.tokenizer()
    fake_datasets(monkeypatch, iter(rows))
    assert list(_documents(Path("hf:a/b:::body"), tokenizer, 0)) == ["the cat"]
    fake_datasets(monkeypatch, iter(rows))
    talk = list(_documents(Path("hf:a/b:::talk"), tokenizer, 0))
    assert talk == [tokenizer.apply_chat_template(TURNS, tokenize=False)]
    fake_datasets(monkeypatch, iter(rows))
    with pytest.raises(FormatError, match=r"hf:a/b:::boby: has the columns body, talk, text; wanted boby"):
        list(_documents(Path("hf:a/b:::boby"), tokenizer, 0))


def test_a_data_set_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows are fetched than are wanted."""
    fetched: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            fetched.append(1)
            yield {"text": "the cat sat on the mat"}

    tokenizer = tiny_hf.tokenizer()
    fake_datasets(monkeypatch, endless())
    got = rows_from_files([Path("hf:a/b")], tokenizer, 10, 24, 0)
    assert got.shape == (10, 24)
    each = len(tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]) + 1
    assert len(fetched) == -(-240 // each)


def test_a_conversion_with_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_hf.write_folder(tmp_path / "model")
    fake_datasets(monkeypatch, iter(KINDS["text"]))
    convert(folder, tmp_path / "out.gguf", calib=["hf:owner/name"], **tiny_hf.QUICK)
    with GgufFile(tmp_path / "out.gguf") as file:
        assert file.metadata["dbf.recipe.text"] == "hf:owner/name"


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nmore"), ValueError("Unknown split"), KeyError("x")]
)
def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fake_datasets(monkeypatch, error)
    with pytest.raises(FormatError, match="hf:a/b: cannot be read from the hub: ") as raised:
        list(entries(Path("hf:a/b"), COLUMNS, 0))
    assert "\n" not in str(raised.value)
    assert "check the name" in str(raised.value)


def test_the_package_itself_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match="hf:nobody/nothing: cannot be read from the hub: "):
        list(entries(Path("hf:nobody/nothing"), COLUMNS, 0))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"t\.parquet: no such text file"):
        tables.check_readable(tmp_path / "t.parquet")
    with pytest.raises(BackendError, match="needs the package no_such_package"):
        tables._need("no_such_package", tmp_path)
