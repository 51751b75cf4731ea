"""A KV cache that grows in place: transformers' own copies all of it for every token."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache: transformers has renamed it."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class GrowingCache(DynamicCache):
    """Room for `capacity` positions, allocated when a layer first writes."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._length: dict[int, int] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, n, head_dim) keys and values; returns all held ones as views."""
        if layer_idx not in self._held:
            shape = (*key_states.shape[:2], self.capacity, key_states.shape[3])
            self._held[layer_idx] = (key_states.new_empty(shape), value_states.new_empty(shape))
        start = self._length.get(layer_idx, 0)
        end = start + key_states.shape[2]
        keys, values = self._held[layer_idx]
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self._length[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int) -> tuple[int, int]:
        """Positions that the mask of a call is for, and the first of them."""
        length = query if isinstance(query, int) else len(query)
        return self.get_seq_length(layer_idx) + length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held."""
        return self._length.get(layer_idx, 0)

    def crop(self, max_length: int) -> None:
        """Forget all but the first positions."""
        self._length = {layer: min(length, max_length) for layer, length in self._length.items()}
