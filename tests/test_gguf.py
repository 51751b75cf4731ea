"""runtime.gguf against gguf's own reader, and against damaged and hostile files."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from calls import count_calls
from make_gguf import tiny_config, tiny_weights, write, write_model

from runtime.errors import DbfError, FormatError
from runtime.format import DBF1, DBF1_TYPE
from runtime.gguf import GgufFile
from runtime.model import load_model_file

U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return U64(len(raw)) + raw


def header(n_tensors: int = 0, n_values: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + U32(version) + U64(n_tensors) + U64(n_values)


def entry(name: str, dims: list[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    n = len(dims) if n_dims is None else n_dims
    return text(name) + U32(n) + b"".join(U64(d) for d in dims) + U32(kind) + U64(offset)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = tiny_config(n_layers=1)
    return write_model(tmp_path / "tiny.gguf", config, tiny_weights(config, bias=True))


def test_agrees_with_gguf(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "a.bool": True, "a.int": 7, "a.float": 0.5, "a.text": "naïve \N{SNOWMAN}", "a.ints": [1, -2, 3],
        "a.floats": [0.5, 0.25], "a.bools": [True, False], "a.texts": ["", "x", "é"],
    }  # fmt: skip
    arrays = {
        "f32": (rng.standard_normal((3, 5)).astype(np.float32), None),
        "f16": (rng.standard_normal((2, 3, 4)).astype(np.float16), None),
        "i8": (rng.integers(-128, 128, (3, 7), dtype=np.int8), None),
        "q8_0": (rng.integers(0, 256, (4, 68), dtype=np.uint8), gguf.GGMLQuantizationType.Q8_0),
        "q6_k": (rng.integers(0, 256, (2, 210), dtype=np.uint8), gguf.GGMLQuantizationType.Q6_K),
        "dbf1": (rng.integers(0, 256, (5, 3), dtype=np.uint8), DBF1_TYPE),
    }
    path = write(tmp_path / "x.gguf", "test", values, arrays)
    theirs = gguf.GGUFReader(path)
    with GgufFile(path) as ours:
        assert ours.version == 3
        assert dict(ours.metadata) == {
            key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
        }
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            info = ours.tensors[t.name]
            assert (info.type, info.offset, info.nbytes) == (t.tensor_type, t.data_offset, t.n_bytes)
            assert info.shape == tuple(reversed(t.shape.tolist()))
            data = ours.data(t.name)
            assert data.dtype == t.data.dtype
            assert data.shape == t.data.shape
            assert np.array_equal(data, t.data)
            assert not data.flags.writeable
        assert ours.tensors["dbf1"].type == DBF1
        assert ours.tensors["dbf1"].shape == (5, 24)


def test_views_outlive_the_file(tiny: Path) -> None:
    with GgufFile(tiny) as file:
        data = file.data("output_norm.weight")
        name = next(iter(file.tensors))
    assert np.isfinite(data).all()
    with pytest.raises(FormatError, match="closed"):
        file.data(name)


def test_missing_tensor(tiny: Path) -> None:
    with GgufFile(tiny) as file, pytest.raises(FormatError, match=r"tiny\.gguf: tensor nope is missing"):
        file.data("nope")


def test_large_vocabulary_opens_fast(tmp_path: Path) -> None:
    """Few calls for each string, none for each number."""
    tokens = [f"token{i}" for i in range(50_000)]
    values = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": tokens,
        "tokenizer.ggml.scores": [0.5] * 50_000,
    }
    path = write(tmp_path / "v.gguf", "test", values, {"x": (np.zeros(4, np.float32), None)})
    assert count_calls(lambda: GgufFile(path).close()) < 5 * 2 * len(tokens)
    with GgufFile(path) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == tokens


ONE = b"\0" * 64
VALUES = {
    "empty file": b"",
    "too short": b"GGUF",
    "wrong magic": header(magic=b"GGML"),
    "version 1": header(version=1),
    "version 4": header(version=4),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + U64(0) + U64(0),
    "2^64-1 tensors": header(n_tensors=2**64 - 1) + ONE,
    "2^64-1 values": header(n_values=2**64 - 1) + ONE,
    "key of 2^64-1 bytes": header(0, 1) + U64(2**64 - 1) + ONE,
    "key too long": header(0, 1) + text("k" * 65536) + U32(4) + U32(1),
    "empty key": header(0, 1) + text("") + U32(4) + U32(1),
    "key not UTF-8": header(0, 1) + text(b"\xff\xfe") + U32(4) + U32(1),
    "key twice": header(0, 2) + (text("k") + U32(4) + U32(1)) * 2,
    "unknown value type": header(0, 1) + text("k") + U32(99) + ONE,
    "bool of 2": header(0, 1) + text("k") + U32(7) + b"\2",
    "text of 2^63 bytes": header(0, 1) + text("k") + U32(8) + U64(2**63) + ONE,
    "text not UTF-8": header(0, 1) + text("k") + U32(8) + text(b"\xc3\x28"),
    "array in array": header(0, 1) + text("k") + U32(9) + U32(9) + U64(1) + ONE,
    "array of unknown type": header(0, 1) + text("k") + U32(9) + U32(77) + U64(1) + ONE,
    "array of 2^61 numbers": header(0, 1) + text("k") + U32(9) + U32(10) + U64(2**61) + ONE,
    "array of 2^60 texts": header(0, 1) + text("k") + U32(9) + U32(8) + U64(2**60) + ONE,
    "array, text too long": header(0, 1) + text("k") + U32(9) + U32(8) + U64(2) + U64(1000) + ONE,
    "array, text wraps": header(0, 1) + text("k") + U32(9) + U32(8) + U64(2) + U64(2**64 - 8) + ONE,
    "alignment 0": header(0, 1) + text("general.alignment") + U32(4) + U32(0),
    "alignment 24": header(0, 1) + text("general.alignment") + U32(4) + U32(24),
    "alignment 2^31": header(0, 1) + text("general.alignment") + U32(4) + U32(2**31),
    "alignment of another type": header(0, 1) + text("general.alignment") + U32(8) + text("32"),
    "million dims": header(1) + entry("t", [1, 1], n_dims=1_000_000) + ONE,
    "no dims": header(1) + entry("t", []) + ONE,
    "product wraps to 0": header(1) + entry("t", [2**32, 2**32]) + ONE,
    "product wraps to 16": header(1) + entry("t", [2**63 + 2, 2]) + ONE,
    "dim 0": header(1) + entry("t", [0, 4]) + ONE,
    "larger than the file": header(1) + entry("t", [1000]) + ONE,
    "offset out of range": header(1) + entry("t", [4], offset=1 << 20) + ONE,
    "offset 2^64-32": header(1) + entry("t", [4], offset=2**64 - 32) + ONE,
    "offset not aligned": header(1) + entry("t", [4], offset=4) + ONE,
    "unknown tensor type": header(1) + entry("t", [4], kind=9999) + ONE,
    "removed tensor type": header(1) + entry("t", [32], kind=4) + ONE,
    "row no multiple of a block": header(1) + entry("t", [31], kind=8) + ONE,
    "DBF1 row no multiple of 8": header(1) + entry("t", [12], kind=DBF1) + ONE,
    "name too long": header(1) + entry("t" * 64, [4]) + ONE,
    "name empty": header(1) + entry("", [4]) + ONE,
    "name twice": header(2) + entry("t", [4]) + entry("t", [4], offset=32) + ONE * 4,
    "overlap": header(2) + entry("t", [12]) + entry("u", [4], offset=32) + ONE * 4,
}


@pytest.mark.parametrize("name", VALUES)
def test_hostile(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(VALUES[name])
    with pytest.raises(FormatError, match=r"bad\.gguf"):
        GgufFile(path)


def test_lazy_array_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(0, 1) + text("k") + U32(9) + U32(8) + U64(2) + text("a") + text(b"\xff"))
    with GgufFile(path) as file, pytest.raises(FormatError, match="string 1 of 'k' is not UTF-8"):
        file.metadata["k"]


def try_open(path: Path) -> bool:
    """Read everything there is; only FormatError may come out."""
    try:
        with GgufFile(path) as file:
            for key in file.metadata:
                file.metadata[key]
            for name in file.tensors:
                file.data(name).sum(dtype=np.float64)
    except FormatError:
        return False
    return True


def header_size(path: Path) -> int:
    with GgufFile(path) as file:
        return min(t.offset for t in file.tensors.values())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    values = {
        "a.text": "xyz",
        "a.texts": ["p", "qq"],
        "a.bools": [True, False],
        "a.int": 3,
        "general.alignment": 32,
    }
    arrays = {"one": (np.ones((2, 4), np.float32), None), "two": (np.zeros((3, 2), np.uint8), DBF1_TYPE)}
    return write(tmp_path / "small.gguf", "test", values, arrays)


def test_every_truncation_fails(tmp_path: Path, small: Path) -> None:
    good = small.read_bytes()
    assert try_open(small)
    with GgufFile(small) as file:  # the padding after the last tensor may be missing
        end = max(t.offset + t.nbytes for t in file.tensors.values())
    bad = tmp_path / "bad.gguf"
    for n in range(end):
        bad.write_bytes(good[:n])
        assert not try_open(bad), n


def test_every_header_byte_mutated(tmp_path: Path, small: Path) -> None:
    good = small.read_bytes()
    bad = tmp_path / "bad.gguf"
    for i in range(header_size(small)):
        for value in {0, 1, 0x7F, 0x80, 0xFF, good[i] ^ 1, good[i] ^ 0x80}:
            bad.write_bytes(good[:i] + bytes([value]) + good[i + 1 :])
            try_open(bad)


def test_random_mutations_of_a_model(tmp_path: Path, tiny: Path) -> None:
    good, rng = tiny.read_bytes(), np.random.default_rng(7)
    end, bad = header_size(tiny), tmp_path / "bad.gguf"
    for _ in range(1500):
        data = bytearray(good)
        for at in rng.integers(0, end, rng.integers(1, 5)):
            data[at] = rng.choice([0, 1, 0xFF, int(rng.integers(256))])
        bad.write_bytes(data)
        with contextlib.suppress(DbfError):
            load_model_file(bad).close()
