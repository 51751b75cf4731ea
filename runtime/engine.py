"""The token loop: ids in, ids out. Keeps the books of the KV cache; knows nothing of text.

The backend holds keys and values of every position it has evaluated. The engine remembers which
tokens those were, so that a prompt that begins like the last one is evaluated only from where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ContextError, OptionError

Floats = NDArray[np.float32]
Sampling = Callable[[Floats, Sequence[int]], int]

BATCH = 512
"""Tokens per call of the backend; between two calls, Ctrl-C is heard."""


class Backend(Protocol):
    """What the engine needs of `runtime.backend.Backend`."""

    @property
    def n_ctx(self) -> int: ...

    def eval(self, tokens: NDArray[np.int32], pos: int, n_logits: int) -> Floats: ...

    def close(self) -> None: ...


@dataclass
class Stats:
    """Counts and seconds of one `generate`. What the caller does between two tokens is not counted."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the cache
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0  # for all new tokens but the first
    first_token_seconds: float = 0.0
    finish: str = ""  # "stop" (a stop token), "length" (max_tokens), "context" (full); "" while running

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens evaluated per second."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return _rate(self.new_tokens - 1, self.decode_seconds)

    def __str__(self) -> str:
        return (
            f"prefill {self.prompt_tokens - self.reused_tokens} tokens ({self.reused_tokens} reused), "
            f"{self.prefill_rate:.1f} tokens/s; "
            f"decode {self.new_tokens} tokens, {self.decode_rate:.1f} tokens/s; "
            f"first token after {self.first_token_seconds * 1000:.0f} ms"
        )


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n > 0 and seconds > 0 else 0.0


def common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    same = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        same += 1
    return same


class Engine:
    """One conversation on a backend.

    Attributes: n_ctx, n_vocab, stats (of the last `generate`).
    """

    def __init__(self, backend: Backend, n_vocab: int) -> None:
        self._backend = backend
        self._held: list[int] = []  # the tokens in the KV cache, by position
        self.n_ctx = backend.n_ctx
        self.n_vocab = n_vocab
        self.stats = Stats()

    def logits(self, ids: Sequence[int], n_last: int | None = None, reuse: bool = False) -> Floats:
        """Logits of the last n_last tokens of ids (all if None).

        reuse  whether tokens before these that are in the cache are taken from it, not evaluated again

        -> (n_last, n_vocab) float32; row i scores what follows token len(ids) - n_last + i

        Raises ContextError if ids do not fit the context, OptionError for other misuse.
        """
        self._check(ids)
        n_last = len(ids) if n_last is None else n_last
        if not 1 <= n_last <= len(ids):
            raise OptionError(f"logits: n_last is {n_last}, wanted 1..{len(ids)}")
        same = self._keep(ids, n_last if reuse else len(ids))
        return self._eval(ids[same:], n_last)

    def generate(
        self,
        ids: Sequence[int],
        sampler: Sampling,
        max_tokens: int | None = None,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        """Continue ids; yields new tokens until a stop token (not yielded), max_tokens, or a full context.

        ids         the whole prompt; what it shares with the cache is not evaluated again
        sampler     called with the logits (n_vocab,) and all tokens so far
        max_tokens  None: as many as fit the context

        Raises at once: ContextError if ids do not fit the context, OptionError for other misuse.
        """
        self._check(ids)
        if max_tokens is not None and max_tokens < 0:
            raise OptionError(f"max_tokens is {max_tokens}, wanted >= 0")
        return self._generate([int(i) for i in ids], sampler, max_tokens, frozenset(stop))

    def close(self) -> None:
        """Free the backend."""
        self._backend.close()

    def _generate(
        self, ids: list[int], sampler: Sampling, max_tokens: int | None, stop: frozenset[int]
    ) -> Iterator[int]:
        stats = self.stats = Stats(prompt_tokens=len(ids))
        if max_tokens == 0:
            stats.finish = "length"
            return
        same = stats.reused_tokens = self._keep(ids, 1)
        start = perf_counter()
        row = self._eval(ids[same:], 1)[0]
        stats.prefill_seconds = perf_counter() - start
        while True:
            token = sampler(row, ids)
            if token in stop:
                stats.finish = "stop"
                return
            ids.append(token)
            stats.new_tokens += 1
            if stats.new_tokens == 1:
                stats.first_token_seconds = perf_counter() - start
            else:
                stats.decode_seconds += perf_counter() - start
            if max_tokens is not None and stats.new_tokens >= max_tokens:
                stats.finish = "length"
            elif len(ids) > self.n_ctx:
                stats.finish = "context"
            yield token
            if stats.finish:
                return
            start = perf_counter()
            row = self._eval(ids[-1:], 1)[0]

    def _keep(self, ids: Sequence[int], n_last: int) -> int:
        """Forget what the cache holds beyond the beginning of ids, whose last n_last tokens will be
        evaluated; returns how many it goes on to hold."""
        same = min(common_prefix(self._held, ids), len(ids) - n_last)
        del self._held[same:]
        return same

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise OptionError("the prompt is empty: there is nothing to continue")
        if len(ids) > self.n_ctx:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, the context {self.n_ctx}; shorten it or raise --ctx"
            )
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.n_vocab:
            raise OptionError(
                f"token id {low if low < 0 else high} is not in the vocabulary (0..{self.n_vocab - 1})"
            )

    def _eval(self, ids: Sequence[int], n_last: int) -> Floats:
        """Evaluate ids after the held tokens, in batches; the books are right even if that is interrupted."""
        rows: list[Floats] = []
        first = len(ids) - n_last  # the first token whose logits are wanted
        for begin in range(0, len(ids), BATCH):
            batch = np.asarray(ids[begin : begin + BATCH], dtype=np.int32)
            wanted = min(len(batch), max(0, begin + len(batch) - first))
            out = self._backend.eval(batch, len(self._held), wanted)
            self._held.extend(batch.tolist())
            if wanted:
                rows.append(out)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)
