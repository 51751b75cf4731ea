"""Models of well-known shapes with random weights, written tensor by tensor: as DBF, or as llama.cpp's types.

Such a model says nothing, but it is as large and as fast as a real one, and it is there in seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from runtime.config import ADJACENT, Config
from runtime.errors import OptionError
from runtime.format import DBF1, FORMAT_VERSION, LINEARS, add_type, linear_bits, pad8, uniform_ranks

ARCHITECTURE = "llama"


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the embedding and the head are Q8_0."""

    name: str
    config: Config
    tied: bool  # the head is the embedding


def _shape(name: str, tied: bool, n_ctx: int, theta: float, **sizes: int) -> Shape:
    config = Config(
        **sizes,
        n_ctx_train=n_ctx,
        norm_eps=1e-5,
        rope_theta=theta,
        rope_dims=sizes["head_dim"],
        rope_pairing=ADJACENT,
    )
    return Shape(name, config, tied)


SHAPES = {
    "smollm2-135m": _shape(
        "SmolLM2-135M", True, 8192, 100000.0,
        n_layers=30, d_model=576, d_ff=1536, n_heads=9, n_kv_heads=3, head_dim=64, n_vocab=49152,
    ),
    "1.1b": _shape(
        "TinyLlama-1.1B", False, 2048, 10000.0,
        n_layers=22, d_model=2048, d_ff=5632, n_heads=32, n_kv_heads=4, head_dim=64, n_vocab=32000,
    ),
    "7b": _shape(
        "Llama-2-7B", False, 4096, 10000.0,
        n_layers=32, d_model=4096, d_ff=11008, n_heads=32, n_kv_heads=32, head_dim=128, n_vocab=32000,
    ),
}  # fmt: skip


def linear_shapes(c: Config) -> dict[str, tuple[int, int]]:
    """GGUF name -> (rows, cols) of every linear layer, in file order."""
    d, q, kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    sizes = ((q, d), (kv, d), (kv, d), (d, q), (c.d_ff, d), (c.d_ff, d), (d, c.d_ff))
    return {f"blk.{i}.{n}": s for i in range(c.n_layers) for n, s in zip(LINEARS, sizes, strict=True)}


# ---- random tensors ----------------------------------------------------------------------------------------

Q1_0 = add_type("Q1_0", 41, 128, 18)
"""llama.cpp's type of 128 signs and a scale, which older versions of `gguf` lack."""

SCALES: dict[Type, tuple[tuple[int, ...], float]] = {
    Q1_0: ((0,), 1.0),
    Type.Q8_0: ((0,), 74.0),
    Type.Q4_0: ((0,), 4.6),
    Type.TQ1_0: ((52,), 0.8),
    Type.TQ2_0: ((64,), 1.1),
    Type.IQ4_NL: ((0,), 70.0),
    Type.IQ1_S: ((0,), 8.0),
    Type.IQ2_XXS: ((0,), 60.0),
    Type.Q2_K: ((80, 82), 15.0),
}
"""Where a block of each type holds float16 scales, and how far random values of it spread without them."""

FALLBACK = {
    Type.TQ1_0: Type.Q4_0,
    Type.TQ2_0: Type.Q4_0,
    Type.Q2_K: Type.Q4_0,
    Type.IQ1_S: Type.IQ4_NL,
    Type.IQ2_XXS: Type.IQ4_NL,
}
"""What llama-quantize gives to tensors whose rows do not fit a type's blocks."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its row length counts elements, whatever the type."""

    name: str
    kind: Type
    shape: tuple[int, ...]
    scale: float = 1.0  # of its values

    @property
    def byte_shape(self) -> tuple[int, ...]:
        block, nbytes = gguf.GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * nbytes)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.byte_shape, dtype=np.int64))

    def random(self, rng: np.random.Generator) -> NDArray[Any]:
        """Values of a size that keeps activations of a deep model finite."""
        if self.kind in (Type.F32, Type.F16):
            sign = rng.choice([-1.0, 1.0], self.shape) if self.kind == Type.F16 else 1.0
            values = rng.uniform(0.5, 1.5, self.shape) * sign * self.scale
            return values.astype(np.float32 if self.kind == Type.F32 else np.float16)
        data = rng.integers(0, 256, self.nbytes, dtype=np.uint8)
        if self.kind in SCALES:
            offsets, spread = SCALES[self.kind]
            blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[self.kind][1])
            for at in offsets:
                blocks[:, at : at + 2] = np.frombuffer(np.float16(self.scale / spread).tobytes(), np.uint8)
        return data.reshape(self.byte_shape)


def _dbf_tensors(c: Config, bpw: float) -> Iterator[Tensor]:
    shapes = linear_shapes(c)
    ranks = uniform_ranks(shapes, bpw)
    for name, (rows, cols) in shapes.items():
        rank = ranks[name]
        yield Tensor(f"{name}.dbf_a", Type(DBF1), (rows, rank))
        yield Tensor(f"{name}.dbf_b", Type(DBF1), (rank, pad8(cols)))
        yield Tensor(f"{name}.dbf_out", Type.F16, (rows,))
        yield Tensor(f"{name}.dbf_mid", Type.F16, (rank,), rank**-0.5)
        yield Tensor(f"{name}.dbf_in", Type.F16, (cols,), cols**-0.5)


def _ggml_tensors(c: Config, kind: Type) -> Iterator[Tensor]:
    """Raises OptionError if rows fit neither the type nor what takes its place."""
    for name, (rows, cols) in linear_shapes(c).items():
        fits = kind
        if cols % gguf.GGML_QUANT_SIZES[kind][0]:
            fits = FALLBACK.get(kind, kind)
        block = gguf.GGML_QUANT_SIZES[fits][0]
        if cols % block:
            raise OptionError(f"{fits.name}: rows of {cols} weights are no multiple of {block}")
        yield Tensor(f"{name}.weight", fits, (rows, cols), cols**-0.5)


def _other_tensors(shape: Shape) -> Iterator[Tensor]:
    c = shape.config
    yield Tensor("token_embd.weight", Type.Q8_0, (c.n_vocab, c.d_model))
    yield Tensor("output_norm.weight", Type.F32, (c.d_model,))
    if not shape.tied:
        yield Tensor("output.weight", Type.Q8_0, (c.n_vocab, c.d_model), c.d_model**-0.5)
    for i in range(c.n_layers):
        yield Tensor(f"blk.{i}.attn_norm.weight", Type.F32, (c.d_model,))
        yield Tensor(f"blk.{i}.ffn_norm.weight", Type.F32, (c.d_model,))


# ---- metadata ----------------------------------------------------------------------------------------------

SPECIAL = ("<unk>", "<s>", "</s>")
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
"""GGUF's types of tokens."""


def vocabulary(n_vocab: int) -> tuple[list[str], list[int]]:
    """Tokens and their types: control tokens, bytes, and words that make up the number.

    Raises OptionError if n_vocab is too small for the bytes.
    """
    tokens = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    if n_vocab < len(tokens):
        raise OptionError(f"a vocabulary of {n_vocab} tokens, wanted {len(tokens)} or more")
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    tokens += [f"▁word{i}" for i in range(len(tokens), n_vocab)]
    return tokens, types + [NORMAL] * (n_vocab - len(types))


def tokenizer_json(tokens: list[str]) -> str:
    """The same vocabulary for Hugging Face's `tokenizers`; every text becomes bytes."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
             "vocab": {t: i for i, t in enumerate(tokens)}, "merges": list[str]()}  # fmt: skip
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(SPECIAL)],
            "normalizer": replace,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, back]},
            "model": model,
        }
    )


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, name: str) -> None:
    c = shape.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"random weights, {name}")
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.n_ctx_train)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.rope_dims)
    writer.add_vocab_size(c.n_vocab)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens, types = vocabulary(c.n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def _add_dbf_metadata(writer: gguf.GGUFWriter, shape: Shape, bpw: float) -> None:
    writer.add_string("tokenizer.huggingface.json", tokenizer_json(vocabulary(shape.config.n_vocab)[0]))
    writer.add_uint32("dbf.version", FORMAT_VERSION)
    writer.add_float32("dbf.bits_per_weight", bpw)
    writer.add_string("dbf.rope.pairing", "adjacent")
    writer.add_string("dbf.activation", "silu")
    writer.add_string("dbf.norm", "rms")


# ---- files -------------------------------------------------------------------------------------------------

Note = Callable[[str], None]


def write_dbf(path: Path, shape: Shape, bpw: float, seed: int, note: Note = lambda text: None) -> float:
    """Write a random DBF model of `shape`; returns its bits per weight, at most `bpw`.

    Raises OptionError if `bpw` is out of range, OSError.
    """
    linears = linear_shapes(shape.config)
    tensors = list(_dbf_tensors(shape.config, bpw))
    ranks = {t.name.removesuffix(".dbf_mid"): t.shape[0] for t in tensors if t.name.endswith(".dbf_mid")}
    bits = sum(linear_bits(*linears[name], rank) for name, rank in ranks.items())
    actual = bits / sum(rows * cols for rows, cols in linears.values())

    def add(writer: gguf.GGUFWriter) -> None:
        _add_metadata(writer, shape, f"{shape.name} DBF {actual:.2f} bpw")
        _add_dbf_metadata(writer, shape, actual)

    _write(path, [*_other_tensors(shape), *tensors], seed, add, note)
    return actual


def write_ggml(path: Path, shape: Shape, kind: Type, seed: int, note: Note = lambda text: None) -> float:
    """Write a random model of `shape` whose linear layers are of one of llama.cpp's types.

    Where rows do not fit the type, its `FALLBACK` takes its place. Returns the layers' bits per weight.

    Raises OptionError if rows fit neither, OSError.
    """
    linears = list(_ggml_tensors(shape.config, kind))
    weights = sum(rows * cols for rows, cols in linear_shapes(shape.config).values())

    def add(writer: gguf.GGUFWriter) -> None:
        _add_metadata(writer, shape, f"{shape.name} {kind.name}")

    _write(path, [*_other_tensors(shape), *linears], seed, add, note)
    return 8 * sum(t.nbytes for t in linears) / weights


def _write(
    path: Path, tensors: list[Tensor], seed: int, add_metadata: Callable[[gguf.GGUFWriter], None], note: Note
) -> None:
    """Write under a temporary name, one tensor in memory at a time; then the file takes its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rng = np.random.default_rng(seed)
    try:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            add_metadata(writer)
            for t in tensors:
                plain = t.kind in (Type.F32, Type.F16)
                dtype = np.dtype({Type.F32: np.float32, Type.F16: np.float16}.get(t.kind, np.uint8))
                writer.add_tensor_info(t.name, t.shape if plain else t.byte_shape, dtype, t.nbytes, t.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for i, t in enumerate(tensors):
                if i % 32 == 0:
                    note(f"writing {path.name}: {i}/{len(tensors)} tensors")
                writer.write_tensor_data(t.random(rng))
        finally:
            writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
