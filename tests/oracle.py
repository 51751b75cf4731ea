"""What the kernels are to compute, in float64 and a few lines each; neither activations nor cache rounded."""

from __future__ import annotations

import gguf
import numpy as np

from runtime.config import (
    ADJACENT,
    F16,
    F32,
    GELU,
    LOCAL_ROPE,
    NO_ROPE,
    RMS_NORM,
    Config,
    Dense,
    Linear,
    Weights,
)
from runtime.format import unpack


def sign_gemv(bits, x, cols):
    """y[r] = sum_k s[r,k] * x[k]; exact if x is an integer array."""
    return unpack(bits, cols).astype(np.int64) @ x


def dbf_linear(w: Linear, x):
    """y = s_out * A(s_mid * B(s_in * x)) + bias for rows x: (n, cols) -> (n, rows)"""
    s_out, s_mid, s_in = (s.astype(np.float64) for s in (w.s_out, w.s_mid, w.s_in))
    a, b = unpack(w.a, w.rank).astype(np.float64), unpack(w.b, w.cols).astype(np.float64)
    y = s_out * ((s_mid * ((s_in * x) @ b.T)) @ a.T)
    return y if w.bias is None else y + w.bias


def dense(w: Dense):
    """The matrix in float64."""
    if w.type == F32:
        return w.data.view(np.float32).astype(np.float64)
    if w.type == F16:
        return w.data.view(np.float16).astype(np.float64)
    return gguf.quants.dequantize(w.data, gguf.GGMLQuantizationType(w.type)).astype(np.float64)


def rmsnorm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def maybe_norm(x, w, eps):
    return x if w is None else rmsnorm(x, w, eps)


def any_norm(c: Config, x, w, b):
    """LayerNorm or RMSNorm, or x itself"""
    if w is None or c.norm == RMS_NORM:
        return maybe_norm(x, w, c.norm_eps)
    x = x - x.mean(-1, keepdims=True)
    return rmsnorm(x, w, c.norm_eps) + (0 if b is None else b)


def rope(x, config: Config, pos, freqs=None, kind=0):
    """x: (n, heads, head_dim) at positions pos: (n,)"""
    if kind == NO_ROPE:
        return x
    half = config.rope_dims // 2
    if kind == LOCAL_ROPE:
        inv = config.rope_theta_local ** (-2.0 * np.arange(half) / config.rope_dims)
    else:
        inv = config.rope_theta ** (-2.0 * np.arange(half) / config.rope_dims) / config.rope_factor
        inv = inv if freqs is None else inv / freqs
    angle = pos[:, None] * inv
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    y = x.copy()
    at = slice(0, 2 * half, 2) if config.rope_pairing == ADJACENT else slice(0, half)
    bt = slice(1, 2 * half, 2) if config.rope_pairing == ADJACENT else slice(half, 2 * half)
    a, b = x[..., at], x[..., bt]
    y[..., at], y[..., bt] = a * c - b * s, a * s + b * c
    return y


def softcap(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def attention(q, k, v, scale=0.0, cap=0.0, window=0):
    """Causal; q: (n, heads, dim), k and v: (n, kv_heads, dim) -> (n, heads * dim)"""
    n, heads, dim = q.shape
    k, v = (np.repeat(t, heads // k.shape[1], axis=1) for t in (k, v))
    score = softcap(np.einsum("ihd,jhd->hij", q, k) * (scale or dim**-0.5), cap)
    seen = np.tri(n, dtype=bool)
    if window:
        seen &= ~np.tri(n, k=-window, dtype=bool)
    score[:, ~seen] = -np.inf
    p = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)


def silu(x):
    return x / (1.0 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def experts(config: Config, layer, h, act):
    """What the experts add: (n, d_model), or 0 if there are none"""
    y, c = np.zeros_like(h), config
    if not layer.experts:
        return y
    score = np.exp(h @ layer.router.astype(np.float64).T)
    shares = score / score.sum(-1, keepdims=True)
    for row, to, p in zip(h[:, None], y, shares, strict=True):
        used = np.argsort(p)[::-1][: c.n_experts_used]
        for e in used:
            expert = layer.experts[e]
            own = dbf_linear(expert.down, act(dbf_linear(expert.gate, row)) * dbf_linear(expert.up, row))
            to += own[0] * p[e] / (p[used].sum() if c.norm_experts else 1.0)
    return y


def forward(config: Config, w: Weights, tokens):
    """Logits of all tokens: (n, n_vocab)"""
    c, n = config, len(tokens)
    pos = np.arange(n)
    act = gelu if c.activation == GELU else silu
    x = dense(w.embed)[tokens] * c.embed_scale
    x = x if w.positions is None else x + w.positions[:n]
    for layer in w.layers:
        h = any_norm(c, x, layer.attn_norm, layer.attn_norm_bias)
        q, k, v = (dbf_linear(w, h) for w in (layer.q, layer.k, layer.v))
        if c.joint_norms:
            q, k = rmsnorm(q, layer.q_norm, c.norm_eps), rmsnorm(k, layer.k_norm, c.norm_eps)
        q = q.reshape(n, c.n_heads, c.head_dim)
        k, v = (t.reshape(n, c.n_kv_heads, c.head_dim) for t in (k, v))
        if layer.q_norm is not None and not c.joint_norms:
            q, k = rmsnorm(q, layer.q_norm, c.norm_eps), rmsnorm(k, layer.k_norm, c.norm_eps)
        q, k = (rope(t, c, pos, w.rope_freqs, layer.rope) for t in (q, k))
        y = dbf_linear(layer.o, attention(q, k, v, c.attn_scale, c.attn_softcap, layer.window))
        x = x + maybe_norm(y, layer.attn_post_norm, c.norm_eps) * c.residual_scale
        h = any_norm(c, x, layer.ffn_norm, layer.ffn_norm_bias)
        y = experts(c, layer, h, act)
        if layer.up is not None:
            up = dbf_linear(layer.up, h)
            up = act(up) if layer.gate is None else act(dbf_linear(layer.gate, h)) * up
            share = 1.0 if layer.shared_gate is None else 1 / (1 + np.exp(-h @ layer.shared_gate[:, None]))
            y = y + share * dbf_linear(layer.down, up)
        x = x + maybe_norm(y, layer.ffn_post_norm, c.norm_eps) * c.residual_scale
    x = any_norm(c, x, w.out_norm, w.out_norm_bias)
    return softcap(x @ dense(w.head).T * c.logit_scale, c.logit_softcap)
