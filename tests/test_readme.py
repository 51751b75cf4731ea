"""The README's commands exist as it names them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from dbf2gguf import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
        )
    ]
    return "\n".join(parser.format_help() for parser in parsers)


def test_options() -> None:
    """Every --option in backquotes that the README names is in some program's help."""
    options = {o for code in re.findall(r"`([^`]+)`", README) for o in re.findall(r"--[a-z][a-z-]+", code)}
    options -= {"--index-url"}  # pip's
    assert options
    assert not {o for o in options if o not in help_texts()}


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", README))
    assert {"demo", "test"} <= targets
    assert not {t for t in targets if not re.search(rf"^{t}:", makefile, re.M)}


def test_files() -> None:
    """Every relative link leads somewhere."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
