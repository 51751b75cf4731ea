"""A standard GGUF -> a Hugging Face folder: weights dequantized, config and tokenizer rebuilt.

The way back of llama.cpp's convert_hf_to_gguf.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import dequantize
from numpy.typing import NDArray
from tokenizers import processors

from dbf2gguf.archs import (
    ACTIVATIONS,
    ARCHS,
    EXPERT_LINEARS,
    FULL,
    SLIDING,
    ArchSpec,
    gguf_spec,
    unpermute_rope,
)
from dbf2gguf.files import check_space
from runtime import ggml_tokenizer
from runtime.errors import FormatError, UnsupportedModelError
from runtime.gguf import GgufFile, type_name
from runtime.model import EPSILONS, NORM_KINDS, check_features

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
NO_TOKEN = 0xFFFFFFFF
ROWS_AT_ONCE = 1024  # of a tensor, to be dequantized
SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def gguf_to_hf(source: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and
    tokenizer_config.json into `target`, which is created. One tensor at a time is in memory.

    Raises FormatError for a broken file, UnsupportedModelError for an architecture or tokenizer that has
    no way back yet, OptionError if the disk is too small.
    """
    config_to_hf(source, target, dtype)
    weights_to_hf(source, target, dtype)


def config_to_hf(source: Path, target: Path, dtype: torch.dtype) -> None:
    """What `gguf_to_hf` writes but model.safetensors."""
    with GgufFile(source) as file:
        arch = _find_arch(file, source)
        target.mkdir(parents=True, exist_ok=True)
        config = _config(file, arch, dtype)
        _write_json(target / "config.json", config)
        ids = {
            k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None
        }
        _write_json(target / "generation_config.json", ids)
        _write_tokenizer(file, source, target)
        _tensors(file, arch, config)  # checks their names


def largest_bytes(source: Path) -> int:
    """Of the file's largest tensor, in float32."""
    with GgufFile(source) as file:
        return 4 * max(prod(tensor.shape) for tensor in file.tensors.values())


def weights_to_hf(source: Path, target: Path, dtype: torch.dtype) -> None:
    """The model.safetensors that `gguf_to_hf` writes."""
    with GgufFile(source) as file:
        arch = _find_arch(file, source)
        tensors = _tensors(file, arch, _config(file, arch, dtype))
        size = sum(prod(tensor.shape) for tensor in tensors.values()) * dtype.itemsize
        weights = target / "model.safetensors"
        check_space(weights, size, "the dequantized model")
        try:
            _write_safetensors(weights, tensors, dtype)
        except OSError as error:  # a full disk, most of all
            raise FormatError(f"{weights}: cannot be written: {error}") from error


def _find_arch(file: GgufFile, source: Path) -> ArchSpec:
    name = file.metadata.get("general.architecture")
    if "dbf.version" in file.metadata:
        raise UnsupportedModelError(f"{source}: already factorized; wanted the original model")
    has_experts = bool(file.metadata.get(f"{name}.expert_count"))
    has_window = bool(file.metadata.get(f"{name}.attention.sliding_window"))
    spec = gguf_spec(name, has_experts, has_window)
    if spec is not None:
        return spec
    if gguf_spec(name, not has_experts) is not None:
        what = "with" if has_experts else "without"
        raise UnsupportedModelError(f"{source}: architecture {name!r} {what} experts is not supported")
    known = ", ".join(sorted({spec.gguf for spec in ARCHS.values()}))
    raise UnsupportedModelError(f"{source}: architecture {name!r} is not supported; supported: {known}")


def _config(file: GgufFile, arch: ArchSpec, dtype: torch.dtype) -> dict[str, Any]:
    meta = file.metadata
    check_features(file.path, meta, arch.gguf, arch.scale_keys)
    window = meta.get(f"{arch.gguf}.attention.sliding_window") or None
    if window and not (arch.windows or arch.window_of_all):
        raise UnsupportedModelError(
            f"{file.path}: {arch.gguf}.attention.sliding_window is {window!r:.60}: a sliding window is not "
            f"supported in {arch.model_type!r}"
        )

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"{arch.gguf}.{key}", default)
        if value is None:
            raise FormatError(f"{file.path}: metadata key {arch.gguf}.{key} is missing")
        if not isinstance(value, (int, float)) or value <= 0:
            raise UnsupportedModelError(
                f"{file.path}: metadata key {arch.gguf}.{key} is {value!r:.60}; wanted one number above 0"
            )
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    if "token_embd.weight" not in file.tensors:
        raise FormatError(f"{file.path}: no tensor token_embd.weight: a vocabulary only, not a model")
    n_blocks = len({match[1] for name in file.tensors if (match := re.match(r"blk\.(\d+)\.", name))})
    if (blocks := get("block_count")) > n_blocks:
        key = f"{arch.gguf}.block_count"
        raise FormatError(f"{file.path}: {key} is {blocks}; there are tensors of {n_blocks}")
    config = {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads),
        "max_position_embeddings": get("context_length"),
        ("layer_norm_epsilon" if arch.norm == "layer" else "rms_norm_eps"): float(
            f"{get('attention.' + EPSILONS[NORM_KINDS[arch.norm]]):.6g}"
        ),
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "hidden_act": ACTIVATIONS[arch.activation][0],
        "hidden_activation": ACTIVATIONS[arch.activation][0],
        "attention_bias": any(name.endswith("attn_q.bias") for name in file.tensors),
        "qkv_bias": any(name.endswith("attn_q.bias") for name in file.tensors),
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in file.tensors),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if meta.get(f"{arch.gguf}.rope.scaling.type") == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(get("rope.scaling.factor"))}
    if arch.partial_rotary:
        config["partial_rotary_factor"] = get("rope.dimension_count", config["head_dim"]) / config["head_dim"]
    if meta.get(f"{arch.gguf}.rope.scaling.type") == "longrope":
        if not arch.longrope:
            raise UnsupportedModelError(
                f"{file.path}: RoPE scaling 'longrope' is not supported in {arch.gguf!r}"
            )
        config["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "attention_factor": float(get("rope.scaling.attn_factor", 1.0)),
            **{f"{name}_factor": _factors(file, name) for name in ("short", "long")},
        }
    if "rope_freqs.weight" in file.tensors:
        config["rope_scaling"] = _rope_scaling(file, config["rope_theta"])
    if arch.positions:
        config["activation_function"], config["n_inner"] = config["hidden_act"], config["intermediate_size"]
    if arch.experts is not None:
        config |= _experts(get, arch, meta)
    if arch.scale_keys:
        config |= {
            "embedding_multiplier": float(get("embedding_scale", 1.0)),
            "attention_multiplier": float(get("attention.scale", config["head_dim"] ** -0.5)),
            "residual_multiplier": float(get("residual_scale", 1.0)),
            "logits_scaling": float(get("logit_scale", 1.0)),
        }
    config["sliding_window"] = window
    if arch.windows:
        config |= _layer_types(file, arch, blocks) if window else {"layer_types": [FULL] * blocks}
    elif window and not all(_pattern(file, arch, blocks) or ()):
        raise UnsupportedModelError(
            f"{file.path}: {arch.gguf}.attention.sliding_window_pattern leaves layers out; supported in "
            f"{arch.model_type!r}: a sliding window of all layers"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        config[name] = get(name) if meta.get(f"{arch.gguf}.{name}") else None
    if arch.scaled_embedding:  # scores are scaled by it, but in the largest models
        large = config["num_hidden_layers"] == arch.layers_of_largest
        config["query_pre_attn_scalar"] = width // heads if large else config["head_dim"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = _token_id(file, key)
    return config


def _token_id(file: GgufFile, key: str) -> int | None:
    """One of the tokenizer's special tokens. None, or llama.cpp's -1 as uint32, if there is none."""
    index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if index in (None, NO_TOKEN):
        return None
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise FormatError(
            f"{file.path}: metadata key tokenizer.ggml.{key}_token_id is {index!r:.60}; wanted one of "
            f"{len(tokens)} tokens"
        )
    return index


def _experts(get: Callable[..., Any], arch: ArchSpec, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json about experts; what a file does not say is as llama.cpp takes it."""
    assert arch.experts is not None
    n_experts, n_used, d_ff = get("expert_count"), get("expert_used_count"), get("feed_forward_length")
    config = {
        "num_experts": n_experts,
        "num_local_experts": n_experts,
        "num_experts_per_tok": n_used,
        "norm_topk_prob": bool(meta.get(f"{arch.gguf}.expert_weights_norm", arch.experts.norm_shares)),
    }
    if arch.experts.own_width:
        config["moe_intermediate_size"] = get("expert_feed_forward_length", d_ff // n_used)
    if arch.experts.shared is not None:
        config["shared_expert_intermediate_size"] = get("expert_shared_feed_forward_length", d_ff)
    return config


def _layer_types(file: GgufFile, arch: ArchSpec, n_layers: int) -> dict[str, Any]:
    """The entries of config.json that say which layers have a sliding window, and RoPE's base there."""
    pattern = _pattern(file, arch, n_layers) or [(i + 1) % arch.windows != 0 for i in range(n_layers)]
    theta = file.metadata.get(f"{arch.gguf}.rope.freq_base_swa", arch.local_theta)
    types = {"layer_types": [SLIDING if windowed else FULL for windowed in pattern]}
    return types | ({"rope_local_base_freq": float(theta)} if theta else {})


def _pattern(file: GgufFile, arch: ArchSpec, n_layers: int) -> list[Any] | None:
    """Which layers have the sliding window; None where the file does not say."""
    key = f"{arch.gguf}.attention.sliding_window_pattern"
    if key not in file.metadata:
        return None
    pattern = file.metadata[key]
    if not isinstance(pattern, list) or len(pattern) != n_layers:
        raise FormatError(f"{file.path}: {key} is {pattern!r:.60}; wanted a bool for each layer")
    return pattern


def _factors(file: GgufFile, name: str) -> list[float]:
    tensor = f"rope_factors_{name}.weight"
    if tensor not in file.tensors:
        raise FormatError(f"{file.path}: no tensor {tensor}, which RoPE scaling 'longrope' needs")
    return [float(f"{value:.7g}") for value in np.array(file.data(tensor)).reshape(-1)]


def _rope_scaling(file: GgufFile, theta: float) -> dict[str, Any]:
    """Llama 3's RoPE scaling, of which a GGUF file holds only what it does to each frequency.

    The factor is read off, the rest is what all Llama 3 models have. Raises UnsupportedModelError if that
    does not give the file's numbers.
    """
    freqs = np.array(file.data("rope_freqs.weight"), dtype=np.float64).reshape(-1)
    scaling = {"rope_type": "llama3", "factor": float(f"{freqs.max():.6g}"), **LLAMA3_ROPE}
    turns = LLAMA3_ROPE["original_max_position_embeddings"] / (2 * np.pi)
    turns = turns * theta ** (-np.arange(len(freqs)) / len(freqs))  # in the original context
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(freqs, 1 / ((1 - share) / scaling["factor"] + share), rtol=1e-3):
        raise UnsupportedModelError(f"{file.path}: rope_freqs.weight is not the RoPE scaling of Llama 3")
    return scaling


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the model, dequantized when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.float32]]


def _tensors(file: GgufFile, arch: ArchSpec, config: dict[str, Any]) -> dict[str, _Tensor]:
    parts = {part for fused in arch.fused.values() for part in fused.parts}
    inner = {name: path for name, path in (arch.linears | arch.norms).items() if name not in parts}
    inner |= {name: fused.module for name, fused in arch.fused.items()}
    inner |= _expert_places(arch)
    outer = {
        "token_embd.weight": f"{arch.embed}.weight",
        "output_norm.weight": f"{arch.out_norm}.weight",
        "output_norm.bias": f"{arch.out_norm}.bias",
        "position_embd.weight": f"{arch.positions}.weight",
        "output.weight": f"{arch.head}.weight",
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    result = {}
    for name, info in file.tensors.items():
        if name.startswith("rope_f"):
            continue  # part of config.json
        change: Callable[[NDArray[Any]], NDArray[Any]] | None = None
        shape = info.shape
        if name in outer:
            target = outer[name]
            offset = arch.norm_offset if name == "output_norm.weight" else 0
        else:
            match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
            if match is None or match[2] not in inner:
                raise UnsupportedModelError(f"{file.path}: no place for tensor {name!r} in {arch.model_type}")
            target = f"{arch.layers}.{match[1]}.{inner[match[2]]}.{match[3]}"
            offset = arch.norm_offset if match[2] in arch.norms else 0
            if name.endswith("_exps.weight"):
                target = target.removesuffix(".weight")
            if name.endswith("_inp_shexp.weight"):
                shape = (1, *shape)
            if arch.positions and len(shape) == 2:
                shape, change = shape[::-1], np.transpose  # GPT-2's Conv1D
            if match[2] in heads and shape[0] % (2 * heads[match[2]]):
                raise FormatError(
                    f"{file.path}: {name} has {shape[0]} rows; wanted an even number for each of "
                    f"{heads[match[2]]} heads"
                )
            if match[2] in heads and arch.rope_pairing == "adjacent":
                change = partial(unpermute_rope, n_heads=heads[match[2]])
        result[target] = _Tensor(shape, partial(_read, file, name, shape, offset, change))
    if arch.experts is not None:
        _join_gate_up(file, f".{arch.experts.module}.", result)
    return result


def _read(
    file: GgufFile,
    name: str,
    shape: tuple[int, ...],
    offset: float,
    change: Callable[[NDArray[Any]], NDArray[Any]] | None,
) -> NDArray[np.float32]:
    """A tensor in float32: a few rows are dequantized at a time."""
    kind, data = file.tensors[name].type, file.data(name)
    array = np.empty(file.tensors[name].shape, dtype=np.float32)
    stored, rows = data.reshape(-1, data.shape[-1]), array.reshape(-1, array.shape[-1])
    try:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rows[part] = dequantize(stored[part], kind)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{file.path}: {name} is of type {type_name(kind)}, which gguf cannot dequantize"
        ) from error
    file.release()
    array -= np.float32(offset)
    array = array if change is None else change(array)
    return np.ascontiguousarray(array.reshape(shape))


def _write_safetensors(path: Path, tensors: Mapping[str, _Tensor], dtype: torch.dtype) -> None:
    """A safetensors file (its header is a table of contents in JSON), tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_TYPES[dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    table = json.dumps(header).encode()
    table += b" " * (-len(table) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(table)) + table)
        for tensor in tensors.values():
            out.write(torch.from_numpy(tensor.read()).to(dtype).flatten().view(torch.uint8).numpy().data)


def _expert_places(arch: ArchSpec) -> dict[str, str]:
    """GGUF name -> module within a layer, of routers, shared experts, and of experts, all in one tensor."""
    experts = arch.experts
    if experts is None:
        return {}
    places = {"ffn_gate_inp": experts.router}
    for name, linear in EXPERT_LINEARS.items():
        places[f"{name}_exps"] = f"{experts.module}.{linear}"
        if experts.shared is not None:
            places[f"{name}_shexp"] = f"{experts.shared}.{linear}"
    if experts.shared_gate is not None:
        places["ffn_gate_inp_shexp"] = experts.shared_gate
    return places


def _join_gate_up(file: GgufFile, module: str, tensors: dict[str, _Tensor]) -> None:
    """transformers holds gate and up of all experts in one tensor, (n_experts, 2 * d_expert, d_model)."""
    for gate in [name for name in tensors if name.endswith(f"{module}gate_proj")]:
        up = gate.replace("gate_proj", "up_proj")
        shape = tensors[gate].shape
        if up not in tensors or tensors[up].shape != shape or len(shape) != 3:
            raise FormatError(f"{file.path}: ffn_up_exps is missing or not like ffn_gate_exps in a layer")
        halves = tensors.pop(gate), tensors.pop(up)
        tensors[gate.replace("gate_proj", "gate_up_proj")] = _Tensor(
            (shape[0], 2 * shape[1], shape[2]), partial(_joined, halves)
        )


def _joined(halves: tuple[_Tensor, ...]) -> NDArray[np.float32]:
    return np.concatenate([half.read() for half in halves], axis=1)


def _write_tokenizer(file: GgufFile, source: Path, target: Path) -> None:
    meta = file.metadata
    if meta.get("tokenizer.ggml.model") is None:
        raise FormatError(f"{source}: metadata key tokenizer.ggml.model is missing")
    tokenizer = ggml_tokenizer.build(meta, str(source))
    tokens = list(meta["tokenizer.ggml.tokens"])
    bos = _token_id(file, "bos")
    add_bos = bos is not None and bool(
        meta.get("tokenizer.ggml.add_bos_token", ggml_tokenizer.adds_bos(meta))
    )
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    tokenizer.save(str(target / "tokenizer.json"))
    added = {i: token.special for i, token in tokenizer.get_added_tokens_decoder().items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.get(f"{meta['general.architecture']}.context_length"),
        "added_tokens_decoder": {
            str(i): {
                "content": tokens[i],
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": is_special,
            }
            for i, is_special in added.items()
        },
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = _token_id(file, key)
        if index is not None:
            settings[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in meta:
        settings["chat_template"] = meta["tokenizer.chat_template"]
    _write_json(target / "tokenizer_config.json", settings)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
