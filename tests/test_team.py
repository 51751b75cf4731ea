"""Processes of torchrun on one CPU: they train what one process trains, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from convert_in_ranks import BATCH_TOKENS

import dbf2gguf.convert
import dbf2gguf.text
from dbf2gguf.convert import convert
from dbf2gguf.distill import COMPILED_STEPS
from dbf2gguf.options import find_device
from dbf2gguf.team import ALONE, Team
from runtime.errors import OptionError
from runtime.gguf import GgufFile

TESTS = Path(__file__).parent
SECONDS = 240  # until a conversion that takes a few must have ended
OPTIONS = tiny_hf.QUICK | {"distill_batch": 3, "distill_steps": 4, "preset": "best"}


def torchrun(processes: int, *command: str, **options: Any) -> subprocess.Popen[str]:
    """torchrun's start of `command`, in a session of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), *command),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(started: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and stderr."""
    try:
        _, err = started.communicate(timeout=SECONDS)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    return started.returncode, err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf.write_folder(tmp_path_factory.mktemp("team") / "model")


# What they compute ----------------------------------------------------------------------------------------


def test_parts() -> None:
    for n in (1, 4, 5, 32):
        for size in (1, 2, 3):
            parts = [range(n)[Team(rank, size).part(n)] for rank in range(size)]
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone() -> None:
    numbers = torch.arange(3)
    ALONE.sum([numbers])
    assert ALONE.share("x") == "x"
    assert numbers.tolist() == [0, 1, 2]


GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two CUDA devices")]


@pytest.mark.parametrize(
    ("device", "steps"),
    [("cpu", 8), pytest.param("cuda", 8, marks=GPUS), pytest.param("cuda", COMPILED_STEPS, marks=GPUS)],
)
def test_two_train_what_one_trains(tmp_path: Path, device: str, steps: int) -> None:
    """The batch's five rows, two here and three there. Both end with the same bits, which are those of one
    process but for the order of sums: 1e-6 a step, and Adam divides small gradients by their own size."""
    command = [str(TESTS / "distil_in_ranks.py"), str(tmp_path), device, str(steps)]
    subprocess.run([sys.executable, *command], check=True, timeout=SECONDS)
    code, err = finish(torchrun(2, *command))
    assert code == 0, err
    one = torch.load(tmp_path / "0-of-1.pt")
    first, second = (torch.load(tmp_path / f"{rank}-of-2.pt") for rank in range(2))
    assert first["history"] == second["history"]
    assert first["history"][:8] == pytest.approx(one["history"][:8], rel=1e-3)
    assert one["history"][-1] < 0.9 * one["history"][0]
    assert first["history"][-1] == pytest.approx(one["history"][-1], rel=0.1)
    assert len(one["student"]) == len(first["student"])
    for name, wanted in one["student"].items():
        got = first["student"][name]
        assert torch.equal(got, second["student"][name]), name
        if steps > 8:
            continue  # what differs has grown
        # a few weights whose gradients are next to nothing go another way
        far = (got - wanted).abs() > 1e-3 * wanted.square().mean().sqrt()
        assert far.float().mean() < 0.02, name


@pytest.fixture(scope="module")
def wanted(model: Path) -> Path:
    """What two processes make of the model. The first one alone speaks; both have its report."""
    out = model.parent / "wanted" / "out.gguf"
    out.parent.mkdir()
    started = converting(model, out, quiet=False)
    code, err = finish(started)
    assert code == 0, err
    assert err.count("distil: done") == 1, err
    assert err.count("held-out text") == 1
    assert [file.name for file in out.parent.iterdir()] == ["out.gguf"]
    return out


def test_conversion(model: Path, wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text as one process writes, nearly the same training."""
    monkeypatch.setattr(dbf2gguf.text, "BATCH_TOKENS", BATCH_TOKENS)
    out = tmp_path / "out.gguf"
    report = convert(model, out, **OPTIONS)
    got, alone = GgufFile(wanted).metadata, GgufFile(out).metadata
    assert got["dbf.recipe.text_sha256"] == alone["dbf.recipe.text_sha256"]
    histories = [json.loads(notes["dbf.recipe.distill_kl"]) for notes in (got, alone)]
    assert histories[0] == pytest.approx(histories[1], rel=1e-2)
    assert got["dbf.quality.kl_mean"] == pytest.approx(report.quality.kl_mean, rel=2e-2)


# How they end ---------------------------------------------------------------------------------------------


def test_all_distil_by_the_same_rates(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are told the recipe for the bits per weight, by which the first process trains."""
    told, distill = [], dbf2gguf.convert.distill

    def distilling(*args: Any) -> list[float]:
        told.append(args[3])
        return distill(*args)

    monkeypatch.setattr(dbf2gguf.convert, "call_to_distil", lambda *args: told.append(args[3]))
    monkeypatch.setattr(dbf2gguf.convert, "distill", distilling)
    convert(model, tmp_path / "out.gguf", **OPTIONS)
    assert len(told) == 2
    assert told[0] == told[1]


def converting(model: Path, out: Path, *fault: str, **changes: Any) -> subprocess.Popen[str]:
    options = json.dumps(OPTIONS | changes)
    return torchrun(2, str(TESTS / "convert_in_ranks.py"), str(model), str(out), options, *fault)


@pytest.mark.parametrize(("kind", "rank"), [("error", "0"), ("error", "1"), ("kill", "0"), ("kill", "1")])
def test_one_fails(model: Path, tmp_path: Path, kind: str, rank: str) -> None:
    """All end soon; the old file stays, and no part of a new one; the work is kept."""
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    code, err = finish(converting(model, out, kind, rank, "2"))
    assert code != 0
    if kind == "error":
        assert err.count("error: the fault that was asked for") == 1
    others = err.count("error: torchrun: another process has ended")
    assert others <= (rank == "1")  # 0 where torchrun is the first to end it
    assert err.count("Traceback") <= 1  # torchrun's own
    assert out.read_bytes() == b"precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.gguf", "out.gguf.work"]


def test_interrupt(model: Path, wanted: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to torchrun and to what it started. Given again, the command ends with the same bytes."""
    out = tmp_path / "out.gguf"
    started = converting(model, out, "wait", "1", "2")
    assert started.stdout is not None
    assert started.stdout.readline() == "waiting\n"
    start = time.monotonic()
    os.killpg(started.pid, signal.SIGINT)
    code, err = finish(started)
    assert code != 0
    assert time.monotonic() - start < 60
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf.work"], err
    code, err = finish(converting(model, out))
    assert code == 0, err
    assert out.read_bytes() == wanted.read_bytes()


def test_too_many_processes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "5", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(OptionError, match="5 processes cannot share batches of 3 rows"):
        convert(model, tmp_path / "out.gguf", **OPTIONS)


# Devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "gpus", "wanted"),
    [
        ("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
    ],
)  # fmt: skip
def test_device(monkeypatch: pytest.MonkeyPatch, asked: str, gpus: int, wanted: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert find_device(asked) == wanted


@pytest.mark.parametrize(
    ("asked", "gpus", "wanted"),
    [
        ("auto", 2, "cuda:1"), ("auto", 1, "cpu"), ("cuda", 2, "cuda:1"), ("cpu", 2, "cpu"),
        ("cuda", 1, None), ("cuda:0", 2, None), ("cuda", 0, None),
    ],
)  # fmt: skip
def test_device_of_each(monkeypatch: pytest.MonkeyPatch, asked: str, gpus: int, wanted: str | None) -> None:
    """Of the second of two processes."""
    values = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if wanted is None:
        with pytest.raises(OptionError, match="--device"):
            find_device(asked)
    else:
        assert find_device(asked) == wanted
