"""The DBF1 tensor type: block layout, pack, unpack, and its registration with `gguf`.

This file is the definition of the format; docs/FORMAT.md is its prose.

A DBF1 tensor is a matrix of signs. One block is one byte that holds 8 signs of one row:
bit i of byte j (LSB first) is the sign of column 8*j + i, 1 for +1 and 0 for -1. Rows are
contiguous and a whole number of bytes long; when a matrix has a number of columns that is no
multiple of 8, the last byte of each row is filled with 0 bits, which readers ignore.

Importing this module registers the type with `gguf`, so that `GGUFWriter`, `GGUFReader` and
`gguf.quants.dequantize` handle it like a type of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import constants as _constants
from gguf import quants as _quants
from numpy.typing import NDArray

from runtime.errors import FormatError

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


def _register() -> int:
    """Make DBF1 known to `gguf`; returns the enum member. Safe to call more than once."""
    qtypes = _constants.GGMLQuantizationType
    if DBF1 in qtypes._value2member_map_:
        return qtypes(DBF1)
    member = int.__new__(qtypes, DBF1)
    member._name_, member._value_ = "DBF1", DBF1
    qtypes._member_map_["DBF1"] = member
    qtypes._value2member_map_[DBF1] = member
    qtypes._member_names_.append("DBF1")
    _constants.GGML_QUANT_SIZES[member] = (BLOCK_SIGNS, BLOCK_BYTES)

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
