"""Random models of any shape, for tests and benchmarks."""

from __future__ import annotations

import gguf
import numpy as np

from runtime.config import (
    F16,
    F32,
    HALVES,
    Q4_0,
    Q6_K,
    Q8_0,
    ROPE,
    Config,
    Dense,
    Expert,
    Layer,
    Linear,
    Weights,
    norm_size,
)


def config(**changes: int | float) -> Config:
    """A Config of odd sizes; keyword arguments replace fields."""
    sizes = {
        "n_layers": 2, "d_model": 48, "d_ff": 100, "n_heads": 6, "n_kv_heads": 2, "head_dim": 12,
        "n_vocab": 131, "n_ctx_train": 128, "norm_eps": 1e-5, "rope_theta": 10000.0, "rope_dims": 12,
        "rope_pairing": HALVES,
    }  # fmt: skip
    return Config(**(sizes | changes))


def smollm2(n_layers: int = 30) -> Config:
    """The shape of SmolLM2-135M."""
    return config(
        n_layers=n_layers, d_model=576, d_ff=1536, n_heads=9, n_kv_heads=3, head_dim=64, n_vocab=49152,
        n_ctx_train=8192, rope_theta=100000.0, rope_dims=64,
    )  # fmt: skip


def linear(rng: np.random.Generator, rows: int, cols: int, rank: int, bias: bool = False) -> Linear:
    """Random signs; scales that keep the variance, with either sign."""

    def scales(n: int, size: float) -> np.ndarray:
        s = rng.uniform(0.5, 1.5, n) * rng.choice([-1.0, 1.0], n) * size
        return s.astype(np.float16)

    return Linear(
        a=rng.integers(0, 256, (rows, rank // 8), dtype=np.uint8),
        b=rng.integers(0, 256, (rank, (cols + 7) // 8), dtype=np.uint8),
        s_out=scales(rows, 1.0),
        s_mid=scales(rank, rank**-0.5),
        s_in=scales(cols, cols**-0.5),
        bias=rng.standard_normal(rows).astype(np.float32) if bias else None,
    )


def dense(rng: np.random.Generator, kind: int, rows: int, cols: int) -> Dense:
    """A random matrix of any type that Dense may have."""
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    if kind == F32:
        data = w.view(np.uint8)
    elif kind == F16:
        data = w.astype(np.float16).view(np.uint8)
    elif kind == Q4_0:
        data = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q4_0)
    elif kind == Q6_K:  # gguf cannot quantize it: any bits, and scales that give values of about 1
        data = rng.integers(0, 256, (rows, cols // 256, 210), dtype=np.uint8)
        data[..., 208:] = np.full((rows, cols // 256, 1), 1 / 1500, np.float16).view(np.uint8)
        data = data.reshape(rows, -1)
    else:
        assert kind == Q8_0
        assert cols % 32 == 0
        blocks = w.reshape(rows, cols // 32, 32)
        d = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
        q = np.clip(np.rint(blocks / d.astype(np.float32)), -127, 127).astype(np.int8)
        data = np.concatenate([d.view(np.uint8), q.view(np.uint8)], axis=-1).reshape(rows, -1)
    return Dense(kind, rows, cols, np.ascontiguousarray(data))


def rank_of(rows: int, cols: int, bpw: float) -> int:
    """The inner rank at which signs and scales take bpw bits per weight, a multiple of 8."""
    rank = (bpw * rows * cols - 16 * (rows + cols)) / (rows + cols + 16)
    return max(8, int(rank) // 8 * 8)


def weights(
    c: Config,
    *,
    kind: int = F32,
    tied: bool = False,
    bias: bool = False,
    head_norms: bool = False,
    post_norms: bool = False,
    pre_norms: bool = True,
    norm_biases: bool = False,
    gated: bool = True,
    windows: tuple[int, ...] = (),
    ropes: tuple[int, ...] = (),
    shared: bool = True,
    shared_gate: bool = False,
    bpw: float = 4.0,
    seed: int = 0,
) -> Weights:
    """Random weights for `c`; windows and ropes are those of the layers.

    shared  whether there is a feed-forward for all tokens; shared_gate: with a share of its own
    """
    rng = np.random.default_rng(seed)

    def lin(rows: int, cols: int, with_bias: bool = False) -> Linear:
        return linear(rng, rows, cols, rank_of(rows, cols, bpw), with_bias)

    def norm(n: int = c.d_model) -> np.ndarray:
        return rng.uniform(0.5, 1.5, n).astype(np.float32)

    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layers = tuple(
        Layer(
            attn_norm=norm() if pre_norms else None, ffn_norm=norm() if pre_norms else None,
            q=lin(heads, c.d_model, bias), k=lin(kv, c.d_model, bias), v=lin(kv, c.d_model, bias),
            o=lin(c.d_model, heads, bias), gate=lin(c.d_ff, c.d_model) if gated and shared else None,
            up=lin(c.d_ff, c.d_model, bias and not gated) if shared else None,
            down=lin(c.d_model, c.d_ff) if shared else None,
            q_norm=norm(norm_size(c, "q_norm")) if head_norms else None,
            k_norm=norm(norm_size(c, "k_norm")) if head_norms else None,
            attn_post_norm=norm() if post_norms else None, ffn_post_norm=norm() if post_norms else None,
            attn_norm_bias=norm() if norm_biases else None, ffn_norm_bias=norm() if norm_biases else None,
            window=windows[i] if windows else 0, rope=ropes[i] if ropes else ROPE,
            router=rng.normal(0, c.d_model**-0.5, (c.n_experts, c.d_model)).astype(np.float32)
            if c.n_experts else None,
            experts=tuple(
                Expert(lin(c.d_expert, c.d_model), lin(c.d_expert, c.d_model), lin(c.d_model, c.d_expert))
                for _ in range(c.n_experts)
            ),
            shared_gate=rng.normal(0, c.d_model**-0.5, c.d_model).astype(np.float32) if shared_gate else None,
        )
        for i in range(c.n_layers)
    )  # fmt: skip
    embed = dense(rng, kind, c.n_vocab, c.d_model)
    head = embed if tied else dense(rng, kind, c.n_vocab, c.d_model)
    positions = rng.standard_normal((c.n_positions, c.d_model)).astype(np.float32)
    return Weights(
        embed=embed, layers=layers, out_norm=norm(), head=head, out_norm_bias=norm() if norm_biases else None,
        positions=positions if c.n_positions else None,
    )  # fmt: skip
