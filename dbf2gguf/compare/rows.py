"""A row of the table: what a model file is, what it costs and how far it is from the original."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dbf2gguf.archs import ARCHS, EXPERT_LINEARS
from dbf2gguf.inspect import factorized_linears
from runtime.bench.report import Row as Cells
from runtime.errors import FormatError
from runtime.gguf import GgufFile

ORIGINAL, LLAMA_CPP, PUBLISHED, ONECOMP, OURS = (
    "original", "llama.cpp", "DBF as published", "onecomp", "dbf2gguf",
)  # fmt: skip
SERIES = (ORIGINAL, LLAMA_CPP, PUBLISHED, ONECOMP, OURS)


@dataclass(frozen=True)
class Protocol:
    """What two rows must have in common to stand in one table."""

    model: str
    text: str
    text_sha256: str  # of the file
    ctx: int
    chunks: int


@dataclass(frozen=True)
class Row:
    """One model file, measured. KL in nats a token."""

    series: str  # one of SERIES
    name: str  # within its series
    bpw: float  # all bits of the linear layers, over the weights they stand for
    file_mib: float | None  # of the file; None where there is none
    ppl: float
    ppl_error: float
    kl: float
    kl_error: float
    kl_p99: float
    same_top1: float
    made_with: str  # program and version, options, calibration text
    model: str
    text: str
    text_sha256: str
    ctx: int
    chunks: int

    @property
    def protocol(self) -> Protocol:
        return Protocol(**{f.name: getattr(self, f.name) for f in fields(Protocol)})

    def cells(self) -> dict[str, Any]:
        """As CSV and JSON have it, rounded to what the measurement can tell."""
        digits = {"bpw": 4, "file_mib": 2, "ppl": 4, "ppl_error": 4, "kl": 6, "kl_error": 6, "kl_p99": 4}
        digits["same_top1"] = 5
        return {
            k: round(v, digits[k]) if k in digits and v is not None else v for k, v in asdict(self).items()
        }


COLUMNS: dict[str, Callable[[Cells], str]] = {
    "": lambda r: r["series"],
    "type": lambda r: r["name"],
    "bpw of linears:": lambda r: f"{r['bpw']:.2f}",
    "file, MiB:": lambda r: "–" if r["file_mib"] is None else f"{r['file_mib']:.1f}",
    "perplexity:": lambda r: f"{r['ppl']:.2f} ± {r['ppl_error']:.2f}",
    "mean KL:": lambda r: f"{r['kl']:.3f}",
    "same top-1:": lambda r: f"{r['same_top1']:.1%}",
}


def merged(rows: Iterable[Row]) -> list[Row]:
    """Rows in the table's order, by series and falling bits; of those of one name the last."""
    last = {(row.series, row.name): row for row in rows}
    return sorted(last.values(), key=lambda row: (SERIES.index(row.series), -row.bpw, row.name))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV to `path`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.cells() for row in rows)


def read_rows(path: Path, protocol: Protocol) -> list[Row]:
    """The rows that `write_rows` wrote. Raises FormatError if the file is no such table, or if a row was not
    measured by `protocol`."""
    kinds: dict[str, Callable[[str], Any]] = {
        "str": str,
        "float": float,
        "int": int,
        "float | None": lambda text: float(text) if text else None,
    }
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = [f.name for f in fields(Row)]
        if reader.fieldnames != names:
            raise FormatError(f"{path}: its columns are {reader.fieldnames}; wanted {', '.join(names)}")
        rows = []
        for number, cells in enumerate(reader, 1):
            try:
                row = Row(**{f.name: kinds[str(f.type)](cells[f.name]) for f in fields(Row)})
            except (TypeError, ValueError) as error:
                raise FormatError(f"{path}: row {number}: {error}") from None
            if row.series not in SERIES:
                raise FormatError(
                    f"{path}: row {number}: series {row.series!r}; there are {', '.join(SERIES)}"
                )
            if row.protocol != protocol:
                raise FormatError(
                    f"{path}: row {number} was measured with {row.protocol}; wanted {protocol}: rows of one "
                    "table must be of one model, text, context and number of chunks"
                )
            rows.append(row)
    return rows


def linear_bits(path: Path) -> tuple[int, int]:
    """All bits of the linear layers in a GGUF file, ordinary or factorized, signs or quants and every scale
    as they lie there; and the weights that they stand for.

    Raises FormatError if it has none, or if one is incomplete.
    """
    names = {name for spec in ARCHS.values() for name in spec.linears}
    names |= {f"{name}_{which}" for name in EXPERT_LINEARS for which in ("exps", "shexp")}
    with GgufFile(path) as file:
        factorized, incomplete = factorized_linears(file)
        if incomplete:
            raise FormatError(f"{path}: linear layer {incomplete[0]} is incomplete")
        nbytes = sum(linear.nbytes for linear in factorized)
        weights = sum(linear.rows * linear.cols for linear in factorized)
        for name, info in file.tensors.items():
            parts = name.split(".")
            if len(parts) == 4 and parts[0] == "blk" and parts[2] in names and parts[3] == "weight":
                nbytes += info.nbytes
                weights += math.prod(info.shape)
    if not weights:
        raise FormatError(f"{path}: holds no linear layers of a known name")
    return nbytes * 8, weights
