"""The DBF1 tensor type: block layout, pack, unpack, the bits of a layer, registration with `gguf`.

This file is the definition of the format; docs/FORMAT.md is its prose.

A DBF1 tensor is a matrix of signs. One block is one byte that holds 8 signs of one row:
bit i of byte j (LSB first) is the sign of column 8*j + i, 1 for +1 and 0 for -1. Rows are
contiguous and a whole number of bytes long; when a matrix has a number of columns that is no
multiple of 8, the last byte of each row is filled with 0 bits, which readers ignore.

Importing this module registers the type with `gguf`, so that `GGUFWriter`, `GGUFReader` and
`gguf.quants.dequantize` handle it like a type of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import constants as _constants
from gguf import quants as _quants
from numpy.typing import NDArray

from runtime.errors import FormatError, OptionError

DBF1 = 0x31464244
"""GGML type id of DBF1: the bytes "DBF1" read as a little-endian uint32."""

BLOCK_SIGNS = 8
"""Signs in one block."""

BLOCK_BYTES = 1
"""Bytes in one block."""

FORMAT_VERSION = 1
"""Value of the metadata key `dbf.version` that this code writes and reads."""

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""GGUF names of the factorized linear layers of a block, in file order."""

FACTORS = ("dbf_a", "dbf_b", "dbf_out", "dbf_mid", "dbf_in")
"""Suffixes of the five tensors that stand for one linear layer's weight."""

RANK_STEP = 8
"""Inner sizes are multiples of this: rows of A are whole bytes."""

SCALE_BITS = 16
"""Bits of one entry of a scale vector, a float16."""

MAX_BPW = 8.0
"""Most bits per weight that a plan may have."""

Shape = tuple[int, int]


def pad8(n: int) -> int:
    """The smallest multiple of 8 that is >= n."""
    return -(-n // BLOCK_SIGNS) * BLOCK_SIGNS


def pack(signs: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack a sign matrix into DBF1 bytes.

    signs  (rows, cols)          any real dtype; >= 0 becomes +1 (bit 1), < 0 becomes -1 (bit 0)
    ->     (rows, pad8(cols)/8)  uint8, bit i of byte j is column 8*j + i; filler bits are 0

    Raises FormatError for an array that is not two-dimensional.
    """
    if signs.ndim != 2:
        raise FormatError(f"pack: got an array of shape {signs.shape}, wanted (rows, cols)")
    packed: NDArray[np.uint8] = np.packbits(signs >= 0, axis=1, bitorder="little")
    return packed


def unpack(data: NDArray[np.uint8], cols: int | None = None) -> NDArray[np.int8]:
    """Unpack DBF1 bytes into a sign matrix; the inverse of `pack`.

    data  (rows, nbytes)  uint8
    cols  number of columns to return; all 8*nbytes if None
    ->    (rows, cols)    int8, each +1 or -1

    Raises FormatError if `data` is no byte matrix or holds fewer than `cols` columns.
    """
    if data.ndim != 2 or data.dtype != np.uint8:
        raise FormatError(f"unpack: got {data.dtype} of shape {data.shape}, wanted uint8 (rows, bytes)")
    if cols is not None and not 0 <= cols <= data.shape[1] * BLOCK_SIGNS:
        raise FormatError(f"unpack: wanted {cols} columns of rows that hold {data.shape[1] * BLOCK_SIGNS}")
    bits = np.unpackbits(np.ascontiguousarray(data), axis=1, count=cols, bitorder="little")
    return (bits.astype(np.int8) << 1) - np.int8(1)


def kind_of(linear: str) -> str:
    """Which of LINEARS a prefix stands for: "blk.0.attn_q" -> "attn_q"; "blk.0.ffn_gate.3", of the expert
    number 3, -> "ffn_gate"."""
    rest, _, last = linear.rpartition(".")
    return rest.rpartition(".")[2] if last.isdigit() else last


def linear_bits(rows: int, cols: int, rank: int) -> int:
    """Bits of one factorized linear layer: signs of A, signs of B with their filler, three scale vectors."""
    return rank * (rows + pad8(cols)) + SCALE_BITS * (rows + rank + cols)


def uniform_ranks(shapes: Mapping[str, Shape], bpw: float) -> dict[str, int]:
    """Inner sizes that give every layer the same bits per weight, as nearly as steps of 8 allow.

    Bits per weight (bpw) is the sum of `linear_bits` over all layers, divided by the number of weights that
    they replace. Each layer gets the largest rank that stays within `bpw`; what is left over buys further
    steps, first for the layers that fell shortest, until nothing more fits. The average is never above
    `bpw`, and within one step of the cheapest layer below it.

    shapes  name -> (rows, cols)

    Raises OptionError if `bpw` cannot pay for rank 8 everywhere, or is above MAX_BPW.
    """
    if not shapes:
        raise OptionError("the model has no linear layers to factorize")
    weights = sum(rows * cols for rows, cols in shapes.values())
    floor = sum(linear_bits(rows, cols, RANK_STEP) for rows, cols in shapes.values())
    budget = int(bpw * weights) if math.isfinite(bpw) else -1
    if not (floor <= budget and bpw <= MAX_BPW):
        least = math.ceil(floor / weights * 1000) / 1000
        raise OptionError(f"--bpw {bpw:g} is out of range: this model can have {least:.3f} to {MAX_BPW:g}")
    ranks: dict[str, int] = {}
    for name, (rows, cols) in shapes.items():
        free = bpw * rows * cols - SCALE_BITS * (rows + cols)
        steps = int(free / (linear_bits(rows, cols, 1) - linear_bits(rows, cols, 0)) / RANK_STEP)
        ranks[name] = max(1, steps) * RANK_STEP
    spent = sum(linear_bits(*shapes[name], rank) for name, rank in ranks.items())
    # Layers too small for their share took rank 8 all the same: take that back where it costs least.
    while spent > budget:
        name = max((n for n in ranks if ranks[n] > RANK_STEP), key=lambda n: _share(shapes[n], ranks[n]))
        spent -= _step_bits(shapes[name])
        ranks[name] -= RANK_STEP
    before = -1
    while before != spent:
        before = spent
        for name in sorted(ranks, key=lambda n: _share(shapes[n], ranks[n])):
            if spent + _step_bits(shapes[name]) <= budget:
                spent += _step_bits(shapes[name])
                ranks[name] += RANK_STEP
    return ranks


def _share(shape: Shape, rank: int) -> float:
    return linear_bits(*shape, rank) / (shape[0] * shape[1])


def _step_bits(shape: Shape) -> int:
    return linear_bits(*shape, RANK_STEP) - linear_bits(*shape, 0)


def add_type(name: str, type_id: int, block: int, nbytes: int) -> Any:
    """Make a tensor type known to `gguf`, unless it is; returns its enum member.

    block, nbytes  weights in a block, and the bytes that hold it
    """
    qtypes = _constants.GGMLQuantizationType
    if type_id in qtypes._value2member_map_:
        return qtypes(type_id)
    member = int.__new__(qtypes, type_id)
    member._name_, member._value_ = name, type_id
    qtypes._member_map_[name] = member
    qtypes._value2member_map_[type_id] = member
    qtypes._member_names_.append(name)
    _constants.GGML_QUANT_SIZES[member] = (block, nbytes)
    return member


def _register() -> Any:
    """Make DBF1 known to `gguf`; returns the enum member. Safe to call more than once."""
    known = DBF1 in _constants.GGMLQuantizationType._value2member_map_
    member = add_type("DBF1", DBF1, BLOCK_SIGNS, BLOCK_BYTES)
    if known:
        return member

    class DBF1Quant(_quants.__Quant, qtype=member):
        """gguf's view of DBF1: float32 signs in, bytes out, and back."""

        @classmethod
        def quantize_blocks(cls, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
            return pack(blocks)

        @classmethod
        def dequantize_blocks(cls, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
            return unpack(blocks).astype(np.float32)

    return member


DBF1_TYPE = _register()
"""`gguf.GGMLQuantizationType.DBF1`."""
