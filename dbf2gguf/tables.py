"""Calibration text as it is stored: plain text, and tables, which are JSON lines, a JSON array, parquet, and
data sets of the Hugging Face hub.

Rows are read as they are wanted, a few at a time; of large files, here and there."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from runtime.errors import BackendError, FormatError, OptionError, first_line

PREFIX = "hf:"
SPEC = re.compile(r"hf:([\w.-]+(?:/[\w.-]+)?)(?:@([^:@\s]+))?" + r"(?::([^:\[\]]*))?" * 3)
FORM = "hf:owner/name[@revision][:config][:split][:column]"
BATCH_ROWS = 64  # of a parquet file that are decoded at a time
LINES = (".jsonl", ".ndjson")
WHOLE = 2**24  # bytes of plain text or JSON lines that are read to the end, whatever is wanted of them
PART = 2**14  # bytes of larger ones that are read together
MOST_ARRAY = 2**26  # bytes of a JSON array, which is read at once
PACKED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz"}
UNREAD = {".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".feather", ".orc", ".pdf", ".doc", ".docx"}
CONTINUED = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character

Entry = tuple[str, Any]
"""Where a row is, for messages, and what is there: an object, or columns but for those that are null."""


@dataclass(frozen=True)
class Dataset:
    """A data set of the hub."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    column: str | None = None  # text or messages; the usual names if None


def dataset_of(file: Path) -> Dataset | None:
    """The data set that a `--calib` names, None for a file. Raises OptionError for a malformed name."""
    if not str(file).startswith(PREFIX):
        return None
    match = SPEC.fullmatch(str(file))
    if match is None:
        raise OptionError(
            f"{file}: no name of a data set; wanted {FORM}, parts left empty for their defaults"
        )
    name, revision, config, split, column = match.groups()
    return Dataset(name, revision, config or None, split or "train", column or None)


def check_readable(file: Path) -> None:
    """Raises OptionError for no such file or a malformed name, FormatError for a kind that is not read,
    BackendError without the package it needs."""
    if dataset_of(file):
        _need("datasets", file)
    elif not file.is_file():
        raise OptionError(f"{file}: no such text file")
    elif _check_kind(file) == ".parquet":
        _need("pyarrow.parquet", file)


def _check_kind(file: Path) -> str:
    """The suffix of a file, which tells its kind: an unknown one is text. Raises FormatError for what is not
    read."""
    suffix = file.suffix.lower()
    if suffix in PACKED:
        raise FormatError(f"{file}: is packed; unpack it first")
    if suffix in UNREAD:
        raise FormatError(
            f"{file}: {suffix} is not read; write it as .jsonl, one object a line with 'text' or 'messages', "
            "as .parquet with such columns, or as plain text"
        )
    return suffix


def is_table(file: Path) -> bool:
    """Whether `entries` reads it, not `plain_texts`. Raises FormatError for what neither does."""
    return dataset_of(file) is not None or _check_kind(file) in (".parquet", ".json", *LINES)


def is_read_whole(file: Path) -> bool:
    """Whether it is small, plain text or JSON lines. Raises FormatError if it is not there."""
    if dataset_of(file) or _check_kind(file) in (".parquet", ".json"):
        return False
    with _reading(file):
        return file.stat().st_size <= WHOLE


def plain_texts(file: Path, seed: int, spread: bool) -> Iterator[str]:
    """A text of no more than WHOLE bytes; of a larger one, if `spread`, the whole lines of one PART after the
    other, in the order that `seed` gives, else of its first WHOLE bytes.

    Raises FormatError if it cannot be read.
    """
    with _reading(file):
        if file.stat().st_size <= WHOLE:
            yield file.read_text(encoding="utf-8-sig")
            return
        with file.open("rb") as stream:
            if not spread:
                yield _text_at(stream, 0, WHOLE)
                return
            for place in _places(file, seed):
                yield _text_at(stream, place, PART)


def _text_at(stream: io.BufferedReader, place: int, size: int) -> str:
    """The whole lines in `size` bytes from there on; whole characters if there are no line ends."""
    stream.seek(place)
    data = stream.read(size)
    if place:
        data = data[data.find(b"\n") + 1 :].lstrip(CONTINUED)
    if stream.peek(1):
        data = data[: data.rfind(b"\n") + 1 or None]
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    return io.IncrementalNewlineDecoder(decoder, translate=True).decode(data)


def _places(file: Path, seed: int) -> list[int]:
    """Where the parts of a file begin, in random order."""
    count = -(-file.stat().st_size // PART)
    generator = torch.Generator().manual_seed(seed)
    return [PART * n for n in torch.randperm(count, generator=generator).tolist()]


def entries(file: Path, keys: set[str], seed: int, spread: bool = True) -> Iterator[Entry]:
    """The rows of a table, one after the other.

    keys    columns that are of use
    seed    of the order in which the row groups of a parquet file come, parts of large JSON lines, and the
            rows of a JSON array; a data set is read from its start
    spread  whether the order is that; otherwise JSON is read from its start, too

    Raises FormatError if it cannot be read, is not there, or has none of the columns.
    """
    if dataset := dataset_of(file):
        return _dataset_rows(file, dataset, keys)
    kind = _check_kind(file)
    if kind == ".parquet":
        return _parquet_rows(file, keys, seed)
    return _array_rows(file, seed, spread) if kind == ".json" else _line_rows(file, seed, spread)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: cannot be read as UTF-8 text: {error}") from None


def _line_rows(file: Path, seed: int, spread: bool) -> Iterator[Entry]:
    with _reading(file):
        some = spread and not is_read_whole(file)
        for where, line in _some_lines(file, seed) if some else _lines(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{where}: not JSON: {error}") from None
            yield where, row


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            yield f"{file}:{number}", line


def _some_lines(file: Path, seed: int) -> Iterator[tuple[str, str]]:
    """All lines, those that begin in the same part after each other."""
    with file.open("rb") as stream:
        for start in _places(file, seed):
            stream.seek(max(start - 1, 0))
            if start:
                stream.readline()  # which begins before
            while (place := stream.tell()) < start + PART and (line := stream.readline()):
                yield f"{file}, line at byte {place}", line.decode("utf-8-sig")


def _array_rows(file: Path, seed: int, spread: bool) -> Iterator[Entry]:
    lines = "write one object a line, as .jsonl"
    with _reading(file):
        if (size := file.stat().st_size) > MOST_ARRAY:
            raise FormatError(
                f"{file}: has {size >> 20} MiB, and a JSON array is read at once, up to {MOST_ARRAY >> 20}; "
                f"{lines}: jq -c '.[]'"
            )
        text = file.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = f"; if it holds one object a line, name it {file.stem}.jsonl"
        raise FormatError(f"{file}: not JSON: {error}{hint}") from None
    del text
    if not isinstance(rows, list):
        raise FormatError(f"{file}: holds no array; wanted [...] of objects, or {lines}")
    generator = torch.Generator().manual_seed(seed)
    for index in torch.randperm(len(rows), generator=generator).tolist() if spread else range(len(rows)):
        yield f"{file}, entry {index + 1}", rows[index]


def _parquet_rows(file: Path, keys: set[str], seed: int) -> Iterator[Entry]:
    parquet = _need("pyarrow.parquet", file)
    try:
        with parquet.ParquetFile(file) as table:
            columns = _check_columns(file, table.schema_arrow.names, keys)
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            generator = torch.Generator().manual_seed(seed)
            for group in torch.randperm(len(sizes), generator=generator).tolist():
                number = sum(sizes[:group])
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{file}, row {number}", _known(row)
    except (OSError, ValueError, import_module("pyarrow").ArrowException) as error:
        raise FormatError(f"{file}: cannot be read as parquet: {first_line(error)}") from None


def _dataset_rows(file: Path, dataset: Dataset, keys: set[str]) -> Iterator[Entry]:
    datasets = _need("datasets", file)
    try:
        rows = datasets.load_dataset(
            dataset.name, dataset.config, split=dataset.split, revision=dataset.revision, streaming=True
        )
        for number, row in enumerate(rows, 1):
            found = _known(row)
            if dataset.column:
                _check_columns(file, list(row), {dataset.column})
                value = found.get(dataset.column)
                found = {"messages" if isinstance(value, list) else "text": value}
            elif number == 1:
                _check_columns(file, list(row), keys)
            yield f"{file}, row {number}", found
    except FormatError:
        raise
    except Exception as error:  # of the network's libraries, of the data set's own format
        raise FormatError(
            f"{file}: cannot be read from the hub: {first_line(error)}; check the name ({FORM}) and the "
            "network, or give a file"
        ) from None


def _check_columns(file: Path, names: list[str], keys: set[str]) -> list[str]:
    """Those of the columns that are of use. Raises FormatError if none is."""
    found = [name for name in names if name in keys]
    if not found:
        raise FormatError(f"{file}: has the columns {', '.join(names)}; wanted {' or '.join(sorted(keys))}")
    return found


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _need(module: str, file: Path) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise BackendError(
            f"{file}: reading it needs the package {package}; run: pip install 'dbf2gguf[data]'"
        ) from error
