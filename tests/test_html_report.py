"""The page about a conversion: it tells what the file and the run tell, and nothing in it can act."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny_hf
import torch
from make_gguf import write_model

from dbf2gguf import cli, html_report
from dbf2gguf.budget import linear_bits
from dbf2gguf.convert import convert
from dbf2gguf.factorize import relative_error
from dbf2gguf.files import replacing
from dbf2gguf.html_report import command_line, heat_map, loss_curve, page
from dbf2gguf.report import Errors, Report, describe_report
from dbf2gguf.source import linear_names, load_model, open_source
from runtime.gguf import GgufFile

QUICK = tiny_hf.QUICK | {"report": True}
VOID = {"meta", "br", "link", "input", "img"}


class Page(HTMLParser):
    """Tags of a page, every one closed in its turn; its text; its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def assert_inert(text: str) -> Page:
    """Well formed, no scripts, nothing fetched."""
    parsed = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "srcset", "xlink:href", "action"), value
    assert "url(" not in text
    assert "@import" not in text
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(drawing)
    return parsed


class Made:
    """A conversion of a tiny model with its page."""

    def __init__(self, base: Path) -> None:
        self.base, self.folder, self.out = base, tiny_hf.write_folder(base / "model"), base / "out.gguf"
        self.report: Report = convert(self.folder, self.out, **QUICK)
        self.path = base / "out.gguf.report.html"
        self.html = self.path.read_text(encoding="utf-8")
        self.page = assert_inert(self.html)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def test_where_it_lies(made: Made) -> None:
    assert {path.name for path in made.base.iterdir()} == {"model", "out.gguf", "out.gguf.report.html"}
    assert made.report.page == made.path
    assert f"report: {made.path}\n" in describe_report(made.report)


def test_the_receipt_and_the_run(made: Made) -> None:
    text, quality = made.page.text, made.report.quality
    assert quality is not None
    assert f"ppl {quality.ppl:.6g} " in text
    assert f"{quality.kl_mean:.3f} mean KL" in text
    assert "prefers-color-scheme: dark" in made.html
    assert set(made.report.memory) == set(made.report.seconds) >= {"text", "factorize", "distil", "measure"}
    for stage, peak in made.report.memory.items():
        assert 2**25 < peak <= made.report.peak_rss
        time, size = html_report._seconds(made.report.seconds[stage]), html_report._mib(peak)
        assert f"{stage} {time} {size}" in text


def test_bits_and_errors_of_every_layer(made: Made, tmp_path: Path) -> None:
    """The page has them, and they are what the file's factors say."""
    source = open_source(made.folder, tmp_path)
    model, factors = load_model(source), tiny_hf.file_factors(made.out, source)
    titles = re.findall(r"<title>layer (\d+), ([\w.]+): ([\d.]+)</title>", made.html)
    maps = [titles[start : start + 14] for start in range(0, len(titles), 14)]
    assert len(titles) == 3 * 14
    names = linear_names(model, source.arch)
    for layer, kind, bits in maps[0]:
        rows, cols = made.report.plan.shapes[f"blk.{layer}.{kind}"]
        rank = made.report.plan.ranks[f"blk.{layer}.{kind}"]
        assert float(bits) == pytest.approx(linear_bits(rows, cols, rank) / (rows * cols), abs=1e-4)
    for layer, kind, error in maps[1]:
        assert 0 < float(error) < 1
        assert float(error) == pytest.approx(made.report.errors.factorized[f"blk.{layer}.{kind}"], abs=1e-4)
    for layer, kind, error in maps[2]:
        name = f"blk.{layer}.{kind}"
        wanted, got = model.get_submodule(names[name]).weight, factors[name].dense()[0]
        assert float(error) == pytest.approx(float((wanted - got).norm() / wanted.norm()), abs=1e-4)


def test_sizes_are_all_of_the_file(made: Made) -> None:
    with GgufFile(made.out) as file:
        parts = {part.name: part.nbytes for part in html_report._parts(file)}
        tensors = {name: info.nbytes for name, info in file.tensors.items()}
    assert sum(parts.values()) == made.out.stat().st_size
    plan = made.report.plan
    assert parts["signs"] + parts["scales"] == plan.bits // 8
    assert parts["scales"] == sum(2 * (r + c + plan.ranks[n]) for n, (r, c) in plan.shapes.items())
    assert parts["embedding and head"] == tensors["token_embd.weight"]
    norms = sum(size for name, size in tensors.items() if "norm" in name)
    assert parts["norms, biases and the rest"] == norms
    assert parts["metadata: tokenizer, recipe, names"] > 1000


def test_the_file_is_the_same_without_it(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert convert(made.folder, out, **QUICK | {"report": False}).page is None
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == made.out.read_bytes()


def test_options(made: Made, tmp_path: Path) -> None:
    parse = cli.convert_parser().parse_args
    assert parse(["a", "b"]).report
    assert not parse(["a", "b", "--no-report"]).report
    convert(made.folder, tmp_path / "out.gguf", **QUICK | {"dry_run": True})
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known before the work, it is an error; afterwards, a warning: the model is there."""
    out = tmp_path / "out.gguf"
    blocked = tmp_path / "out.gguf.report.html"
    blocked.mkdir()
    with pytest.raises(Exception, match=r"out.gguf.report.html: is a folder"):
        convert(made.folder, out, **QUICK)
    blocked.rmdir()

    def full(path: Path) -> Any:
        if path.suffix == ".html":
            raise OSError(28, "No space left on device")
        return replacing(path)

    monkeypatch.setattr(html_report, "replacing", full)
    assert convert(made.folder, out, **QUICK).page is None
    assert "cannot be written: No space left on device; the model is complete" in capsys.readouterr().err
    assert out.read_bytes() == made.out.read_bytes()


def test_inspect_prints_it(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as the file tells: bits, sizes, loss, receipt, recipe."""
    assert cli.main(["inspect", str(made.out), "--html"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = assert_inert(out).text
    assert len(re.findall(r"<title>layer ", out)) == 14
    assert "Quality receipt" in text
    assert "Distillation" in text
    assert "Time and memory" not in text
    assert "To make it again" not in text


# The command ----------------------------------------------------------------------------------------------


def test_the_command_gives_the_same_arguments() -> None:
    given = {
        "model": "my models/a b", "out": "o'ut.gguf", "bpw": 1.25, "max_kl": None, "preset": "fast",
        "calib": ["x y.txt", Path("z.jsonl")], "eval_text": Path("eval.txt"), "embed_type": "q6_k",
        "carrier": "dbf1", "seed": 3, "device": "cpu", "threads": 2, "force": True, "dry_run": False,
        "quiet": True, "report": True, "overrides": {}, "text_rows": 8, "chat_share": None,
    }  # fmt: skip
    line = command_line(given)
    assert line.startswith("dbf2gguf 'my models/a b' ")
    assert "--carrier" not in line
    parsed = vars(cli.convert_parser().parse_args(shlex.split(line)[1:]))
    for name, value in given.items():
        if name not in ("overrides", "quiet"):
            wanted = list(map(str, value)) if isinstance(value, list) else value
            assert parsed[name] == (str(wanted) if isinstance(wanted, Path) else wanted), name


def test_the_command_is_python_where_the_shell_has_no_option(made: Made) -> None:
    """And that is run here, to the same bytes."""
    command = made.report.command
    assert command.startswith("from dbf2gguf.convert import convert\nconvert(")
    assert "row_tokens=24" in command
    assert "threads=1" in command
    first = made.out.read_bytes()
    again = made.base / "again.gguf"
    exec(command.replace(repr(str(made.out)), repr(str(again))), {})
    assert again.read_bytes() == first
    for path in (again, made.base / "again.gguf.report.html"):
        path.unlink()


@pytest.mark.parametrize(
    "line",
    [
        "M O --calib a.txt b.txt",
        "M O --calib a.txt --calib b.txt",
        "M O --calib a.txt --seed 1 --calib b.txt",
        "--calib a.txt b.txt --seed 1 M O",
        "--calib a.txt b.txt -- M O",
    ],
)
def test_several_texts(line: str) -> None:
    parsed = cli.convert_parser().parse_args(line.split())
    assert (parsed.model, parsed.out, parsed.calib) == ("M", "O", ["a.txt", "b.txt"])
    assert cli.convert_parser().parse_args(["M", "O"]).calib == []


# Charts ---------------------------------------------------------------------------------------------------


def test_heat_map_of_odd_values() -> None:
    drawn = heat_map({"blk.0.attn_q": 1.0, "blk.0.attn_k": math.nan, "blk.12.attn_q": 1.0, "other": 7.0})
    assert drawn is not None
    tree = ElementTree.fromstring(drawn)
    assert [r.get("class") for r in tree.iter("rect")] == ["cell", "cell", "hole"]
    assert "other" not in drawn
    assert "layer 12, attn_q: 1.0000" in drawn
    assert heat_map({}) is None
    assert heat_map({"blk.0.attn_q": math.nan}) is None


def test_darker_is_more() -> None:
    drawn = heat_map({f"blk.{i}.ffn_up": float(i) for i in range(200)})
    assert drawn is not None
    shades = [float(r.get("fill-opacity", "")) for r in ElementTree.fromstring(drawn).iter("rect")]
    assert len(shades) == 200
    assert shades == sorted(shades)
    assert shades[-1] - shades[0] > 0.7
    alike = heat_map({"blk.0.ffn_up": 1.1950, "blk.1.ffn_up": 1.1951})  # nothing to tell apart
    assert alike is not None
    first, second = (float(r.get("fill-opacity", "")) for r in ElementTree.fromstring(alike).iter("rect"))
    assert abs(first - second) < 0.01


@pytest.mark.parametrize("steps", [1, 2, 59, 3000])
def test_loss_curve(steps: int) -> None:
    history = [3.0 / step**0.5 for step in range(1, steps + 1)]
    drawn = loss_curve(history)
    assert drawn is not None
    tree = ElementTree.fromstring(drawn)
    circles = list(tree.iter("circle"))
    assert len(circles) == min(steps, math.ceil(steps / math.ceil(steps / html_report.MOST_POINTS)))
    heights = [float(c.get("cy", "")) for c in circles]
    assert heights == sorted(heights)  # a falling loss falls on the page
    width, height = map(float, tree.get("viewBox", "").split()[2:])
    for circle in circles:
        assert 0 < float(circle.get("cx", "")) < width
        assert 0 < float(circle.get("cy", "")) < height
    assert len(list(tree.iter("polyline"))) == (steps > 1)
    first = circles[0].find("title")
    assert first is not None
    many = f"steps 1 to 13: KL {sum(history[:13]) / 13:.4f}"
    assert first.text == ("step 1: KL 3.0000" if steps < 3000 else many)


def test_loss_curve_of_nothing() -> None:
    assert loss_curve([]) is None
    assert loss_curve([math.nan, math.inf]) is None
    flat = loss_curve([0.0, math.nan, 0.0])
    assert flat is not None
    assert len(list(ElementTree.fromstring(flat).iter("circle"))) == 2


# Files that mean harm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["[[1]]", "nonsense", "[" * 100000, '{"a": 1}', "[NaN]", 5, "null"])
def test_hostile_strings(tmp_path: Path, history: Any) -> None:
    bad = '<script>alert(1)</script>"><img src=x onerror=alert(1)>\x1b[31m\0'

    def change(meta: dict[str, Any], _arrays: dict[str, Any]) -> None:
        meta["general.name"] = bad + "x" * 3000
        meta["dbf.recipe.text"] = bad
        meta["dbf.quality.<b>ppl"] = bad
        meta["dbf.recipe.distill_kl"] = history

    with GgufFile(write_model(tmp_path / "m.gguf", change=change)) as file:
        text = page(file)
    assert_inert(text)
    assert "\x1b" not in text
    assert text.count("&lt;script&gt;") >= 4


def test_ordinary_gguf(tmp_path: Path) -> None:
    """Without a factorized layer there is little to tell, but that is told."""
    folder = tiny_hf.write_folder(tmp_path / "model")
    with GgufFile(tiny_hf.write_standard_gguf(tmp_path / "m.gguf", folder)) as file:
        text = assert_inert(page(file)).text
    assert "tiny llama, 2 layers" in text
    assert "linear layers" not in text


@pytest.mark.parametrize(("kl", "collapsed"), [(3.0, False), (3.01, True), (math.nan, True)])
def test_a_collapsed_model_says_so(tmp_path: Path, kl: float, collapsed: bool) -> None:
    def change(meta: dict[str, Any], _arrays: dict[str, Any]) -> None:
        meta["dbf.quality.kl_mean"] = kl

    with GgufFile(write_model(tmp_path / "m.gguf", change=change)) as file:
        assert ("The model has collapsed" in assert_inert(page(file)).text) == collapsed


def test_tries(made: Made) -> None:
    report = replace(made.report, tries=((1.2, 0.5), (1.25, 0.25)), errors=Errors())
    with GgufFile(made.out) as file:
        text = assert_inert(page(file, report)).text
    assert "1.2 0.5000 1.25 0.2500" in text
    assert "Error of the factorization" not in text


def test_relative_error() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, got = torch.randn(2, 5, 7, generator=generator)
    rows, cols = torch.rand(5, generator=generator), torch.rand(7, generator=generator)
    weights = rows.double()[:, None] * cols.double()
    expected = ((wanted - got).double() * weights).norm() / (wanted.double() * weights).norm()
    assert relative_error(wanted, got, rows, cols) == pytest.approx(float(expected), rel=1e-5)
    plain = (wanted - got).double().norm() / wanted.double().norm()
    assert relative_error(wanted, got) == pytest.approx(float(plain), rel=1e-5)
    assert math.isnan(relative_error(torch.zeros(2, 2), torch.zeros(2, 2)))
