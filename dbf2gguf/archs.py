"""What differs between model families: names of modules and tensors, and features, one `ArchSpec` each.

To add a family, add a spec to `ARCHS`; a feature that no spec has yet also needs a field in
`runtime.config.Config` and a branch in both forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runtime.errors import FormatError, UnsupportedModelError

NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
INPUT = "input"
"""Residual of a linear whose output is added to the block's input."""


@dataclass(frozen=True)
class Group:
    """Linears that read the same vector. Groups are factorized in order, each on the inputs that the
    factorized groups before it produce."""

    linears: tuple[str, ...]
    residual: str | None = None  # what the output is added to: INPUT, the submodule that reads it, or None


@dataclass(frozen=True)
class ArchSpec:
    """One model family. Paths are dotted module names of transformers; `norms` and `linears` are relative
    to a decoder layer and map GGUF names to them."""

    model_type: str  # config.json's model_type
    model_class: str  # config.json's architectures
    gguf: str  # general.architecture
    rope_pairing: str  # "adjacent" or "halves", see runtime.config
    activation: str = "silu"
    norm: str = "rms"
    decoder: str = "model"
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    out_norm: str = "model.norm"
    head: str = "lm_head"
    linears: dict[str, str] = field(
        default_factory=lambda: {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }
    )
    norms: dict[str, str] = field(default_factory=lambda: NORMS)
    groups: tuple[Group, ...] = (
        Group(("attn_q", "attn_k", "attn_v")),
        Group(("attn_output",), residual=INPUT),
        Group(("ffn_gate", "ffn_up")),
        Group(("ffn_down",), residual="post_attention_layernorm"),
    )


ARCHS = {
    spec.model_type: spec
    for spec in (
        ArchSpec("llama", "LlamaForCausalLM", "llama", "adjacent"),
        ArchSpec("mistral", "MistralForCausalLM", "llama", "adjacent"),
        ArchSpec("qwen2", "Qwen2ForCausalLM", "qwen2", "halves"),
        ArchSpec("qwen3", "Qwen3ForCausalLM", "qwen3", "halves", norms=NORMS | HEAD_NORMS),
    )
}
"""Of those that share a GGUF architecture, a GGUF file is read as the first."""


def find_arch(config: dict[str, Any], where: str) -> ArchSpec:
    """The spec for a config.json. Raises UnsupportedModelError for a family or a feature that is not
    implemented, naming it and what is; FormatError for one that makes no sense."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHS:
        known = ", ".join(sorted(ARCHS))
        raise UnsupportedModelError(
            f"{where}: model_type {model_type!r} is not supported; supported: {known}"
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{where}: has a quantization_config: the weights are quantized already; take the original"
        )
    spec = ARCHS[model_type]
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "partial_rotary_factor": (None, 1.0),
    }
    for key, values in wanted.items():
        got = config.get(key, values[0])
        if got not in values:
            raise UnsupportedModelError(
                f"{where}: {key} = {got!r} is not supported; supported: {values[0]!r}"
            )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: RoPE parameters are {rope!r}; wanted an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3", "linear"):
        raise UnsupportedModelError(
            f"{where}: RoPE scaling {kind!r} is not supported; supported: default, linear, llama3"
        )
    return spec


def context_length(config: Any) -> int:
    """How many tokens a model may have: of transformers' config, what it was trained for, but no more than a
    sliding window, within which attention is like any other."""
    trained: int = config.max_position_embeddings
    window: int | None = getattr(config, "sliding_window", None)
    return min(trained, window) if window else trained


def permute_rope(rows: Any, n_heads: int) -> Any:
    """Reorder the rows of a q or k projection from transformers' halves (i, i + d/2) to llama.cpp's
    adjacent pairs (2i, 2i + 1), head by head. Works on NumPy arrays and tensors, rows first."""
    shape = rows.shape
    return rows.reshape(n_heads, 2, shape[0] // n_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def unpermute_rope(rows: Any, n_heads: int) -> Any:
    """The inverse of `permute_rope`."""
    shape = rows.shape
    return rows.reshape(n_heads, shape[0] // n_heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
