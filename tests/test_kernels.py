"""The C kernels one by one, on every instruction set of this machine, against oracle.py."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny

from runtime.config import BLOCKS, F16, F32, Q4_0, Q6_K, Q8_0, Dense

cext = pytest.importorskip("cext", reason="the C core is not built")
ffi, lib = cext.ffi, cext.lib

ISAS = [ffi.string(lib.dbf_isa_name(i)).decode() for i in range(lib.dbf_isa_count())]
SIZES = [*range(1, 10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 576, 1023, 1025, 1536, 2055]
INTEGERS = [Q4_0, Q8_0, Q6_K]
"""Types of dense matrices that are multiplied as integers."""
GUARD = 0x5A


@pytest.fixture(params=ISAS)
def isa(request):
    assert lib.dbf_isa_use(request.param.encode()) == lib.DBF_OK
    yield request.param
    assert lib.dbf_isa_use(ffi.NULL) == lib.DBF_OK


class Guarded:
    """Memory for n numbers, off its natural vector alignment by `shift` numbers, between guard bytes."""

    def __init__(self, dtype, n, shift=1):
        self.size = np.dtype(dtype).itemsize
        self.memory = np.full((n + shift + 64) * self.size, GUARD, np.uint8)
        self.begin, self.end = shift * self.size, (shift + n) * self.size
        self.array = self.memory[self.begin : self.end].view(dtype)

    def pointer(self, ctype):
        return ffi.cast(ctype, ffi.from_buffer(self.memory) + self.begin)

    def check(self):
        assert (self.memory[: self.begin] == GUARD).all()
        assert (self.memory[self.end :] == GUARD).all()


def guarded(values, shift=1):
    g = Guarded(values.dtype, values.size, shift)
    g.array[:] = values.ravel()
    return g


def sign_gemv(bits, q, cols, activation_bits=16):
    rows = bits.shape[0]
    w, x, out = guarded(bits, 3), guarded(q), Guarded(np.int32, rows)
    code = lib.dbf_sign_gemv(
        out.pointer("int32_t *"), w.pointer("uint8_t *"), x.pointer("int16_t *"), rows, cols, activation_bits
    )
    assert code == lib.DBF_OK
    out.check()
    return out.array


def test_isas():
    assert ISAS[0] == "scalar"
    assert lib.dbf_isa_demoted() == ffi.NULL
    assert lib.dbf_isa_name(len(ISAS)) == ffi.NULL
    assert lib.dbf_isa_name(-1) == ffi.NULL
    assert lib.dbf_isa_use(b"mmx") == lib.DBF_EISA


@pytest.mark.parametrize("cols", SIZES)
def test_sign_gemv_is_exact(isa, cols):
    rng = np.random.default_rng(cols)
    for rows in (1, 7, 63, 64, 65, 131):
        bits = rng.integers(0, 256, (rows, (cols + 7) // 8), dtype=np.uint8)  # filler bits are random too
        q = rng.integers(-8191, 8192, cols, dtype=np.int16)
        np.testing.assert_array_equal(sign_gemv(bits, q, cols), oracle.sign_gemv(bits, q.astype(int), cols))


@pytest.mark.parametrize("value", [8191, -8191])
@pytest.mark.parametrize("byte", [0, 255, 0x55])
def test_sign_gemv_extremes(isa, value, byte):
    for cols in (1024, 1025, 2056, 11008):
        bits = np.full((65, (cols + 7) // 8), byte, np.uint8)
        q = np.full(cols, value, np.int16)
        np.testing.assert_array_equal(sign_gemv(bits, q, cols), oracle.sign_gemv(bits, q.astype(int), cols))


@pytest.mark.parametrize("cols", SIZES)
def test_sign_gemv_of_8_bits_is_exact(isa, cols):
    """With activations mostly small, large, and as large as can be: tables are divided, or not."""
    rng = np.random.default_rng(cols)
    bits = rng.integers(0, 256, (131, (cols + 7) // 8), dtype=np.uint8)
    small = rng.integers(-10, 11, cols, dtype=np.int16)
    small[:: 1 + cols // 5] = 126
    for q in (
        small,
        rng.integers(-126, 127, cols, dtype=np.int16),
        rng.choice([-126, 126], cols).astype(np.int16),
    ):
        got = sign_gemv(bits, q, cols, 8)
        np.testing.assert_array_equal(got, oracle.sign_gemv(bits, q.astype(int), cols))


def sign_gemm(bits, q):
    (rows, _), (n, cols) = bits.shape, q.shape
    w, x, out = guarded(bits, 3), guarded(q), Guarded(np.int32, n * rows)
    code = lib.dbf_sign_gemm(
        out.pointer("int32_t *"), w.pointer("uint8_t *"), x.pointer("int16_t *"), rows, cols, n
    )
    assert code == lib.DBF_OK
    out.check()
    return out.array.reshape(n, rows)


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 97, 576, 1023, 2047, 2048, 2049, 4100])
def test_sign_gemm_is_exact(isa, cols):
    rng = np.random.default_rng(cols)
    for rows, n in ((1, 1), (8, 31), (63, 32), (64, 33), (65, 64), (131, 65)):
        bits = rng.integers(0, 256, (rows, (cols + 7) // 8), dtype=np.uint8)
        q = rng.integers(-8191, 8192, (n, cols), dtype=np.int16)
        np.testing.assert_array_equal(sign_gemm(bits, q), oracle.sign_gemv(bits, q.T.astype(int), cols).T)


def test_sign_gemm_of_many_rows(isa):
    rng = np.random.default_rng(0)
    bits, q = rng.integers(0, 256, (1351, 3), dtype=np.uint8), rng.integers(-8191, 8192, (130, 24), np.int16)
    np.testing.assert_array_equal(sign_gemm(bits, q), oracle.sign_gemv(bits, q.T.astype(int), 24).T)


@pytest.mark.parametrize("value", [8191, -8191])
@pytest.mark.parametrize("byte", [0, 255, 0x55])
def test_sign_gemm_extremes(isa, value, byte):
    """All sums as large as they get, for every carry of the two u16 that stand for them."""
    for cols in (2048, 2056, 5000):
        bits = np.full((3, (cols + 7) // 8), byte, np.uint8)
        q = np.full((40, cols), value, np.int16)
        q[1:] -= np.arange(39, dtype=np.int16)[:, None] * np.int16(value // 8191)
        np.testing.assert_array_equal(sign_gemm(bits, q), oracle.sign_gemv(bits, q.T.astype(int), cols).T)


def quantize(x):
    out, scale = Guarded(np.int16, x.size), ffi.new("float *")
    assert (
        lib.dbf_quantize(out.pointer("int16_t *"), scale, guarded(x).pointer("float *"), x.size) == lib.DBF_OK
    )
    out.check()
    return out.array, np.float32(scale[0])


@pytest.mark.parametrize("n", SIZES)
def test_quantize(isa, n):
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    q, scale = quantize(x)
    top = np.abs(x).max()
    assert scale == top / np.float32(8191)
    np.testing.assert_array_equal(q, np.rint(x * (np.float32(8191) / top)).astype(np.int16))
    assert np.abs(q).max() == 8191


def test_quantize_rounds_ties_to_even(isa):
    x = np.array([8191, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 4.5], np.float32)
    q, scale = quantize(x)
    assert scale == 1.0
    assert q.tolist() == [8191, 0, 2, 2, 0, -2, -2, 4, 4]


@pytest.mark.parametrize(
    ("value", "scale"), [(0.0, 0.0), (1e-40, None), (np.inf, np.inf), (-np.inf, np.inf), (np.nan, np.nan)]
)
def test_quantize_odd_values(isa, value, scale):
    for n in (1, 9, 40):
        x = np.zeros(n, np.float32)
        x[n // 2] = value
        q, got = quantize(x)
        assert (q == 0).all()
        if scale is not None:
            np.testing.assert_equal(got, np.float32(scale))


def check_dense_gemv(rng, kind, rows, cols, n, shift=1):
    w = tiny.dense(rng, kind, rows, cols)
    x = guarded(rng.standard_normal((n, cols)).astype(np.float32), shift + 1)
    data = guarded(w.data, shift if kind in INTEGERS else 4)
    out = Guarded(np.float32, n * rows, shift)
    c = ffi.new("dbf_dense *", [kind, rows, cols, data.pointer("void *")])
    assert lib.dbf_dense_gemv(out.pointer("float *"), c, x.pointer("float *"), n) == lib.DBF_OK
    out.check()
    m, x = oracle.dense(w), x.array.reshape(n, cols)
    # 16 lanes: at most cols/16 + 5 roundings a sum; integers: half a step of the activation's grid as well
    bound = (cols / 16 + 5) * 2.0**-24 * (np.abs(x) @ np.abs(m).T)
    if kind in INTEGERS:
        bound = bound + 0.501 * np.abs(x).max(-1, keepdims=True) / 8191 * np.abs(m).sum(-1)
    assert (np.abs(out.array.reshape(n, rows) - x.astype(np.float64) @ m.T) <= bound).all()


@pytest.mark.parametrize("kind", [F32, F16, *INTEGERS])
def test_dense_gemv(isa, kind):
    rng = np.random.default_rng(7)
    block = BLOCKS[kind][0]
    for cols in [block, 2 * block, 3 * block, 2304] if kind in INTEGERS else [1, 7, 16, 33, 97, 576]:
        for n in (1, 2, 3, 4, 7):
            check_dense_gemv(rng, kind, 67, cols, n)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("shift", range(8))
def test_leftover_rows_at_any_alignment(isa, kind, shift):
    rng = np.random.default_rng(shift)
    for rows in range(1, 10):
        check_dense_gemv(rng, kind, rows, 3 * BLOCKS[kind][0], 3, shift)


@pytest.mark.parametrize("kind", INTEGERS)
def test_dense_gemv_extremes(isa, kind):
    """The largest integers that there can be, all of one sign: sums stay within int32."""
    block, nbytes = BLOCKS[kind]
    data = np.full((5, 2, nbytes), {Q4_0: 0x00, Q8_0: 0x80, Q6_K: 0x00}[kind], np.uint8)
    if kind == Q6_K:
        data[..., 192:208] = 0x80  # s = -128, v = -32
    data[..., slice(208, 210) if kind == Q6_K else slice(0, 2)] = [0x00, 0x3C]  # d = 1
    w = Dense(kind, 5, 2 * block, data.reshape(5, -1))
    x, data = guarded(np.full(2 * block, 3.0, np.float32)), guarded(w.data)
    out = Guarded(np.float32, 5)
    c = ffi.new("dbf_dense *", [kind, 5, 2 * block, data.pointer("void *")])
    assert lib.dbf_dense_gemv(out.pointer("float *"), c, x.pointer("float *"), 1) == lib.DBF_OK
    np.testing.assert_allclose(out.array, oracle.dense(w) @ x.array.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("kind", [F32, F16, *INTEGERS])
def test_dense_row(isa, kind):
    """Bit for bit what gguf makes of it."""
    w = tiny.dense(np.random.default_rng(3), kind, 5, 768)
    data, out = guarded(w.data, 4), Guarded(np.float32, 768)
    c = ffi.new("dbf_dense *", [kind, 5, 768, data.pointer("void *")])
    for r in range(5):
        assert lib.dbf_dense_row(out.pointer("float *"), c, r) == lib.DBF_OK
        np.testing.assert_array_equal(out.array, oracle.dense(w)[r].astype(np.float32))
    out.check()
    assert lib.dbf_dense_row(out.pointer("float *"), c, 5) == lib.DBF_EINVAL
    assert lib.dbf_dense_row(out.pointer("float *"), c, -1) == lib.DBF_EINVAL


def test_bad_arguments():
    one = np.zeros(8, np.int16)
    q, bits, out = ffi.from_buffer("int16_t[]", one), ffi.new("uint8_t[8]"), ffi.new("int32_t[8]")
    for args in [
        (ffi.NULL, bits, q, 1, 8), (out, ffi.NULL, q, 1, 8), (out, bits, ffi.NULL, 1, 8),
        (out, bits, q, 0, 8), (out, bits, q, 1, 0), (out, bits, q, -1, 8), (out, bits, q, 1, 131073),
    ]:  # fmt: skip
        assert lib.dbf_sign_gemv(*args, 16) == lib.DBF_EINVAL
        assert lib.dbf_sign_gemm(*args, 1) == lib.DBF_EINVAL
    assert lib.dbf_sign_gemm(out, bits, q, 1, 8, 0) == lib.DBF_EINVAL
    assert lib.dbf_sign_gemv(out, bits, q, 1, 8, 7) == lib.DBF_EINVAL
    for code in range(-5, 1):
        assert ffi.string(lib.dbf_strerror(code)) != b"unknown error"
    assert ffi.string(lib.dbf_strerror(-99)) == b"unknown error"
