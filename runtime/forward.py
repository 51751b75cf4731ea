"""The forward pass of cext/src/forward.c, on Numba's kernels.

x = embedding
every layer:  x += O attention(RoPE(Q n), RoPE(K n), V n),  n = RMSNorm(x)
              x += Down (SiLU(Gate n) * Up n),              n = RMSNorm(x)
logits = Head RMSNorm(x)

C divides panels of rows among threads and lets a chunk of tokens pass through a layer together; here numba
divides the rows of a product, and tokens pass one by one. The arithmetic, and so every bit, is the same.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from runtime import kernels_numba as kernels
from runtime.backend import Backend, check_tokens
from runtime.config import (
    F16,
    F32,
    Q4_0,
    Q6_K,
    Q8_0,
    Config,
    Dense,
    Linear,
    Weights,
    kv_row_bytes,
    rope_table,
)
from runtime.errors import BackendError

Floats = NDArray[np.float32]

FROM_BLOCKS = {Q4_0: kernels.from_q4_0, Q8_0: kernels.from_q8_0, Q6_K: kernels.from_q6_k}
GEMV_BLOCKS = {Q4_0: kernels.gemv_q4_0, Q8_0: kernels.gemv_q8_0, Q6_K: kernels.gemv_q6_k}
"""Kernels of the types that are blocks of integers."""


def _f16(array: NDArray[np.float16]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(array).view(np.uint16)


class _Linear:
    """A Linear with its arrays as the kernels take them."""

    def __init__(self, w: Linear) -> None:
        self.rows, self.rank, self.cols = w.rows, w.rank, w.cols
        self.a, self.b = np.ascontiguousarray(w.a), np.ascontiguousarray(w.b)
        self.s_out, self.s_mid, self.s_in = _f16(w.s_out), _f16(w.s_mid), _f16(w.s_in)
        self.bias = None if w.bias is None else np.ascontiguousarray(w.bias)


def linear(w: _Linear, x: Floats) -> Floats:
    """y = s_out * A(s_mid * B(s_in * x)) + bias"""
    scaled, mid, y = (np.empty(n, np.float32) for n in (w.cols, w.rank, w.rows))

    q, isum = np.empty(w.cols, np.int16), np.empty(w.rank, np.int32)
    kernels.scale(scaled, x, w.s_in, w.cols)
    scale = kernels.quantize(q, scaled, w.cols)
    kernels.sign_gemv(isum, w.b, q, w.rank, w.cols)
    kernels.descale(mid, isum, np.float32(scale), w.s_mid, None, w.rank)

    q, isum = np.empty(w.rank, np.int16), np.empty(w.rows, np.int32)
    scale = kernels.quantize(q, mid, w.rank)
    kernels.sign_gemv(isum, w.a, q, w.rows, w.rank)
    kernels.descale(y, isum, np.float32(scale), w.s_out, w.bias, w.rows)
    return y


def dense_row(w: Dense, r: int) -> Floats:
    """Row r of a dense matrix as float32."""
    row, y = w.data[r], np.empty(w.cols, np.float32)
    if w.type == F32:
        y[:] = row.view(np.float32)
    elif w.type == F16:
        kernels.from_f16(y, row.view(np.uint16), w.cols)
    else:
        FROM_BLOCKS[w.type](y, row, w.cols)
    return y


def head_logits(w: Dense, x: Floats) -> Floats:
    """y = W x of an unfactorized matrix."""
    y = np.empty(w.rows, np.float32)
    if w.type == F32:
        kernels.gemv_f32(y[None], w.data.view(np.float32), x[None], 1, w.rows, w.cols)
    elif w.type == F16:
        kernels.gemv_f16(y[None], w.data.view(np.uint16), x[None], 1, w.rows, w.cols)
    else:
        q = np.empty((1, w.cols), np.int16)
        scale = np.array([kernels.quantize(q[0], x, w.cols)], np.float32)
        GEMV_BLOCKS[w.type](y[None], w.data, q, scale, 1, w.rows, w.cols)
    return y


class NumbaBackend(Backend):
    """The Numba backend; see Backend."""

    name = "numba"

    def __init__(
        self, config: Config, weights: Weights, n_threads: int | None, n_ctx: int, kv_type: str
    ) -> None:
        limit = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self.n_threads = min(n_threads or limit, limit)
        self.n_ctx, self.kv_type = n_ctx, kv_type
        self.description = f"Numba, {self.n_threads} thread{'s' if self.n_threads > 1 else ''}"
        self._config, self._held = config, 0
        self._weights: Weights | None = weights
        self._linears = [
            {name: _Linear(getattr(layer, name)) for name in ("q", "k", "v", "o", "gate", "up", "down")}
            for layer in weights.layers
        ]
        self._rope = rope_table(config, weights.rope_freqs, n_ctx)
        cache = (config.n_layers, config.n_kv_heads, n_ctx, kv_row_bytes(config, kv_type))
        self._k, self._v = np.zeros(cache, np.uint8), np.zeros(cache, np.uint8)
        self._score = np.empty(n_ctx, np.float32)

    def eval(self, tokens: NDArray[np.int32], pos: int, n_logits: int) -> Floats:
        if self._weights is None:
            raise BackendError("eval: the backend is closed")
        ids = check_tokens(tokens, pos, n_logits, self._held, self._config, self.n_ctx)
        numba.set_num_threads(self.n_threads)
        logits = np.empty((n_logits, self._config.n_vocab), np.float32)
        first = ids.size - n_logits
        for i, token in enumerate(ids.tolist()):
            x = self._token(self._weights, token, pos + i)
            if i >= first:
                logits[i - first] = head_logits(self._weights.head, self._rmsnorm(x, self._weights.out_norm))
            self._held = pos + i + 1
        return logits

    def close(self) -> None:
        self._weights = None
        self._linears = []
        self._k = self._v = np.zeros((0, 0, 0, 0), np.uint8)

    def _rmsnorm(self, x: Floats, w: Floats) -> Floats:
        y = np.empty_like(x)
        kernels.rmsnorm(y, x, w, np.float32(self._config.norm_eps), x.size)
        return y

    def _token(self, weights: Weights, token: int, pos: int) -> Floats:
        """The residual stream of one token after the last layer; keys and values go to the cache."""
        c = self._config

        # embedding
        x = dense_row(weights.embed, token)

        for i, (layer, w) in enumerate(zip(weights.layers, self._linears, strict=True)):
            # queries, keys, values
            n = self._rmsnorm(x, layer.attn_norm)
            q = linear(w["q"], n).reshape(c.n_heads, c.head_dim)
            k = linear(w["k"], n).reshape(c.n_kv_heads, c.head_dim)
            v = linear(w["v"], n).reshape(c.n_kv_heads, c.head_dim)

            # RoPE, KV cache
            self._rotate_and_store(q, k, v, i, pos)

            # attention, added to the residual stream
            kernels.add(x, linear(w["o"], self._attention(q, i, pos)), c.d_model)

            # feed-forward, added to the residual stream
            n = self._rmsnorm(x, layer.ffn_norm)
            gate, up = linear(w["gate"], n), linear(w["up"], n)
            kernels.silu_mul(gate, gate, up, c.d_ff)
            kernels.add(x, linear(w["down"], gate), c.d_model)
        return x

    def _rotate_and_store(self, q: Any, k: Any, v: Any, layer: int, pos: int) -> None:
        """Rotate queries and keys, store keys and values."""
        c = self._config
        for h in range(c.n_heads):
            kernels.rope(q[h], self._rope[pos], c.rope_dims, c.rope_pairing)
        for h in range(c.n_kv_heads):
            kernels.rope(k[h], self._rope[pos], c.rope_dims, c.rope_pairing)
            self._narrow(self._k[layer, h, pos], k[h])
            self._narrow(self._v[layer, h, pos], v[h])

    def _attention(self, q: Any, layer: int, pos: int) -> Floats:
        """Attention of every query head over the positions up to pos."""
        c, held = self._config, pos + 1
        y = np.zeros((c.n_heads, c.head_dim), np.float32)
        factor = np.float32(1.0) / np.sqrt(np.float32(c.head_dim))
        group = c.n_heads // c.n_kv_heads
        for kv_head in range(c.n_kv_heads):
            k, v = (self._widen(cache[layer, kv_head, :held]) for cache in (self._k, self._v))
            for h in range(kv_head * group, (kv_head + 1) * group):
                kernels.scores(self._score, q[h], k, factor, held, c.head_dim)
                inverse = np.float32(1.0) / np.float32(kernels.softmax(self._score, held))
                kernels.mix(y[h], self._score, v, held, c.head_dim)
                y[h] *= inverse
        return y.reshape(-1)

    def _narrow(self, to: NDArray[np.uint8], x: Floats) -> None:
        """The keys or values of a KV head, of one position, to the cache's type."""
        if self.kv_type == "f16":
            kernels.to_f16(to.view(np.uint16), x, x.size)
        else:
            kernels.to_q8_0(to, x, x.size)

    def _widen(self, rows: NDArray[np.uint8]) -> Floats:
        """The keys or values of a KV head, of some positions, as float32."""
        y = np.empty((rows.shape[0], self._config.head_dim), np.float32)
        if self.kv_type == "f16":
            kernels.from_f16(y.reshape(-1), rows.reshape(-1).view(np.uint16), y.size)
        else:
            kernels.from_q8_0(y.reshape(-1), rows.reshape(-1), y.size)
        return y
