"""The forward pass of cext/src/forward.c, on Numba's kernels.

x = embedding
every layer:  x += O attention(RoPE(Q n), RoPE(K n), V n),  n = RMSNorm(x)
              x += Down (SiLU(Gate n) * Up n),              n = RMSNorm(x)
logits = Head RMSNorm(x)

What some models do otherwise is in Config and Layer: GELU, with a gate or without, LayerNorm, norms of
queries and keys and of what is added to x, learned positions, a window of attention, scales, soft caps,
experts.

C divides panels of rows among threads; here numba divides the rows of a product. Both let a chunk of tokens
pass through a layer together. The arithmetic, and so every bit, is the same.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from runtime import kernels_numba as kernels
from runtime.backend import Backend, check_tokens, describe
from runtime.config import (
    F16,
    F32,
    NO_ROPE,
    Q4_0,
    Q6_K,
    Q8_0,
    RMS_NORM,
    SILU,
    Config,
    Dense,
    Expert,
    Layer,
    Linear,
    Weights,
    kv_row_bytes,
    rope_tables,
)
from runtime.errors import BackendError

Floats = NDArray[np.float32]

FROM_BLOCKS = {Q4_0: kernels.from_q4_0, Q8_0: kernels.from_q8_0, Q6_K: kernels.from_q6_k}
GEMV_BLOCKS = {Q4_0: kernels.gemv_q4_0, Q8_0: kernels.gemv_q8_0, Q6_K: kernels.gemv_q6_k}
"""Kernels of the types that are blocks of integers."""

CHUNK = 64
"""Tokens that go through a layer together."""


def _f16(array: NDArray[np.float16]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(array).view(np.uint16)


class _Linear:
    """A Linear with its arrays as the kernels take them."""

    def __init__(self, w: Linear) -> None:
        self.rows, self.rank, self.cols = w.rows, w.rank, w.cols
        self.a, self.b = np.ascontiguousarray(w.a), np.ascontiguousarray(w.b)
        self.s_out, self.s_mid, self.s_in = _f16(w.s_out), _f16(w.s_mid), _f16(w.s_in)
        self.bias = None if w.bias is None else np.ascontiguousarray(w.bias)


def linear_one(w: _Linear, x: Floats, qmax: int) -> Floats:
    """y = s_out * A(s_mid * B(s_in * x)) + bias of one token: (cols,) -> (rows,)"""
    scaled, mid, y = (np.empty(n, np.float32) for n in (w.cols, w.rank, w.rows))

    q, isum = np.empty(w.cols, np.int16), np.empty(w.rank, np.int32)
    scale = kernels.quantize_scaled(q, scaled, x, w.s_in, w.cols, qmax)
    kernels.sign_gemv(isum, w.b, q, w.rank, w.cols)
    kernels.descale(mid, isum, np.float32(scale), w.s_mid, None, w.rank)

    q, isum = np.empty(w.rank, np.int16), np.empty(w.rows, np.int32)
    scale = kernels.quantize_scaled(q, scaled, mid, None, w.rank, qmax)
    kernels.sign_gemv(isum, w.a, q, w.rows, w.rank)
    kernels.descale(y, isum, np.float32(scale), w.s_out, w.bias, w.rows)
    return y


def linear_many(w: _Linear, x: Floats, qmax: int) -> Floats:
    """The same of many tokens, side by side: (n, cols) -> (n, rows)"""
    n = x.shape[0]
    wide = -(-n // kernels.STRIP) * kernels.STRIP
    columns, mid = np.zeros((w.cols, wide), np.float32), np.empty((w.rank, wide), np.float32)
    y = np.empty((w.rows, wide), np.float32)
    columns[:, :n] = x.T

    q, scale = _quantize_strips(columns, w.s_in, qmax)
    isum = np.empty((w.rank, wide), np.int32)
    kernels.sign_gemm(isum, w.b, q, None, w.rank, w.cols, wide)
    kernels.descale_many(mid, isum, scale, w.s_mid, None, w.rank, wide)

    q, scale = _quantize_strips(mid, None, qmax)
    isum = np.empty((w.rows, wide), np.int32)
    kernels.sign_gemm(isum, w.a, q, None, w.rows, w.rank, wide)
    kernels.descale_many(y, isum, scale, w.s_out, w.bias, w.rows, wide)
    return np.ascontiguousarray(y[:, :n].T)


def _quantize_strips(x: Floats, s: NDArray[np.uint16] | None, qmax: int) -> tuple[NDArray[np.int16], Floats]:
    cols, wide = x.shape
    q, scale = np.empty((cols, wide), np.int16), np.empty(wide, np.float32)
    for i in range(0, wide, kernels.STRIP):
        kernels.quantize_many(q[:, i:], scale[i:], x[:, i:], s, cols, wide, wide, qmax)
    return q, scale


def linear(w: _Linear, x: Floats, qmax: int) -> Floats:
    """y = s_out * A(s_mid * B(s_in * x)) + bias of every token: (n, cols) -> (n, rows)"""
    return linear_many(w, x, qmax) if x.shape[0] > 1 else linear_one(w, x[0], qmax)[None]


class _Experts:
    """The experts of a layer, with their arrays as the kernels take them."""

    def __init__(self, experts: tuple[Expert, ...]) -> None:
        self.gate = [_Linear(expert.gate) for expert in experts]
        self.up = [_Linear(expert.up) for expert in experts]
        self.down = [_Linear(expert.down) for expert in experts]


def choose(c: Config, p: Floats, total: np.float32) -> tuple[NDArray[np.int64], Floats]:
    """The experts with the largest p (n_experts,), of equals the first, in ascending order, and their shares
    p / total, or p divided by the sum of theirs: both (n_experts_used,)."""
    used = np.sort(np.argsort(-p, kind="stable")[: c.n_experts_used])
    if c.norm_experts:
        total = np.float32(0.0)
        for one in p[used]:
            total = total + one
    return used, p[used] / total


def _add(x: Floats, y: Floats) -> None:
    kernels.add(x.reshape(-1), y.reshape(-1), x.size)


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
        self,
        config: Config,
        weights: Weights,
        n_threads: int | None,
        n_ctx: int,
        kv_type: str,
        activations: str,
    ) -> None:
        limit = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self.n_threads = min(n_threads or limit, limit)
        self.n_ctx, self.kv_type, self.activations = n_ctx, kv_type, activations
        self._qmax = kernels.QMAX8 if activations == "int8" else kernels.QMAX
        threads = f"{self.n_threads} thread{'s' if self.n_threads > 1 else ''}"
        self.description = f"Numba, {threads}{describe(activations)}"
        self._config, self._held = config, 0
        self._weights: Weights | None = weights
        self._linears = [
            {name: _Linear(linear) for name, linear in layer.linears.items()} for layer in weights.layers
        ]
        self._experts = [_Experts(layer.experts) for layer in weights.layers]
        self._rope = rope_tables(config, weights, n_ctx)
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
        for begin in range(0, ids.size, CHUNK):
            x = self._chunk(self._weights, ids[begin : begin + CHUNK].tolist(), pos + begin)
            end = begin + x.shape[0]
            if end > first:
                skip = max(first - begin, 0)
                logits[begin + skip - first : end - first] = self._logits(self._weights, x[skip:])
            self._held = pos + end
        return logits

    def close(self) -> None:
        self._weights = None
        self._linears, self._experts = [], []
        self._k = self._v = np.zeros((0, 0, 0, 0), np.uint8)

    def _norms(self, x: Floats, w: Floats | None, b: Floats | None = None, kind: int = RMS_NORM) -> Floats:
        """RMSNorm or LayerNorm of every row, or x itself if w is None."""
        if w is None:
            return x
        y, eps = np.empty_like(x), np.float32(self._config.norm_eps)
        for to, row in zip(y, x, strict=True):
            if kind == RMS_NORM:
                kernels.rmsnorm(to, row, w, eps, row.size)
            else:
                kernels.layernorm(to, row, w, b, eps, row.size)
        return y

    def _chunk(self, weights: Weights, tokens: list[int], pos: int) -> Floats:
        """The residual streams of some tokens after the last layer; keys and values go to the cache."""
        c, n = self._config, len(tokens)

        # embedding
        x = np.stack([dense_row(weights.embed, token) for token in tokens])
        if c.embed_scale != 1.0:
            kernels.scale(x.reshape(-1), np.float32(c.embed_scale), x.size)
        if weights.positions is not None:
            _add(x, np.ascontiguousarray(weights.positions[pos : pos + n]))

        for i, (layer, w) in enumerate(zip(weights.layers, self._linears, strict=True)):
            # queries, keys, values
            h = self._norms(x, layer.attn_norm, layer.attn_norm_bias, c.norm)
            q, k, v = (self._linear(w[name], h) for name in "qkv")

            # norms of queries and keys, RoPE, KV cache
            q_norm, k_norm = layer.q_norm, layer.k_norm
            if c.joint_norms:
                q, k, q_norm, k_norm = self._norms(q, q_norm), self._norms(k, k_norm), None, None
            q = q.reshape(n, c.n_heads, c.head_dim)
            k, v = (t.reshape(n, c.n_kv_heads, c.head_dim) for t in (k, v))
            for j in range(n):
                self._turn(q[j], q_norm, layer.rope, pos + j)
                self._turn(k[j], k_norm, layer.rope, pos + j)
                self._store(k[j], v[j], i, pos + j)

            # attention, added to the residual stream
            attended = np.stack([self._attention(q[j], i, layer, pos + j) for j in range(n)])
            self._add_linear(x, w["o"], attended, layer.attn_post_norm)

            # feed-forward, added to the residual stream
            h = self._norms(x, layer.ffn_norm, layer.ffn_norm_bias, c.norm)
            if not layer.experts:
                self._add_linear(x, w["down"], self._gated(w.get("gate"), w["up"], h), layer.ffn_post_norm)
                continue
            branch = self._mixed(layer.router, self._experts[i], h)
            if "up" in w:
                shared = self._linear(w["down"], self._gated(w.get("gate"), w["up"], h))
                for to, row, own in zip(branch, shared, h, strict=True):
                    kernels.mix(to, self._shared_share(layer, own), row[None], 1, c.d_model)
            self._add_branch(x, branch, layer.ffn_post_norm)
        return x

    def _gated(self, gate: _Linear | None, up: _Linear, h: Floats) -> Floats:
        """SiLU(gate(h)) * up(h), or GELU(gate(h)) * up(h), or without gate GELU(up(h))"""
        y = self._linear(up, h)
        flat = y.reshape(-1)
        if gate is None:
            kernels.gelu(flat, flat, flat.size)
        else:
            act_mul = kernels.silu_mul if self._config.activation == SILU else kernels.gelu_mul
            act_mul(flat, self._linear(gate, h).reshape(-1), flat, flat.size)
        return y

    def _mixed(self, router: Floats | None, w: _Experts, h: Floats) -> Floats:
        """sum_e share_e * expert_e of every token, over the experts that it uses."""
        c, n = self._config, h.shape[0]
        assert router is not None
        p = np.empty((n, c.n_experts), np.float32)
        kernels.gemv_f32(p, router, h, n, c.n_experts, c.d_model)
        chosen = [choose(c, row, np.float32(kernels.softmax(row, c.n_experts))) for row in p]
        y = np.zeros_like(h)
        for e in range(c.n_experts):
            shares = {i: share[used == e] for i, (used, share) in enumerate(chosen) if e in used}
            if not shares:
                continue
            own = self._linear(w.down[e], self._gated(w.gate[e], w.up[e], h[list(shares)]))
            for (i, share), row in zip(shares.items(), own, strict=True):
                kernels.mix(y[i], share, row[None], 1, c.d_model)
        return y

    def _shared_share(self, layer: Layer, x: Floats) -> Floats:
        """The shared expert's share of a token: (1,)"""
        share = np.ones(1, np.float32)
        if layer.shared_gate is not None:
            kernels.gemv_f32(share[None], layer.shared_gate[None], x[None], 1, 1, x.size)
            share[0] = np.float32(1.0) / (np.float32(1.0) + np.float32(kernels.exp_f32(-share[0])))
        return share

    def _logits(self, weights: Weights, x: Floats) -> Floats:
        """Logits of some tokens, by their residual streams."""
        c = self._config
        h = self._norms(x, weights.out_norm, weights.out_norm_bias, c.norm)
        y = np.empty((x.shape[0], c.n_vocab), np.float32)
        for to, row in zip(y, h, strict=True):
            to[:] = head_logits(weights.head, row)
        if c.logit_scale != 1.0:
            kernels.scale(y.reshape(-1), np.float32(c.logit_scale), y.size)
        if c.logit_softcap > 0:
            kernels.softcap(y.reshape(-1), np.float32(c.logit_softcap), y.size)
        return y

    def _linear(self, w: _Linear, x: Floats) -> Floats:
        return linear(w, x, self._qmax)

    def _add_linear(self, x: Floats, w: _Linear, y: Floats, norm: Floats | None) -> None:
        """x += w(y); in some models, w(y) is normalized or scaled first"""
        self._add_branch(x, self._linear(w, y), norm)

    def _add_branch(self, x: Floats, branch: Floats, norm: Floats | None) -> None:
        """x += branch, which in some models is normalized or scaled first"""
        branch = self._norms(branch, norm)
        if self._config.residual_scale != 1.0:
            kernels.scale(branch.reshape(-1), np.float32(self._config.residual_scale), branch.size)
        _add(x, branch)

    def _turn(self, heads: Any, norm: Floats | None, rope: int, pos: int) -> None:
        """Normalize queries or keys, unless norm is None, and rotate them, unless rope is NO_ROPE."""
        c = self._config
        for x in heads:
            if norm is not None:
                kernels.rmsnorm(x, x, norm, np.float32(c.norm_eps), c.head_dim)
            if rope != NO_ROPE:
                kernels.rope(x, self._rope[rope, pos], c.rope_dims, c.rope_pairing)

    def _store(self, k: Any, v: Any, layer: int, pos: int) -> None:
        """Store keys and values."""
        for h in range(self._config.n_kv_heads):
            self._narrow(self._k[layer, h, pos], k[h])
            self._narrow(self._v[layer, h, pos], v[h])

    def _attention(self, q: Any, index: int, layer: Layer, pos: int) -> Floats:
        """Attention of every query head over the positions up to pos, or a window of them."""
        c, held = self._config, pos + 1
        begin = max(held - layer.window, 0) if layer.window else 0
        n = held - begin
        y = np.zeros((c.n_heads, c.head_dim), np.float32)
        factor = np.float32(1.0) / np.sqrt(np.float32(c.head_dim))
        if c.attn_scale > 0:
            factor = np.float32(c.attn_scale)
        group = c.n_heads // c.n_kv_heads
        for kv_head in range(c.n_kv_heads):
            k, v = (self._widen(cache[index, kv_head, begin:held]) for cache in (self._k, self._v))
            for h in range(kv_head * group, (kv_head + 1) * group):
                kernels.scores(self._score, q[h], k, factor, n, c.head_dim)
                if c.attn_softcap > 0:
                    kernels.softcap(self._score, np.float32(c.attn_softcap), n)
                inverse = np.float32(1.0) / np.float32(kernels.softmax(self._score, n))
                kernels.mix(y[h], self._score, v, n, c.head_dim)
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
