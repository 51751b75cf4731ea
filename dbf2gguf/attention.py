"""Causal attention without masks, for GPUs: while a CUDA graph is recorded, transformers makes a mask,
and with a mask it copies keys and values for every query head that shares them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

CAUSAL = "dbf2gguf_causal"
"""Its name, as `attn_implementation`."""


def suits(config: Any, tokens: int) -> bool:
    """Whether all attention of a model of this (transformers') config is plain in texts of so many tokens: no
    soft-caps, no window that is shorter."""
    window = getattr(config, "sliding_window", None)
    return not getattr(config, "attn_logit_softcapping", None) and not (window and window < tokens)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Every token to itself and those before it; of one token, to all there are.

    query       (batch, heads, n, head_dim)
    key, value  (batch, kv_heads, tokens, head_dim); tokens = n, or any number where n = 1
    ->          (batch, n, heads, head_dim)
    """
    batch, heads, n, head_dim = query.shape
    kv_heads = key.shape[1]
    if n == 1:  # the queries that share keys are like rows of one
        query = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        out = scaled_dot_product_attention(query, key, value, scale=scaling)
        return out.reshape(batch, 1, heads, head_dim), None
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=kv_heads != heads
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(CAUSAL, attend)
AttentionMaskInterface.register(CAUSAL, lambda *_args, **_kwargs: None)
