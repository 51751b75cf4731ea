"""runtime.sampling against straightforward definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from calls import count_calls

from runtime.errors import BackendError, OptionError
from runtime.sampling import Sampler, largest, min_p, penalize, softmax, top_k, top_p

RNG = np.random.default_rng(3)
CASES = [
    *(RNG.standard_normal(n).astype(np.float32) * 4 for n in (1, 2, 5, 40, 1000, 5000)),
    np.zeros(50, np.float32),
    RNG.integers(-2, 3, 400).astype(np.float32),
    np.where(RNG.random(100) < 0.5, -np.inf, RNG.standard_normal(100)).astype(np.float32),
]


def ranking(logits: Any) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


@pytest.mark.parametrize("logits", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("k", [1, 2, 7, 40, 10**6])
def test_top_k(logits: Any, k: int) -> None:
    k = min(k, len(logits))
    assert largest(logits, k).tolist() == ranking(logits)[:k]
    ids, kept = top_k(k)(np.arange(len(logits)), logits)
    assert ids.tolist() == ranking(logits)[:k]
    assert np.array_equal(kept, logits[ids])


@pytest.mark.parametrize("logits", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p(logits: Any, p: float) -> None:
    probs, total, want = softmax(logits), 0.0, []
    for i in ranking(logits):
        want.append(i)
        total += probs[i]
        if total >= p:
            break
    ids, kept = top_p(p)(np.arange(len(logits)), logits)
    assert ids.tolist() == want
    assert np.array_equal(kept, logits[ids])


@pytest.mark.parametrize("logits", CASES, ids=range(len(CASES)))
def test_min_p(logits: Any) -> None:
    probs = softmax(logits)
    ids, _ = min_p(0.05)(np.arange(len(logits)), logits)
    clear = np.abs(probs / probs.max() - 0.05) > 1e-4
    got = np.isin(np.arange(len(logits)), ids)
    assert np.array_equal(got[clear], (probs >= 0.05 * probs.max())[clear])


def test_penalty() -> None:
    logits = np.array([2.0, -2.0, 1.0, 3.0], np.float32)
    assert penalize(logits, [0, 1, 0], 2.0).tolist() == [1.0, -4.0, 1.0, 3.0]
    assert logits[0] == 2.0
    sampler = Sampler(temperature=0, repeat_penalty=4.0, repeat_window=2)
    assert sampler(logits, [3, 0, 1]) == 3  # 3 is out of the window
    assert sampler(logits, [0, 1, 3]) == 0
    assert Sampler(temperature=0, repeat_penalty=4.0, repeat_window=-1)(logits, [3, 1, 1]) == 0
    assert Sampler(temperature=0, repeat_penalty=4.0, repeat_window=0)(logits, [3, 1, 1]) == 3


def test_greedy_takes_the_lowest_index() -> None:
    assert Sampler(temperature=0)(np.array([0, 5, 1, 5], np.float32)) == 1


def test_seed() -> None:
    logits = RNG.standard_normal(200).astype(np.float32)
    runs = [[Sampler(seed=s)(logits) for _ in range(1)] for s in (1, 1)]
    assert runs[0] == runs[1]
    one, two, other = Sampler(seed=1), Sampler(seed=1), Sampler(seed=2)
    a, b, c = ([s(logits) for _ in range(50)] for s in (one, two, other))
    assert a == b
    assert a != c


def test_frequencies() -> None:
    """50,000 draws follow softmax(logits / T) within five standard deviations."""
    logits, n = np.array([0.0, 1.0, 2.0, -1.0], np.float32), 20_000
    sampler = Sampler(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, seed=5)
    counts = np.bincount([sampler(logits) for _ in range(n)], minlength=4)
    p = softmax(logits / np.float32(0.7))
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


def test_only_candidates_are_drawn() -> None:
    logits = np.arange(100, dtype=np.float32) / 10
    sampler = Sampler(temperature=5.0, top_k=3, top_p=1.0, min_p=0.0, seed=1)
    assert {sampler(logits) for _ in range(300)} == {97, 98, 99}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
        ({"min_p": 1.5}, "min-p"),
        ({"repeat_penalty": 0.0}, "repeat penalty"),
        ({"repeat_window": -2}, "repeat window"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sampler(**options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits(bad: float) -> None:
    logits = np.array([1.0, bad, 0.0], np.float32)
    for temperature in (0.0, 0.8):
        with pytest.raises(BackendError, match="not finite"):
            Sampler(temperature=temperature)(logits)
    with pytest.raises(BackendError, match="not finite"):
        Sampler()(np.full(4, -np.inf, np.float32))


def test_fast_enough() -> None:
    """No Python for each token of the vocabulary."""
    logits = RNG.standard_normal(150_000).astype(np.float32) * 3
    for options in ({}, {"top_k": 0}):
        sampler = Sampler(seed=1, **options)
        assert count_calls(lambda sampler=sampler: sampler(logits)) < 500, options
