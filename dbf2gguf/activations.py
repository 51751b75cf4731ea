"""What a pass of distillation holds for its backward pass, and how to make that fit a GPU.

Bytes on the GPU for S signs, W weights of linear layers, D parameters of norms, embedding and head:

    latents, their gradients, Adam's two moments    16 S        float32
    the model to imitate                             2 W + 4 D   its linear layers in bfloat16 for the while
    weights multiplied out, their gradients          4 W         bfloat16
    norms, embedding and head, trained              16 D        float32 (where recipe.dense_rate > 0)
    activations                                     as below

S is about W times the bits per weight less 0.03. Activations are bounded twice: as many rows pass together as
fit, and where not even LEAST_TOKENS of them do, every decoder layer keeps its input alone and runs again in
the backward pass (checkpointing): a third more time, the same gradients. With --dtype float32, what is
bfloat16 here takes twice as much, and activations, some of which are float32 anyway, half as much more.

GB by this arithmetic. Of a token a layer of width d holds about 53 d bytes (counted in bfloat16, all
parameters trained, feed-forwards of 2.7 d; `token_bytes` is an upper bound), checkpointed 4 d and what one
layer at a time needs.

                            1.1 B (22 layers, d 2048)     3.2 B (28 layers, d 3072)
    bits per weight          1.26     2.07                 1.26     2.07
    latents to Adam          19.1     31.6                 55.5     92.0
    the model to imitate      2.5                           7.2
    weights, gradients        3.9                          11.3
    norms, embedding, head    2.1                           6.3
    a row of 512 tokens       1.2, checkpointed 0.2         2.3, checkpointed 0.3

The gradients of the latents, a quarter of the first line, come when activations and half of the third line
are gone. So on 80 GB the first model trains without checkpointing, and the second with it at 1.26 bits; at
2.07 it wants 141 GB. docs/MEMORY.md has what 3.0 B took on an H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dbf2gguf.archs import features, head_dim

LEAST_TOKENS = 4096  # that must pass at a time, or else layers are checkpointed
PASS_BYTES = 2**28  # of activations in one layer, where rows are not distilled on
BACKWARD = 3  # times as many bytes as a pass forward takes, where nothing is kept for a pass back
SLACK = 0.85  # of the free memory, for what is not counted


@dataclass(frozen=True)
class Passes:
    """How a batch goes through the student: so many rows at a time, its layers checkpointed or not."""

    rows: int
    checkpointed: bool


def plan_passes(
    batch: int, tokens: int, layers: int, plain: int, kept: int, free: float, checkpointing: str
) -> Passes:
    """The largest divisor of the batch that fits the memory, without checkpointing if that is enough.

    batch, tokens  rows of a batch, tokens of a row
    plain          bytes that a row's pass holds without checkpointing
    kept           bytes of its input to a layer
    free           bytes there are
    checkpointing  recipe.CHECKPOINTING: "auto", or the answer
    """

    def rows(each: float) -> int:
        return next((n for n in range(batch, 1, -1) if batch % n == 0 and n * each <= free), 1)

    few = 1.5 * plain / layers + layers * kept  # a layer at a time, and its gradients
    plainly = rows(plain)
    enough = plainly * tokens >= min(LEAST_TOKENS, batch * tokens) and plainly * plain <= free
    if checkpointing == "off" or (checkpointing == "auto" and enough):
        return Passes(plainly, False)
    return Passes(rows(few), True)


def token_bytes(config: Any, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that all layers of a model keep for the backward pass of one token, under autocast to bfloat16 or
    in float32: an upper bound for the families that there are (tests count them)."""
    f = features(config)
    heads = (config.num_attention_heads + f.n_kv_heads) * head_dim(config)
    rounded = 44 * config.hidden_size + 8 * f.d_ff + 13 * heads
    return config.num_hidden_layers * (rounded if dtype == torch.bfloat16 else rounded * 3 // 2)


def row_bytes(config: Any, tokens: int) -> int:
    """Bytes that pass through one decoder layer with a row of so many tokens, in float32, without a backward
    pass; that holds about BACKWARD times as many."""
    f = features(config)
    d_ff = f.d_shared + f.n_experts_used * f.d_expert if f.n_experts else f.d_ff
    scores = 2 * config.num_attention_heads * tokens if f.attn_softcap else 0  # all of them, twice
    return 4 * tokens * (6 * config.hidden_size + 3 * d_ff + scores)


def record_bytes(config: Any, tokens: int) -> int:
    """Bytes that the correction of one block keeps of a row of so many tokens: what its layers read and are
    added to, its outputs, and those of the factorized model before it and after it."""
    f = features(config)
    if f.n_experts:
        return row_bytes(config, tokens) + 4 * tokens * 3 * config.hidden_size
    return 4 * tokens * (7 * config.hidden_size + f.d_ff)


def rows_together(config: Any, tokens: int, most: int, times: int = 1) -> int:
    """How many rows of text pass through a model together, at least one and at most `most`, without their
    activations taking more than PASS_BYTES.

    times  as many bytes as row_bytes says: BACKWARD for a backward pass
    """
    return max(1, min(most, PASS_BYTES // (times * row_bytes(config, tokens))))


@contextmanager
def checkpointed(layers: list[nn.Module]) -> Iterator[None]:
    """Layers that keep their inputs alone and run again in the backward pass while the context lasts; those
    that are compiled stay so.

    Without the state of random numbers, which no layer draws in evaluation mode, and which a CUDA graph
    cannot ask for.
    """

    def wrapped(call: Any) -> Any:
        return lambda *args, **kwargs: checkpoint(
            call, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    before = [layer._compiled_call_impl for layer in layers]
    for layer, compiled in zip(layers, before, strict=True):
        layer._compiled_call_impl = wrapped(compiled or layer._call_impl)
    try:
        yield
    finally:
        for layer, compiled in zip(layers, before, strict=True):
            layer._compiled_call_impl = compiled


@contextmanager
def in_bfloat16(linears: list[nn.Module]) -> Iterator[None]:
    """Linear layers on a GPU whose weights are bfloat16 while the context lasts; the float32 ones wait in the
    host's memory. Under autocast the products are the same: it would round them for every pass."""
    kept = [linear.weight.data for linear in linears]
    devices = [weight.device for weight in kept]
    for place, linear in enumerate(linears):
        linear.weight.data = kept[place].to(torch.bfloat16)
        kept[place] = kept[place].to("cpu")
    try:
        yield
    finally:
        for linear, weight, device in zip(linears, kept, devices, strict=True):
            linear.weight.data = weight.to(device)
