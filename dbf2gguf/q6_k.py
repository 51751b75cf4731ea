"""Quantize to ggml's type Q6_K, which the gguf package can only read."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

BLOCK, BLOCK_BYTES = GGML_QUANT_SIZES[GGMLQuantizationType.Q6_K]
GROUP = 16
"""Weights that share a scale: int8, times the block's float16 d."""

LOW, HIGH = -32, 31
"""A weight is d * scale * v, LOW <= v <= HIGH."""

CANDIDATES = np.arange(-9, 10) * 0.1
"""The weight of largest magnitude is given -32 less one of these, before rounding, as in ggml."""

TINY = 1e-15
"""Groups of smaller weights are zeros."""

BLOCKS_AT_ONCE = 256

Floats = NDArray[np.float32]


def quantize_q6_k(x: Floats) -> NDArray[np.uint8]:
    """Q6_K blocks of the rows of x.

    x   (rows, cols)          float32, cols a multiple of 256
    ->  (rows, cols/256*210)  uint8

    Scales are searched as ggml's quantize_row_q6_K_ref does, but for the least squared error, where ggml
    weighs it by x^2: 1 to 3 percent less error (root mean square) on random weights of several distributions.
    """
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK // GROUP, GROUP)
    parts = [_quantize(blocks[i : i + BLOCKS_AT_ONCE]) for i in range(0, blocks.shape[0], BLOCKS_AT_ONCE)]
    return np.concatenate(parts).reshape(x.shape[0], -1)


def _quantize(x: Floats) -> NDArray[np.uint8]:
    """x: (blocks, 16, 16) -> (blocks, 210)"""
    wanted = _group_scales(x)
    largest = np.take_along_axis(wanted, np.abs(wanted).argmax(1)[:, None], 1)  # (blocks, 1)
    d = (largest / -128).astype(np.float16)
    step = d.astype(np.float32)
    scale = np.rint(np.divide(wanted, step, out=np.zeros_like(wanted), where=step != 0))
    least = np.full(wanted.shape, np.inf, np.float32)
    best = np.zeros_like(wanted)
    for nudge in (0, -1, 1):
        tried = np.clip(scale + nudge, -128, 127)
        error = np.square(x - _values(x, step * tried) * (step * tried)[..., None]).sum(-1)
        best = np.where(error < least, tried, best)
        least = np.minimum(error, least)
    v = (_values(x, step * best) - LOW).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = v[:, :, :2] & 15 | v[:, :, 2:] << 4
    two = v >> 4
    high = two[:, :, 0] | two[:, :, 1] << 2 | two[:, :, 2] << 4 | two[:, :, 3] << 6
    fields = (low, high, best.astype(np.int8).view(np.uint8), d.view(np.uint8))
    return np.concatenate([field.reshape(x.shape[0], -1) for field in fields], 1)


def _values(x: Floats, scale: Floats) -> Floats:
    """The v nearest to x / scale; 0 where the scale is 0. x: (..., 16), scale: (...)"""
    divisor = scale[..., None]
    v = np.divide(x, divisor, out=np.zeros_like(x), where=divisor != 0)
    return np.clip(np.rint(v), LOW, HIGH)


def _group_scales(x: Floats) -> Floats:
    """The scale of each group that, refitted to the v of some candidate, has the least squared error.

    x: (blocks, 16, 16) -> (blocks, 16)
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    best, scale = np.zeros(x.shape[:2], np.float32), np.zeros(x.shape[:2], np.float32)
    for extra in CANDIDATES:
        inverse = np.divide(
            np.float32(-(32 + extra)), largest, out=np.zeros_like(largest), where=np.abs(largest) >= TINY
        )
        v = np.clip(np.rint(x * inverse), LOW, HIGH)
        xv, vv = (x * v).sum(-1), (v * v).sum(-1)
        gain = np.divide(xv * xv, vv, out=np.zeros_like(xv), where=vv > 0)
        scale = np.where(gain > best, np.divide(xv, vv, out=np.zeros_like(xv), where=vv > 0), scale)
        best = np.maximum(gain, best)
    return scale
