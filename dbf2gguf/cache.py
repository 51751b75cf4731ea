"""Text that a model has written, kept for further conversions of the same model: with other bits per weight,
or after other options have changed. Named after what decides it, so nothing in it is ever out of date."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbf2gguf.work import Work

VARIABLE = "DBF2GGUF_CACHE"
KEPT_TEXTS = 8  # the newest


def cache_folder() -> Path | None:
    """$DBF2GGUF_CACHE; without it, dbf2gguf in $XDG_CACHE_HOME or ~/.cache. None if the variable is empty:
    then nothing is kept."""
    if (given := os.environ.get(VARIABLE)) is not None:
        return Path(given).expanduser() if given else None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "dbf2gguf"


def cached_text(key: Mapping[str, Any], make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """The rows that `make` makes, (rows, tokens) int64, and whether they were known already.

    key  all that decides them, as plain values

    Files are checksummed and appear whole; all but the KEPT_TEXTS newest are removed. Where the folder
    cannot be written, a note says so and nothing is kept.
    """
    folder = cache_folder()
    if folder is None:
        return make(), False
    name = f"text-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}"
    work = Work(folder)
    rows = work.load(name)
    if rows is not None:
        with suppress(OSError):  # of a folder that can only be read
            (folder / f"{name}.pt").touch()
        return rows.long(), True
    rows = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work.save(name, rows.to(torch.int32))
        for file in sorted(folder.glob("text-*.pt"), key=lambda f: f.stat().st_mtime)[:-KEPT_TEXTS]:
            file.with_suffix(".sha256").unlink(missing_ok=True)
            file.unlink()
    except OSError as error:
        print(f"note: the written text is not kept for other conversions: {error}", file=sys.stderr)
    return rows, False
