"""Open the model to convert: a Hugging Face folder, one fetched from the hub, or a GGUF turned into one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dbf2gguf import hub, legacy
from dbf2gguf.archs import ARCHS, ArchSpec, features, find_arch, head_dim
from dbf2gguf.files import files_of_index
from dbf2gguf.legacy import bin_to_safetensors, is_legacy
from runtime.errors import FormatError, UnsupportedModelError, first_line

GGUF_MAGIC = b"GGUF"
CONSTANTS = (".inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names that old checkpoints give to what is computed: RoPE's frequencies, GPT-2's causal mask."""


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that passed its checks."""

    path: Path
    config: dict[str, Any]
    arch: ArchSpec
    name: str
    gguf: Path | None = None  # the file that the folder was made of


def open_source(model: str | Path, scratch: Path) -> Source:
    """The model at `model`, its weights as safetensors: see `find_source` and `with_weights`."""
    return with_weights(find_source(model, scratch), scratch / "weights")


def find_source(model: str | Path, scratch: Path) -> Source:
    """Check the model at `model` without loading its weights.

    What is no file or folder but has the shape of an id on the hub, owner/name[@revision], is fetched. Of a
    GGUF file, a Hugging Face folder without weights is made under `scratch`.

    Raises FormatError for what is no model or a broken one, UnsupportedModelError for an architecture or
    feature that is not implemented.
    """
    path, gguf = Path(model), None
    name = path.resolve().name
    if not path.exists() and (known := hub.split_id(str(model))):
        path, name = hub.fetch(str(model)), known[0].partition("/")[2]
    if not path.exists():
        raise FormatError(
            f"{model}: no such folder or file; wanted a Hugging Face model folder, a GGUF file, or the id of "
            "a model on the hub (owner/name)"
        )
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != GGUF_MAGIC:
                raise FormatError(
                    f"{model}: not a GGUF file; wanted a Hugging Face model folder or a GGUF file"
                )
        from dbf2gguf.from_gguf import config_to_hf

        name, path, gguf = path.stem, scratch / "model", path
        config_to_hf(gguf, path, torch.float32)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise FormatError(f"{path}: no config.json in it; wanted a Hugging Face model folder")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{config_file}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{config_file}: wanted a JSON object, got {type(config).__name__}")
    arch = find_arch(config, str(config_file))
    if gguf is None and not is_legacy(path):
        _check_safetensors(path)
    return Source(path, config, arch, name, gguf)


def with_weights(source: Source, folder: Path) -> Source:
    """A source whose weights are safetensors: the same one if they are; or else in `folder`, which is made:
    those of a GGUF file dequantized to float32, or those of pytorch_model.bin.

    Raises FormatError for a broken file, OptionError if the disk is too small.
    """
    if source.gguf is not None:
        from dbf2gguf.from_gguf import weights_to_hf

        shutil.copytree(source.path, folder, dirs_exist_ok=True)
        weights_to_hf(source.gguf, folder, torch.float32)
    elif is_legacy(source.path):
        bin_to_safetensors(source.path, folder)
    else:
        return source
    _check_safetensors(folder)
    return replace(source, path=folder)


def reading_bytes(source: Source) -> int:
    """How much memory `with_weights` takes, about."""
    if source.gguf is not None:
        from dbf2gguf.from_gguf import largest_bytes

        return 2 * largest_bytes(source.gguf)
    return legacy.reading_bytes(source.path) if is_legacy(source.path) else 0


def weight_files(path: Path) -> list[Path]:
    """The safetensors of a model's folder: those that its index names, or else all. Raises FormatError."""
    index = path / "model.safetensors.index.json"
    return files_of_index(index) if index.is_file() else sorted(path.glob("*.safetensors"))


def _check_safetensors(path: Path) -> None:
    """Every weight file is whole: its header is readable and its size is what the header says."""
    files = weight_files(path)
    if not files:
        raise FormatError(f"{path}: no .safetensors file in it, and no pytorch_model.bin")
    from safetensors import SafetensorError

    for file in files:
        try:
            with open_safetensors(file) as tensors:
                tensors.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{file}: broken or truncated safetensors file: {error}") from None


def load_model(source: Source, device: str = "cpu", tokens: int = sys.maxsize) -> nn.Module:
    """The reference model, float32, in evaluation mode, without gradients. Raises FormatError.

    tokens  of the longest text that it will see: where no window is shorter, a GPU needs no masks
    """
    import transformers
    from transformers.utils import logging

    from dbf2gguf import attention

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = model_config(source)
        model, info = getattr(transformers, ARCHS[config.model_type].model_class).from_pretrained(
            source.path if source.arch.text is None else None,
            config=config,
            state_dict=_text_tensors(source),
            dtype=torch.float32,
            attn_implementation=attention_of(config),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise FormatError(f"{source.path}: transformers cannot load it: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise FormatError(f"{source.path}: {len(missing)} tensors are missing, first {missing[0]!r}")
    for name, got, wanted in sorted(info["mismatched_keys"]):
        check_shape(source, name, got, wanted)
    check_no_others(source, model.config, info["unexpected_keys"])
    for name, parameter in model.named_parameters():
        check_finite(source, name, parameter)
    if device != "cpu" and attention.suits(model.config, tokens):
        model.set_attn_implementation(attention.CAUSAL)
    return split_fused(model.to(device).eval().requires_grad_(False), source.arch)


def model_config(source: Source) -> Any:
    """transformers' config of the model that is converted. Raises what transformers does."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.path, local_files_only=True)
    if source.arch.text is None:
        return config
    text = getattr(config, source.arch.text.config)
    # which of the two counts depends on transformers' version; a head that is then missing is reported
    text.tie_word_embeddings = text.tie_word_embeddings and config.tie_word_embeddings
    return text


class Stored(NamedTuple):
    """A tensor of a file."""

    file: Path
    name: str
    shape: tuple[int, ...]


def stored_tensors(source: Source) -> dict[str, Stored]:
    """The tensors of the folder that are not left out, by the names of the model that is converted."""
    found = {}
    for file in weight_files(source.path):
        with open_safetensors(file) as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (it is no mapping)
                name = stored if source.arch.text is None else source.arch.text.name(stored)
                if name is not None:
                    found[name] = Stored(file, stored, tuple(tensors.get_slice(stored).get_shape()))
    return found


def open_safetensors(file: Path) -> Any:
    """A context manager; tensors that are got from it are mapped."""
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def _text_tensors(source: Source) -> dict[str, Tensor] | None:
    """What transformers cannot read by itself: the tensors of a text model that is a part, mapped."""
    if source.arch.text is None:
        return None
    found = {}
    for name, stored in stored_tensors(source).items():
        with open_safetensors(stored.file) as tensors:
            found[name] = tensors.get_tensor(stored.name)
    return found


def count_weights(module: nn.Module) -> int:
    """Of all its parameters, what is shared once."""
    return sum(p.numel() for p in module.parameters())


def attention_of(config: Any) -> str:
    """The attention that transformers is to take for a model of this config: its SDPA knows no soft caps."""
    return "eager" if features(config).attn_softcap else "sdpa"


def check_shape(source: Source, name: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises FormatError if a tensor of the checkpoint has another shape than the model that config.json
    describes."""
    if tuple(got) != tuple(wanted):
        raise FormatError(
            f"{source.path}: shapes contradict config.json: {name!r} is {tuple(got)}; wanted {tuple(wanted)}"
        )


def check_no_others(source: Source, config: Any, names: Iterable[str]) -> None:
    """Raises FormatError if one of the tensors that the model has no place for is more than a copy of a tied
    head, or a constant that old checkpoints hold."""
    tied = source.arch.head + ".weight" if config.tie_word_embeddings else None
    unknown = sorted(name for name in names if name != tied and not name.endswith(CONSTANTS))
    if unknown:
        raise FormatError(
            f"{source.path}: {len(unknown)} tensors have no place in the model that config.json describes, "
            f"first {unknown[0]!r}"
        )


def check_finite(source: Source, name: str, tensor: Tensor) -> None:
    """Raises FormatError if a tensor holds NaN or infinity. Makes no copies."""
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise FormatError(f"{source.path}: tensor {name!r} holds NaN or infinity")


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x))."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ExpertList(nn.ModuleList):
    """Experts as modules of their own, in the place of one module that holds all weights."""

    def forward(self, x: Tensor, used: Tensor, shares: Tensor) -> Tensor:
        """x (n, d_model), used (n, k) the experts of each token, shares (n, k) -> (n, d_model)"""
        y = torch.zeros_like(x)
        for index, expert in enumerate(self):
            token, place = torch.where(used == index)
            if len(token):
                y.index_add_(0, token, (expert(x[token]) * shares[token, place, None]).to(y.dtype))
        return y


class FusedLinear(nn.Module):
    """Linears side by side in the place of one: their outputs one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], -1)


def split_fused(model: nn.Module, arch: ArchSpec) -> nn.Module:
    """Put FusedLinear in the place of the linears that a family fuses, ExpertList in that of its experts, and
    ordinary linears in that of GPT-2's Conv1D. Raises UnsupportedModelError if rows are not what config.json
    says."""
    from transformers.pytorch_utils import Conv1D

    split_experts(model, arch)
    if not arch.fused:
        return model
    config, f = model.config, features(model.config)
    q, kv = (n * head_dim(config) for n in (config.num_attention_heads, f.n_kv_heads))
    rows = {"attn_q": q, "attn_k": kv, "attn_v": kv}
    for index, layer in enumerate(decoder_layers(model, arch)):
        for name, module in list(layer.named_modules()):
            if isinstance(module, Conv1D):
                layer.set_submodule(name, as_linear(module.weight.T.contiguous(), module.bias))
        for fused in arch.fused.values():
            module, parts = layer.get_submodule(fused.module), FusedLinear()
            sizes = [rows.get(part, f.d_ff) for part in fused.parts]
            if module.weight.shape[0] != sum(sizes):
                raise UnsupportedModelError(
                    f"{arch.layers}.{index}.{fused.module} has {module.weight.shape[0]} rows; wanted {sizes}"
                )
            biases = [None] * len(sizes) if module.bias is None else module.bias.split(sizes)
            for part, weight, bias in zip(fused.parts, module.weight.split(sizes), biases, strict=True):
                parts.add_module(part, as_linear(weight, bias))
            layer.set_submodule(fused.module, parts)
    return model


def split_experts(model: nn.Module, arch: ArchSpec) -> None:
    """Put ExpertList in the place of a family's experts, unless it is there."""
    if arch.experts is None:
        return
    for layer in decoder_layers(model, arch):
        fused, experts = layer.get_submodule(arch.experts.module), ExpertList()
        if isinstance(fused, ExpertList):
            continue
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            linears = [as_linear(weight, None) for weight in (gate, up, down)]
            experts.append(Expert(*linears, fused.act_fn))
        layer.set_submodule(arch.experts.module, experts)


def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of this weight, (rows, cols), and bias, (rows,)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


def load_tokenizer(source: Source) -> Any:
    """The model's fast tokenizer. Raises FormatError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except Exception as error:  # transformers raises anything from KeyError to tokenizers' own Exception
        raise FormatError(
            f"{source.path}: transformers cannot load its tokenizer: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{source.path}: no tokenizer.json, and none can be made from its tokenizer"
        )
    return tokenizer


def decoder_layers(model: nn.Module, arch: ArchSpec) -> nn.ModuleList:
    """The list of decoder blocks."""
    layers = model.get_submodule(arch.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def linear_names(model: nn.Module, arch: ArchSpec) -> dict[str, str]:
    """GGUF name ("blk.0.attn_q") -> module name of every linear layer to factorize, in file order.

    Raises UnsupportedModelError if a block lacks one or it is no plain linear layer.
    """
    names = {}
    for index in range(len(decoder_layers(model, arch))):
        for gguf, hf in arch.linears_of(model.config).items():
            module = f"{arch.layers}.{index}.{hf}"
            try:
                found = model.get_submodule(module)
            except AttributeError:
                raise UnsupportedModelError(f"{module}: the model has no such layer") from None
            if not isinstance(found, nn.Linear):
                raise UnsupportedModelError(f"{module}: wanted a linear layer, got {type(found).__name__}")
            names[f"blk.{index}.{gguf}"] = module
    return names
