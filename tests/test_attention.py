"""Attention without masks gives what transformers' own gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_hf
import torch
from transformers import AutoConfig

from dbf2gguf import attention
from dbf2gguf.kvcache import GrowingCache, cache_argument

GEMMA = {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 20, "num_hidden_layers": 6}
"""Layers with a window, which is as long as the text, and without."""


@pytest.mark.parametrize(
    "changes", [{}, {"model_type": "qwen3"}, GEMMA], ids=lambda c: c.get("model_type", "llama")
)
@torch.no_grad()
def test_same_logits(changes: dict[str, Any]) -> None:
    """Of whole rows, and token by token with a cache; queries share keys two by two."""
    reference = tiny_hf.model(**changes)
    assert attention.suits(reference.config, 20)
    model = copy.deepcopy(reference)
    model.set_attn_implementation(attention.CAUSAL)
    tokens = torch.randint(0, tiny_hf.N_VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    wanted = reference(tokens).logits
    assert (model(tokens).logits - wanted).abs().max() < 1e-4
    cache = GrowingCache(20)
    for position in range(20):
        got = model(tokens[:, position, None], **{cache_argument(model): cache}, use_cache=True).logits[:, 0]
        assert (got - wanted[:, position]).abs().max() < 1e-4


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "gemma2"])
@torch.no_grad()
def test_windows_with_a_growing_cache(model_type: str) -> None:
    """The model's own attention, then: masks are as long as what the cache holds."""
    model = tiny_hf.model(1, model_type, sliding_window=6, pad_token_id=0)
    assert not attention.suits(model.config, 20)
    tokens = torch.randint(0, tiny_hf.N_VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    wanted = model(tokens).logits
    cache = GrowingCache(20)
    for position in range(20):
        got = model(tokens[:, position, None], **{cache_argument(model): cache}, use_cache=True).logits[:, 0]
        assert (got - wanted[:, position]).abs().max() < 1e-4


@torch.no_grad()
def test_a_cropped_cache_goes_on_from_there() -> None:
    model = tiny_hf.model()
    tokens = torch.randint(0, tiny_hf.N_VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = GrowingCache(9)
    model(tokens, **{cache_argument(model): cache}, use_cache=True)
    cache.crop(4)
    assert cache.get_seq_length() == 4
    got = model(tokens[:, 4:5], **{cache_argument(model): cache}, use_cache=True).logits
    assert (got - model(tokens).logits[:, 4:5]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "suits"),
    [
        ({}, True),
        ({"sliding_window": 63}, False),
        ({"sliding_window": 64}, True),
        ({"attn_logit_softcapping": 50.0}, False),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, False),
    ],
)
def test_which_models_it_suits(changes: dict[str, object], suits: bool) -> None:
    config = AutoConfig.for_model("llama", **tiny_hf.SIZES)
    for name, value in changes.items():
        setattr(config, name, value)
    assert attention.suits(config, 64) == suits
