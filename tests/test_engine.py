"""runtime.engine: the books of the KV cache, limits, stops, statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import engine as engine_module
from runtime.engine import Engine
from runtime.errors import ContextError, OptionError


def greedy(logits: Any, history: Sequence[int]) -> int:
    return int(np.argmax(logits))


def continuation(ids: list[int], n: int, n_vocab: int = 300) -> list[int]:
    ids = list(ids)
    for _ in range(n):
        ids.append(next_token(ids, n_vocab))
    return ids[-n:] if n else []


def make(**options: Any) -> tuple[Engine, FakeBackend]:
    backend = FakeBackend(**options)
    return Engine(backend, backend.n_vocab), backend


def test_generates() -> None:
    engine, _ = make()
    assert list(engine.generate([5, 6, 7], greedy, 10)) == continuation([5, 6, 7], 10)
    assert engine.stats.finish == "length"
    assert engine.stats.new_tokens == 10


def test_history_is_passed() -> None:
    engine, _ = make()
    seen: list[list[int]] = []

    def sampler(logits: Any, history: Sequence[int]) -> int:
        seen.append(list(history))
        return int(np.argmax(logits))

    out = list(engine.generate([5, 6], sampler, 3))
    assert seen == [[5, 6], [5, 6, out[0]], [5, 6, *out[:2]]]


def test_prefix_is_reused() -> None:
    engine, backend = make()
    first = list(engine.generate([5, 6, 7], greedy, 4))
    # the last new token is not in the cache: nothing needed its successor
    second = [5, 6, 7, *first, 8, 9]
    backend.calls.clear()
    assert list(engine.generate(second, greedy, 2)) == continuation(second, 2)
    assert backend.calls[0] == (3, 6, 1)
    assert engine.stats.reused_tokens == 6
    # the same prompt again: its last token is evaluated again, for its logits
    backend.calls.clear()
    list(engine.generate(second, greedy, 1))
    assert backend.calls == [(1, len(second) - 1, 1)]
    # a prompt that differs early
    backend.calls.clear()
    assert list(engine.generate([5, 1, 7], greedy, 1)) == continuation([5, 1, 7], 1)
    assert backend.calls == [(2, 1, 1)]


def test_logits_reuse_the_prefix() -> None:
    engine, backend = make()
    engine.logits([5, 6, 7, 8])
    backend.calls.clear()
    rows = engine.logits([5, 6, 7, 9, 10], 1, reuse=True)
    assert rows.argmax(axis=1).tolist() == [next_token([5, 6, 7, 9, 10], 300)]
    rows = engine.logits([5, 6, 7, 9, 10], 3, reuse=True)  # what is wanted is evaluated again
    assert rows.argmax(axis=1).tolist() == [next_token([5, 6, 7, 9, 10][:n], 300) for n in (3, 4, 5)]
    engine.logits([5, 6, 7, 9, 10], 1)
    assert backend.calls == [(2, 3, 1), (3, 2, 3), (5, 0, 1)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 4)), max_size=6)
)
def test_reuse_never_changes_the_answer(turns: list[tuple[list[int], int]]) -> None:
    engine, _ = make()
    for ids, n in turns:
        assert list(engine.generate(ids, greedy, n)) == continuation(ids, n)


def test_abandoned_generator() -> None:
    engine, _ = make()
    list(itertools.islice(engine.generate([5, 6], greedy), 3))
    assert list(engine.generate([5, 6, 9], greedy, 5)) == continuation([5, 6, 9], 5)


@pytest.mark.parametrize("call", [0, 1, 3])
def test_interrupt_keeps_the_books(call: int) -> None:
    engine, backend = make()
    backend.interrupt_at = call
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate([5, 6], greedy, 10))
    backend.interrupt_at = None
    assert list(engine.generate([5, 6], greedy, 10)) == continuation([5, 6], 10)


def test_stop_token() -> None:
    engine, _ = make(script=[10, 11, 2, 12])
    assert list(engine.generate([5], greedy, 10, stop=(2,))) == [10, 11]
    assert engine.stats.finish == "stop"


def test_context_limit() -> None:
    engine, backend = make(n_ctx=8)
    with pytest.raises(ContextError, match="9 tokens, the context 8"):
        engine.generate([1] * 9, greedy)  # at once, not at the first next()
    assert backend.calls == []
    # the token after a full context can still be told
    assert list(engine.generate([1] * 8, greedy)) == continuation([1] * 8, 1)
    assert engine.stats.finish == "context"
    assert list(engine.generate([1] * 5, greedy)) == continuation([1] * 5, 4)
    assert list(engine.generate([1] * 5, greedy, 3)) == continuation([1] * 5, 3)
    assert engine.stats.finish == "length"


@pytest.mark.parametrize(
    ("ids", "n", "message"),
    [
        ([], 1, "empty"),
        ([300], 1, "token id 300"),
        ([-1, 2], 1, "token id -1"),
        ([1], -1, "max_tokens is -1"),
    ],
)
def test_misuse(ids: list[int], n: int, message: str) -> None:
    engine, backend = make()
    with pytest.raises(OptionError, match=message):
        engine.generate(ids, greedy, n)
    assert backend.calls == []


def test_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BATCH", 4)
    engine, backend = make()
    ids = list(range(3, 14))
    assert list(engine.generate(ids, greedy, 2)) == continuation(ids, 2)
    assert backend.calls == [(4, 0, 0), (4, 4, 0), (3, 8, 1), (1, 11, 1)]
    for n_last in (1, 3, 4, 6, 11):
        rows = engine.logits(ids, n_last)
        assert rows.shape == (n_last, 300)
        want = [next_token(ids[: len(ids) - n_last + i + 1], 300) for i in range(n_last)]
        assert rows.argmax(axis=1).tolist() == want
    assert engine.logits(ids).shape == (11, 300)
    with pytest.raises(OptionError, match="n_last is 12"):
        engine.logits(ids, 12)


def test_stats() -> None:
    engine, _ = make()
    list(engine.generate([5, 6, 7], greedy, 4))
    s = engine.stats
    assert (s.prompt_tokens, s.reused_tokens, s.new_tokens) == (3, 0, 4)
    assert 0 < s.prefill_seconds <= s.first_token_seconds
    assert s.prefill_rate > 0
    assert s.decode_rate > 0
    assert "tokens/s" in str(s)
    assert list(engine.generate([5], greedy, 0)) == []
    assert engine.stats.decode_rate == 0.0
