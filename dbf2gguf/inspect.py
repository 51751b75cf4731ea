"""Show what a GGUF file holds: sizes, bits per weight, the receipt, the recipe, tensors."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.format import FACTORS, kind_of
from runtime.gguf import GgufFile, TensorInfo

MAX_TEXT = 60
"""Characters of a value that the summary shows; it shortens the rest."""

MIB = 1 << 20
NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
QUALITY, RECIPE = "dbf.quality.", "dbf.recipe."
ELSEWHERE = ("dbf.version", "dbf.bits_per_weight", "dbf.sign_bits_per_weight", "general.name")
"""Keys that the summary's head shows already."""


@dataclass(frozen=True)
class FactorizedLinear:
    """Sizes of one factorized linear layer, as its tensors tell them."""

    kind: str  # "attn_q"
    rows: int
    cols: int
    rank: int
    nbytes: int  # of all five tensors
    name: str  # "blk.0.attn_q"

    @property
    def bpw(self) -> float:
        """Bits per weight that it stands for."""
        return _ratio(self.nbytes * 8, self.rows * self.cols)


def inspect(path: str | Path, tensors: bool = False, as_json: bool = False) -> None:
    """Print what the GGUF file at `path` holds; on a file of dbf2gguf, its bits, receipt and recipe too.

    tensors  list every tensor in the summary
    as_json  print one JSON object instead: all metadata (arrays as their length) and all tensors

    Raises FormatError if it is no well-formed GGUF file, OSError if it cannot be read.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    with GgufFile(path) as file:
        if as_json:
            print(json.dumps(describe(file), indent=2))
        else:
            print("\n".join(summary(file) + (tensor_table(file) if tensors else [])))


def describe(file: GgufFile) -> dict[str, Any]:
    """Everything but the data, as plain values for JSON."""
    linears, incomplete = factorized_linears(file)
    return {
        "file": os.fspath(file.path),
        "bytes": file.size,
        "gguf_version": file.version,
        "alignment": file.alignment,
        "weights": count_weights(file, linears),
        "file_bits_per_weight": _ratio(file.size * 8, count_weights(file, linears)),
        "linear_bits_per_weight": linear_bpw(linears),
        "incomplete_linears": incomplete,
        "metadata": {key: _plain(file, key) for key in file.metadata},
        "tensors": [
            {"name": t.name, "type": t.type_name, "shape": list(t.shape), "bytes": t.nbytes}
            for t in file.tensors.values()
        ],
    }


def summary(file: GgufFile) -> list[str]:
    """The lines for people."""
    linears, incomplete = factorized_linears(file)
    weights = count_weights(file, linears)
    lines = [f"{escape(os.fspath(file.path))}: GGUF v{file.version}, {len(file.tensors)} tensors"]
    rows = [
        ("name", _show(file, "general.name")),
        ("architecture", describe_architecture(file)),
        ("file", f"{file.size / MIB:.2f} MiB, {_bpw(_ratio(file.size * 8, weights))} of {weights} weights"),
    ]
    if "dbf.version" in file.metadata:
        replaced = sum(x.rows * x.cols for x in linears)
        rows.append(("linear layers", f"{_bpw(linear_bpw(linears))} of {replaced} weights{_signs(file)}"))
        rows.append(("DBF format", _show(file, "dbf.version")))
    if incomplete:
        rows.append(("incomplete", f"{len(incomplete)} linear layers, first {escape(incomplete[0])}"))
    lines += _columns(rows)
    if linears:
        lines += ["", *linear_table(linears)]
    lines += ["", *type_table(file)]
    for title, prefix in (("quality", QUALITY), ("recipe", RECIPE)):
        keys = [key for key in file.metadata if key.startswith(prefix)]
        if keys:
            lines += ["", f"{title} ({prefix}*)"]
            lines += _columns([(escape(key.removeprefix(prefix)), _show(file, key)) for key in keys])
    rest = [k for k in file.metadata if not k.startswith((QUALITY, RECIPE)) and k not in ELSEWHERE]
    if rest:
        lines += ["", "metadata", *_columns([(escape(key), _show(file, key)) for key in rest])]
    return lines


def factorized_linears(file: GgufFile) -> tuple[list[FactorizedLinear], list[str]]:
    """The factorized linear layers, and the names of those that lack a tensor or have ones of odd shape."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in file.tensors.items():
        prefix, _, suffix = name.rpartition(".")
        if suffix in FACTORS:
            found.setdefault(prefix, {})[suffix] = info
    linears, incomplete = [], []
    for prefix, parts in found.items():
        shapes = [parts[s].shape for s in ("dbf_out", "dbf_mid", "dbf_in") if s in parts]
        if len(parts) != len(FACTORS) or any(len(shape) != 1 for shape in shapes):
            incomplete.append(prefix)
            continue
        rows, rank, cols = (shape[0] for shape in shapes)
        nbytes = sum(part.nbytes for part in parts.values())
        linears.append(FactorizedLinear(kind_of(prefix), rows, cols, rank, nbytes, prefix))
    return linears, incomplete


def count_weights(file: GgufFile, linears: list[FactorizedLinear]) -> int:
    """Weights of the model: for a factorized linear those that its factors replace."""
    dense = (
        math.prod(info.shape)
        for name, info in file.tensors.items()
        if name not in NOT_WEIGHTS and name.rpartition(".")[2] not in FACTORS
    )
    return sum(dense) + sum(x.rows * x.cols for x in linears)


def linear_table(linears: list[FactorizedLinear]) -> list[str]:
    """One line for each kind and shape of linear layer."""
    kinds: dict[tuple[str, int, int], list[FactorizedLinear]] = {}
    for x in linears:
        kinds.setdefault((x.kind, x.rows, x.cols), []).append(x)
    lines = [f"{'linear layers':<26}{'rows':>7}{'cols':>7}{'rank':>12}{'bpw':>8}{'MiB':>9}"]
    for (kind, rows, cols), some in kinds.items():
        low, high = min(x.rank for x in some), max(x.rank for x in some)
        rank = f"{low}" if low == high else f"{low}-{high}"
        nbytes = sum(x.nbytes for x in some)
        lines.append(
            f"{len(some):>5} x {escape(kind):<18}{rows:>7}{cols:>7}{rank:>12}"
            f"{linear_bpw(some):>8.3f}{nbytes / MIB:>9.2f}"
        )
    return lines


def type_table(file: GgufFile) -> list[str]:
    """One line for each type of tensor."""
    types: dict[str, list[int]] = {}
    for info in file.tensors.values():
        types.setdefault(info.type_name, []).append(info.nbytes)
    lines = [f"{'type':<12}{'tensors':>8}{'MiB':>10}"]
    return lines + [f"{name:<12}{len(s):>8}{sum(s) / MIB:>10.2f}" for name, s in types.items()]


def tensor_table(file: GgufFile) -> list[str]:
    """One line for each tensor, in the file's order, after an empty line."""
    rows = [
        (escape(t.name), f"{t.type_name:<8}{' x '.join(map(str, t.shape)):<16}{t.nbytes:>12} bytes")
        for t in file.tensors.values()
    ]
    return ["", "tensors", *_columns(rows)]


def escape(text: str) -> str:
    """Text without control characters: a hostile file must not drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _plain(file: GgufFile, key: str) -> Any:
    length = file.metadata.array_length(key)
    if length is not None:
        return {"length": length}
    value = file.metadata[key]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _show(file: GgufFile, key: str) -> str:
    """A value in one short line."""
    if key not in file.metadata:
        return "-"
    length = file.metadata.array_length(key)
    if length is not None:
        return f"[{length} values]"
    value = file.metadata[key]
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if len(text) <= MAX_TEXT:
        return escape(text)
    return f"{escape(text[:MAX_TEXT])}... ({len(text)} characters)"


def describe_architecture(file: GgufFile) -> str:
    """The family and its sizes, those that the file tells."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str):
        return "-"
    sizes = (
        ("block_count", "{} layers"),
        ("embedding_length", "width {}"),
        ("feed_forward_length", "feed-forward {}"),
        ("attention.head_count", "{} heads"),
        ("attention.head_count_kv", "{} KV heads"),
        ("attention.key_length", "head size {}"),
        ("vocab_size", "vocabulary {}"),
        ("context_length", "context {}"),
    )
    known = [
        form.format(_show(file, f"{arch}.{key}")) for key, form in sizes if f"{arch}.{key}" in file.metadata
    ]
    return ", ".join([escape(arch[:MAX_TEXT]), *known])


def _signs(file: GgufFile) -> str:
    value = file.metadata.get("dbf.sign_bits_per_weight")
    return f" (signs alone {value:.4f})" if isinstance(value, float) else ""


def linear_bpw(linears: list[FactorizedLinear]) -> float:
    """Bits per weight over all of them."""
    return _ratio(sum(x.nbytes for x in linears) * 8, sum(x.rows * x.cols for x in linears))


def _bpw(value: float) -> str:
    return f"{value:.4f} bits per weight"


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in rows]
