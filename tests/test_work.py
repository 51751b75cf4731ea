"""Conversions that were stopped go on where they were and end with the same bytes."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from stops import FragileWork, Stop

import dbf2gguf.convert
import dbf2gguf.distill
from dbf2gguf.convert import convert
from dbf2gguf.files import alone_in
from dbf2gguf.work import Work
from runtime.errors import OptionError, QualityError
from runtime.gguf import GgufFile

PART = {"rows": torch.arange(6).view(2, 3), "n": 3, "history": [0.5, 0.25]}


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(b[k], torch.Tensor) else a[k] == b[k] for k in b)


def test_parts_are_kept(tmp_path: Path) -> None:
    work = Work.open(tmp_path / "w", {"seed": 1}, quiet=True)
    assert same(work.keep("a", lambda: PART), PART)
    again = Work.open(tmp_path / "w", {"seed": 1}, quiet=True)
    assert same(again.keep("a", lambda: pytest.fail("made again")), PART)
    assert again.within("b-").load("a") is None
    assert again.parts() == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "no digest", "no file"])
def test_damaged_parts_are_made_again(tmp_path: Path, damage: str) -> None:
    work = Work.open(tmp_path / "w", {}, quiet=True)
    work.save("a", PART)
    file = tmp_path / "w" / "a.pt"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "no digest":
        (tmp_path / "w" / "a.sha256").unlink()
    else:
        file.unlink()
    assert work.load("a") is None
    assert work.keep("a", lambda: 7) == 7
    assert work.load("a") == 7


def test_another_conversion_starts_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Work.open(tmp_path / "w", {"seed": 1, "model": "a"}, quiet=True).save("a", PART)
    (tmp_path / "w" / "notes.txt").write_text("mine")
    work = Work.open(tmp_path / "w", {"seed": 2, "model": "a"}, quiet=False)
    assert "of another conversion (seed changed); starting afresh" in capsys.readouterr().err
    assert work.load("a") is None
    work.clear()
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["notes.txt"]


def test_without_a_folder_nothing_is_kept() -> None:
    work = Work(None)
    assert work.keep("a", lambda: 1) == 1
    assert work.keep("a", lambda: 2) == 2


@pytest.mark.parametrize("seed", range(3))
def test_stopped_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Stopped before or after a part is written, again and again; every step of distillation is one."""
    model = tiny_hf.write_folder(tmp_path / "model")
    options = tiny_hf.QUICK | {"distill_steps": 4, "preset": "best", "distill_batch": 2}
    wanted = tmp_path / "wanted.gguf"
    convert(model, wanted, **options)
    assert not (tmp_path / "wanted.gguf.work").exists()

    monkeypatch.setattr(dbf2gguf.distill, "SAVE_SECONDS", 0)
    generator, work = random.Random(seed), FragileWork(monkeypatch)
    out, stops = tmp_path / "out.gguf", 0
    while True:
        work.left = generator.randint(2, 9)
        try:
            convert(model, out, **options)
            break
        except Stop:
            stops += 1
            assert not out.exists()
    assert stops > 1
    assert out.read_bytes() == wanted.read_bytes()
    assert not (tmp_path / "out.gguf.work").exists()


def test_another_dtype_is_another_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What float32 has begun is of no use to bfloat16; the file says which it was."""
    model, save = tiny_hf.write_folder(tmp_path / "model"), Work.save
    options = tiny_hf.QUICK | {"distill_steps": 4}
    for dtype in ("float32", "bfloat16"):
        convert(model, tmp_path / f"{dtype}.gguf", dtype=dtype, **options)
        with GgufFile(tmp_path / f"{dtype}.gguf") as file:
            assert file.metadata["dbf.recipe.dtype"] == dtype

    def fragile(self: Work, name: str, part: Any) -> None:
        save(self, name, part)
        if name == "distilled":
            raise Stop

    monkeypatch.setattr(Work, "save", fragile)
    with pytest.raises(Stop):
        convert(model, tmp_path / "out.gguf", dtype="float32", **options)
    monkeypatch.setattr(Work, "save", save)
    convert(model, tmp_path / "out.gguf", dtype="bfloat16", **options | {"quiet": False})
    assert "of another conversion (recipe changed); starting afresh" in capsys.readouterr().err
    made, other, wanted = (
        (tmp_path / f"{name}.gguf").read_bytes() for name in ("out", "float32", "bfloat16")
    )
    fast = dbf2gguf.distill.has_bfloat16(torch.device("cpu"))
    convert(model, tmp_path / "auto.gguf", **options)
    assert (tmp_path / "auto.gguf").read_bytes() == (wanted if fast else other)
    assert made == wanted != other


def test_killed(tmp_path: Path) -> None:
    """SIGKILL while texts are written, layers are factorized, and the model is distilled, and anywhere."""
    model = tiny_hf.write_folder(tmp_path / "model")
    command = [sys.executable, "-m", "dbf2gguf", str(model), "", "--bpw", "4", "-t", "1", "--text-rows", "16"]
    command += ["--correct-rows", "4", "--admm-iterations", "3", "--distill-steps", "8"]
    out, wanted = tmp_path / "out.gguf", tmp_path / "wanted.gguf"

    def begun(path: Path, last: str) -> subprocess.Popen[str]:
        """A conversion that has said so."""
        process = subprocess.Popen(
            [part or str(path) for part in command], stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(last):
                break
        return process

    straight = begun(wanted, "load: started")
    start = time.monotonic()
    straight.communicate()
    seconds = time.monotonic() - start
    assert straight.returncode == 0
    generator = random.Random(0)
    stops = [(stage, 0.0) for stage in ("text: started", "factorize: started", "distil: started")]
    stops += [("load: started", generator.uniform(0, 1)) for _ in range(4)]
    for last, share in generator.sample(stops, len(stops)):
        process = begun(out, last)
        time.sleep(share * seconds)
        process.kill()
        process.communicate()
        if out.exists():  # it was nearly done: what is finished is not done again
            break
    again = not out.exists()
    done = subprocess.run([part or str(out) for part in command], check=True, capture_output=True, text=True)
    assert not again or "going on from" in done.stderr
    assert out.read_bytes() == wanted.read_bytes()
    pages = [path.with_name(path.name + ".report.html") for path in (out, wanted)]
    assert {path.name for path in tmp_path.iterdir()} == {"model", *(p.name for p in (out, wanted, *pages))}
    resumed, straight = (re.findall("<title>.*?</title>", page.read_text(encoding="utf-8")) for page in pages)
    assert resumed == straight  # bits and errors of every layer, losses of every step
    assert len([title for title in straight if "layer" in title]) == 3 * 14


def test_a_refused_file_needs_no_second_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--force after a refusal writes what is there."""
    model = tiny_hf.write_folder(tmp_path / "model")
    out = tmp_path / "out.gguf"
    monkeypatch.setattr(dbf2gguf.convert, "COLLAPSED_KL", 1e-9)
    with pytest.raises(QualityError):
        convert(model, out, **tiny_hf.QUICK)
    monkeypatch.setattr(dbf2gguf.distill, "_gradients", lambda *_: pytest.fail("distilled again"))
    convert(model, out, force=True, **tiny_hf.QUICK)
    assert out.is_file()


@pytest.mark.parametrize("changed", ["weights", "chat_template.jinja", "merges.txt", "code"])
def test_another_model_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    """Other weights, another tokenizer or template, under the same name; or other code of this package."""
    model, out, work = (
        tiny_hf.write_folder(tmp_path / "model"),
        tmp_path / "out.gguf",
        FragileWork(monkeypatch),
    )
    work.left = 6
    with pytest.raises(Stop):
        convert(model, out, **tiny_hf.QUICK)
    if changed == "weights":
        tiny_hf.write_folder(tmp_path / "other", seed=1)
        (model / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    elif changed == "code":
        monkeypatch.setattr(dbf2gguf.convert, "digest_of_code", lambda *_: "another")
    else:
        (model / changed).write_text("{{ messages[0].content }}")
    work.left = sys.maxsize
    convert(model, out, **tiny_hf.QUICK | {"quiet": False})
    what = "code" if changed == "code" else "model"
    assert f"of another conversion ({what} changed); starting afresh" in capsys.readouterr().err


def test_two_at_a_time(tmp_path: Path) -> None:
    """The second one is refused, and takes nothing from the first."""
    model, out = tiny_hf.write_folder(tmp_path / "model"), tmp_path / "out.gguf"
    folder = tmp_path / "out.gguf.work"
    with alone_in(folder):
        Work.open(folder, {}, quiet=True).save("a", PART)
        with pytest.raises(OptionError, match=r"out\.gguf\.work: another conversion works in it"):
            convert(model, out, **tiny_hf.QUICK)
        assert same(Work(folder).load("a"), PART)
        Work(folder).clear()
    assert not folder.exists()
    convert(model, out, **tiny_hf.QUICK)
    assert out.is_file()


def test_terminated(tmp_path: Path) -> None:
    """SIGTERM leaves what is finished and nothing else, also of what a GGUF file was dequantized into."""
    model = tiny_hf.write_standard_gguf(tmp_path / "m.gguf", tiny_hf.write_folder(tmp_path / "model"))
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "dbf2gguf", str(model), str(tmp_path / "out.gguf"), "--bpw", "4"]
    process = subprocess.Popen(
        [*command, "-t", "1", "--text-rows", "16", "--distill-steps", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("factorize: started"):
            break
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "keeps what is finished; the same command goes on" in said
    assert not list((tmp_path / "tmp").iterdir())
    assert {path.suffix for path in (tmp_path / "out.gguf.work").iterdir()} == {".json", ".pt", ".sha256"}


def test_other_options_start_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_hf.write_folder(tmp_path / "model")
    out = tmp_path / "out.gguf"
    work = Work.open(tmp_path / "out.gguf.work", {"seed": 7}, quiet=True)
    work.save("text", "no text at all")
    convert(model, out, **tiny_hf.QUICK | {"quiet": False})
    assert "starting afresh" in capsys.readouterr().err
    assert out.is_file()
