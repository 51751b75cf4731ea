"""GGUF reader: memory-mapped, every offset, count, product and length checked before use.

A file is hostile until proven otherwise: whatever it holds, `GgufFile` either opens it or raises
FormatError. Metadata arrays are only skipped over when a file is opened and parsed on first access,
so that a large vocabulary costs nothing to those who do not ask for it. Tensor data is never copied.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3 (which differ
only in that 3 may be big-endian; big-endian files are refused).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

import runtime.format  # noqa: F401  (registers DBF1 with gguf)
from runtime.errors import FormatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_DIMS = 4
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # ggml keeps names in char[64]

STRING, ARRAY = 8, 9
SCALARS: dict[int, tuple[str, str]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "B"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
"""Metadata value types: id -> (name, struct code)."""

_STRUCTS = {kind: struct.Struct("<" + code) for kind, (_, code) in SCALARS.items()}
_U32, _U64 = _STRUCTS[4], _STRUCTS[10]
_BOOL = 7

_NUMPY = {
    int(GGMLQuantizationType.F32): "<f4",
    int(GGMLQuantizationType.F16): "<f2",
    int(GGMLQuantizationType.F64): "<f8",
    int(GGMLQuantizationType.I8): "i1",
    int(GGMLQuantizationType.I16): "<i2",
    int(GGMLQuantizationType.I32): "<i4",
    int(GGMLQuantizationType.I64): "<i8",
}
"""Tensor types whose elements numpy knows; all others are given as bytes."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    name: str
    type: int  # GGML type id
    shape: tuple[int, ...]  # numpy order: row-major, last dimension contiguous
    offset: int  # of its first byte in the file
    nbytes: int

    @property
    def type_name(self) -> str:
        return type_name(self.type)


def type_name(kind: int) -> str:
    """The name of a GGML tensor type."""
    return str(GGMLQuantizationType(kind).name)


@dataclass(frozen=True)
class _LazyArray:
    """A metadata array that was checked and skipped: `count` values of type `kind` from `offset` on."""

    kind: int
    count: int
    offset: int


class Metadata(Mapping[str, Any]):
    """The metadata, a read-only dict; arrays are lists, parsed on first access."""

    def __init__(
        self, file: GgufFile, values: dict[str, Any], kinds: dict[str, tuple[int, int | None]]
    ) -> None:
        self._file = file
        self._values = values
        self._kinds = kinds

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _LazyArray):
            value = self._values[key] = self._file._parse_array(key, value)
        return value

    def kind(self, key: str) -> tuple[int, int | None]:
        """GGUF's number of a value's type; for an array also that of its elements, else None."""
        return self._kinds[key]

    def array_length(self, key: str) -> int | None:
        """The number of values of an array, which is not parsed for that; None if `key` is no array."""
        value = self._values[key]
        if isinstance(value, _LazyArray):
            return value.count
        return len(value) if isinstance(value, list) else None

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GgufFile:
    """A GGUF file, mapped into memory and checked.

    Attributes: path, version, alignment, size (bytes), metadata (a mapping), tensors (name -> TensorInfo,
    in the file's order).

    Raises FormatError if the file is not a well-formed GGUF file, OSError if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.version = 0
        self.alignment = DEFAULT_ALIGNMENT
        self.tensors: dict[str, TensorInfo] = {}
        with open(self.path, "rb") as f:
            self.size = os.fstat(f.fileno()).st_size
            if self.size < 24:
                raise FormatError(f"{self.path}: {self.size} bytes are too few for a GGUF file's header (24)")
            self._map: mmap.mmap | None = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self._pos = 0
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> NDArray[Any]:
        """A tensor's data, a read-only view of the file.

        -> F32, F16, F64 and integer types: an array of that type in the tensor's shape; all others
           (quantised types and DBF1): uint8 (..., bytes of a row)

        Raises FormatError if there is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.path}: tensor {name} is missing")
        if info.type in _NUMPY:
            dtype, shape = np.dtype(_NUMPY[info.type]), info.shape
        else:
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.type)]
            dtype, shape = np.dtype(np.uint8), (*info.shape[:-1], info.shape[-1] // block * nbytes)
        count = info.nbytes // dtype.itemsize
        return np.frombuffer(self._mapped(), dtype=dtype, count=count, offset=info.offset).reshape(shape)

    def release(self) -> None:
        """Drop the file's pages from this process's memory. What is used again is read again, by itself."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the file. Arrays that `data` returned stay valid; the last of them unmaps it then."""
        if self._map is not None:
            with contextlib.suppress(BufferError):  # views are alive: the last of them will unmap it
                self._map.close()
            self._map = None

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # -- parsing ----------------------------------------------------------------------------------------

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise FormatError(f"{self.path}: the file was closed")
        return self._map

    def _fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}")

    def _need(self, nbytes: int, what: str) -> int:
        """Claim the next nbytes; returns their offset."""
        pos = self._pos
        if nbytes > self.size - pos:
            raise self._fail(
                f"truncated: {what} at byte {pos} needs {nbytes} bytes, {self.size - pos} are left"
            )
        self._pos = pos + nbytes
        return pos

    def _u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._mapped(), self._need(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._mapped(), self._need(8, what))[0])

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._u64(f"length of {what}")
        if limit is not None and not 0 < length <= limit:
            raise self._fail(f"{what} at byte {self._pos} is {length} bytes long, wanted 1 to {limit}")
        pos = self._need(length, what)
        try:
            return self._mapped()[pos : pos + length].decode("utf-8")
        except UnicodeDecodeError as e:
            raise self._fail(f"{what} at byte {pos} is not UTF-8 ({e.reason})") from None

    def _parse(self) -> None:
        magic = self._mapped()[:4]
        if magic != MAGIC:
            raise self._fail(f"not a GGUF file: it begins with {magic!r}, wanted {MAGIC!r}")
        self._pos = 4
        self.version = self._u32("version")
        if self.version not in VERSIONS:
            if self.version & 0xFFFF == 0 and self.version:
                raise self._fail("a big-endian GGUF file; only little-endian ones can be read")
            raise self._fail(f"GGUF version {self.version}, wanted 2 or 3")
        n_tensors = self._count("tensors", 33)  # length, 1-byte name, dims, 1 dim, type, offset
        n_values = self._count("metadata values", 14)  # length, 1-byte key, type, 1-byte value
        self._parse_metadata(n_values)
        self._parse_tensors(n_tensors)

    def _count(self, what: str, at_least: int) -> int:
        count = self._u64(f"number of {what}")
        if count > (self.size - self._pos) // at_least:
            raise self._fail(f"{count} {what} cannot fit in a file of {self.size} bytes")
        return count

    def _parse_metadata(self, count: int) -> None:
        values: dict[str, Any] = {}
        kinds: dict[str, tuple[int, int | None]] = {}
        for i in range(count):
            key = self._string(f"metadata key {i}", MAX_KEY_BYTES)
            if key in values:
                raise self._fail(f"metadata key {key!r} occurs twice")
            kind = self._u32(f"type of {key!r}")
            values[key] = value = self._value(key, kind)
            kinds[key] = (kind, value.kind if isinstance(value, _LazyArray) else None)
            if key == "general.alignment":
                self._set_alignment(kind, values[key])
        self.metadata = Metadata(self, values, kinds)

    def _set_alignment(self, kind: int, value: Any) -> None:
        """Data sections begin at multiples of the alignment; 8 at least, so that typed views are aligned."""
        if kind != 4 or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._fail(
                f"general.alignment is {value!r}, wanted a uint32 power of 2 in 8..{MAX_ALIGNMENT}"
            )
        self.alignment = value

    def _value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self._string(f"value of {key!r}")
        if kind == ARRAY:
            return self._skip_array(key)
        if kind not in SCALARS:
            raise self._fail(f"{key!r} has the unknown value type {kind}")
        scalar = _STRUCTS[kind]
        value = scalar.unpack_from(self._mapped(), self._need(scalar.size, f"value of {key!r}"))[0]
        return self._bool(key, value) if kind == _BOOL else value

    def _bool(self, key: str, value: int) -> bool:
        if value > 1:
            raise self._fail(f"{key!r} holds the bool {value}, wanted 0 or 1")
        return bool(value)

    def _skip_array(self, key: str) -> _LazyArray:
        kind = self._u32(f"element type of {key!r}")
        count = self._u64(f"length of {key!r}")
        if kind in SCALARS:
            return _LazyArray(kind, count, self._need(count * _STRUCTS[kind].size, f"array {key!r}"))
        if kind != STRING:
            raise self._fail(f"{key!r} is an array of the unknown type {kind}")
        start = self._pos
        if count > (self.size - start) // 8:
            raise self._fail(f"truncated: {count} strings of {key!r} cannot fit in {self.size - start} bytes")
        data, pos, last, length_at = self._mapped(), start, self.size - 8, _U64.unpack_from
        for i in range(count):
            if pos > last:
                raise self._fail(f"truncated: string {i} of {key!r} at byte {pos}")
            pos += 8 + length_at(data, pos)[0]
        if pos > self.size:
            raise self._fail(f"truncated: the last string of {key!r} ends at byte {pos} of {self.size}")
        self._pos = pos
        return _LazyArray(kind, count, start)

    def _parse_array(self, key: str, array: _LazyArray) -> list[Any]:
        data = self._mapped()
        if array.kind != STRING:
            dtype = np.dtype("<" + SCALARS[array.kind][1])
            values = np.frombuffer(data, dtype=dtype, count=array.count, offset=array.offset).tolist()
            return [self._bool(key, v) for v in values] if array.kind == _BOOL else values
        out, pos, length_at = [], array.offset, _U64.unpack_from  # bounds were checked when it was skipped
        try:
            for _ in range(array.count):
                end = pos + 8 + length_at(data, pos)[0]
                out.append(data[pos + 8 : end].decode("utf-8"))
                pos = end
        except UnicodeDecodeError as e:
            raise self._fail(f"string {len(out)} of {key!r} is not UTF-8 ({e.reason})") from None
        return out

    def _parse_tensors(self, count: int) -> None:
        found: list[TensorInfo] = []
        names: set[str] = set()
        for i in range(count):
            info = self._tensor_info(i)
            if info.name in names:
                raise self._fail(f"tensor {info.name!r} occurs twice")
            names.add(info.name)
            found.append(info)
        base = -(-self._pos // self.alignment) * self.alignment
        for info in found:
            end = base + info.offset + info.nbytes
            if end > self.size:
                raise self._fail(f"tensor {info.name!r} ends at byte {end}, but the file has {self.size}")
        placed = [TensorInfo(t.name, t.type, t.shape, base + t.offset, t.nbytes) for t in found]
        by_offset = sorted(placed, key=lambda t: t.offset)
        for one, two in pairwise(by_offset):
            if one.offset + one.nbytes > two.offset:
                raise self._fail(f"tensors {one.name!r} and {two.name!r} overlap at byte {two.offset}")
        self.tensors = {t.name: t for t in placed}

    def _tensor_info(self, i: int) -> TensorInfo:
        """One tensor's entry; its offset is still relative to the data section."""
        name = self._string(f"name of tensor {i}", MAX_NAME_BYTES)
        n_dims = self._u32(f"number of dimensions of {name!r}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._fail(f"tensor {name!r} has {n_dims} dimensions, wanted 1 to {MAX_DIMS}")
        dims = [self._u64(f"dimensions of {name!r}") for _ in range(n_dims)]
        kind = self._u32(f"type of {name!r}")
        offset = self._u64(f"offset of {name!r}")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self._fail(f"tensor {name!r} has the unknown type {kind}") from None
        if dims[0] % block:
            raise self._fail(
                f"tensor {name!r}: rows of {dims[0]} are no multiple of {block} ({type_name(kind)})"
            )
        nbytes = dims[0] // block * block_bytes
        for d in dims[1:]:
            nbytes *= d  # a Python integer: it cannot wrap
        if not 0 < nbytes <= self.size:
            raise self._fail(
                f"tensor {name!r} of shape {dims[::-1]} has {nbytes} bytes, the file {self.size}"
            )
        if offset % self.alignment:
            raise self._fail(f"tensor {name!r} has offset {offset}, no multiple of {self.alignment}")
        return TensorInfo(name, kind, tuple(reversed(dims)), offset, nbytes)
