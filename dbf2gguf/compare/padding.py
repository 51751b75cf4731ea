"""The same model, wider: zeros fill rows up to whole blocks of 256, which llama.cpp's K and IQ types want.

With n of N channels in use, the mean square that RMSNorm divides by is n/N of what it was, and so are its
epsilon and, squared, its weights. Heads are added whole, at the end of each group of queries or as
groups after the last, and what they put out is multiplied by zeros.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from dbf2gguf.archs import HEAD_NORMS, NORMS, ArchSpec, features, head_dim
from runtime.errors import UnsupportedModelError

BLOCK = 256
KNOWN = (NORMS | HEAD_NORMS).keys()


def padded(model: nn.Module, arch: ArchSpec) -> nn.Module:
    """A model with the same logits in which every linear layer and the embedding have rows of whole BLOCKs;
    `model` itself where that is so already.

    Exact in real numbers, but for head norms (Qwen3's): a config has one epsilon, so theirs shrinks, too.
    """
    from transformers import AutoModelForCausalLM

    old = model.config
    size = head_dim(old)
    f = features(old)
    widths = (old.hidden_size, f.d_ff, f.d_expert, f.d_shared, old.num_attention_heads * size)
    if all(n % BLOCK == 0 for n in widths):
        return model
    odd = arch.norm_offset or arch.fused or arch.experts
    if arch.norm != "rms" or odd or not NORMS.keys() <= arch.norms.keys() <= KNOWN:
        raise UnsupportedModelError(
            f"{arch.model_type} cannot be padded to rows of whole {BLOCK}s: its norms, fused layers or "
            "experts are not Llama's; take peers' types that fit its rows"
        )
    width = whole(old.hidden_size)
    heads, kv_heads = pad_heads(old.num_attention_heads, old.num_key_value_heads, size, width)
    config = copy.deepcopy(old)
    config.hidden_size, config.intermediate_size = width, whole(old.intermediate_size)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads, kv_heads, size
    config.rms_norm_eps = old.rms_norm_eps * old.hidden_size / width

    wider = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    places = _Places(old, config, arch)
    for name, values in model.named_parameters():
        target = wider.get_parameter(name)
        target.zero_()
        target[places.of(name, values.shape)] = values * places.factor(name)
    return wider


@torch.no_grad()
def unpadded(wider: nn.Module, model: nn.Module, arch: ArchSpec) -> nn.Module:
    """The way back: a copy of `model` with the weights of `wider`, which a quantizer made of `padded(model)`;
    it computes the same in less time. `wider` itself where nothing was added, or where what was added has an
    effect now that its zeros are quantized.
    """
    if all(p.shape == wider.get_parameter(name).shape for name, p in model.named_parameters()):
        return wider
    places = _Places(model.config, wider.config, arch)
    narrow = copy.deepcopy(model)
    for name, target in narrow.named_parameters():
        values, place = wider.get_parameter(name), places.of(name, target.shape)
        for dim in places.zeros(name):
            added = torch.ones(values.shape[dim], dtype=torch.bool)
            added[place[dim]] = False
            if values.movedim(dim, 0)[added].any():
                return wider
        target.copy_(values[place] / places.factor(name))
    return narrow


class _Places:
    """Where the parameters of a model lie in those of the padded one, and what they are multiplied by."""

    def __init__(self, old: Any, new: Any, arch: ArchSpec) -> None:
        """old, new  the configs of both"""
        layers = range(old.num_hidden_layers)
        inner = [path for path in arch.norms.values() if path not in HEAD_NORMS.values()]
        self.norms = {f"{arch.layers}.{index}.{path}.weight" for index in layers for path in inner}
        self.norms.add(f"{arch.out_norm}.weight")
        self._arch, self._norm_factor = arch, math.sqrt(old.hidden_size / new.hidden_size)
        group = new.num_attention_heads // new.num_key_value_heads
        self._groups_grow = group * old.num_key_value_heads > old.num_attention_heads
        self._query_rows = _rows_of_heads(old, group, new.head_dim)

    def of(self, name: str, shape: torch.Size) -> tuple[Any, ...]:
        """The index of a parameter that has `shape` without padding."""
        query, output = self._arch.linears["attn_q"], self._arch.linears["attn_output"]
        place: list[Any] = [slice(n) for n in shape]
        if name.endswith((f".{query}.weight", f".{query}.bias")):
            place[0] = self._query_rows
        elif name.endswith(f".{output}.weight"):
            place[1] = self._query_rows
        return tuple(place)

    def zeros(self, name: str) -> tuple[int, ...]:
        """Dimensions of a parameter in which all that is added must be zero to have no effect: outputs, and
        what reads a head that was added to a group, whose values are not zero."""
        if name in self.norms:
            return ()
        if name == f"{self._arch.embed}.weight":
            return (1,)
        reads_heads = name.endswith(f".{self._arch.linears['attn_output']}.weight")
        return (0, 1) if reads_heads and self._groups_grow else (0,)

    def factor(self, name: str) -> float:
        return self._norm_factor if name in self.norms else 1.0


def whole(n: int, block: int = BLOCK) -> int:
    """The smallest multiple of `block` that is >= n."""
    return -(-n // block) * block


def pad_heads(heads: int, kv_heads: int, head_dim: int, width: int) -> tuple[int, int]:
    """The least numbers of query and of key/value heads that keep every head and its group, where all query
    heads together have whole BLOCKs; of two ways, the one that makes groups no larger.

    width  of the residual stream: transformers wants it to be a multiple of the number of heads

    Raises UnsupportedModelError if there is none.
    """
    group, steps = heads // kv_heads, BLOCK // math.gcd(BLOCK, head_dim)
    ways = [(g * kv, g, kv) for g in range(group, group + steps) for kv in range(kv_heads, kv_heads + steps)]
    fitting = [way for way in ways if way[0] * head_dim % BLOCK == 0 and width % way[0] == 0]
    if not fitting:
        raise UnsupportedModelError(
            f"{heads} heads of {head_dim} in {kv_heads} groups cannot be padded to a multiple of {BLOCK}: "
            f"their number must divide the width, {width}"
        )
    total, _, kv = min(fitting)
    return total, kv


def _rows_of_heads(config: Any, group: int, head_dim: int) -> Tensor:
    """Where the rows of the query heads go when groups grow to `group` heads: (heads * head_dim,) int64."""
    heads = torch.arange(config.num_attention_heads)
    old_group = config.num_attention_heads // config.num_key_value_heads
    places = heads // old_group * group + heads % old_group
    return (places[:, None] * head_dim + torch.arange(head_dim)).flatten()
