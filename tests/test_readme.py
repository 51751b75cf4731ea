"""The commands and files that the README and docs/ name exist as they name them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from dbf2gguf import cli

ROOT = Path(__file__).parents[1]
README_FILE = ROOT / "README.md"
README = README_FILE.read_text(encoding="utf-8")
PAGES = [README_FILE, *sorted((ROOT / "docs").glob("**/*.md"))]
OPTION = re.compile(r"--[a-z][a-z0-9-]*[a-z0-9]")
OTHERS = {"--index-url", "--nnodes", "--rdzv-endpoint"}
"""Options of pip and torchrun."""


def help_texts() -> str:
    parsers = [cli.convert_parser(), cli.inspect_parser(), cli.export_parser()]
    parsers += [
        importlib.import_module(name).build_parser()
        for name in (
            "runtime.chat",
            "runtime.perplexity",
            "runtime.zeroshot",
            "runtime.bench.__main__",
            "dbf2gguf.compare.__main__",
            "dbf2gguf.synthetic",
        )
    ]
    return "\n".join(parser.format_help() for parser in parsers)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options(page: Path) -> None:
    """Every --option in backquotes is one of some program's."""
    spans = re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8"))
    options = {option for code in spans for option in OPTION.findall(code)}
    assert options or page != README_FILE
    assert options <= set(OPTION.findall(help_texts())) | OTHERS


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", README))
    assert {"demo", "test"} <= targets
    assert not {t for t in targets if not re.search(rf"^{t}:", makefile, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files(page: Path) -> None:
    """Every relative link leads somewhere."""
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links or page != README_FILE
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
