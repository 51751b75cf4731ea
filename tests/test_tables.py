"""Calibration text out of files and data sets: as of JSON lines, and no more is read than wanted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_hf
import torch

import dbf2gguf.text
from dbf2gguf import tables
from dbf2gguf.cli import main
from dbf2gguf.convert import convert
from dbf2gguf.tables import Dataset, dataset_of, entries, plain_texts
from dbf2gguf.text import COLUMNS, _documents, first_rows, rows_from_files
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


# Files ----------------------------------------------------------------------------------------------------


def test_an_array_is_jsonl(tmp_path: Path) -> None:
    """The same documents, in the order that the seed gives; for a receipt, in their own."""
    tokenizer = tiny_hf.tokenizer()
    for kind, rows in KINDS.items():
        wanted = list(_documents(write_jsonl(tmp_path / f"{kind}.jsonl", rows), tokenizer, 0))
        array = tmp_path / f"{kind}.json"
        array.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
        got = [list(_documents(array, tokenizer, seed)) for seed in (0, 0, 1)]
        assert sorted(got[0]) == sorted(wanted)
        assert got[0] == got[1]
        assert list(_documents(array, tokenizer, 0, spread=False)) == wanted
        assert kind != "text" or wanted != got[0] != got[2] != wanted
    assert len(rows_from_files([tmp_path / "text.json"], tokenizer, 10, 24, 0)) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"text": "two"}\n', "not JSON: Extra data.*; if it .* a line, name it a.jsonl"),
        ('{"data": []}', r"holds no array; wanted \[\.\.\.\] of objects, or write one object a line"),
        ('[{"text": "one"}, {"title": "two"}]', "entry 2: wanted an object with 'text', 'messages'"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(FormatError, match=rf"a\.json.*{message}"):
        list(_documents(file, tiny_hf.tokenizer(), 0))


def test_a_large_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_ARRAY", 2**20)
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": "x" * 2**21}]))
    with pytest.raises(FormatError, match=r"a\.json: has 2 MiB, .* up to 1; write one .*: jq -c '\.\[\]'"):
        list(_documents(file, tiny_hf.tokenizer(), 0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", r"\.csv is not read; write it as \.jsonl"),
        ("a.TSV", r"\.tsv is not read"),
        ("a.jsonl.gz", "is packed; unpack it first"),
        ("a.txt.ZST", "is packed"),
        ("a.zip", "is packed"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, message: str) -> None:
    """Refused before any work, and by what reads them."""
    (tmp_path / name).write_text("text,label\nthe cat,1\n")
    for refuse in (
        lambda: tables.check_readable(tmp_path / name),
        lambda: rows_from_files([tmp_path / name], tiny_hf.tokenizer(), 1, 4, 0),
    ):
        with pytest.raises(FormatError, match=f"{name}: {message}"):
            refuse()


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    rows, tokenizer = KINDS["text"], tiny_hf.tokenizer()
    wanted = list(_documents(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 0))
    for name in ("b.JSONL", "c.ndjson"):
        assert list(_documents(write_jsonl(tmp_path / name, rows), tokenizer, 0)) == wanted
    (tmp_path / "d.Json").write_text(json.dumps(rows))
    table = write_parquet(tmp_path / "e.Parquet", rows)
    for file in (tmp_path / "d.Json", table):
        assert sorted(_documents(file, tokenizer, 0)) == sorted(wanted)
    with pytest.raises(OptionError, match=r"f\.PARQUET: no such text file"):
        tables.check_readable(tmp_path / "f.PARQUET")


def test_what_a_name_of_a_data_set_ends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, iter([{"text": "the cat"}]))
    assert list(_documents(Path("hf:owner/texts.csv"), tiny_hf.tokenizer(), 0)) == ["the cat"]


# Large files ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than 2 KiB are large, and read in parts of 100 bytes."""
    monkeypatch.setattr(tables, "WHOLE", 2048)
    monkeypatch.setattr(tables, "PART", 100)


@pytest.mark.usefixtures("small_parts")
def test_every_line_of_large_jsonl_once(tmp_path: Path) -> None:
    """Whatever their lengths, in an order that the seed gives."""
    rows = [{"text": f"{n} " + "é🙂" * (n * 7 % 61)} for n in range(100)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    tokenizer = tiny_hf.tokenizer()
    wanted = [row["text"] for row in rows]
    got = [list(_documents(file, tokenizer, seed)) for seed in (0, 0, 1)]
    assert sorted(got[0]) == sorted(wanted)
    assert got[0] == got[1]
    assert len({tuple(texts) for texts in (wanted, got[0], got[2])}) == 3
    assert list(_documents(file, tokenizer, 0, spread=False)) == wanted


@pytest.mark.usefixtures("small_parts")
def test_where_a_large_file_is_bad(tmp_path: Path) -> None:
    good = json.dumps({"text": "the cat sat"}) + "\n"
    file = tmp_path / "a.jsonl"
    file.write_text(good * 100 + "{\n" + good)
    with pytest.raises(FormatError, match=rf"a\.jsonl, line at byte {len(good) * 100}: not JSON"):
        list(_documents(file, tiny_hf.tokenizer(), 0))
    for name in ("b.jsonl", "b.txt"):
        (tmp_path / name).write_bytes(good.encode() * 100 + b"caf\xe9\n" * 50)
        with pytest.raises(FormatError, match=rf"{name}: cannot be read as UTF-8 text"):
            list(_documents(tmp_path / name, tiny_hf.tokenizer(), 0))


@pytest.mark.usefixtures("small_parts")
def test_parts_of_large_text(tmp_path: Path) -> None:
    """Whole lines, from all over the file; none twice."""
    file = tmp_path / "a.txt"
    lines = [f"{n} " + "é🙂" * (n % 5) + "\n" for n in range(1000)]
    file.write_bytes("".join(lines).replace("\n", "\r\n").encode("utf-8-sig"))
    got = [list(plain_texts(file, seed, True)) for seed in (0, 0, 1)]
    assert got[0] == got[1]
    assert got[0] != got[2]
    found = [line for text in got[0] for line in text.splitlines(keepends=True)]
    assert len(set(found)) == len(found) > 700
    assert set(found) <= set(lines)
    first = [int(text.split()[0]) for text in got[0][:20]]
    assert min(first) < 200
    assert max(first) > 800
    (start,) = plain_texts(file, 0, False)
    assert "".join(lines).startswith(start)
    assert start.endswith("\n")
    assert 2048 - 30 < len(start.replace("\n", "\r\n").encode("utf-8-sig")) <= 2048


@pytest.mark.usefixtures("small_parts")
def test_large_text_without_lines(tmp_path: Path) -> None:
    """Whole characters."""
    file = tmp_path / "a.txt"
    file.write_text("é🙂" * 1000, encoding="utf-8")
    texts = list(plain_texts(file, 0, True))
    assert len(texts) == 60
    assert set("".join(texts)) == set("é🙂")
    assert all("🙂🙂" not in text and "éé" not in text for text in texts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_large_files_are_read_as_far_as_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """20 MB, of which 30 rows take a little; small ones give all their rows to draw from."""
    file, line = tmp_path / name, "the cat sat on the mat and the hat, 1234 times"
    file.write_text((json.dumps({"text": line}) + "\n") * 340_000)
    assert file.stat().st_size > tables.WHOLE
    tokenizer, read = tiny_hf.tokenizer(), []
    documents = dbf2gguf.text._documents

    def counted(*args: Any) -> Iterator[str]:
        for text in documents(*args):
            read.append(len(text))
            yield text

    monkeypatch.setattr(dbf2gguf.text, "_documents", counted)
    got = rows_from_files([file], tokenizer, 30, 24, 0)
    assert got.shape == (30, 24)
    assert sum(read) <= max(tables.PART, 30 * 24 * len(line))
    assert torch.equal(got, rows_from_files([file], tokenizer, 30, 24, 0))
    monkeypatch.setattr(dbf2gguf.text, "_documents", documents)
    assert len(first_rows(file, tokenizer, 3, 24, 0)) == 3


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
