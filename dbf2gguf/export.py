"""The dense twin: factors multiplied back into an ordinary GGUF file, which any llama.cpp runs.

One tensor is in memory at a time. What the file says about the model, its tokenizer and its chat template is
copied key by key; the keys `dbf.*` are left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from dbf2gguf.archs import ARCHS, ArchSpec, gguf_spec
from dbf2gguf.files import check_output, check_space, replacing
from dbf2gguf.metadata import copy_metadata
from runtime.config import ADJACENT, NO_ROPE, Dense, Linear
from runtime.errors import FormatError, OptionError, UnsupportedModelError
from runtime.format import FACTORS, unpack
from runtime.model import ModelFile, load_model_file

OUT_TYPES = {
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

LARGEST = {Type.F16: 65504.0, Type.BF16: 3.38e38, Type.Q8_0: 65504.0 * 127}
"""Largest absolute weight that a type holds."""

BLOCK_ROWS = 512  # rows of A that are multiplied at a time

DESCRIPTION = "general.description"
OURS = ("dbf.", "general.alignment", "general.architecture", "general.file_type", DESCRIPTION)
"""Keys that are not copied: of the factorized file, or written anew."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the twin: what it is, and what it is made of."""

    name: str
    type: Type
    shape: tuple[int, ...]
    source: list[Linear] | Dense | NDArray[Any]  # rows of several linears follow each other

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size


def export(file: str | Path, out: str | Path, *, outtype: str = "f16", quiet: bool = False) -> None:
    """Write the model in the DBF file `file` to `out` as a GGUF file that llama.cpp runs.

    outtype  type of all matrices: f16, bf16 or q8_0; those whose rows are no whole blocks of q8_0 become f16

    An existing `out` is replaced only by a complete new file. Raises DbfError with a message for the user,
    OSError if a file cannot be read or written.
    """
    out = Path(out)
    if outtype not in OUT_TYPES:
        raise OptionError(f"--outtype {outtype!r} is unknown; there are {', '.join(OUT_TYPES)}")
    out = check_output(out, [Path(file)])
    model = load_model_file(file)
    try:
        _check_features(model)
        kind, file_type = OUT_TYPES[outtype]
        tensors = list(_tensors(model, kind))
        check_space(out, sum(t.nbytes for t in tensors))
        with replacing(out) as temporary:
            _write(temporary, model, tensors, file_type, quiet)
    finally:
        model.close()
    if not quiet:
        odd = sum(t.type != kind for t in tensors if isinstance(t.source, list | Dense))
        note = f"; rows of {odd} matrices fit no {kind.name} and are F16" if odd else ""
        print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, {kind.name}{note}", file=sys.stderr)
        window = _lost_window(model)
        if window:
            print(
                f"note: llama.cpp computes no sliding window in {model.architecture!r}: what follows the "
                f"first {window} tokens of a text is not what this runtime gives",
                file=sys.stderr,
            )


def dense(linear: Linear) -> NDArray[np.float32]:
    """W = diag(s_out) A diag(s_mid) B diag(s_in), multiplied out in float32: (rows, cols)."""
    s_out, s_mid, s_in = (s.astype(np.float32) for s in (linear.s_out, linear.s_mid, linear.s_in))
    b = unpack(linear.b, linear.cols).astype(np.float32)
    w = np.empty((linear.rows, linear.cols), np.float32)
    for start in range(0, linear.rows, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        np.matmul(unpack(linear.a[rows]) * s_mid, b, out=w[rows])
        w[rows] *= s_out[rows, None]
    w *= s_in
    return w


def _spec(model: ModelFile) -> ArchSpec | None:
    return gguf_spec(model.architecture, model.config.n_experts > 0)


def _lost_window(model: ModelFile) -> int:
    """The sliding window that llama.cpp does not compute; 0 where none is shorter than the context."""
    spec = _spec(model)
    windows = [layer.window for layer in model.weights.layers if 0 < layer.window < model.config.n_ctx_train]
    return min(windows) if windows and not (spec and spec.windows) else 0


def _check_features(model: ModelFile) -> None:
    """What llama.cpp knows by the architecture must be what the file says: RoPE's pairs, which q and k are in
    the order of, and the scale of attention."""
    spec, c = _spec(model), model.config
    if spec is None:
        known = sorted({spec.gguf for spec in ARCHS.values()})
        experts = " with experts" if c.n_experts else ""
        raise UnsupportedModelError(
            f"{model.path}: architecture {model.architecture!r}{experts} cannot be exported; supported: "
            f"{', '.join(known)}"
        )
    _check_experts(model, spec)
    size = c.d_model // c.n_heads if c.n_layers == spec.layers_of_largest else c.head_dim
    scale = c.attn_scale or c.head_dim**-0.5
    if not spec.scale_keys and not math.isclose(scale, size**-0.5, rel_tol=1e-5):
        raise UnsupportedModelError(
            f"{model.path}: dbf.scale.attention is {scale:g}; llama.cpp takes {size**-0.5:g} for this model"
        )
    rotates = [layer.rope != NO_ROPE for layer in model.weights.layers]
    wanted_there = [not spec.no_rope or (i + 1) % spec.no_rope != 0 for i in range(c.n_layers)]
    if rotates != wanted_there and not spec.positions:
        raise UnsupportedModelError(f"{model.path}: dbf.rope.layers are not those that llama.cpp rotates")
    has = "adjacent" if model.config.rope_pairing == ADJACENT else "halves"
    wanted = spec.rope_pairing
    if has != wanted:
        raise UnsupportedModelError(
            f"{model.path}: dbf.rope.pairing is {has!r}; llama.cpp wants {wanted!r} of {model.architecture!r}"
        )


def _check_experts(model: ModelFile, spec: ArchSpec) -> None:
    """The same for experts."""
    if spec.experts is None:
        return
    arch, shared = model.architecture, spec.experts.shared is not None
    if bool(model.config.norm_experts) != spec.experts.norm_shares:
        raise UnsupportedModelError(
            f"{model.path}: {arch}.expert_weights_norm is {bool(model.config.norm_experts)}; llama.cpp takes "
            f"{spec.experts.norm_shares} for {arch!r}"
        )
    for index, layer in enumerate(model.weights.layers):
        if (layer.up is not None) != shared or (layer.shared_gate is not None) != shared:
            raise UnsupportedModelError(f"{model.path}: layer {index} has not the shared expert of {arch!r}")
        parts = [linear for e in layer.experts for linear in (e.gate, e.up, e.down)]
        if any(linear.bias is not None for linear in parts):
            raise UnsupportedModelError(f"{model.path}: layer {index}: llama.cpp knows no biases of experts")


def _tensors(model: ModelFile, kind: Type) -> Iterator[_Tensor]:
    """The twin's tensors in the file's order, each linear in the place of its first factor."""
    weights = model.weights
    linears = {}
    for index, layer in enumerate(weights.layers):
        linears |= {f"blk.{index}.{name}": linear for name, linear in layer.gguf_linears.items()}
    spec = _spec(model)
    assert spec is not None
    fused = spec.fused
    first = {part.parts[0]: (name, part.parts) for name, part in fused.items()}
    others = {name for part in fused.values() for name in part.parts[1:]}
    matrices = {"token_embd.weight": weights.embed, "output.weight": weights.head}
    for name, info in model.file.tensors.items():
        prefix, _, suffix = name.rpartition(".")
        if prefix in linears and prefix.rpartition(".")[2].isdigit():  # experts, all in the first one's place
            if suffix == FACTORS[0] and prefix.endswith(".0"):
                path, n = prefix[:-2], model.config.n_experts
                together = [linears[f"{path}.{e}"] for e in range(n)]
                shape = (n, together[0].rows, together[0].cols)
                yield _Tensor(f"{path}_exps.weight", _fitting(kind, shape[2]), shape, together)
            continue
        at, part = prefix[: prefix.rfind(".") + 1], prefix[prefix.rfind(".") + 1 :]
        if part in others and suffix in ("bias", FACTORS[0]):
            continue  # in the tensor of the first part
        name_there, parts_there = first.get(part, (part, (part,)))
        if suffix == FACTORS[0]:
            together = [linears[at + p] for p in parts_there]
            rows, cols = sum(linear.rows for linear in together), together[0].cols
            yield _Tensor(f"{at}{name_there}.weight", _fitting(kind, cols), (rows, cols), together)
        elif suffix == "bias":
            biases = np.concatenate([model.file.data(f"{at}{p}.bias") for p in parts_there])
            yield _Tensor(f"{at}{name_there}.bias", Type(info.type), biases.shape, biases)
        elif name in matrices:
            yield _Tensor(name, _fitting(kind, info.shape[1]), info.shape, matrices[name])
        elif suffix not in FACTORS:
            yield _Tensor(name, Type(info.type), info.shape, model.file.data(name))


def _fitting(kind: Type, cols: int) -> Type:
    return Type.F16 if cols % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _data(tensor: _Tensor, where: str) -> NDArray[Any]:
    """A tensor's data as the twin stores it. Raises FormatError for weights that its type cannot hold."""
    source = tensor.source
    if isinstance(source, list):
        values = dense(source[0]) if len(source) == 1 else np.concatenate([dense(part) for part in source])
    elif isinstance(source, Dense):
        if source.type == tensor.type:
            return source.data.reshape(-1)
        values = gguf.quants.dequantize(source.data, Type(source.type)).reshape(tensor.shape)
    else:
        return source
    largest = max(float(values.max()), -float(values.min()))
    if not largest <= LARGEST[tensor.type]:
        raise FormatError(
            f"{where}: a weight of {tensor.name} is {largest:g}, {tensor.type.name} holds "
            f"{LARGEST[tensor.type]:g} at most; take --outtype bf16"
        )
    return np.asarray(gguf.quants.quantize(values, tensor.type))


def _write(
    path: Path, model: ModelFile, tensors: list[_Tensor], file_type: gguf.LlamaFileType, quiet: bool
) -> None:
    writer = gguf.GGUFWriter(path, model.architecture)
    try:
        copy_metadata(writer, model.file, lambda key: not key.startswith(OURS))
        writer.add_file_type(file_type)
        writer.add_string(DESCRIPTION, _description(model))
        for t in tensors:
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        show = not quiet and sys.stderr.isatty()
        for done, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(_data(tensor, model.path))
            model.file.release()
            if show:
                print(f"\r{done}/{len(tensors)} tensors", end="", file=sys.stderr, flush=True)
        if show:
            print(file=sys.stderr)
    finally:
        writer.close()


def _description(model: ModelFile) -> str:
    """The model's own description, if it has one, and where its weights come from."""
    bpw = model.metadata.get("dbf.bits_per_weight")
    bits = f" of {bpw:.3f} bits per weight" if isinstance(bpw, float) else ""
    note = f"Double Binary Factorization{bits}, multiplied back into dense matrices by dbf2gguf"
    own = model.metadata.get(DESCRIPTION)
    return f"{own} ({note})" if isinstance(own, str) and own else note
