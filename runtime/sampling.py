"""From logits to a token: repeat penalty, top-k, top-p, min-p, temperature, in llama.cpp's order.

A sampler is composed of steps; each takes candidates (ids, logits) and returns fewer or changed ones.
Defaults are llama.cpp's, but for the repeat window's penalty, which both leave off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendError, OptionError

TEMPERATURE, TOP_K, TOP_P, MIN_P, REPEAT_PENALTY, REPEAT_WINDOW = 0.8, 40, 0.95, 0.05, 1.0, 64

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Step = Callable[[Ids, Floats], tuple[Ids, Floats]]


def penalize(logits: Floats, history: Sequence[int], penalty: float) -> Floats:
    """Make tokens of `history` less likely: positive logits / penalty, negative ones * penalty.

    logits  (n_vocab,)  float32; not changed
    Source: CTRL, arXiv:1909.05858, as in llama.cpp.
    """
    seen = np.unique(np.asarray(history, dtype=np.int64))
    out = logits.copy()
    out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    return out


def largest(logits: Floats, k: int) -> Ids:
    """Indices of the k largest logits, largest first; ties by lower index. Partitions, then sorts k."""
    n = logits.shape[0]
    if k < n:
        least = np.partition(logits, n - k)[n - k]
        above = np.flatnonzero(logits > least)
        ids = np.concatenate([above, np.flatnonzero(logits == least)[: k - above.shape[0]]])
    else:
        ids = np.arange(n)
    return ids[np.lexsort((ids, -logits[ids]))]


def softmax(logits: Floats) -> NDArray[np.float64]:
    """exp(logits) / sum, in float64."""
    e = np.exp(logits.astype(np.float64) - np.max(logits))
    return np.asarray(e / e.sum())


def top_k(k: int) -> Step:
    """Keep the k likeliest candidates."""

    def step(ids: Ids, logits: Floats) -> tuple[Ids, Floats]:
        keep = largest(logits, min(k, logits.shape[0]))
        return ids[keep], logits[keep]

    return step


def top_p(p: float) -> Step:
    """Keep the fewest likeliest candidates whose probabilities sum to p or more (arXiv:1904.09751)."""

    def step(ids: Ids, logits: Floats) -> tuple[Ids, Floats]:
        probs = softmax(logits)
        n, k = logits.shape[0], min(256, logits.shape[0])
        while True:  # sort as few as possible: the nucleus is mostly small
            order = largest(logits, k)
            total = np.cumsum(probs[order])
            if total[-1] >= p or k == n:
                break
            k = min(8 * k, n)
        keep = order[: int(np.searchsorted(total, p)) + 1]
        return ids[keep], logits[keep]

    return step


def min_p(p: float) -> Step:
    """Keep candidates at least p times as likely as the likeliest (arXiv:2407.01082)."""

    def step(ids: Ids, logits: Floats) -> tuple[Ids, Floats]:
        keep = logits >= np.max(logits) + np.log(p)
        return ids[keep], logits[keep]

    return step


@dataclass
class Sampler:
    """Chooses tokens; call it with logits and the tokens so far.

    temperature     0 chooses the likeliest token, the lowest id on ties; nothing else matters then
                    but the repeat penalty
    top_k           0 keeps all
    top_p           1 keeps all
    min_p           0 keeps all
    repeat_penalty  1 is none
    repeat_window   how many of the last tokens it looks at; 0 none, -1 all
    seed            None draws one from the system

    Raises OptionError for values out of range.
    """

    temperature: float = TEMPERATURE
    top_k: int = TOP_K
    top_p: float = TOP_P
    min_p: float = MIN_P
    repeat_penalty: float = REPEAT_PENALTY
    repeat_window: int = REPEAT_WINDOW
    seed: int | None = None
    _rng: np.random.Generator = field(init=False, repr=False, compare=False)
    _steps: tuple[Step, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0.0 <= self.temperature < np.inf, ">= 0"),
            ("top-k", self.top_k, self.top_k >= 0, ">= 0"),
            ("top-p", self.top_p, 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("min-p", self.min_p, 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("repeat penalty", self.repeat_penalty, 0.0 < self.repeat_penalty < np.inf, "> 0"),
            ("repeat window", self.repeat_window, self.repeat_window >= -1, ">= -1"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, ">= 0"),
        )
        for name, value, good, wanted in checks:
            if not good:
                raise OptionError(f"{name} is {value}, wanted {wanted}")
        steps = []
        if self.top_k > 0:
            steps.append(top_k(self.top_k))
        if self.top_p < 1.0:
            steps.append(top_p(self.top_p))
        if self.min_p > 0.0:
            steps.append(min_p(self.min_p))
        self._steps = tuple(steps)
        self._rng = np.random.default_rng(self.seed)

    def __call__(self, logits: Floats, history: Sequence[int] = ()) -> int:
        """Choose a token.

        logits   (n_vocab,)  float32
        history  the tokens so far, for the repeat penalty

        Raises BackendError if the logits hold NaN or no finite maximum.
        """
        if self.repeat_penalty != 1.0 and self.repeat_window != 0 and len(history) > 0:
            recent = history if self.repeat_window < 0 else history[-self.repeat_window :]
            logits = penalize(logits, recent, self.repeat_penalty)
        best = int(np.argmax(logits))  # the first NaN, if there is one; else the lowest index on ties
        if not np.isfinite(logits[best]):
            raise BackendError(f"the model's logits are not finite (token {best}: {logits[best]})")
        if self.temperature == 0.0:
            return best
        ids: Ids = np.arange(logits.shape[0])
        for step in self._steps:
            ids, logits = step(ids, logits)
        total = np.cumsum(softmax(logits.astype(np.float64) / self.temperature))  # type: ignore[arg-type]
        chosen = int(np.searchsorted(total, self._rng.random() * total[-1], side="right"))
        return int(ids[min(chosen, ids.shape[0] - 1)])
