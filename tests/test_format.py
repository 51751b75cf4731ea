"""The DBF1 tensor type: bytes, round trips, and what gguf makes of it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime.errors import FormatError
from runtime.format import BLOCK_BYTES, BLOCK_SIGNS, DBF1, DBF1_TYPE, pack, pad8, unpack

SHAPES = st.tuples(st.integers(0, 9), st.integers(0, 70))


def test_golden_bytes() -> None:
    """One row, column by column:  + - - - - - - -   - + - + - - - +   + + -
    bit i of byte j is column 8j+i:  00000001         10001010          00000011 (5 filler bits 0)"""
    row = [1, -1, -1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1]
    packed = pack(np.array([row, [-s for s in row]], dtype=np.float32))
    assert packed.tolist() == [[0x01, 0x8A, 0x03], [0xFE, 0x75, 0x04]]
    assert unpack(packed, 19).tolist() == [row, [-s for s in row]]


def test_golden_id() -> None:
    """The type's id is its name in a hex dump of a file."""
    assert DBF1.to_bytes(4, "little") == b"DBF1"
    assert int(DBF1_TYPE) == DBF1 == 826688068
    assert (BLOCK_SIGNS, BLOCK_BYTES) == (8, 1)


def test_zero_and_nan() -> None:
    """Zero of either sign is +1; what is not a number is not >= 0, so -1."""
    assert pack(np.array([[0.0, -0.0, np.nan, -1e-30]], dtype=np.float32)).tolist() == [[0b0011]]


@given(hnp.arrays(np.int8, SHAPES, elements=st.sampled_from([-1, 1])))
def test_round_trip_of_signs(signs: np.ndarray) -> None:
    packed = pack(signs)
    assert packed.shape == (signs.shape[0], pad8(signs.shape[1]) // 8)
    assert packed.dtype == np.uint8
    assert np.array_equal(unpack(packed, signs.shape[1]), signs)
    filler = unpack(packed)[:, signs.shape[1] :]
    assert (filler == -1).all()  # bit 0


@given(hnp.arrays(np.uint8, SHAPES))
def test_round_trip_of_bytes(data: np.ndarray) -> None:
    signs = unpack(data)
    assert signs.shape == (data.shape[0], data.shape[1] * 8)
    assert signs.dtype == np.int8
    assert np.array_equal(pack(signs), data)


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        SHAPES,
        elements={"min_value": -2.0, "max_value": 2.0},
    )
)
def test_bit_by_bit(values: np.ndarray) -> None:
    """The definition, one bit at a time."""
    packed = pack(values)
    for (row, column), value in np.ndenumerate(values):
        assert (packed[row, column >> 3] >> (column & 7)) & 1 == (value >= 0)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 172, 576])
def test_pad8(n: int) -> None:
    assert pad8(n) % 8 == 0
    assert n <= pad8(n) < n + 8


def test_misuse() -> None:
    with pytest.raises(FormatError, match=r"shape \(3,\)"):
        pack(np.ones(3))
    with pytest.raises(FormatError, match="int8"):
        unpack(np.ones((1, 1), np.int8))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="17 columns of rows that hold 16"):
        unpack(np.zeros((1, 2), np.uint8), 17)


def test_gguf_knows_the_type() -> None:
    assert gguf.GGMLQuantizationType(DBF1) is DBF1_TYPE
    assert gguf.GGMLQuantizationType["DBF1"] is DBF1_TYPE
    assert DBF1_TYPE.name == "DBF1"
    assert gguf.GGML_QUANT_SIZES[DBF1_TYPE] == (8, 1)
    assert gguf.quant_shape_to_byte_shape((5, 24), DBF1_TYPE) == (5, 3)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 12).map(lambda n: 8 * n), seed=st.integers(0, 99))
def test_gguf_quantizes(rows: int, cols: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    data = gguf.quants.quantize(values, DBF1_TYPE)
    assert np.array_equal(data, pack(values))
    assert np.array_equal(gguf.quants.dequantize(data, DBF1_TYPE), np.where(values >= 0, 1.0, -1.0))


def test_gguf_writes_and_reads(tmp_path: Path) -> None:
    signs = np.random.default_rng(3).choice([-1.0, 1.0], (13, 40)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.dbf_a", pack(signs), raw_dtype=DBF1_TYPE)
    writer.add_tensor("after", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one, two = GGUFReader(tmp_path / "x.gguf").tensors
    assert one.tensor_type is DBF1_TYPE
    assert one.shape.tolist() == [40, 13]
    assert one.n_bytes == 13 * 5
    assert np.array_equal(gguf.quants.dequantize(one.data, one.tensor_type), signs)
    assert two.data.tolist() == [0, 1, 2]
