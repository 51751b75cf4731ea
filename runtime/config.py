"""What a model is made of: sizes and features (`Config`) and its tensors (`Weights`).

The forward pass depends on these and never on a model's name; the converter turns each
architecture into features, `runtime.model` reads them back from a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from runtime import format
from runtime.errors import OptionError

F32, F16, Q4_0, Q8_0, Q6_K = 0, 1, 2, 8, 14
"""Types of the unfactorized matrices (embedding, head); the values are GGML's type ids."""

BLOCKS = {kind: GGML_QUANT_SIZES[GGMLQuantizationType(kind)] for kind in (F32, F16, Q4_0, Q8_0, Q6_K)}
"""type -> weights and bytes of a block; rows are whole blocks."""

KV_TYPES = {"f16": F16, "q8_0": Q8_0}
"""Types of the KV cache, by the names that options have."""

ACTIVATIONS = {"int16": 16, "int8": 8}
"""Activations of sign products, by the names that options have, and what the C core calls them: integers of
one scale a vector, in -8191 .. 8191 (14 bits) or in -126 .. 126."""

ADJACENT, HALVES = 0, 1
"""RoPE pairing: (2i, 2i+1), llama.cpp's "norm" order, or (i, i + dims/2), its "neox" order."""

RMS_NORM, LAYER_NORM = 0, 1
"""Norms."""

SILU, GELU = 0, 1
"""Activations; GELU is the one with tanh."""

NO_ROPE, ROPE, LOCAL_ROPE = -1, 0, 1
"""What rotates a layer's queries and keys: nothing, or a table of `rope_tables`."""


@dataclass(frozen=True)
class Config:
    """Sizes and features of a decoder."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int  # GQA: query head h reads KV head h // (n_heads // n_kv_heads)
    head_dim: int
    n_vocab: int
    n_ctx_train: int  # context length that the model was trained for
    norm_eps: float
    rope_theta: float
    rope_dims: int  # leading dimensions of each head that RoPE rotates; even, <= head_dim
    rope_pairing: int  # ADJACENT or HALVES
    rope_factor: float = 1.0  # positions are divided by it, but for layers with LOCAL_ROPE
    rope_magnitude: float = 1.0  # cos and sin are multiplied by it, but for layers with LOCAL_ROPE
    rope_theta_local: float = 10000.0  # of layers with LOCAL_ROPE
    n_ctx_original: int = 0  # contexts longer than this rotate by rope_freqs_long, if there are any
    activation: int = SILU
    embed_scale: float = 1.0  # embeddings are multiplied by it
    attn_scale: float = 0.0  # and scores of attention by this; 0: 1/sqrt(head_dim)
    attn_softcap: float = 0.0  # scores become cap * tanh(score / cap); 0: they stay
    logit_softcap: float = 0.0  # the same of logits
    residual_scale: float = 1.0  # what o and down add to the residual stream is multiplied by it
    logit_scale: float = 1.0  # and logits by this, before the cap
    norm: int = RMS_NORM  # of attn_norm, ffn_norm and out_norm; all others are RMSNorm
    n_positions: int = 0  # rows of the learned positions; 0: there are none
    joint_norms: int = 0  # 1: q_norm and k_norm are of all heads of a token together
    n_experts: int = 0  # of every layer; 0: there are none
    n_experts_used: int = 0  # by a token
    d_expert: int = 0  # d_ff of an expert; d_ff itself is that of the expert that all tokens share
    norm_experts: int = 0  # 1: shares of the experts that a token uses are divided by their sum


def kv_row_bytes(config: Config, kv_type: str) -> int:
    """Bytes of the keys, or of the values, of one position of one KV head.

    kv_type  a name of KV_TYPES

    Raises OptionError if the heads are no whole blocks of the type.
    """
    if kv_type not in KV_TYPES:
        raise OptionError(f"KV cache type {kv_type!r} is unknown; there are {', '.join(KV_TYPES)}")
    block, nbytes = BLOCKS[KV_TYPES[kv_type]]
    if config.head_dim % block:
        raise OptionError(
            f"KV cache type {kv_type}: this model's heads have {config.head_dim} dimensions (head_dim), no "
            f"multiple of {block}; take f16"
        )
    return config.head_dim // block * nbytes


def kv_bytes_per_token(config: Config, kv_type: str) -> int:
    """Bytes of the KV cache that one token takes; see `kv_row_bytes`."""
    return 2 * config.n_layers * config.n_kv_heads * kv_row_bytes(config, kv_type)


def norm_size(c: Config, name: str) -> int:
    """How many weights a norm of a layer has."""
    if name not in ("q_norm", "k_norm"):
        return c.d_model
    heads = c.n_heads if name == "q_norm" else c.n_kv_heads
    return c.head_dim * (heads if c.joint_norms else 1)


@dataclass(frozen=True)
class Linear:
    """y = s_out * A(s_mid * B(s_in * x)) + bias, A and B in {-1, +1} as DBF1 bytes."""

    a: NDArray[np.uint8]  # (rows, rank/8)
    b: NDArray[np.uint8]  # (rank, pad8(cols)/8)
    s_out: NDArray[np.float16]  # (rows,)
    s_mid: NDArray[np.float16]  # (rank,), rank % 8 == 0
    s_in: NDArray[np.float16]  # (cols,)
    bias: NDArray[np.float32] | None = None  # (rows,)

    @property
    def rows(self) -> int:
        return int(self.s_out.shape[0])

    @property
    def rank(self) -> int:
        return int(self.s_mid.shape[0])

    @property
    def cols(self) -> int:
        return int(self.s_in.shape[0])


@dataclass(frozen=True)
class Dense:
    """An unfactorized matrix, rows contiguous, in GGML's own layout of its type."""

    type: int  # a key of BLOCKS
    rows: int
    cols: int
    data: NDArray[np.uint8]  # (rows, bytes of a row)


NORMS = (
    "attn_norm",
    "ffn_norm",
    "q_norm",
    "k_norm",
    "attn_post_norm",
    "ffn_post_norm",
    "attn_norm_bias",
    "ffn_norm_bias",
)
"""Names of a block's norms, and of what is added after some."""

LINEARS = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), format.LINEARS, strict=True))
"""Names of a block's linear layers, in the file's order -> GGUF names."""

MAX_EXPERTS, MAX_EXPERTS_USED = 4096, 64
"""Most experts of a layer, and of those most that a token uses."""


@dataclass(frozen=True)
class Expert:
    """A gated feed-forward that some of the tokens pass."""

    gate: Linear
    up: Linear
    down: Linear


def gguf_name(name: str, has_experts: bool) -> str:
    """GGUF name of one of LINEARS: that of the shared expert where there are experts."""
    shared = has_experts and name in ("gate", "up", "down")
    return LINEARS[name] + ("_shexp" if shared else "")


@dataclass(frozen=True)
class Layer:
    """One decoder block."""

    # (d_model,) norms of what q, k, v, and of what gate, up read; None: the stream as it is
    attn_norm: NDArray[np.float32] | None
    ffn_norm: NDArray[np.float32] | None
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear | None  # None: down reads GELU(up)
    up: Linear | None  # with experts, gate, up and down are those of the shared one; None: there is none
    down: Linear | None
    q_norm: NDArray[np.float32] | None = None  # (head_dim,) of RMSNorm before RoPE, or all rows; both or none
    k_norm: NDArray[np.float32] | None = None
    attn_post_norm: NDArray[np.float32] | None = None  # (d_model,) of RMSNorm of what o adds to the stream
    ffn_post_norm: NDArray[np.float32] | None = None  # (d_model,) and of what down adds
    attn_norm_bias: NDArray[np.float32] | None = None  # (d_model,) added after LayerNorm
    ffn_norm_bias: NDArray[np.float32] | None = None
    window: int = 0  # a query sees so many positions, its own the last; 0: all of them
    rope: int = ROPE  # NO_ROPE, ROPE or LOCAL_ROPE
    router: NDArray[np.float32] | None = None  # (n_experts, d_model) whose softmax are the experts' shares
    experts: tuple[Expert, ...] = ()  # (n_experts,), or none
    shared_gate: NDArray[np.float32] | None = None  # (d_model,) whose sigmoid is the shared expert's share

    @property
    def norms(self) -> dict[str, NDArray[np.float32]]:
        """The norms' weights that there are, by their names."""
        every = {name: getattr(self, name) for name in NORMS}
        return {name: w for name, w in every.items() if w is not None}

    @property
    def linears(self) -> dict[str, Linear]:
        """The linear layers of all tokens that there are, by their names, in the file's order."""
        every = {name: getattr(self, name) for name in LINEARS}
        return {name: w for name, w in every.items() if w is not None}

    @property
    def gguf_linears(self) -> dict[str, Linear]:
        """All linear layers, experts included, by their GGUF names."""
        named = {gguf_name(name, bool(self.experts)): w for name, w in self.linears.items()}
        for i, expert in enumerate(self.experts):
            named |= {f"{LINEARS[name]}.{i}": getattr(expert, name) for name in ("gate", "up", "down")}
        return named


@dataclass(frozen=True)
class Weights:
    """All tensors of a model."""

    embed: Dense  # (n_vocab, d_model)
    layers: tuple[Layer, ...]
    out_norm: NDArray[np.float32]  # (d_model,)
    head: Dense  # (n_vocab, d_model); the embedding itself when the head is tied
    out_norm_bias: NDArray[np.float32] | None = None  # (d_model,)
    positions: NDArray[np.float32] | None = None  # (n_positions, d_model), added to embeddings
    rope_freqs: NDArray[np.float32] | None = None  # (rope_dims/2,), divides the frequencies
    rope_freqs_long: NDArray[np.float32] | None = None  # (rope_dims/2,), the same in long contexts


def rope_tables(config: Config, weights: Weights, n_ctx: int) -> NDArray[np.float32]:
    """cos and sin of every rotation, computed once in float64 and shared by all backends.

    ->  (tables, n_ctx, rope_dims/2, 2) float32: of ROPE, and of LOCAL_ROPE if there are layers that have it,
        [p, i] = magnitude * (cos, sin of p * theta^(-2i/dims) / (factor * freqs[i]))

    Source: RoFormer, arXiv:2104.09864; LongRoPE, arXiv:2402.13753. As in llama.cpp, the room for positions
    decides between rope_freqs and rope_freqs_long, so that a token's rotation never changes.
    """
    freqs = weights.rope_freqs
    if weights.rope_freqs_long is not None and n_ctx > config.n_ctx_original:
        freqs = weights.rope_freqs_long
    count = 1 + max(layer.rope for layer in weights.layers)  # none if no layer has any
    half = config.rope_dims // 2
    tables = np.empty((count, n_ctx, half, 2), np.float32)
    for kind, table in enumerate(tables):
        theta = config.rope_theta_local if kind == LOCAL_ROPE else config.rope_theta
        inv = theta ** (-np.arange(half, dtype=np.float64) * 2.0 / config.rope_dims)
        if kind == ROPE:
            inv = inv / config.rope_factor
        if kind == ROPE and freqs is not None:
            inv = inv / freqs.astype(np.float64)
        magnitude = config.rope_magnitude if kind == ROPE else 1.0
        angle = np.arange(n_ctx, dtype=np.float64)[:, None] * inv
        table[..., 0], table[..., 1] = magnitude * np.cos(angle), magnitude * np.sin(angle)
    return tables
