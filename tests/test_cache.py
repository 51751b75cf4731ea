"""Text that a model wrote is written once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_hf
import torch

import dbf2gguf.convert
from dbf2gguf.cache import KEPT_TEXTS, VARIABLE, cache_folder, cached_text
from dbf2gguf.convert import convert

ROWS = torch.arange(6).view(2, 3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() is None
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/dbf2gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path("~/.cache/dbf2gguf").expanduser()


def test_a_text_is_made_once(cache: Path) -> None:
    rows, known = cached_text({"seed": 0}, lambda: ROWS)
    assert (rows.tolist(), known) == (ROWS.tolist(), False)
    rows, known = cached_text({"seed": 0}, lambda: pytest.fail("made again"))
    assert (rows.tolist(), rows.dtype, known) == (ROWS.tolist(), torch.int64, True)
    rows, known = cached_text({"seed": 1}, lambda: ROWS + 1)
    assert (rows.tolist(), known) == ((ROWS + 1).tolist(), False)
    next(cache.glob("*.pt")).write_bytes(b"broken")
    assert [cached_text({"seed": s}, lambda: ROWS + 2)[1] for s in (0, 1)].count(False) == 1


def test_old_texts_are_removed(cache: Path) -> None:
    for seed in range(KEPT_TEXTS + 2):
        cached_text({"seed": seed}, lambda: ROWS)
        for age, file in enumerate(sorted(cache.glob("*.pt"), key=lambda f: f.stat().st_mtime, reverse=True)):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert len(list(cache.glob("*.pt"))) == len(list(cache.glob("*.sha256"))) == KEPT_TEXTS
    assert cached_text({"seed": KEPT_TEXTS + 1}, lambda: ROWS)[1]
    assert not cached_text({"seed": 0}, lambda: ROWS)[1]


def test_a_folder_that_cannot_be_is_no_harm(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.write_text("a file")
    assert cached_text({}, lambda: ROWS)[0] is ROWS
    assert "is not kept" in capsys.readouterr().err


def test_a_folder_that_can_only_be_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_text({}, lambda: ROWS)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    rows, known = cached_text({}, lambda: pytest.fail("made again"))
    assert (rows.tolist(), known) == (ROWS.tolist(), True)


def test_other_bits_take_the_same_text(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_hf.write_folder(tmp_path / "m")
    convert(folder, tmp_path / "a.gguf", **tiny_hf.QUICK)
    monkeypatch.setattr(dbf2gguf.convert, "self_written_rows", lambda *_: pytest.fail("written again"))
    convert(folder, tmp_path / "b.gguf", **tiny_hf.QUICK)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    convert(folder, tmp_path / "c.gguf", **tiny_hf.QUICK | {"bpw": 5.0})
    with pytest.raises(pytest.fail.Exception, match="written again"):
        convert(folder, tmp_path / "d.gguf", **tiny_hf.QUICK, seed=1)
    monkeypatch.setattr(dbf2gguf.convert, "digest_of_code", lambda *modules: f"other {modules}")
    with pytest.raises(pytest.fail.Exception, match="written again"):
        convert(folder, tmp_path / "e.gguf", **tiny_hf.QUICK)
