"""The kernels of cext/src/kernels_ref.c in Python: same names, parameters, order and bits.

What the numbers are is said in cext/src/kernels.h. float16 arrays are passed as uint16. The kernels of
kernels.h that only lay out memory (sign_pack, sign_table, sign_table8 and their sizes, to_columns, to_rows)
have no mirror: here, as in the scalar C, the layout is DBF1 itself and a table is q itself, so that
sign_gemv8 is sign_gemv; and numpy turns arrays.

numba never contracts a * b + c nor reorders a sum (no fastmath), and `prange` runs over output rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from runtime.config import ADJACENT, BLOCKS, Q4_0, Q6_K, Q8_0

if TYPE_CHECKING:
    F = TypeVar("F", bound=Callable[..., Any])
    Array = np.ndarray[Any, np.dtype[Any]]
    prange = range

    def njit(**options: bool) -> Callable[[F], F]: ...
else:
    from numba import njit, prange

LANES = 16
QMAX = 8191
QMAX8 = 126
STRIP = 16
Q4_0_BLOCK, Q4_0_BYTES = BLOCKS[Q4_0]
Q8_0_BLOCK, Q8_0_BYTES = BLOCKS[Q8_0]
Q6_K_BLOCK, Q6_K_BYTES = BLOCKS[Q6_K]
Q6_K_GROUP = 16
Q6_K_HIGH, Q6_K_SCALES, Q6_K_D = 128, 192, 208

f32 = np.float32

# ---- single numbers (cext/src/scalar.h) --------------------------------------------------------------------

EXP_LOW, EXP_HIGH = f32(-87.0), f32(88.0)
EXP_LOG2E = f32(1.44269504088896341)
EXP_LN2_HIGH, EXP_LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)
EXP_P0, EXP_P1, EXP_P2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
EXP_P3, EXP_P4, EXP_P5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)
GELU_1, GELU_3 = f32(1.59576912160573071), f32(0.0713548162726009)
ONE, TWO, HALF, ZERO = f32(1.0), f32(2.0), f32(0.5), f32(0.0)
SUBNORMAL = f32(2.0**-24)


@njit(cache=True)
def bits_of(x: Any) -> Any:
    """The bits of a float32 as uint32."""
    return np.float32(x).view(np.uint32)


@njit(cache=True)
def float_of(b: Any) -> Any:
    """The float32 that has the bits b."""
    return np.uint32(b).view(np.float32)


@njit(cache=True)
def f32_from_f16(h: Any) -> Any:
    """A float16, given as uint16, as float32."""
    b = np.int64(h)
    sign = (b & 0x8000) << 16
    exponent = (b >> 10) & 31
    mantissa = b & 0x3FF
    if exponent == 0:
        return float_of(sign | np.int64(bits_of(f32(mantissa) * SUBNORMAL)))
    if exponent == 31:
        return float_of(sign | 0x7F800000 | (mantissa << 13))
    return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13))


@njit(cache=True)
def f16_from_f32(x: Any) -> Any:
    """A float32 as float16, given as uint16; round to nearest even."""
    b = np.int64(bits_of(x))
    sign = (b >> 16) & 0x8000
    mag = b & 0x7FFFFFFF
    if mag > 0x7F800000:  # NaN
        return np.uint16(sign | 0x7E00)
    if mag >= 0x477FF000:  # rounds to infinity
        return np.uint16(sign | 0x7C00)
    if mag < 0x38800000:  # subnormal: adding 0.5 leaves the rounded result in the low bits
        return np.uint16(sign | (np.int64(bits_of(float_of(mag) + HALF)) - 0x3F000000))
    return np.uint16(sign | ((mag - 0x38000000 + 0xFFF + ((mag >> 13) & 1)) >> 13))


@njit(cache=True)
def exp_f32(x: Any) -> Any:
    """exp(x), within 2 ulp for -87 <= x <= 88; arguments beyond are clamped. Source: Cephes, expf.c."""
    if x != x:
        return x
    x = EXP_LOW if x < EXP_LOW else x
    x = EXP_HIGH if x > EXP_HIGH else x
    n = np.rint(x * EXP_LOG2E)
    r = (x - n * EXP_LN2_HIGH) - n * EXP_LN2_LOW
    p = ((((EXP_P0 * r + EXP_P1) * r + EXP_P2) * r + EXP_P3) * r + EXP_P4) * r + EXP_P5
    return ((p * (r * r) + r) + ONE) * float_of((np.int64(n) + 127) << 23)


@njit(cache=True)
def gelu_f32(x: Any) -> Any:
    """GELU with tanh, see `gelu_mul`."""
    return x / (ONE + exp_f32(-(x * (GELU_1 + GELU_3 * (x * x)))))


@njit(cache=True)
def softcap_f32(x: Any, cap: Any, twice: Any) -> Any:
    """cap * tanh(x / cap); twice is 2 / cap."""
    return cap - (cap + cap) / (exp_f32(x * twice) + ONE)


@njit(cache=True)
def f32_at(block: Any, at: int) -> Any:
    """The float16 in the bytes at, at + 1 of a block (uint8) as float32."""
    return f32_from_f16(np.uint16(block[at] | (np.uint16(block[at + 1]) << 8)))


@njit(cache=True)
def q4_0_value(block: Any, i: int) -> Any:
    """Integer i of a Q4_0 block (Q4_0_BYTES,) uint8."""
    return ((np.int32(block[2 + i % 16]) >> (0 if i < 16 else 4)) & 15) - np.int32(8)


@njit(cache=True)
def q8_0_value(block: Any, i: int) -> Any:
    """Integer i of a Q8_0 block (Q8_0_BYTES,) uint8."""
    return np.int32(np.int8(block[2 + i]))


@njit(cache=True)
def q6_k_value(block: Any, i: int) -> Any:
    """Integer i of a Q6_K block (Q6_K_BYTES,) uint8."""
    half, quarter, j = i // 128, i % 128 // 32, i % 32
    low = (np.int32(block[half * 64 + quarter % 2 * 32 + j]) >> (0 if quarter < 2 else 4)) & 15
    high = (np.int32(block[Q6_K_HIGH + half * 32 + j]) >> (2 * quarter)) & 3
    return (low | (high << 4)) - np.int32(32)


@njit(cache=True)
def add_block(lane: Any, d: Any, v: Any, p: Any) -> None:
    """lane[m] += d * isum,  isum = sum of v[k] * p[k] over the columns 2m, 2m + 1, 2m + 16, 2m + 17.

    v, p  (32,) integers: a block's weights, and the vector's numbers that they multiply
    """
    for m in range(8):
        k = 2 * m
        isum = v[k] * np.int32(p[k]) + v[k + 1] * np.int32(p[k + 1])
        isum += v[k + 16] * np.int32(p[k + 16]) + v[k + 17] * np.int32(p[k + 17])
        lane[m] = lane[m] + f32(isum) * d


@njit(cache=True)
def lanes_sum(lane: Any) -> Any:
    """The order in which every float sum ends; overwrites lane (LANES,) float32."""
    half = LANES // 2
    while half > 0:
        for i in range(half):
            lane[i] = lane[i] + lane[i + half]
        half //= 2
    return lane[0]


# ---- sign products -----------------------------------------------------------------------------------------


@njit(cache=True)
def quantize_to(qmax: int, q: Array, x: Array, n: int) -> Any:
    """quantize, with qmax in place of 8191."""
    # the largest |x| as an integer: the bits of non-negative floats are ordered, and NaN comes last
    magnitude = np.int64(0)
    for i in range(n):
        m = np.int64(bits_of(x[i])) & 0x7FFFFFFF
        magnitude = m if m > magnitude else magnitude
    absmax = float_of(magnitude)
    usable = magnitude >= 0x0D800000 and magnitude < 0x7F800000  # 2^-100 <= absmax < infinity
    inverse = f32(qmax) / absmax if usable else ZERO
    for i in range(n):
        q[i] = np.int16(np.rint(x[i] * inverse)) if usable else np.int16(0)
    return absmax / f32(qmax)


@njit(cache=True)
def quantize(q: Array, x: Array, n: int) -> Any:
    """scale = absmax(x) / 8191,  q[i] = rint(x[i] * (8191 / absmax(x)));  returns scale

    q  (n,)  int16, overwritten; all 0 where absmax(x) < 2^-100 or is no finite number
    x  (n,)  float32
    Mirror: cext/src/kernels_ref.c.
    """
    return quantize_to(QMAX, q, x, n)


@njit(cache=True)
def quantize_scaled(q: Array, z: Array, x: Array, s: Array | None, n: int, qmax: int) -> Any:
    """z[i] = x[i] * s[i],  scale = absmax(z) / qmax,  q[i] = rint(z[i] * (qmax / absmax(z)));  returns scale

    q     (n,)  int16, overwritten; as in quantize
    z     (n,)  float32, overwritten
    x     (n,)  float32
    s     (n,)  float16 as uint16, or None for z = x, of which nothing is written
    qmax        QMAX or QMAX8
    Mirror: cext/src/kernels_ref.c.
    """
    if s is None:
        return quantize_to(qmax, q, x, n)
    for i in range(n):
        z[i] = x[i] * f32_from_f16(s[i])
    return quantize_to(qmax, q, z, n)


@njit(cache=True)
def descale(y: Array, isum: Array, scale: Any, s: Array, bias: Array | None, n: int) -> None:
    """y[i] = (isum[i] * scale) * s[i] + bias[i],  s float16, bias may be NULL

    y     (n,)  float32, overwritten
    isum  (n,)  int32
    s     (n,)  float16 as uint16
    bias  (n,)  float32, or None
    Mirror: cext/src/kernels_ref.c.
    """
    for i in range(n):
        v = (f32(isum[i]) * scale) * f32_from_f16(s[i])
        y[i] = v if bias is None else v + bias[i]


@njit(cache=True, parallel=True)
def sign_gemv(isum: Array, w: Array, table: Array, rows: int, cols: int) -> None:
    """isum[r] = sum_k s[r,k] * q[k],  s = +1 where bit k of row r is set, else -1

    isum   (rows,)             int32, overwritten
    w      (rows, pad8(cols)/8) uint8, DBF1: bit k is (w[r, k >> 3] >> (k & 7)) & 1
    table  (cols,)             int16, q
    Mirror: cext/src/kernels_ref.c.  Source: DBF, arXiv:2505.11076.
    """
    for r in prange(rows):
        total = np.int32(0)
        for k in range(cols):
            bit = (w[r, k >> 3] >> (k & 7)) & 1
            total += np.int32(table[k]) if bit else -np.int32(table[k])
        isum[r] = total


# ---- sign products of many tokens --------------------------------------------------------------------------


@njit(cache=True)
def quantize_many(
    q: Array, scale: Array, x: Array, s: Array | None, cols: int, wide: int, stride: int, qmax: int
) -> None:
    """scale[i], q[k * wide + i] = those of quantize_scaled for x[k * stride + i] * s[k],  k < cols,
    i < DBF_STRIP

    q      (cols, wide)    int16, columns i < STRIP overwritten
    scale  (STRIP,)        float32, overwritten
    x      (cols, stride)  float32
    s      (cols,)         float16 as uint16, or None
    Mirror: cext/src/kernels_ref.c.
    """
    for i in range(STRIP):
        column, z = np.empty(cols, np.int16), np.empty(cols, np.float32)
        scale[i] = quantize_scaled(column, z, np.ascontiguousarray(x[:, i]), s, cols, qmax)
        for k in range(cols):
            q[k, i] = column[k]


@njit(cache=True, parallel=True)
def sign_gemm(isum: Array, w: Array, q: Array, work: Array | None, rows: int, cols: int, wide: int) -> None:
    """isum[r * wide + i] = sum_k s[r,k] * q[k * wide + i],  s = +1 where bit k of row r is set, else -1

    isum  (rows, wide)         int32, overwritten
    w     (rows, pad8(cols)/8) uint8, DBF1
    q     (cols, wide)         int16
    work  None: work space of the SIMD kernels
    Mirror: cext/src/kernels_ref.c.
    """
    for r in prange(rows):
        for i in range(wide):
            isum[r, i] = 0
        for k in range(cols):
            bit = (w[r, k >> 3] >> (k & 7)) & 1
            for i in range(wide):
                isum[r, i] += np.int32(q[k, i]) if bit else -np.int32(q[k, i])


@njit(cache=True)
def descale_many(
    y: Array, isum: Array, scale: Array, s: Array, bias: Array | None, rows: int, wide: int
) -> None:
    """y[r * wide + i] = (isum[r * wide + i] * scale[i]) * s[r] + bias[r],  s float16, bias may be NULL

    y      (rows, wide)  float32, overwritten
    isum   (rows, wide)  int32
    scale  (wide,)       float32
    s      (rows,)       float16 as uint16
    bias   (rows,)       float32, or None
    Mirror: cext/src/kernels_ref.c.
    """
    for r in range(rows):
        for i in range(wide):
            v = (f32(isum[r, i]) * scale[i]) * f32_from_f16(s[r])
            y[r, i] = v if bias is None else v + bias[r]


# ---- unfactorized matrices ---------------------------------------------------------------------------------


@njit(cache=True, parallel=True)
def gemv_f32(y: Array, w: Array, x: Array, n: int, rows: int, cols: int) -> None:
    """y[i,r] = sum_k w[r,k] * x[i,k]

    y  (n, rows)     float32, overwritten
    w  (rows, cols)  float32
    x  (n, cols)     float32
    Mirror: cext/src/kernels_ref.c.
    """
    for r in prange(rows):
        for i in range(n):
            lane = np.zeros(LANES, np.float32)
            for k in range(cols):
                lane[k % LANES] = lane[k % LANES] + w[r, k] * x[i, k]
            y[i, r] = lanes_sum(lane)


@njit(cache=True, parallel=True)
def gemv_f16(y: Array, w: Array, x: Array, n: int, rows: int, cols: int) -> None:
    """y[i,r] = sum_k w[r,k] * x[i,k]

    y  (n, rows)     float32, overwritten
    w  (rows, cols)  float16 as uint16
    x  (n, cols)     float32
    Mirror: cext/src/kernels_ref.c.
    """
    for r in prange(rows):
        for i in range(n):
            lane = np.zeros(LANES, np.float32)
            for k in range(cols):
                lane[k % LANES] = lane[k % LANES] + f32_from_f16(w[r, k]) * x[i, k]
            y[i, r] = lanes_sum(lane)


@njit(cache=True, parallel=True)
def gemv_q4_0(y: Array, w: Array, q: Array, scale: Array, n: int, rows: int, cols: int) -> None:
    """y[i,r] = scale[i] * sum_l sum_b d[r,b] * isum[r,b,l],  isum[r,b,l] = sum of v[r,k] * q[i,k] over the
    columns 2l, 2l + 1, 2l + 16, 2l + 17 of block b,  l = 0 .. 7;  cols % 32 == 0

    y      (n, rows)          float32, overwritten
    w      (rows, cols/32*18) uint8, blocks of Q4_0: d as float16, 32 weights as nibbles
    q      (n, cols)          int16
    scale  (n,)               float32
    Mirror: cext/src/kernels_ref.c.
    """
    for r in prange(rows):
        for i in range(n):
            lane, v = np.zeros(LANES, np.float32), np.empty(Q4_0_BLOCK, np.int32)
            for b in range(cols // Q4_0_BLOCK):
                block = w[r, b * Q4_0_BYTES : (b + 1) * Q4_0_BYTES]
                p = q[i, b * Q4_0_BLOCK : (b + 1) * Q4_0_BLOCK]
                for k in range(Q4_0_BLOCK):
                    v[k] = q4_0_value(block, k)
                add_block(lane, f32_at(block, 0), v, p)
            y[i, r] = lanes_sum(lane) * scale[i]


@njit(cache=True, parallel=True)
def gemv_q8_0(y: Array, w: Array, q: Array, scale: Array, n: int, rows: int, cols: int) -> None:
    """y[i,r] = scale[i] * sum_l sum_b d[r,b] * isum[r,b,l],  isum[r,b,l] = sum of v[r,k] * q[i,k] over the
    columns 2l, 2l + 1, 2l + 16, 2l + 17 of block b,  l = 0 .. 7;  cols % 32 == 0

    y      (n, rows)          float32, overwritten
    w      (rows, cols/32*34) uint8, blocks of Q8_0: d as float16, 32 weights as int8
    q      (n, cols)          int16
    scale  (n,)               float32
    Mirror: cext/src/kernels_ref.c.
    """
    for r in prange(rows):
        for i in range(n):
            lane, v = np.zeros(LANES, np.float32), np.empty(Q8_0_BLOCK, np.int32)
            for b in range(cols // Q8_0_BLOCK):
                block = w[r, b * Q8_0_BYTES : (b + 1) * Q8_0_BYTES]
                p = q[i, b * Q8_0_BLOCK : (b + 1) * Q8_0_BLOCK]
                for k in range(Q8_0_BLOCK):
                    v[k] = q8_0_value(block, k)
                add_block(lane, f32_at(block, 0), v, p)
            y[i, r] = lanes_sum(lane) * scale[i]


@njit(cache=True, parallel=True)
def gemv_q6_k(y: Array, w: Array, q: Array, scale: Array, n: int, rows: int, cols: int) -> None:
    """y[i,r] = scale[i] * sum_l sum_b d[r,b] * isum[r,b,l],  isum[r,b,l] = sum of s[r,g] * v[r,k] * q[i,k]
    over the columns 16g + 2l, 16g + 2l + 1 of block b,  g = 0 .. 15,  l = 0 .. 7;  cols % 256 == 0

    y      (n, rows)             float32, overwritten
    w      (rows, cols/256*210)  uint8, blocks of Q6_K: 256 weights of 6 bits, 16 scales as int8, d as float16
    q      (n, cols)             int16
    scale  (n,)                  float32
    Mirror: cext/src/kernels_ref.c.
    """
    for r in prange(rows):
        for i in range(n):
            lane = np.zeros(LANES, np.float32)
            for b in range(cols // Q6_K_BLOCK):
                block = w[r, b * Q6_K_BYTES : (b + 1) * Q6_K_BYTES]
                p = q[i, b * Q6_K_BLOCK : (b + 1) * Q6_K_BLOCK]
                d = f32_at(block, Q6_K_D)
                for m in range(8):
                    isum = np.int32(0)
                    for g in range(Q6_K_BLOCK // Q6_K_GROUP):
                        s = np.int32(np.int8(block[Q6_K_SCALES + g]))
                        k = g * Q6_K_GROUP + 2 * m
                        pair = q6_k_value(block, k) * np.int32(p[k])
                        pair += q6_k_value(block, k + 1) * np.int32(p[k + 1])
                        isum += s * pair
                    lane[m] = lane[m] + f32(isum) * d
            y[i, r] = lanes_sum(lane) * scale[i]


# ---- everything else ---------------------------------------------------------------------------------------


@njit(cache=True)
def rmsnorm(y: Array, x: Array, w: Array, eps: Any, n: int) -> None:
    """y[i] = (x[i] / sqrt(sum_k x[k]^2 / n + eps)) * w[i]

    y  (n,)  float32, overwritten
    x  (n,)  float32
    w  (n,)  float32
    Mirror: cext/src/kernels_ref.c.  Source: RMSNorm, arXiv:1910.07467.
    """
    lane = np.zeros(LANES, np.float32)
    for i in range(n):
        lane[i % LANES] = lane[i % LANES] + x[i] * x[i]
    root = ONE / np.sqrt(lanes_sum(lane) / f32(n) + eps)
    for i in range(n):
        y[i] = (x[i] * root) * w[i]


@njit(cache=True)
def layernorm(y: Array, x: Array, w: Array, b: Array | None, eps: Any, n: int) -> None:
    """y[i] = ((x[i] - mean) / sqrt(variance + eps)) * w[i] + b[i],
    mean and variance those of x;  b may be NULL

    y  (n,)  float32, overwritten
    x  (n,)  float32
    w  (n,)  float32
    b  (n,)  float32, or None
    Mirror: cext/src/kernels_ref.c.  Source: Layer Normalization, arXiv:1607.06450.
    """
    sums, squares = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for i in range(n):
        sums[i % LANES] = sums[i % LANES] + x[i]
    mean = lanes_sum(sums) / f32(n)
    for i in range(n):
        d = x[i] - mean
        squares[i % LANES] = squares[i % LANES] + d * d
    root = ONE / np.sqrt(lanes_sum(squares) / f32(n) + eps)
    for i in range(n):
        v = ((x[i] - mean) * root) * w[i]
        y[i] = v if b is None else v + b[i]


@njit(cache=True)
def rope(x: Array, cos_sin: Array, dims: int, pairing: int) -> None:
    """rotate the first dims elements of one head, in place: (a, b) -> (a cos - b sin, a sin + b cos)

    x        (dim,)       float32, dims <= dim
    cos_sin  (dims/2, 2)  float32
    pairing               ADJACENT: (2i, 2i + 1), HALVES: (i, i + dims/2)
    Mirror: cext/src/kernels_ref.c.  Source: RoFormer, arXiv:2104.09864.
    """
    half = dims // 2
    for i in range(half):
        ia = 2 * i if pairing == ADJACENT else i
        ib = 2 * i + 1 if pairing == ADJACENT else i + half
        a, b, c, s = x[ia], x[ib], cos_sin[i, 0], cos_sin[i, 1]
        x[ia] = a * c - b * s
        x[ib] = a * s + b * c


@njit(cache=True)
def scores(y: Array, x: Array, k: Array, factor: Any, n: int, dim: int) -> None:
    """y[j] = (sum_i k[j,i] * x[i]) * factor

    y  (n,)      float32, overwritten
    x  (dim,)    float32
    k  (n, dim)  float32
    Mirror: cext/src/kernels_ref.c.
    """
    for j in range(n):
        lane = np.zeros(LANES, np.float32)
        for i in range(dim):
            lane[i % LANES] = lane[i % LANES] + k[j, i] * x[i]
        y[j] = lanes_sum(lane) * factor


@njit(cache=True)
def softmax(x: Array, n: int) -> Any:
    """x[j] = exp(x[j] - max(x));  returns their sum

    x  (n,)  float32, overwritten
    Mirror: cext/src/kernels_ref.c.
    """
    top = f32(-np.inf)
    for j in range(n):
        top = x[j] if x[j] > top else top
    lane = np.zeros(LANES, np.float32)
    for j in range(n):
        x[j] = exp_f32(x[j] - top)
        lane[j % LANES] = lane[j % LANES] + x[j]
    return lanes_sum(lane)


@njit(cache=True)
def mix(y: Array, p: Array, v: Array, n: int, dim: int) -> None:
    """y[i] = y[i] + sum_j p[j] * v[j,i],  added one by one

    y  (dim,)    float32, overwritten
    p  (n,)      float32
    v  (n, dim)  float32
    Mirror: cext/src/kernels_ref.c.
    """
    for j in range(n):
        for i in range(dim):
            y[i] = y[i] + p[j] * v[j, i]


@njit(cache=True)
def silu_mul(y: Array, gate: Array, up: Array, n: int) -> None:
    """y[i] = gate[i] / (1 + exp(-gate[i])) * up[i]

    y     (n,)  float32, overwritten
    gate  (n,)  float32
    up    (n,)  float32
    Mirror: cext/src/kernels_ref.c.
    """
    for i in range(n):
        y[i] = gate[i] / (ONE + exp_f32(-gate[i])) * up[i]


@njit(cache=True)
def gelu_mul(y: Array, gate: Array, up: Array, n: int) -> None:
    """y[i] = gate[i] / (1 + exp(-a)) * up[i],  a = 2 sqrt(2/pi) (gate[i] + 0.044715 gate[i]^3), which is GELU
    with tanh

    y     (n,)  float32, overwritten
    gate  (n,)  float32
    up    (n,)  float32
    Mirror: cext/src/kernels_ref.c.  Source: GELU, arXiv:1606.08415.
    """
    for i in range(n):
        y[i] = gelu_f32(gate[i]) * up[i]


@njit(cache=True)
def gelu(y: Array, x: Array, n: int) -> None:
    """y[i] = x[i] / (1 + exp(-a)),  a = 2 sqrt(2/pi) (x[i] + 0.044715 x[i]^3)

    y  (n,)  float32, overwritten
    x  (n,)  float32
    Mirror: cext/src/kernels_ref.c.
    """
    for i in range(n):
        y[i] = gelu_f32(x[i])


@njit(cache=True)
def add(y: Array, x: Array, n: int) -> None:
    """y[i] = y[i] + x[i]

    y  (n,)  float32, overwritten
    x  (n,)  float32
    Mirror: cext/src/kernels_ref.c.
    """
    for i in range(n):
        y[i] = y[i] + x[i]


@njit(cache=True)
def scale(y: Array, factor: Any, n: int) -> None:
    """y[i] = y[i] * factor

    y  (n,)  float32, overwritten
    Mirror: cext/src/kernels_ref.c.
    """
    for i in range(n):
        y[i] = y[i] * factor


@njit(cache=True)
def softcap(y: Array, cap: Any, n: int) -> None:
    """y[i] = cap * tanh(y[i] / cap),  cap > 0

    y  (n,)  float32, overwritten
    Mirror: cext/src/kernels_ref.c.  Source: Gemma 2, arXiv:2408.00118.
    """
    twice = TWO / cap
    for i in range(n):
        y[i] = softcap_f32(y[i], cap, twice)


@njit(cache=True)
def to_f16(y: Array, x: Array, n: int) -> None:
    """float32 to float16, round to nearest even

    y  (n,)  float16 as uint16, overwritten
    x  (n,)  float32
    Mirror: cext/src/kernels_ref.c.
    """
    for i in range(n):
        y[i] = f16_from_f32(x[i])


@njit(cache=True)
def from_f16(y: Array, x: Array, n: int) -> None:
    """float16 to float32

    y  (n,)  float32, overwritten
    x  (n,)  float16 as uint16
    Mirror: cext/src/kernels_ref.c.
    """
    for i in range(n):
        y[i] = f32_from_f16(x[i])


@njit(cache=True)
def to_q8_0(y: Array, x: Array, n: int) -> None:
    """float32 to Q8_0: d = absmax / 127,  v[i] = rint(x[i] * (127 / absmax)),  absmax that of the block;
    n % 32 == 0

    y  (n/32*34,)  uint8, overwritten; all v = 0 where absmax < 2^-100 or is no finite number
    x  (n,)        float32
    Mirror: cext/src/kernels_ref.c.
    """
    for b in range(n // Q8_0_BLOCK):
        values = x[b * Q8_0_BLOCK : (b + 1) * Q8_0_BLOCK]
        block = y[b * Q8_0_BYTES : (b + 1) * Q8_0_BYTES]
        magnitude = np.int64(0)
        for i in range(Q8_0_BLOCK):
            m = np.int64(bits_of(values[i])) & 0x7FFFFFFF
            magnitude = m if m > magnitude else magnitude
        absmax = float_of(magnitude)
        usable = magnitude >= 0x0D800000 and magnitude < 0x7F800000  # 2^-100 <= absmax < infinity
        inverse = f32(127.0) / absmax if usable else ZERO
        d = np.int64(f16_from_f32(absmax / f32(127.0)))
        block[0] = np.uint8(d & 255)
        block[1] = np.uint8(d >> 8)
        for i in range(Q8_0_BLOCK):
            v = np.int64(np.rint(values[i] * inverse)) if usable else np.int64(0)
            block[2 + i] = np.uint8(v & 255)


@njit(cache=True)
def from_q4_0(y: Array, x: Array, n: int) -> None:
    """Q4_0 and Q8_0 to float32: y[i] = d * v[i],  n % 32 == 0

    y  (n,)        float32, overwritten
    x  (n/32*18,)  uint8
    Mirror: cext/src/kernels_ref.c.
    """
    for b in range(n // Q4_0_BLOCK):
        block = x[b * Q4_0_BYTES : (b + 1) * Q4_0_BYTES]
        for i in range(Q4_0_BLOCK):
            y[b * Q4_0_BLOCK + i] = f32_at(block, 0) * f32(q4_0_value(block, i))


@njit(cache=True)
def from_q8_0(y: Array, x: Array, n: int) -> None:
    """Q4_0 and Q8_0 to float32: y[i] = d * v[i],  n % 32 == 0

    y  (n,)        float32, overwritten
    x  (n/32*34,)  uint8
    Mirror: cext/src/kernels_ref.c.
    """
    for b in range(n // Q8_0_BLOCK):
        block = x[b * Q8_0_BYTES : (b + 1) * Q8_0_BYTES]
        for i in range(Q8_0_BLOCK):
            y[b * Q8_0_BLOCK + i] = f32_at(block, 0) * f32(q8_0_value(block, i))


@njit(cache=True)
def from_q6_k(y: Array, x: Array, n: int) -> None:
    """Q6_K to float32: y[i] = (d * s[i / 16]) * v[i],  n % 256 == 0

    y  (n,)          float32, overwritten
    x  (n/256*210,)  uint8
    Mirror: cext/src/kernels_ref.c.
    """
    for b in range(n // Q6_K_BLOCK):
        block = x[b * Q6_K_BYTES : (b + 1) * Q6_K_BYTES]
        for i in range(Q6_K_BLOCK):
            s = f32(np.int8(block[Q6_K_SCALES + i // Q6_K_GROUP]))
            y[b * Q6_K_BLOCK + i] = (f32_at(block, Q6_K_D) * s) * f32(q6_k_value(block, i))
