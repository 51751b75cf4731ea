"""Calibration text out of tables: parquet files, and data sets of the Hugging Face hub.

Rows are read as they are wanted, a few at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
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

Entry = tuple[str, dict[str, Any]]
"""Where a row is, for messages, and its columns but for those that are null."""


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
    """Raises OptionError for no such file or a malformed name, BackendError without the package it needs."""
    if dataset_of(file):
        _need("datasets", file)
    elif not file.is_file():
        raise OptionError(f"{file}: no such text file")
    elif file.suffix == ".parquet":
        _need("pyarrow.parquet", file)


def is_table(file: Path) -> bool:
    """Whether `entries` reads it."""
    return file.suffix == ".parquet" or dataset_of(file) is not None


def entries(file: Path, keys: set[str], seed: int) -> Iterator[Entry]:
    """The rows of a table, one after the other.

    keys  columns that are of use
    seed  of the order in which the row groups of a parquet file come; a data set is read from its start

    Raises FormatError if it cannot be read, is not there, or has none of the columns.
    """
    dataset = dataset_of(file)
    return _dataset_rows(file, dataset, keys) if dataset else _parquet_rows(file, keys, seed)


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
