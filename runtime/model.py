"""From a GGUF file to `Config` and `Weights`: every tensor's name, shape and type is checked.

Tensors and keys that this version does not know are features it would silently leave out, so they are
errors. The arrays are views of the mapped file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from runtime.config import (
    ADJACENT,
    BLOCKS,
    F16,
    F32,
    GELU,
    HALVES,
    LAYER_NORM,
    LINEARS,
    LOCAL_ROPE,
    MAX_EXPERTS,
    MAX_EXPERTS_USED,
    NO_ROPE,
    RMS_NORM,
    ROPE,
    SILU,
    Config,
    Dense,
    Expert,
    Layer,
    Linear,
    Weights,
    gguf_name,
    norm_size,
)
from runtime.errors import FormatError, UnsupportedModelError
from runtime.format import DBF1, FORMAT_VERSION, pad8
from runtime.gguf import GgufFile, TensorInfo, type_name

I8 = int(GGMLQuantizationType.I8)

ROPE_PAIRINGS = {"adjacent": ADJACENT, "halves": HALVES}
ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU}
NORM_KINDS = {"rms": RMS_NORM, "layer": LAYER_NORM}
EPSILONS = {RMS_NORM: "layer_norm_rms_epsilon", LAYER_NORM: "layer_norm_epsilon"}
POSITIONS = "position_embd.weight"

MAX_SIZE = 1 << 24
"""Largest dimension of a model: sizes and their sums then fit int32 everywhere."""

FORBIDDEN = (
    ("rope.scaling.type", ("none", "llama3", "linear", "longrope"), "RoPE scaling"),
    ("attention.causal", (True,), "non-causal attention"),
    ("use_parallel_residual", (False,), "parallel residual branches"),
    ("expert_gating_func", (1,), "a gating of experts other than softmax"),
    ("expert_group_count", (0, 1), "groups of experts"),
    ("expert_weights_scale", (0.0, 1.0), "a scale of experts"),
    ("leading_dense_block_count", (0,), "layers with experts among layers without"),
    ("interleave_moe_layer_step", (0, 1), "layers with experts among layers without"),
    ("moe_every_n_layers", (0, 1), "layers with experts among layers without"),
)
"""Keys (after the architecture) whose other values stand for features that are not implemented.
Llama 3's RoPE scaling is: its factors are the tensor rope_freqs.weight."""

NORMS = {
    "attn_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "ffn_post_norm": "post_ffw_norm.weight",
    "attn_norm_bias": "attn_norm.bias",
    "ffn_norm_bias": "ffn_norm.bias",
}
"""Fields of Layer -> GGUF names."""

NORM_PAIRS = (("attn_norm", "attn_post_norm"), ("ffn_norm", "ffn_post_norm"))
"""Each layer has one of either, or both."""

SCALES = (
    ("attention.scale", (0.0,), "a scale of attention scores"),
    ("logit_scale", (0.0, 1.0), "a logit scale"),
    ("embedding_scale", (0.0, 1.0), "an embedding scale"),
    ("residual_scale", (0.0, 1.0), "a residual scale"),
)
"""Such keys whose meaning differs from architecture to architecture; `dbf.scale.*` say it without doubt."""


def check_features(path: str | Path, metadata: Mapping[str, Any], arch: str, scales: bool = False) -> None:
    """Raise UnsupportedModelError if a GGUF's metadata speak of a feature that is not implemented.

    scales  whether the caller knows what the keys of SCALES mean
    """
    for name, harmless, feature in FORBIDDEN if scales else FORBIDDEN + SCALES:
        value = metadata.get(f"{arch}.{name}")
        if value is not None and value not in harmless:
            raise UnsupportedModelError(
                f"{path}: {arch}.{name} is {value!r:.60}: {feature} is not implemented"
            )


@dataclass(frozen=True)
class ModelFile:
    """An opened DBF GGUF file. `file` must stay open as long as `weights` are used."""

    path: str
    architecture: str
    config: Config
    weights: Weights
    metadata: Mapping[str, Any]
    file: GgufFile

    @property
    def name(self) -> str:
        """The model's own name, else the file's."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name else os.path.basename(self.path)

    @property
    def tokenizer_json(self) -> str | None:
        """The Hugging Face tokenizer, as JSON text."""
        value = self.metadata.get("tokenizer.huggingface.json")
        return value if isinstance(value, str) else None

    @property
    def chat_template(self) -> str | None:
        """The chat template's Jinja source."""
        value = self.metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None

    def close(self) -> None:
        self.file.close()


def load_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Open and check a file made by dbf2gguf.

    Raises FormatError if it is damaged or inconsistent, UnsupportedModelError if it is a plain GGUF file or
    uses a feature that is not implemented, OSError if it cannot be read.
    """
    file = GgufFile(path)
    try:
        reader = _Reader(file)
        config = reader.config()
        weights = reader.weights(config)
        return ModelFile(file.path, reader.arch, config, weights, file.metadata, file)
    except BaseException:
        file.close()
        raise


class _Reader:
    """Reads keys and tensors of one file and keeps account of the tensors it used."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.meta = file.metadata
        self.used: set[str] = set()
        if "dbf.version" not in self.meta:
            raise UnsupportedModelError(
                f"{file.path}: a plain GGUF file, not one of dbf2gguf (no key dbf.version); "
                f"convert it first: dbf2gguf {file.path} OUT.gguf --bpw 1.2"
            )
        version = self._get("dbf.version", int)
        if version != FORMAT_VERSION:
            raise UnsupportedModelError(
                f"{file.path}: dbf.version is {version}, this program reads {FORMAT_VERSION}; update dbf2gguf"
            )
        carrier = self._get("dbf.carrier", str, "dbf1")
        if carrier not in ("dbf1", "i8"):
            raise self._unsupported(f"dbf.carrier is {carrier!r}, wanted 'dbf1' or 'i8'")
        self.carrier = I8 if carrier == "i8" else DBF1
        self.arch = self._get("general.architecture", str)

    # -- metadata ---------------------------------------------------------------------------------------

    def _fail(self, what: str) -> FormatError:
        return FormatError(f"{self.file.path}: {what}")

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.file.path}: {what}")

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.meta.get(key, default)
        if value is None:
            raise self._fail(f"metadata key {key} is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self._fail(f"{key} is {value!r:.60}, wanted {kind.__name__}")
        return value

    def _size(self, name: str, default: int | None = None) -> int:
        """A size under <architecture>.<name>: 1..MAX_SIZE; per-layer arrays only if all the same."""
        key = f"{self.arch}.{name}"
        value = self.meta.get(key)
        if isinstance(value, list):
            if not value or any(v != value[0] for v in value):
                raise self._unsupported(f"{key} differs from layer to layer, which is not implemented")
            value = value[0]
        if value is None:
            value = default
        if value is None:
            raise self._fail(f"metadata key {key} is missing")
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise self._fail(f"{key} is {value!r:.60}, wanted an integer in 1..{MAX_SIZE}")
        return value

    def _positive(self, name: str, default: float | None = None) -> float:
        key = f"{self.arch}.{name}"
        value = float(self._get(key, float, default))
        if not (value > 0 and math.isfinite(value)):
            raise self._fail(f"{key} is {value}, wanted a positive number")
        return value

    def _optional(self, key: str, default: float) -> float:
        """A number that is not negative, and `default` where there is none."""
        value = float(self._get(key, float, default))
        if not (value >= 0 and math.isfinite(value)):
            raise self._fail(f"{key} is {value}, wanted a number of 0 or more")
        return value

    def _flags(self, key: str, n_layers: int) -> list[bool]:
        """A bool for each layer."""
        values = self.meta.get(key)
        if not isinstance(values, list) or [type(v) for v in values] != [bool] * n_layers:
            raise self._fail(f"{key} is {values!r:.60}, wanted a bool for each of {n_layers} layers")
        return values

    def _ropes(self, windows: list[int]) -> list[int]:
        """What rotates the queries and keys of each layer."""
        local = f"{self.arch}.rope.freq_base_swa" in self.meta
        ropes = [LOCAL_ROPE if window and local else ROPE for window in windows]
        if "dbf.rope.layers" not in self.meta:
            return ropes
        rotates = self._flags("dbf.rope.layers", len(windows))
        return [rope if yes else NO_ROPE for rope, yes in zip(ropes, rotates, strict=True)]

    def _windows(self, n_layers: int) -> list[int]:
        """The sliding window of each layer; 0 for none."""
        key = f"{self.arch}.attention.sliding_window"
        if not self.meta.get(key):
            return [0] * n_layers
        window = self._size("attention.sliding_window")
        if f"{key}_pattern" not in self.meta:
            raise self._unsupported(f"{key} is {window}, but {key}_pattern does not say in which layers")
        return [window if windowed else 0 for windowed in self._flags(f"{key}_pattern", n_layers)]

    def _choice(self, key: str, default: str, known: tuple[str, ...]) -> str:
        value = str(self._get(key, str, default))
        if value not in known:
            raise self._unsupported(f"{key} is {value!r}; implemented: {', '.join(known)}")
        return value

    def config(self) -> Config:
        told = any(key.startswith("dbf.scale.") for key in self.meta)
        check_features(self.file.path, self.meta, self.arch, told)
        activation = self._choice("dbf.activation", "silu", tuple(ACTIVATIONS))
        norm = self._choice("dbf.norm", "rms", tuple(NORM_KINDS))
        pairing = self._choice("dbf.rope.pairing", "", tuple(ROPE_PAIRINGS))
        d_model, n_heads = self._size("embedding_length"), self._size("attention.head_count")
        head_dim = self._size("attention.key_length", max(1, d_model // n_heads))
        n_vocab = self._tensor("token_embd.weight").shape[0]
        config = Config(
            n_layers=self._size("block_count"),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=self._size("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            n_vocab=self._size("vocab_size", n_vocab),
            n_ctx_train=self._size("context_length"),
            norm_eps=self._positive(f"attention.{EPSILONS[NORM_KINDS[norm]]}"),
            rope_theta=self._positive("rope.freq_base", 10000.0),
            rope_dims=self._size("rope.dimension_count", head_dim),
            rope_pairing=ROPE_PAIRINGS[pairing],
            rope_factor=self._rope_factor(),
            rope_magnitude=self._positive("rope.scaling.attn_factor", 1.0),
            n_ctx_original=self._size("rope.scaling.original_context_length") if self._longrope else 0,
            rope_theta_local=self._positive("rope.freq_base_swa", 10000.0),
            activation=ACTIVATIONS[activation],
            embed_scale=self._optional("dbf.scale.embedding", 1.0),
            attn_scale=self._optional("dbf.scale.attention", 0.0),
            attn_softcap=self._optional(f"{self.arch}.attn_logit_softcapping", 0.0),
            logit_softcap=self._optional(f"{self.arch}.final_logit_softcapping", 0.0),
            residual_scale=self._optional("dbf.scale.residual", 1.0),
            logit_scale=self._optional("dbf.scale.logits", 1.0),
            norm=NORM_KINDS[norm],
            n_positions=self._n_positions(),
            joint_norms=self._joint_norms(n_heads * head_dim, head_dim),
            **self._feed_forward(),
        )
        if config.n_heads % config.n_kv_heads:
            raise self._fail(f"{config.n_heads} heads are no multiple of {config.n_kv_heads} KV heads")
        if config.n_heads * head_dim > MAX_SIZE:
            raise self._fail(
                f"{config.n_heads} heads of {head_dim} dimensions, wanted {MAX_SIZE} in all at most"
            )
        if config.rope_dims % 2 or config.rope_dims > head_dim:
            raise self._fail(
                f"RoPE rotates {config.rope_dims} dimensions of {head_dim}, wanted an even number of them"
            )
        if self._size("attention.value_length", head_dim) != head_dim:
            raise self._unsupported("keys and values of different length are not implemented")
        return config

    def _feed_forward(self) -> dict[str, int]:
        """The fields of Config that say what feed-forward and experts there are."""
        n_experts = self._get(f"{self.arch}.expert_count", int, 0)
        if not n_experts:
            return {"d_ff": self._size("feed_forward_length")}
        if not 1 <= n_experts <= MAX_EXPERTS:
            raise self._fail(f"{self.arch}.expert_count is {n_experts}, wanted 0 to {MAX_EXPERTS}")
        n_used, most = self._size("expert_used_count"), min(n_experts, MAX_EXPERTS_USED)
        if n_used > most:
            raise self._fail(
                f"{self.arch}.expert_used_count is {n_used}, wanted 1 to {most}, with {n_experts} experts"
            )
        d_expert = self._size("expert_feed_forward_length")
        return {
            "n_experts": n_experts,
            "n_experts_used": n_used,
            "d_expert": d_expert,
            "d_ff": self._size("expert_shared_feed_forward_length") if self._shared else d_expert,
            "norm_experts": int(self._get(f"{self.arch}.expert_weights_norm", bool)),
        }

    @property
    def _shared(self) -> bool:
        """Whether there is an expert that all tokens share, if there are experts."""
        return bool(self.meta.get(f"{self.arch}.expert_shared_feed_forward_length"))

    def _rope_factor(self) -> float:
        linear = self.meta.get(f"{self.arch}.rope.scaling.type") == "linear"
        return self._positive("rope.scaling.factor") if linear else 1.0

    def _joint_norms(self, rows: int, head_dim: int) -> int:
        """Whether queries are normalized all heads together; the norm's length tells it."""
        norm = self.file.tensors.get("blk.0.attn_q_norm.weight")
        return int(norm is not None and norm.shape == (rows,) and rows != head_dim)

    def _n_positions(self) -> int:
        """Rows of the learned positions; 0 if there are none."""
        if POSITIONS not in self.file.tensors:
            return 0
        rows = self._tensor(POSITIONS).shape[0]
        if rows > MAX_SIZE:
            raise self._fail(f"tensor {POSITIONS} has {rows} rows, wanted {MAX_SIZE} at most")
        return rows

    @property
    def _longrope(self) -> bool:
        return self.meta.get(f"{self.arch}.rope.scaling.type") == "longrope"

    # -- tensors ----------------------------------------------------------------------------------------

    def _tensor(self, name: str) -> TensorInfo:
        info = self.file.tensors.get(name)
        if info is None:
            raise self._fail(f"tensor {name} is missing")
        return info

    def _array(self, name: str, kind: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor's data, after its type and shape; floats must be finite."""
        info = self._tensor(name)
        if info.type != kind:
            raise self._fail(f"tensor {name} has type {info.type_name}, wanted {type_name(kind)}")
        if info.shape != shape:
            raise self._fail(f"tensor {name} has shape {info.shape}, wanted {shape}")
        self.used.add(name)
        data = self.file.data(name)
        if data.dtype.kind == "f" and not np.isfinite(data).all():
            raise self._fail(f"tensor {name} holds a value that is not finite")
        return data

    def _vector(self, name: str, n: int) -> NDArray[np.float32]:
        return self._array(name, F32, (n,))

    def _signs(self, name: str, rows: int, cols: int) -> NDArray[np.uint8]:
        """DBF1 bytes (rows, cols/8), whichever tensor type carries them."""
        data = self._array(name, self.carrier, (rows, cols if self.carrier == DBF1 else cols // 8))
        return data.view(np.uint8)

    def _linear(self, name: str, rows: int, cols: int) -> Linear:
        mid = self._tensor(f"{name}.dbf_mid").shape
        if len(mid) != 1 or mid[0] % 8 or mid[0] > MAX_SIZE:
            raise self._fail(f"tensor {name}.dbf_mid has shape {mid}, wanted (rank,), rank a multiple of 8")
        rank = mid[0]
        return Linear(
            a=self._signs(f"{name}.dbf_a", rows, rank),
            b=self._signs(f"{name}.dbf_b", rank, pad8(cols)),
            s_out=self._array(f"{name}.dbf_out", F16, (rows,)),
            s_mid=self._array(f"{name}.dbf_mid", F16, (rank,)),
            s_in=self._array(f"{name}.dbf_in", F16, (cols,)),
            bias=self._vector(f"{name}.bias", rows) if f"{name}.bias" in self.file.tensors else None,
        )

    def _dense(self, name: str, rows: int, cols: int) -> Dense:
        info = self._tensor(name)
        if info.type not in BLOCKS:
            known = ", ".join(type_name(kind) for kind in BLOCKS)
            raise self._unsupported(f"tensor {name} has type {info.type_name}; implemented: {known}")
        if info.shape != (rows, cols):
            raise self._fail(f"tensor {name} has shape {info.shape}, wanted ({rows}, {cols})")
        self.used.add(name)
        data = self.file.data(name)
        return Dense(info.type, rows, cols, data.view(np.uint8).reshape(rows, -1))

    def _layer(self, i: int, c: Config, window: int, rope: int) -> Layer:
        d, heads, kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        sizes = ((heads, d), (kv, d), (kv, d), (d, heads), (c.d_ff, d), (c.d_ff, d), (d, c.d_ff))
        linears: dict[str, Any] = {"gate": None, "up": None, "down": None}
        for field, size in zip(LINEARS, sizes, strict=True):
            name = f"blk.{i}.{gguf_name(field, bool(c.n_experts))}"
            there = f"{name}.dbf_mid" in self.file.tensors
            if field in ("gate", "up", "down") and c.n_experts and not self._shared:
                continue
            if field != "gate" or c.activation != GELU or there:
                linears[field] = self._linear(name, *size)
        norms: dict[str, Any] = {"attn_norm": None, "ffn_norm": None}
        for field, name in NORMS.items():
            if f"blk.{i}.{name}" in self.file.tensors:
                norms[field] = self._vector(f"blk.{i}.{name}", norm_size(c, field))
        for pair in NORM_PAIRS:
            if all(norms.get(field) is None for field in pair):
                raise self._fail(f"tensor blk.{i}.{pair[0]}.weight is missing")
        if (norms.get("q_norm") is None) != (norms.get("k_norm") is None):
            raise self._fail(
                f"layer {i} has only one of the tensors attn_q_norm.weight and attn_k_norm.weight"
            )
        return Layer(**linears, **norms, **self._experts(i, c), window=window, rope=rope)

    def _experts(self, i: int, c: Config) -> dict[str, Any]:
        """The fields of Layer about experts."""
        if not c.n_experts:
            return {}
        d, wide, shared_gate = c.d_model, c.d_expert, f"blk.{i}.ffn_gate_inp_shexp.weight"
        sizes = {"gate": (wide, d), "up": (wide, d), "down": (d, wide)}
        return {
            "router": self._array(f"blk.{i}.ffn_gate_inp.weight", F32, (c.n_experts, d)),
            "experts": tuple(
                Expert(
                    **{
                        field: self._linear(f"blk.{i}.{LINEARS[field]}.{e}", *size)
                        for field, size in sizes.items()
                    }
                )
                for e in range(c.n_experts)
            ),
            "shared_gate": self._vector(shared_gate, d)
            if self._shared and shared_gate in self.file.tensors
            else None,
        }

    def _freqs(self, name: str, c: Config) -> NDArray[np.float32]:
        freqs = self._vector(name, c.rope_dims // 2)
        if not (freqs > 0).all():
            raise self._fail(f"tensor {name} holds a value that is not positive")
        return freqs

    def weights(self, c: Config) -> Weights:
        embed = self._dense("token_embd.weight", c.n_vocab, c.d_model)
        tied = "output.weight" not in self.file.tensors
        freqs: NDArray[np.float32] | None = None
        freqs_long: NDArray[np.float32] | None = None
        if self._longrope:
            freqs = self._freqs("rope_factors_short.weight", c)
            freqs_long = self._freqs("rope_factors_long.weight", c)
        elif "rope_freqs.weight" in self.file.tensors:
            freqs = self._freqs("rope_freqs.weight", c)
        windows = self._windows(c.n_layers)
        kinds = enumerate(zip(windows, self._ropes(windows), strict=True))
        weights = Weights(
            embed=embed,
            layers=tuple(self._layer(i, c, window, rope) for i, (window, rope) in kinds),
            out_norm=self._vector("output_norm.weight", c.d_model),
            out_norm_bias=self._vector("output_norm.bias", c.d_model)
            if "output_norm.bias" in self.file.tensors
            else None,
            positions=self._array(POSITIONS, F32, (c.n_positions, c.d_model)) if c.n_positions else None,
            head=embed if tied else self._dense("output.weight", c.n_vocab, c.d_model),
            rope_freqs=freqs,
            rope_freqs_long=freqs_long,
        )
        unknown = [name for name in self.file.tensors if name not in self.used]
        if unknown:
            raise self._unsupported(
                f"tensor {unknown[0]} ({len(unknown)} such) belongs to a feature that is not implemented"
            )
        return weights
