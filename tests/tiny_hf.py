"""Tiny random model folders as Hugging Face has them, and what it takes to convert them in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from make_gguf import CHAT_TEMPLATE, tokenizer_json
from tokenizers import Tokenizer, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dbf2gguf.archs import ARCHS, features, permute_rope
from dbf2gguf.convert import as_read, load_model
from dbf2gguf.factorize import Factors
from dbf2gguf.source import Source, linear_names, open_source
from runtime.config import ADJACENT, Linear
from runtime.format import unpack
from runtime.model import load_model_file

N_VOCAB = 300

QUICK: dict[str, Any] = {
    "bpw": 4.0,
    "row_tokens": 24,
    "text_rows": 8,
    "written_share": 0.0,
    "correct_rows": 4,
    "gradient_rows": 4,
    "eval_rows": 2,
    "admm_iterations": 3,
    "distill_steps": 2,
    "threads": 1,
    "device": "cpu",
    "quiet": True,
    "report": False,
}
"""Options of `convert` that make it quick; the result is as correct as any, if not as good."""

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False},
    "qwen3-moe": {
        "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 24, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Families with experts: arguments of `write_folder`."""

SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def model(seed: int = 0, model_type: str = "llama", **changes: Any) -> Any:
    """A random model with random norms and biases. It has something to say: its logits differ by units."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5).sub_(ARCHS[model_type].norm_offset)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "wpe.weight")):
            parameter.normal_(0, 0.3)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(N_VOCAB)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def write_folder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model and its tokenizer to `path`, which is made."""
    model(seed, **changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def begin_texts(folder: Path) -> None:
    """Let the tokenizer in `folder` put its begin token before every text."""
    file = folder / "tokenizer.json"
    changed = Tokenizer.from_file(str(file))
    changed.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    changed.save(str(file))


def write_text(path: Path, lines: int = 120) -> Path:
    """A text with some structure, for --calib."""
    words = ["the", "cat", "sat", "on", "mat", "and", "hat", "times", "with", "naive", "cafe", "1234"]
    generator = torch.Generator().manual_seed(5)
    picks = torch.randint(0, len(words), (lines, 9), generator=generator).tolist()
    path.write_text("\n".join(" ".join(words[i] for i in row) for row in picks), encoding="utf-8")
    return path


# What a file holds, in transformers' terms ----------------------------------------------------------------


def file_factors(path: Path, source: Source) -> dict[str, Factors]:
    """The factors in a DBF file, rows of q and k in transformers' order."""
    file = load_model_file(path)
    found: dict[str, Factors] = {}
    heads = {"attn_q": file.config.n_heads, "attn_k": file.config.n_kv_heads}
    for index, layer in enumerate(file.weights.layers):
        for name, part in layer.gguf_linears.items():
            factors = _factors(part)
            if name in heads and file.config.rope_pairing == ADJACENT:
                n = heads[name]
                factors.a = _halves(factors.a[0], n)[None]
                factors.s_out = _halves(factors.s_out[0], n)[None]
            found[f"blk.{index}.{name}"] = factors
    file.close()
    return found


def _factors(part: Linear) -> Factors:
    a, b = unpack(part.a), unpack(part.b, part.cols)
    arrays = (a, b, part.s_out, part.s_mid, part.s_in)
    return Factors(*(torch.from_numpy(array.astype("float32"))[None] for array in arrays))


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a head's rows, adjacent pairs -> transformers', halves, row by row."""
    size = len(rows) // heads
    order = [h * size + 2 * (i % (size // 2)) + i // (size // 2) for h in range(heads) for i in range(size)]
    return rows[order]


def dense_twin(path: Path, folder: Path, embed_type: str, scratch: Path) -> nn.Module:
    """The transformers model, float32, with the weights that the DBF file at `path` stands for."""
    source = open_source(folder, scratch)
    original = load_model(source)
    names = linear_names(original, source.arch)
    return as_read(original, names, file_factors(path, source), embed_type)


# The same model as llama.cpp writes it --------------------------------------------------------------------


def write_standard_gguf(path: Path, folder: Path, pre: str = "gpt-2") -> Path:
    """A plain F32 GGUF of a folder of `write_folder`, by the conventions of convert_hf_to_gguf.py."""
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = made.config
    arch = ARCHS[config.model_type]
    writer = gguf.GGUFWriter(path, arch.gguf)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    f = features(config)
    writer.add_feed_forward_length(f.d_ff)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(f.n_kv_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    (writer.add_layer_norm_eps if arch.norm == "layer" else writer.add_layer_norm_rms_eps)(f.norm_eps)
    every_rope = getattr(config, "rope_parameters", None) or {}
    rope = every_rope.get("full_attention", every_rope)
    if rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    partial = rope.get("partial_rotary_factor") or 1.0
    writer.add_rope_dimension_count(int(head_dim * partial))
    writer.add_vocab_size(config.vocab_size)
    if arch.windows:
        writer.add_sliding_window(config.sliding_window)
    if arch.window_told:
        writer.add_sliding_window(config.sliding_window or 0)
    if "sliding_attention" in every_rope:
        writer.add_rope_freq_base_swa(every_rope["sliding_attention"]["rope_theta"])
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if f.n_experts:
        writer.add_expert_count(f.n_experts)
        writer.add_expert_used_count(f.n_experts_used)
    if arch.experts and arch.experts.own_width:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if f.d_shared:
        writer.add_expert_shared_feed_forward_length(f.d_shared)
    kind = rope.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(made.model.rotary_emb.attention_scaling)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if arch.scale_keys:
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    freqs = rope_freqs(made) if kind == "llama3" else None
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs)
    _add_bpe(writer, folder, pre, config.vocab_size)
    known = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.gguf)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name, tensor in made.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch.rope_pairing == "adjacent" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = permute_rope(tensor, heads)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T  # Conv1D
        if name.endswith("norm.weight"):
            tensor = tensor + arch.norm_offset
        if name.endswith("experts.gate_up_proj"):
            at = f"blk.{name.split('.')[2]}"
            for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                writer.add_tensor(f"{at}.ffn_{part}_exps.weight", half.contiguous().numpy())
            continue
        if name.endswith("experts.down_proj"):
            name += ".weight"
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor[0]
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        writer.add_tensor(target, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rope_freqs(made: Any) -> Any:
    """What llama.cpp divides RoPE's frequencies by; None if that is 1 everywhere."""
    inverse = made.model.rotary_emb.inv_freq.double()
    steps = torch.arange(len(inverse), dtype=torch.float64) / len(inverse)
    ratio = made.config.rope_parameters["rope_theta"] ** -steps / inverse
    return None if torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-4) else ratio.float().numpy()


def _add_bpe(writer: gguf.GGUFWriter, folder: Path, pre: str, n_vocab: int) -> None:
    made = PreTrainedTokenizerFast.from_pretrained(folder)
    by_id = sorted((index, token) for token, index in made.get_vocab().items())
    special = made.added_tokens_decoder
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    kinds, unused = gguf.TokenType, range(len(by_id), n_vocab)
    writer.add_token_list([token for _, token in by_id] + [f"[PAD{i}]" for i in unused])
    types = [kinds.CONTROL if i in special else kinds.NORMAL for i, _ in by_id]
    writer.add_token_types(types + [kinds.UNUSED] * len(unused))
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(by_id)).add_to_gguf(writer, quiet=True)
