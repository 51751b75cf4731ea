"""--max-kl: as few bits as are enough, found in few tries; no file of a collapsed model without --force."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dbf2gguf import cli, convert
from dbf2gguf.budget import MAX_BPW, least_bpw, plan_uniform
from dbf2gguf.evaluate import Quality
from dbf2gguf.report import describe_report
from dbf2gguf.search import COLLAPSED_KL, bpw_grid, smallest
from runtime.errors import OptionError, QualityError
from runtime.gguf import GgufFile

OPTIONS = (
    "-t", "1", "--text-rows", "8", "--correct-rows", "4", "--distill-steps", "1", "--admm-iterations", "3",
)  # fmt: skip
QUICK = {key: value for key, value in tiny_hf.QUICK.items() if key != "bpw"}


# The search -----------------------------------------------------------------------------------------------


def find(
    curve: Callable[[float], float], limit: float, start: float = 1.2
) -> tuple[float | None, list[float]]:
    """What `smallest` finds on 0.2 to 8 bits, and its tries."""
    tries: list[float] = []

    def kl(bpw: float) -> float:
        tries.append(bpw)
        return curve(bpw)

    return smallest(kl, bpw_grid(0.2, 8.0), limit, start), tries


def test_grid() -> None:
    assert bpw_grid(0.17, 0.4) == [0.2, 0.25, 0.3, 0.35, 0.4]
    assert bpw_grid(0.2, 0.24) == [0.2]
    assert len(bpw_grid(0.01, 8.0)) == 160
    shapes = {"a": (32, 48), "b": (16, 32)}
    for bpw in (low := bpw_grid(least_bpw(shapes), MAX_BPW))[0], low[-1]:
        plan_uniform(shapes, bpw)
    with pytest.raises(OptionError, match="out of range"):
        plan_uniform(shapes, low[0] - 0.05)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=157, max_size=157), st.floats(0.001, 3.0), st.floats(0.0, 9.0))
def test_any_falling_curve(falls: list[float], limit: float, start: float) -> None:
    """Steps, plateaus, zeros: the least that is enough, no try twice, and none above one that was enough."""
    grid = bpw_grid(0.2, 8.0)
    values = {bpw: 5.0 * math.prod(falls[: i + 1]) for i, bpw in enumerate(grid)}
    found, tries = find(values.__getitem__, limit, start)
    assert found == next((bpw for bpw in grid if values[bpw] <= limit), None)
    assert len(set(tries)) == len(tries)
    enough = [bpw for bpw in tries if values[bpw] <= limit]
    assert enough == sorted(enough, reverse=True)
    for i, bpw in enumerate(tries):
        assert all(bpw < earlier for earlier in tries[:i] if values[earlier] <= limit)


@pytest.mark.parametrize("slope", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("limit", [0.05, 0.3, 0.6, 1.5])
def test_few_tries_where_log_kl_is_a_line(slope: float, limit: float) -> None:
    found, tries = find(lambda bpw: 2.0 * math.exp(-slope * bpw), limit)
    wanted = math.log(2.0 / limit) / slope
    assert found == (None if wanted > 8 else pytest.approx(max(0.2, wanted), abs=0.05))
    assert len(tries) <= 6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_kl_that_is_not_finite(bad: float) -> None:
    found, tries = find(lambda bpw: bad if bpw < 2.31 else 0.1, 0.5)
    assert found == 2.35
    assert len(tries) <= 12
    assert find(lambda bpw: bad, 0.5)[0] is None


def test_noise() -> None:
    """Where KL does not fall all the way, what is found is enough all the same."""
    found, _ = find(lambda bpw: 1.0 / bpw + 0.05 * math.sin(40 * bpw), 0.4)
    assert found is not None
    assert 1.0 / found + 0.05 * math.sin(40 * found) <= 0.4


# Conversions ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf.write_folder(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def sharp(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model eight times as sure of itself: with few bits, it collapses."""
    path = tmp_path_factory.mktemp("sharp") / "model"
    tiny_hf.write_folder(path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data *= 8
    model.save_pretrained(path)
    return path


def test_the_fewest_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Good enough, while one step less is not; the file is that of --bpw, and the text was made once."""
    out, prepared = tmp_path / "out.gguf", []
    for name in ("load_model", "_text", "output_importance"):
        monkeypatch.setattr(convert, name, counting(getattr(convert, name), prepared, name))
    report = convert.convert(folder, out, max_kl=0.75, **QUICK | {"quiet": False})
    monkeypatch.undo()
    assert prepared == ["load_model", "_text", "output_importance"]
    tries = dict(report.tries)
    found = report.plan.target
    assert report.quality is not None
    assert tries[found] == report.quality.kl_mean <= 0.75
    assert tries[round(found - 0.05, 2)] > 0.75
    assert len(tries) == len(report.tries) > 2
    assert report.describe()["tries"] == [list(one) for one in report.tries]
    said = capsys.readouterr().err
    for number, (bpw, kl) in enumerate(report.tries, 1):
        enough = "good enough" if kl <= 0.75 else "not good enough"
        line = f"try {number}: {bpw:g} bits per weight: mean KL {kl:.4f}, {enough} for --max-kl 0.75\n"
        assert line in said
    assert report.file_bytes == out.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    convert.convert(folder, tmp_path / "again.gguf", bpw=found, **QUICK)
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


def counting(function: Callable[..., Any], calls: list[str], name: str) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return counted


def test_no_bits_are_enough(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    assert cli.main([str(folder), str(out), *OPTIONS, "--quiet", "--max-kl", "0.01"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {out}: not written: of ")
    assert (
        "tries up to 8 bits per weight, none has a mean KL of 0.01 or less on held-out text; the least" in err
    )
    assert "take a larger --max-kl, more text" in err
    assert err.count("\n") == 1
    assert out.read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf", "out.gguf.work"}  # for another limit


def test_collapsed(sharp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, command = tmp_path / "out.gguf", [str(sharp), str(tmp_path / "out.gguf"), *OPTIONS, "--bpw", "1.6"]
    assert cli.main([*command, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {out}: not written: the model has collapsed: the mean KL ")
    assert float(err.partition("original is ")[2].split()[0]) > COLLAPSED_KL
    for part in ("the limit 3;", "more bits (--bpw, now 1.6)", "more text (--calib", "--preset", "--force"):
        assert part in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf.work"]  # for --force
    assert cli.main([*command, "--force"]) == 0
    assert "warning: KL above 3, written with --force: the model has collapsed" in capsys.readouterr().err
    with GgufFile(out) as file:
        assert file.metadata["dbf.quality.kl_mean"] > COLLAPSED_KL


@pytest.mark.parametrize("kl", [math.nan, math.inf, COLLAPSED_KL * (1 + 1e-9)])
def test_no_kl_at_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kl: float) -> None:
    """As above the limit; whatever else the measurement says."""

    def measure(*args: Any) -> Quality:
        return replace(Quality(1, 20.0, 19.0, kl_mean=kl, kl_p99=0.1, same_top1=0.9))

    monkeypatch.setattr(convert, "measure", measure)
    with pytest.raises(QualityError, match="not written: the model has collapsed"):
        convert.convert(folder, tmp_path / "out.gguf", bpw=4.0, **QUICK)
    with pytest.raises(QualityError, match="not written: of "):
        convert.convert(folder, tmp_path / "out.gguf", max_kl=1.0, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf.work"]  # for --force
    report = convert.convert(folder, tmp_path / "out.gguf", bpw=4.0, force=True, **QUICK)
    assert report.file is not None
    assert "the model has collapsed" in describe_report(report)


def test_room_is_that_of_each_try(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the disk, for what distillation keeps; not that of the most bits there are."""
    asked: dict[str, int] = {}
    monkeypatch.setattr(convert, "check_space", lambda out, size, what: asked.setdefault(what, size))
    report = convert.convert(folder, tmp_path / "out.gguf", max_kl=0.75, **QUICK)
    first, *others = report.tries
    assert list(asked) == ["the conversion", *(f"a try with {bpw:g} bits per weight" for bpw, _ in others)]
    for (bpw, _), size in zip(report.tries, asked.values(), strict=True):
        assert (size > asked["the conversion"]) == (bpw > first[0])


def test_at_the_limit_is_no_collapse(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = Quality(1, 20.0, 19.0, kl_mean=COLLAPSED_KL, kl_p99=0.1, same_top1=0.9)
    monkeypatch.setattr(convert, "measure", lambda *args: quality)
    report = convert.convert(folder, tmp_path / "out.gguf", bpw=4.0, **QUICK)
    assert "collapsed" not in describe_report(report)


def test_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(folder), str(out), "--bpw", "2", "--max-kl", "1"])
    assert leaving.value.code == 2
    assert "argument --max-kl: not allowed with argument --bpw" in capsys.readouterr().err
    for options, message in (
        ({"bpw": 2.0}, "leave out --bpw"),
        ({"dry_run": True}, "leave out --dry-run"),
        ({"max_kl": 0.0}, "--max-kl is 0; wanted more than 0 and at most 3 without --force"),
        ({"max_kl": -1.0, "force": True}, "--max-kl is -1; wanted more than 0$"),
        ({"max_kl": math.nan}, "--max-kl is nan; wanted"),
        ({"max_kl": 3.5}, "at most 3 without --force"),
    ):
        with pytest.raises(OptionError, match=message):
            convert.convert(folder, out, **QUICK | {"max_kl": 1.0} | options)
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_limit() -> None:
    assert f"above {COLLAPSED_KL:g}" in " ".join(cli.convert_parser().format_help().split())
    assert cli.convert_parser().parse_args(["a", "b"]).bpw is None
    assert f"(default: {convert.DEFAULT_BPW:g})" in cli.convert_parser().format_help().replace("\n", " ")
