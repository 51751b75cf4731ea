"""Numba's kernels by themselves, where no test of a whole model tells enough."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

kernels = pytest.importorskip("runtime.kernels_numba")


def to_q8_0(x):
    y = np.empty(x.size // 32 * 34, np.uint8)
    kernels.to_q8_0(y, x, x.size)
    return y


def test_q8_0_is_that_of_gguf():
    """Byte for byte, but for halves, which gguf rounds away from zero."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(32 * 200) * np.repeat(10.0 ** rng.uniform(-4, 4, 200), 32)).astype(np.float32)
    data, theirs = to_q8_0(x), gguf.quants.quantize(x, Type.Q8_0)
    assert (data != theirs).mean() < 1e-3
    assert np.abs(data.astype(int) - theirs.astype(int)).max() <= 1
    values = np.empty_like(x)
    kernels.from_q8_0(values, data, x.size)
    np.testing.assert_array_equal(values, gguf.quants.dequantize(data, Type.Q8_0))
    d = np.abs(x.reshape(-1, 32)).max(1) / 127
    # half a step, and the rounding of d to float16, 127 times (below 2^-14 its spacing is 2^-24)
    assert (np.abs(values - x).reshape(-1, 32).max(1) <= d * (0.5001 + 127 * 2.0**-11) + 127 * 2.0**-25).all()


def test_q8_0_of_odd_values():
    for value, scale in ((0.0, 0.0), (1e-40, 0.0), (np.inf, np.inf), (-np.inf, np.inf), (np.nan, np.nan)):
        x = np.zeros(64, np.float32)
        x[40] = value
        data = to_q8_0(x).reshape(2, 34)
        assert (data[:, 2:] == 0).all()
        np.testing.assert_equal(data[:, :2].copy().view(np.float16).ravel(), np.array([0, scale], np.float16))
    x = np.full(32, -8.0, np.float32)
    x[1] = 4.0
    assert to_q8_0(x)[2:5].view(np.int8).tolist() == [-127, 64, -127]
