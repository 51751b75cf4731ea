"""What a conversion has finished, kept in a folder beside its output: a conversion that was stopped, however
hard, goes on from there when the same command is given again, and ends with the same bytes.

Every part is a file of torch.save with its SHA-256 beside it, each written under another name and renamed;
what is missing, incomplete or changed is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch

KEY = "key.json"
BLOCK = 1 << 20


class Work:
    """A folder of finished parts of one conversion, or of none: without a folder nothing is kept."""

    def __init__(self, folder: Path | None, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix

    @classmethod
    def open(cls, folder: Path, key: Mapping[str, Any], quiet: bool) -> Work:
        """The folder for what `key` describes: the model, the options, the versions. One that belongs to
        another conversion is emptied, with a message."""
        text = json.dumps(key, sort_keys=True, indent=1)
        file = folder / KEY
        if folder.exists():
            known = file.read_text(encoding="utf-8") if file.is_file() else ""
            if known == text:
                work = cls(folder)
                if not quiet:
                    print(f"{folder}: going on from {work.parts()} finished parts", file=sys.stderr)
                return work
            if known and not quiet:
                changed = _differences(known, key)
                print(f"{folder}: of another conversion ({changed}); starting afresh", file=sys.stderr)
            cls(folder).clear()
        folder.mkdir(exist_ok=True)
        _write(file, lambda out: out.write(text.encode()))
        return cls(folder)

    def within(self, prefix: str) -> Work:
        """The same folder for parts whose names begin with `prefix`."""
        return Work(self.folder, self.prefix + prefix)

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name: as it was kept, or as `make` makes it, which is then kept. Parts are
        tensors, numbers, strings, and dicts, lists and tuples of them; tensors are read to the CPU."""
        part = self.load(name)
        if part is None:
            part = make()
            self.save(name, part)
        return part

    def load(self, name: str) -> Any | None:
        """The part of that name, None if there is none that is whole."""
        if self.folder is None:
            return None
        file, digest = self._files(name)
        try:
            if digest.read_text(encoding="ascii") != _sha256(file):
                return None
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, UnicodeDecodeError):
            return None

    def save(self, name: str, part: Any) -> None:
        """Keep a part, in the place of what had its name."""
        if self.folder is None:
            return
        file, digest = self._files(name)
        _write(file, lambda out: torch.save(part, out))
        _write(digest, lambda out: out.write(_sha256(file).encode()))

    def _files(self, name: str) -> tuple[Path, Path]:
        assert self.folder is not None
        return self.folder / f"{self.prefix}{name}.pt", self.folder / f"{self.prefix}{name}.sha256"

    def parts(self) -> int:
        """How many parts are kept."""
        return 0 if self.folder is None else sum(path.suffix == ".sha256" for path in self.folder.iterdir())

    def forget(self) -> None:
        """Remove the parts whose names begin with the prefix."""
        for path in list(self.folder.iterdir()) if self.folder else []:
            if path.name.startswith(self.prefix) and path.suffix in (".pt", ".sha256"):
                path.unlink()

    def clear(self) -> None:
        """Forget everything. Only what Work has made, or what has a temporary name, is removed."""
        for path in list(self.folder.iterdir()) if self.folder else []:
            if path.name == KEY or path.suffix in (".pt", ".sha256", ".tmp"):
                path.unlink()


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 over the files' contents, in the given order."""
    total = hashlib.sha256()
    for file in files:
        total.update(bytes.fromhex(_sha256(file)))
    return total.hexdigest()


@cache
def digest_of_code(*modules: str) -> str:
    """SHA-256 over this package's modules, or over those named: other code may make other parts."""
    folder = Path(__file__).parent
    return digest_of([folder / f"{name}.py" for name in modules] or sorted(folder.glob("*.py")))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _differences(known: str, key: Mapping[str, Any]) -> str:
    try:
        old = json.loads(known)
    except ValueError:
        return "its key is broken"
    names = sorted(name for name in {*old, *key} if old.get(name) != key.get(name))
    return f"{', '.join(names)} changed"
