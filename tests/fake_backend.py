"""A backend without arithmetic: the likeliest next token is a function of all tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def next_token(ids: Sequence[int], n_vocab: int) -> int:
    """What follows ids; never a control token (0-2) of make_gguf's tokenizer."""
    return 3 + sum((i + 1) * t for i, t in enumerate(ids)) % (n_vocab - 3)


class FakeBackend:
    """Checks how the engine uses the interface, and counts."""

    name = "fake"
    description = "fake, 1 thread"
    kv_type = "f16"
    activations = "int16"

    def __init__(self, n_vocab: int = 300, n_ctx: int = 64, script: Sequence[int] = ()) -> None:
        self.n_vocab, self.n_ctx, self.n_threads = n_vocab, n_ctx, 1
        self.script = list(script)  # tokens to say instead, one for each call with logits
        self.cache: list[int] = []
        self.calls: list[tuple[int, int, int]] = []  # tokens, pos, n_logits
        self.closed = False
        self.interrupt_at: int | None = None  # raise KeyboardInterrupt in this call

    def eval(self, tokens: NDArray[np.int32], pos: int, n_logits: int) -> NDArray[np.float32]:
        assert not self.closed
        assert tokens.dtype == np.int32
        assert tokens.ndim == 1
        assert 1 <= len(tokens) <= self.n_ctx - pos
        assert 0 <= pos <= len(self.cache)
        assert 0 <= n_logits <= len(tokens)
        assert (tokens >= 0).all()
        assert (tokens < self.n_vocab).all()
        del self.cache[pos:]
        self.calls.append((len(tokens), pos, n_logits))
        if self.interrupt_at == len(self.calls) - 1:
            raise KeyboardInterrupt
        self.cache.extend(tokens.tolist())
        out = np.zeros((n_logits, self.n_vocab), np.float32)
        for row in range(n_logits):
            end = len(self.cache) - n_logits + row + 1
            token = next_token(self.cache[:end], self.n_vocab)
            out[row, self.script.pop(0) if self.script else token] = 50.0
        return out

    def close(self) -> None:
        self.closed = True


class FakeModule:
    """Stands for the module runtime.backend."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.loaded: list[FakeBackend] = []
        self.asked: dict[str, Any] = {}

    def load(
        self,
        config: Any,
        weights: Any,
        *,
        backend: str,
        n_threads: int | None,
        n_ctx: int,
        kv_type: str,
        activations: str,
    ) -> FakeBackend:
        self.asked = {
            "backend": backend, "n_threads": n_threads, "n_ctx": n_ctx, "kv_type": kv_type,
            "activations": activations,
        }  # fmt: skip
        self.loaded.append(FakeBackend(config.n_vocab, n_ctx, **self.options))
        return self.loaded[-1]
