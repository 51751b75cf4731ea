"""Write the factorized model as GGUF: llama.cpp's metadata, the exact tokenizer, DBF1 tensors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dbf2gguf.archs import (
    EXPERT_LINEARS,
    FULL,
    ArchSpec,
    Experts,
    Features,
    context_length,
    features,
    head_dim,
    permute_rope,
)
from dbf2gguf.factorize import Factors, signs
from dbf2gguf.metadata import copy_metadata
from dbf2gguf.q6_k import quantize_q6_k
from dbf2gguf.source import Source, decoder_layers
from runtime.errors import FormatError, UnsupportedModelError
from runtime.format import DBF1_TYPE, FORMAT_VERSION, pack, unpack
from runtime.ggml_tokenizer import SPACE
from runtime.gguf import GgufFile
from runtime.model import load_model_file
from runtime.pretokenizers import find_pre

ADDED_SCORE = -1000.0
WEIGHTS_AT_ONCE = 2**22  # of an embedding, to be quantized and read back
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
"""Added tokens that llama.cpp's converter takes for control tokens, whatever the tokenizer says."""


def ggml_type(embed_type: str) -> gguf.GGMLQuantizationType:
    """What GGUF calls one of EMBED_TYPES."""
    return gguf.GGMLQuantizationType[embed_type.upper()]


def write_gguf(
    path: Path,
    source: Source,
    model: nn.Module,
    student: nn.Module,
    tokenizer: Any,
    factors: Mapping[str, Factors],
    embed_type: str,
    bpw: float,
    notes: dict[str, Any],
    carrier: str = "dbf1",
) -> None:
    """Write the model to `path` at once; the caller gives a temporary name.

    model    the original, or its modules without weights
    student  norms, biases, embedding and head are taken from it
    factors  GGUF name ("blk.0.attn_q") -> factors, scales already float16 values
    carrier  one of recipe.CARRIERS
    notes    further metadata: full key -> str, int, float, bool
    """
    arch = source.arch
    writer = gguf.GGUFWriter(path, arch.gguf)
    try:
        # llama.cpp has no number for DBF1
        _add_architecture(writer, source, model, gguf.LlamaFileType.GUESSED)
        _add_tokenizer(writer, source, tokenizer, model.get_input_embeddings().weight.shape[0])
        writer.add_uint32("dbf.version", FORMAT_VERSION)
        writer.add_float32("dbf.bits_per_weight", bpw)
        if carrier == "i8":
            writer.add_string("dbf.carrier", carrier)
        writer.add_string("dbf.rope.pairing", arch.rope_pairing)
        writer.add_string("dbf.activation", arch.activation)
        writer.add_string("dbf.norm", arch.norm)
        for key, value in notes.items():
            _add_value(writer, key, value)

        def add_linear(prefix: str, _module: nn.Module, ordered: Callable[[Tensor], Tensor]) -> None:
            _add_factors(writer, prefix, factors, ordered, carrier)

        def add_experts(prefix: str, experts: nn.ModuleList) -> None:
            for index in range(len(experts)):
                for name in EXPERT_LINEARS:
                    _add_factors(writer, f"{prefix}.{name}.{index}", factors, _as_is, carrier)

        _add_tensors(writer, arch, student, embed_type, add_linear, add_experts)
        _finish(writer)
    finally:
        writer.close()


def write_dense(path: Path, source: Source, model: nn.Module, tokenizer: Any) -> None:
    """Write `model` to `path` as an ordinary GGUF, which llama.cpp runs: matrices F16, vectors F32.

    source  where its tokenizer is from; the sizes are those of `model`

    Raises FormatError for a weight that float16 cannot hold.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and parameter.abs().max() > torch.finfo(torch.float16).max:
            raise FormatError(f"{source.path}: a weight of {name} is too large for F16")
    writer = gguf.GGUFWriter(path, source.arch.gguf)
    try:
        _add_architecture(writer, source, model, gguf.LlamaFileType.MOSTLY_F16)
        _add_tokenizer(writer, source, tokenizer, model.get_input_embeddings().weight.shape[0])

        def add_linear(prefix: str, module: nn.Module, ordered: Callable[[Tensor], Tensor]) -> None:
            _add_matrix(writer, f"{prefix}.weight", ordered(module.weight), "f16")

        def add_experts(prefix: str, experts: nn.ModuleList) -> None:
            for name, path in EXPERT_LINEARS.items():
                weights = torch.stack([expert.get_submodule(path).weight for expert in experts])
                _add_matrix(writer, f"{prefix}.{name}_exps.weight", weights, "f16")

        _add_tensors(writer, source.arch, model, "f16", add_linear, add_experts)
        _finish(writer)
    finally:
        writer.close()


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def verify(path: Path, source: Source, factors: Mapping[str, Factors]) -> None:
    """Read the file back with the runtime's own reader and compare every sign and every scale.

    factors  what write_gguf was given

    Raises FormatError if the file differs, or if the reader refuses it.
    """
    file = load_model_file(path)
    try:
        heads = {"attn_q": file.config.n_heads, "attn_k": file.config.n_kv_heads}
        for index, layer in enumerate(file.weights.layers):
            for kind, linear in layer.gguf_linears.items():
                name = f"blk.{index}.{kind}"
                if name not in factors:
                    raise FormatError(f"{path}: {name} was not written, but is there")
                wanted = factors[name]
                a, s_out = wanted.a[0].cpu(), wanted.s_out[0].cpu()
                if kind in heads and source.arch.rope_pairing == "adjacent":
                    a, s_out = permute_rope(a, heads[kind]), permute_rope(s_out, heads[kind])
                _compare(f"{path}: {name}.dbf_a", unpack(linear.a), signs(a))
                _compare(f"{path}: {name}.dbf_b", unpack(linear.b, linear.cols), signs(wanted.b[0]))
                _compare(f"{path}: {name}.dbf_out", linear.s_out, s_out)
                _compare(f"{path}: {name}.dbf_mid", linear.s_mid, wanted.s_mid[0])
                _compare(f"{path}: {name}.dbf_in", linear.s_in, wanted.s_in[0])
            file.file.release()
        count = sum(len(layer.gguf_linears) for layer in file.weights.layers)
        if count != len(factors):
            raise FormatError(f"{path}: holds {count} linear layers; wanted {len(factors)}")
    finally:
        file.close()


def _compare(where: str, stored: NDArray[Any], wanted: Tensor) -> None:
    expected = wanted.detach().cpu().numpy().astype(stored.dtype)
    if stored.shape != expected.shape:
        raise FormatError(f"{where}: read back with shape {stored.shape}; wanted {expected.shape}")
    wrong = int((stored != expected).sum())
    if wrong:
        raise FormatError(f"{where}: {wrong} of {expected.size} values differ when read back")


def quantized(weight: Tensor, embed_type: str) -> tuple[NDArray[Any], gguf.GGMLQuantizationType]:
    """A matrix in the type of the embedding and the head: (rows, bytes) uint8 or (rows, cols) float16."""
    kind = ggml_type(embed_type)
    values = weight.detach().float().cpu().numpy()
    if kind == gguf.GGMLQuantizationType.Q6_K:
        return quantize_q6_k(values), kind
    return gguf.quants.quantize(values, kind), kind


def dequantized(weight: Tensor, embed_type: str, out: Tensor | None = None) -> Tensor:
    """What a reader of the file gets for `quantized(weight, embed_type)`, put in `out`, which may be
    the weight itself."""
    out = torch.empty_like(weight) if out is None else out
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    for wanted, part in zip(weight.split(rows), out.split(rows), strict=True):
        data, kind = quantized(wanted, embed_type)
        part.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(data, kind), dtype=np.float32)))
    return out


def head_is_tied(model: nn.Module) -> bool:
    """Whether the head is the embedding itself."""
    return bool(model.config.tie_word_embeddings)


def _add_architecture(
    writer: gguf.GGUFWriter, source: Source, model: nn.Module, file_type: gguf.LlamaFileType
) -> None:
    config, f = model.config, features(model.config)
    size = head_dim(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.name)
    weights = model.num_parameters()
    writer.add_size_label(gguf.size_label(weights, weights, 0, 0))
    writer.add_file_type(file_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(f.d_ff)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(f.n_kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if source.arch.norm == "layer":
        writer.add_layer_norm_eps(f.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(f.norm_eps)
    if any(f.rotates) or not f.rotates:
        writer.add_rope_freq_base(f.rope_theta)
        writer.add_rope_dimension_count(f.rope_dims)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_features(writer, source.arch, f)
    if f.rope_short:
        rotary = model.get_submodule(source.arch.decoder).rotary_emb
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(f.n_ctx_original)
        writer.add_rope_scaling_attn_factors(float(rotary.attention_scaling))
    if source.arch.scale_keys:  # logits are divided by the last
        writer.add_embedding_scale(f.embed_scale)
        writer.add_attention_scale(f.attn_scale or size**-0.5)
        writer.add_residual_scale(f.residual_scale)
        writer.add_logit_scale(1.0 / f.logit_scale)


def _add_features(writer: gguf.GGUFWriter, arch: ArchSpec, f: Features) -> None:
    """The keys that only some models have: llama.cpp's, and ours for what it knows by the architecture."""
    if f.n_experts:
        writer.add_expert_count(f.n_experts)
        writer.add_expert_used_count(f.n_experts_used)
        writer.add_expert_feed_forward_length(f.d_expert)
        writer.add_expert_weights_norm(f.norm_shares)
    if f.d_shared:
        writer.add_expert_shared_feed_forward_length(f.d_shared)
    if f.rope_factor != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(f.rope_factor)
    if not all(f.rotates):
        writer.add_array("dbf.rope.layers", list(f.rotates))
    if f.windows:
        writer.add_sliding_window(max(f.windows))
        writer.add_sliding_window_pattern([window > 0 for window in f.windows])
    elif arch.window_told:
        writer.add_sliding_window(0)
    if f.rope_theta_local:
        writer.add_rope_freq_base_swa(f.rope_theta_local)
    if f.attn_softcap:
        writer.add_attn_logit_softcapping(f.attn_softcap)
    if f.logit_softcap:
        writer.add_final_logit_softcapping(f.logit_softcap)
    for name, scale, usual in (
        ("embedding", f.embed_scale, 1.0),
        ("attention", f.attn_scale, 0.0),
        ("residual", f.residual_scale, 1.0),
        ("logits", f.logit_scale, 1.0),
    ):
        if scale != usual or arch.scale_keys:
            writer.add_float32(f"dbf.scale.{name}", scale)


def _rope_freqs(model: nn.Module, arch: ArchSpec) -> NDArray[np.float32] | None:
    """What divides RoPE's frequencies in a model with scaled ones, beside a factor of all; None where nothing
    does."""
    f, rotary = features(model.config), getattr(model.get_submodule(arch.decoder), "rotary_emb", None)
    inverse = getattr(rotary, "inv_freq", None)
    inverse = getattr(rotary, f"{FULL}_inv_freq", None) if inverse is None else inverse
    if inverse is None:
        return None  # no layer is like that
    scaled = inverse.double().cpu().numpy()
    plain = f.rope_theta ** (-np.arange(len(scaled), dtype=np.float64) / len(scaled))
    ratio = plain / scaled / f.rope_factor
    return None if np.allclose(ratio, 1.0, rtol=1e-4) else ratio.astype(np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, source: Source, tokenizer: Any, vocab_size: int) -> None:
    text = tokenizer.backend_tokenizer.to_str()
    writer.add_string("tokenizer.huggingface.json", text)
    if source.gguf is not None:
        with GgufFile(source.gguf) as file:
            copy_metadata(
                writer, file, lambda key: key.startswith("tokenizer.") and key != "tokenizer.huggingface.json"
            )
        return
    description = json.loads(text)["model"]
    pre = find_pre(tokenizer.backend_tokenizer)
    has_pieces = (source.path / "tokenizer.model").is_file()
    if pre is None and (has_pieces or description.get("byte_fallback")):
        if has_pieces:
            pieces, prefix = _pieces_of_model(source.path / "tokenizer.model")
        else:
            pieces, prefix = _pieces_of_merges(description, tokenizer)
        tokens, scores, types = _sentencepiece_vocabulary(pieces, tokenizer, vocab_size)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        if not prefix:
            writer.add_add_space_prefix(False)
        special = gguf.SpecialVocab(source.path, n_vocab=len(tokens))
    elif description["type"] == "BPE":
        tokens, types = _bpe_vocabulary(tokenizer, vocab_size)
        if pre is None:
            print(
                "warning: unknown pre-tokenizer: the file has no tokenizer.ggml.pre, which this runtime does "
                "not need",
                file=sys.stderr,
            )
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        special = gguf.SpecialVocab(source.path, load_merges=True, n_vocab=len(tokens))
    else:
        raise UnsupportedModelError(f"{source.path}: tokenizer model {description['type']!r}; supported: BPE")
    special.chat_template = tokenizer.chat_template or None
    special.add_to_gguf(writer, quiet=True)


def _bpe_vocabulary(tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and llama.cpp's token types of a byte-level BPE vocabulary, filled up to `vocab_size`."""
    kinds = gguf.TokenType
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(vocab_size):
        if index not in by_id:
            tokens.append(f"[PAD{index}]")
            types.append(kinds.UNUSED)
        elif index in added:
            tokens.append(by_id[index])
            types.append(kinds.CONTROL if added[index].special else kinds.USER_DEFINED)
        else:
            tokens.append(by_id[index])
            types.append(kinds.NORMAL)
    return tokens, types


_Piece = tuple[str, float, int]
"""A piece of a SentencePiece vocabulary, its score, and llama.cpp's token type."""


def _unused(index: int) -> _Piece:
    return f"[PAD{index}]", ADDED_SCORE, int(gguf.TokenType.UNUSED)


def _pieces_of_model(file: Path) -> tuple[list[_Piece], bool]:
    """A tokenizer.model; whether texts get a space in front. Raises FormatError."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    with suppress(DecodeError):
        proto.ParseFromString(file.read_bytes())
    if not proto.pieces:
        raise FormatError(f"{file}: not a SentencePiece model")
    kinds = {int(gguf.TokenType.USER_DEFINED): int(gguf.TokenType.NORMAL)}  # the tokenizer knows better
    pieces = [(piece.piece, piece.score, kinds.get(piece.type, piece.type)) for piece in proto.pieces]
    return pieces, proto.normalizer_spec.add_dummy_prefix


def _pieces_of_merges(description: dict[str, Any], tokenizer: Any) -> tuple[list[_Piece], bool]:
    """The same of a tokenizer.json alone. Merges are in the order of the scores of what they give, so their
    places serve as scores."""
    kinds = gguf.TokenType
    merges = description["merges"]
    scores: dict[str, float] = {}
    for place, merge in enumerate(merges):
        scores.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), -float(place))
    pieces = [_unused(index) for index in range(max(description["vocab"].values()) + 1)]
    for piece, index in description["vocab"].items():
        is_byte = BYTE_PIECE.fullmatch(piece) is not None
        kind = kinds.BYTE if is_byte else kinds.UNKNOWN if piece == description["unk_token"] else kinds.NORMAL
        pieces[index] = piece, scores.get(piece, -float(len(merges))), int(kind)
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    return pieces, first.startswith(SPACE)


def _sentencepiece_vocabulary(
    pieces: list[_Piece], tokenizer: Any, vocab_size: int
) -> tuple[list[bytes], list[float], list[int]]:
    """Pieces, scores and llama.cpp's token types of a SentencePiece vocabulary, filled up to `vocab_size`."""
    kinds = gguf.TokenType
    filled = [*pieces[:vocab_size], *map(_unused, range(len(pieces), vocab_size))]
    tokens, scores, types = map(list, zip(*filled, strict=True))
    for index, token in tokenizer.added_tokens_decoder.items():
        if index >= vocab_size or types[index] not in (kinds.NORMAL, kinds.UNUSED):
            continue
        control = token.special or LOOKS_SPECIAL.fullmatch(token.content) is not None
        # found in the text as it is
        tokens[index] = token.content if control else token.content.replace(SPACE, " ")
        scores[index], types[index] = ADDED_SCORE, int(kinds.CONTROL if control else kinds.USER_DEFINED)
    return [token.encode() for token in tokens], scores, types


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float64(key, value)
    else:
        writer.add_string(key, str(value))


class _Packed:
    """Signs that are packed when the writer comes to them; all of numpy's arrays that it asks for."""

    dtype = np.dtype(np.uint8)

    def __init__(self, shape: tuple[int, int], matrix: Callable[[], Tensor]) -> None:
        """
        shape   of the packed bytes
        matrix  makes the signs, (rows, cols)
        """
        self.shape, self.nbytes, self._matrix = shape, shape[0] * shape[1], matrix

    def tofile(self, file: BinaryIO) -> None:
        pack(self._matrix().cpu().numpy()).tofile(file)


def _add_factors(
    writer: gguf.GGUFWriter,
    prefix: str,
    factors: Mapping[str, Factors],
    ordered: Callable[[Tensor], Tensor],
    carrier: str,
) -> None:
    """The five tensors of a factorized linear layer; `ordered` puts its rows in the file's order."""
    linear = factors[prefix]
    for name, matrix in (
        ("dbf_a", lambda: ordered(factors[prefix].a[0])),
        ("dbf_b", lambda: factors[prefix].b[0]),
    ):
        rows, cols = getattr(linear, name[-1]).shape[1:]
        data = _Packed((rows, -(-cols // 8)), matrix)
        if carrier == "i8":
            writer.add_tensor(f"{prefix}.{name}", data, raw_dtype=gguf.GGMLQuantizationType.I8)
        else:
            writer.add_tensor(f"{prefix}.{name}", data, raw_dtype=DBF1_TYPE)
    scales = (("dbf_out", ordered(linear.s_out[0])), ("dbf_mid", linear.s_mid[0]), ("dbf_in", linear.s_in[0]))
    for name, vector in scales:
        _add_vector(writer, f"{prefix}.{name}", vector, np.float16)


def _add_tensors(
    writer: gguf.GGUFWriter,
    arch: ArchSpec,
    model: nn.Module,
    embed_type: str,
    add_linear: Callable[[str, nn.Module, Callable[[Tensor], Tensor]], None],
    add_experts: Callable[[str, nn.ModuleList], None],
) -> None:
    """All tensors in the file's order. `add_linear` adds the weights of one linear layer: of its prefix
    ("blk.0.attn_q"), its module, and what puts its rows in the file's order; `add_experts` those of all
    experts of a layer ("blk.0")."""
    _add_matrix(writer, "token_embd.weight", model.get_input_embeddings().weight, embed_type)
    if not head_is_tied(model):
        _add_matrix(writer, "output.weight", model.get_output_embeddings().weight, embed_type)
    if arch.positions:
        _add_vector(writer, "position_embd.weight", model.get_submodule(arch.positions).weight)
    _add_norm(writer, "output_norm", model.get_submodule(arch.out_norm), arch)
    f = features(model.config)
    freqs = None if f.rope_short else _rope_freqs(model, arch)
    for name, factors_of in (("long", f.rope_long), ("short", f.rope_short)):
        if factors_of:
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(factors_of, np.float32))
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": f.n_kv_heads}
    for index, layer in enumerate(decoder_layers(model, arch)):
        for name, path in arch.norms.items():
            _add_norm(writer, f"blk.{index}.{name}", layer.get_submodule(path), arch)
        for name, path in arch.linears.items():
            prefix, module = f"blk.{index}.{name}", layer.get_submodule(path)
            permuted = name in heads and arch.rope_pairing == "adjacent"
            ordered = partial(permute_rope, n_heads=heads[name]) if permuted else _as_is
            add_linear(prefix, module, ordered)
            if module.bias is not None:
                _add_vector(writer, f"{prefix}.bias", ordered(module.bias))
        if arch.experts is not None:
            _add_routing(writer, f"blk.{index}", layer, arch.experts, add_linear)
            add_experts(f"blk.{index}", layer.get_submodule(arch.experts.module))


def _add_routing(
    writer: gguf.GGUFWriter,
    prefix: str,
    layer: nn.Module,
    experts: Experts,
    add_linear: Callable[[str, nn.Module, Callable[[Tensor], Tensor]], None],
) -> None:
    """The router of a layer, and the shared expert with its gate."""
    _add_vector(writer, f"{prefix}.ffn_gate_inp.weight", layer.get_submodule(experts.router).weight)
    if experts.shared_gate is not None:
        gate = layer.get_submodule(experts.shared_gate).weight
        _add_vector(writer, f"{prefix}.ffn_gate_inp_shexp.weight", gate.flatten())
    if experts.shared is not None:
        for name, path in EXPERT_LINEARS.items():
            add_linear(f"{prefix}.{name}_shexp", layer.get_submodule(f"{experts.shared}.{path}"), _as_is)


def _as_is(rows: Tensor) -> Tensor:
    return rows


def _add_matrix(writer: gguf.GGUFWriter, name: str, weight: Tensor, embed_type: str) -> None:
    data, kind = quantized(weight, embed_type)
    writer.add_tensor(name, data, raw_dtype=kind)


def _add_norm(writer: gguf.GGUFWriter, name: str, norm: nn.Module, arch: ArchSpec) -> None:
    _add_vector(writer, f"{name}.weight", norm.weight + arch.norm_offset)
    if getattr(norm, "bias", None) is not None:
        _add_vector(writer, f"{name}.bias", norm.bias)


def _add_vector(writer: gguf.GGUFWriter, name: str, vector: Tensor, dtype: type = np.float32) -> None:
    writer.add_tensor(name, vector.detach().float().cpu().numpy().astype(dtype))
