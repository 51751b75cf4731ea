"""Writes small, valid DBF GGUF files with gguf's own writer, for tests of the reader's side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from runtime.config import F32, HALVES, LOCAL_ROPE, NO_ROPE, Config, Dense, Expert, Layer, Linear, Weights
from runtime.format import DBF1_TYPE, pad8
from runtime.model import EPSILONS, NORMS

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_json(n_vocab: int = 300) -> str:
    """A byte-level BPE tokenizer with three control tokens (ids 0-2), 256 bytes and a few merges."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[AddedToken(t, special=True) for t in CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(["the cat sat on the mat and the hat, 1234 times; naïve café"] * 4, trainer)
    return str(tok.to_str())


def tiny_config(**changes: Any) -> Config:
    sizes: dict[str, Any] = {
        "n_layers": 2, "d_model": 32, "d_ff": 44, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
        "n_vocab": 300, "n_ctx_train": 128, "norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_dims": 8, "rope_pairing": HALVES,
    }  # fmt: skip
    return Config(**{**sizes, **changes})


def linear(rng: np.random.Generator, rows: int, cols: int, rank: int, bias: bool = False) -> Linear:
    def scale(n: int) -> Any:
        return (rng.uniform(0.5, 1.5, n) / np.sqrt(n)).astype(np.float16)

    return Linear(
        a=rng.integers(0, 256, (rows, rank // 8), dtype=np.uint8),
        b=rng.integers(0, 256, (rank, pad8(cols) // 8), dtype=np.uint8),
        s_out=scale(rows),
        s_mid=scale(rank),
        s_in=scale(cols),
        bias=rng.standard_normal(rows).astype(np.float32) if bias else None,
    )


def tiny_weights(c: Config, seed: int = 1, rank: int = 24, bias: bool = False) -> Weights:
    """Random weights with a tied F32 embedding."""
    rng = np.random.default_rng(seed)
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes = ((q, c.d_model), (kv, c.d_model), (kv, c.d_model), (c.d_model, q),
              (c.d_ff, c.d_model), (c.d_ff, c.d_model), (c.d_model, c.d_ff))  # fmt: skip

    def norm() -> Any:
        return rng.uniform(0.5, 1.5, c.d_model).astype(np.float32)

    def expert() -> Expert:
        shape = (c.d_expert, c.d_model)
        return Expert(*(linear(rng, *size, rank) for size in (shape, shape, shape[::-1])))

    layers = tuple(
        Layer(
            norm(),
            norm(),
            *(linear(rng, n, k, rank, bias and i < 3) for i, (n, k) in enumerate(shapes)),
            router=rng.standard_normal((c.n_experts, c.d_model)).astype(np.float32) if c.n_experts else None,
            experts=tuple(expert() for _ in range(c.n_experts)),
        )
        for _ in range(c.n_layers)
    )
    table = rng.standard_normal((c.n_vocab, c.d_model)).astype(np.float32)
    embed = Dense(F32, c.n_vocab, c.d_model, table.view(np.uint8))
    return Weights(embed, layers, norm(), embed)


def metadata(c: Config, arch: str = "llama") -> dict[str, Any]:
    """Keys of a valid file; ints become uint32, floats float32."""
    return {
        f"{arch}.block_count": c.n_layers,
        f"{arch}.context_length": c.n_ctx_train,
        f"{arch}.embedding_length": c.d_model,
        f"{arch}.feed_forward_length": c.d_ff,
        f"{arch}.attention.head_count": c.n_heads,
        f"{arch}.attention.head_count_kv": c.n_kv_heads,
        f"{arch}.attention.key_length": c.head_dim,
        f"{arch}.attention.{EPSILONS[c.norm]}": c.norm_eps,
        f"{arch}.rope.freq_base": c.rope_theta,
        f"{arch}.rope.dimension_count": c.rope_dims,
        f"{arch}.vocab_size": c.n_vocab,
        "dbf.version": 1,
        "dbf.rope.pairing": ("adjacent", "halves")[c.rope_pairing],
        "dbf.activation": ("silu", "gelu_tanh")[c.activation],
        "dbf.norm": ("rms", "layer")[c.norm],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        "tokenizer.huggingface.json": tokenizer_json(c.n_vocab),
    }


def features(c: Config, weights: Weights, arch: str = "llama") -> dict[str, Any]:
    """Keys of what only some models have."""
    meta: dict[str, Any] = {}
    if c.n_experts:
        meta[f"{arch}.expert_count"] = c.n_experts
        meta[f"{arch}.expert_used_count"] = c.n_experts_used
        meta[f"{arch}.expert_feed_forward_length"] = c.d_expert
        meta[f"{arch}.expert_weights_norm"] = bool(c.norm_experts)
        if weights.layers[0].up is not None:
            meta[f"{arch}.expert_shared_feed_forward_length"] = c.d_ff
    windows = [layer.window for layer in weights.layers]
    if any(windows):
        meta[f"{arch}.attention.sliding_window"] = max(windows)
        meta[f"{arch}.attention.sliding_window_pattern"] = [window > 0 for window in windows]
    if any(layer.rope == LOCAL_ROPE for layer in weights.layers):
        meta[f"{arch}.rope.freq_base_swa"] = c.rope_theta_local
    if any(layer.rope == NO_ROPE for layer in weights.layers):
        meta["dbf.rope.layers"] = [layer.rope != NO_ROPE for layer in weights.layers]
    if c.rope_factor != 1:
        meta[f"{arch}.rope.scaling.type"] = "linear"
        meta[f"{arch}.rope.scaling.factor"] = c.rope_factor
    for key, value, usual in (
        (f"{arch}.attn_logit_softcapping", c.attn_softcap, 0.0),
        (f"{arch}.final_logit_softcapping", c.logit_softcap, 0.0),
        ("dbf.scale.embedding", c.embed_scale, 1.0),
        ("dbf.scale.attention", c.attn_scale, 0.0),
        ("dbf.scale.residual", c.residual_scale, 1.0),
        ("dbf.scale.logits", c.logit_scale, 1.0),
    ):
        if value != usual:
            meta[key] = value
    return meta


def tensors(weights: Weights, c: Config) -> dict[str, tuple[Any, GGMLQuantizationType | None]]:
    """name -> (array, type to declare or None for the array's own)."""
    f32 = weights.embed.data.view(np.float32).reshape(c.n_vocab, c.d_model)
    out: dict[str, tuple[Any, GGMLQuantizationType | None]] = {"token_embd.weight": (f32, None)}
    out["output_norm.weight"] = (weights.out_norm, None)
    if weights.out_norm_bias is not None:
        out["output_norm.bias"] = (weights.out_norm_bias, None)
    if weights.positions is not None:
        out["position_embd.weight"] = (weights.positions, None)
    for i, layer in enumerate(weights.layers):
        for name, norm in layer.norms.items():
            out[f"blk.{i}.{NORMS[name]}"] = (norm, None)
        if layer.router is not None:
            out[f"blk.{i}.ffn_gate_inp.weight"] = (layer.router, None)
        if layer.shared_gate is not None:
            out[f"blk.{i}.ffn_gate_inp_shexp.weight"] = (layer.shared_gate, None)
        for name, part in layer.gguf_linears.items():
            at = f"blk.{i}.{name}"
            out[f"{at}.dbf_a"] = (part.a, DBF1_TYPE)
            out[f"{at}.dbf_b"] = (part.b, DBF1_TYPE)
            out[f"{at}.dbf_out"] = (part.s_out, None)
            out[f"{at}.dbf_mid"] = (part.s_mid, None)
            out[f"{at}.dbf_in"] = (part.s_in, None)
            if part.bias is not None:
                out[f"{at}.bias"] = (part.bias, None)
    return out


def write(path: Path, arch: str, meta: dict[str, Any], arrays: dict[str, Any]) -> Path:
    writer = GGUFWriter(path, arch)
    for key, value in meta.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path,
    config: Config | None = None,
    weights: Weights | None = None,
    *,
    arch: str = "llama",
    change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
) -> Path:
    """Write a model; `change` may edit the metadata and the tensors first, to make a bad one."""
    config = config or tiny_config()
    weights = weights or tiny_weights(config)
    meta, arrays = metadata(config, arch) | features(config, weights, arch), tensors(weights, config)
    if change is not None:
        change(meta, arrays)
    return write(path, arch, meta, arrays)


def added_tokens(json_text: str) -> list[str]:
    return [t["content"] for t in json.loads(json_text)["added_tokens"]]


__all__ = ["gguf", "tiny_config", "tiny_weights", "write_model"]
