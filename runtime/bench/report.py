"""Statistics of repeated runs, and tables of them as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any, TextIO

FORMATS = ("md", "csv", "json")

Row = Mapping[str, Any]

__all__ = ["FORMATS", "Row", "Table", "count_text", "mean_and_sd", "median", "ratio_of_medians", "size_text"]


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; the latter is 0 for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as large the median of `ours` is."""
    below = median(theirs)
    return median(ours) / below if below else math.inf


def size_text(nbytes: float) -> str:
    """Bytes as llama-bench writes them."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def count_text(n: float) -> str:
    """A number of parameters as llama-bench writes it."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


class Table:
    """Writes rows as they come (md, csv), or all at the end (json).

    out      where to
    form     "md", "csv" or "json"
    columns  of the Markdown table: heading -> text of a cell, given the row; headings that end in ":" are
             aligned to the right
    """

    def __init__(self, out: TextIO, form: str, columns: Mapping[str, Any]) -> None:
        self._out, self._form, self._columns = out, form, columns
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Write one row; all rows have the same keys. Lists are left out of CSV, as llama-bench does."""
        first = not self._rows
        self._rows.append(row)
        if self._form == "csv":
            plain = {k: v for k, v in row.items() if not isinstance(v, list)}
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            if first:
                writer.writerow(plain)
            writer.writerow(plain.values())
            self._out.write(text.getvalue())
        elif self._form == "md":
            if first:
                self._out.write(self._line(name.rstrip(":") for name in self._columns))
                self._out.write(self._line("---:" if name.endswith(":") else "---" for name in self._columns))
            self._out.write(self._line(cell(row) for cell in self._columns.values()))
        self._out.flush()

    def close(self) -> None:
        """Write what was kept back."""
        if self._form == "json":
            json.dump(list(self._rows), self._out, indent=2)
            self._out.write("\n")

    def _line(self, cells: Any) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |\n"
