"""Q6_K as written by dbf2gguf, against gguf's reader and the quantizer of ggml."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dbf2gguf.q6_k import quantize_q6_k

F = np.float32


def ggml_group(x):
    """ggml-quants.c, make_qx_quants(16, 32, x, .., 1, NULL): the scale of a group."""
    largest = x[np.abs(x).argmax()]
    if abs(largest) < 1e-15:
        return F(0)
    best = scale = F(0)
    for tenths in (0, *range(-9, 0), *range(1, 10)):
        v = np.clip(np.rint(F(-(32 + 0.1 * tenths)) / largest * x), -32, 31)
        xv, vv = (x * x * x * v).sum(), (x * x * v * v).sum()
        if vv > 0 and xv * xv > best * vv:
            scale = xv / vv
            best = scale * xv
    return scale


def ggml_values(x):
    """ggml-quants.c, quantize_row_q6_K_ref, and back: what a reader gets of rows x."""
    out = np.zeros_like(x)
    for block, values in zip(x.reshape(-1, 16, 16), out.reshape(-1, 16, 16), strict=True):
        scales = np.array([ggml_group(group) for group in block], F)
        largest = scales[np.abs(scales).argmax()]
        if abs(largest) < 1e-15:
            continue
        d = F(np.float16(largest / F(-128)))
        for i, group in enumerate(block):
            step = d * F(min(127, np.rint(F(-128) / largest * scales[i])))
            if step:
                values[i] = step * np.clip(np.rint(group / step), -32, 31)
    return out


def read(data):
    return gguf.quants.dequantize(data, Type.Q6_K)


def rmse(x, y):
    return np.sqrt(np.square(x - y, dtype=np.float64).mean())


DRAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "positive": lambda rng, shape: rng.uniform(0, 1, shape),
    "outliers": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 30, 1),
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    "rows of any size": lambda rng, shape: (
        rng.standard_normal(shape) * 10 ** rng.uniform(-2, 3, (shape[0], 1))
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_as_good_as_ggml(name):
    x = DRAWS[name](np.random.default_rng(1), (8, 768)).astype(F)
    data = quantize_q6_k(x)
    assert (data.shape, data.dtype) == ((8, 630), np.uint8)
    assert rmse(read(data), x) <= rmse(ggml_values(x), x)
    assert rmse(read(data), x) < 0.04 * np.sqrt(np.square(x).mean())


def test_integers_are_exact():
    """Weights that Q6_K can hold are held: one step of 1/4 a block, all of -32 .. 31."""
    v = np.random.default_rng(2).integers(-32, 32, (4, 16, 16))
    v[:, :, 0] = -32
    x = (v.reshape(4, 256) / 4).astype(F)
    np.testing.assert_allclose(read(quantize_q6_k(x)), x, rtol=1e-3)


def test_zeros_and_tiny_weights():
    x = np.zeros((3, 512), F)
    x[1, :256] = 1e-12
    x[2, 300] = -7.0
    assert (read(quantize_q6_k(x))[[0, 1]] == 0).all()
    row = read(quantize_q6_k(x))[2]
    assert row[300] == pytest.approx(-7.0, rel=1e-3)
    assert np.count_nonzero(row) == 1


@pytest.mark.filterwarnings("error")
@settings(max_examples=100, deadline=None)
@given(arrays(F, (2, 256), elements=st.floats(-1e4, 1e4, width=32)))
def test_no_weight_is_far_off(x):
    """Every value is within one step of a scale that the block's largest weight needs."""
    values = read(quantize_q6_k(x))
    assert np.isfinite(values).all()
    assert (np.abs(values - x).max(1) <= np.abs(x).max(1) / 31 + 127 * 32 * 2.0**-25).all()
