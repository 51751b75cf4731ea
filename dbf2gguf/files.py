"""Files: the one that a command writes, whose place is checked before the work and whose name is given when
it is complete; those that a checkpoint is split into."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import FormatError, OptionError


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A temporary name beside `path`, or in a folder beside it, that takes its place when the body ends well,
    and is removed when it does not."""
    temporary = folder / f"{path.name}.tmp" if folder else path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(out: Path, inputs: Sequence[Path]) -> Path:
    """The file to write, symbolic links followed; it can be written and is none of the inputs. Raises
    OptionError."""
    out = out.resolve()
    if out.is_dir():
        raise OptionError(f"{out}: is a folder; wanted the name of the GGUF file to write")
    if out.exists() and not out.is_file():
        raise OptionError(f"{out}: is a device or the like; wanted the name of the GGUF file to write")
    for path in inputs:
        if out.exists() and path.exists() and path.samefile(out):
            raise OptionError(f"{out}: is an input, too, and would be overwritten; wanted another name")
    folder = out.parent
    if not folder.is_dir():
        raise OptionError(f"{out}: its folder {folder} does not exist")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(f"{out}: cannot write in {folder}: {error.strerror}") from None
    return out


def check_space(out: Path, size: int, what: str = "the file") -> None:
    """The disk has `size` bytes free where `out` will lie. Raises OptionError."""
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise OptionError(
            f"{out}: the disk has {free / 2**20:.1f} MiB free; {what} needs {size / 2**20:.1f} MiB"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, which is made, and removed if nothing is left in
    it. Raises OptionError if another one is in."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"{folder}: another conversion works in it; wait for its end, or take another output"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()
    finally:
        os.close(handle)


def files_of_index(index: Path) -> list[Path]:
    """The files of a sharded checkpoint, sorted, by its index of weights (`weight_map`: name -> file beside
    it). Raises FormatError if it is no such index or a file is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(Path(name).name == name for name in names):
            raise ValueError("files must lie in the same folder")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{index}: not an index of checkpoint files: {error!r}") from None
    files = [index.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise FormatError(f"{file}: named in {index.name} but missing")
    return files
