"""Perplexity of any model, by the code of `runtime.perplexity`, and how far it is from the original.

The original's predictions are computed once and kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dbf2gguf import calibrate
from dbf2gguf.progress import Stage
from runtime.errors import OptionError
from runtime.perplexity import Score, score

Logits = Callable[[list[int]], NDArray[Any]]
"""ids (ctx) -> logits of the last ctx - ctx // 2 positions, (positions, n_vocab) float32."""


def logits_of(model: nn.Module) -> Logits:
    """A transformers model as a function."""

    @torch.no_grad()
    def logits(ids: list[int]) -> NDArray[np.float32]:
        tokens = torch.tensor([ids], device=next(model.parameters()).device)
        hidden = calibrate.hidden_states(model, input_ids=tokens)[0, len(ids) // 2 :]
        found: NDArray[np.float32] = calibrate.logits(model, hidden).cpu().numpy()
        return found

    return logits


@dataclass(frozen=True)
class Divergence:
    """How far predictions are from the original's; KL(original || model) in nats a token."""

    kl_mean: float
    kl_error: float  # standard error of the mean
    kl_p99: float
    same_top1: float  # share of predictions with the same likeliest token


class Judge:
    """Scores models against one original on one text.

    original  computes the original's logits, each chunk's once
    pieces    what runtime.perplexity.chunks returned
    folder    where those logits are kept: 4 bytes for every scored position and token of the vocabulary
    """

    def __init__(
        self, original: Logits, pieces: Sequence[list[int]], folder: Path, quiet: bool = False
    ) -> None:
        self.pieces, self._quiet = pieces, quiet
        self._files: dict[tuple[int, ...], Path] = {}
        with Stage("original", len(pieces), quiet) as stage:
            for number, ids in enumerate(pieces):
                self._files[tuple(ids)] = folder / f"original-{number}.npy"
                np.save(self._files[tuple(ids)], original(ids))
                stage.step()

    def original(self, ids: list[int]) -> NDArray[np.float32]:
        """The original's logits of one of the pieces."""
        found: NDArray[np.float32] = np.load(self._files[tuple(ids)])
        return found

    def measure(self, name: str, logits: Logits) -> tuple[Score, Divergence]:
        """Score `logits`; `name` is shown meanwhile. Raises OptionError for another vocabulary, BackendError
        for logits that are no numbers."""
        found: list[tuple[Tensor, Tensor]] = []

        def compared(ids: list[int]) -> NDArray[Any]:
            rows = logits(ids)
            found.append(_compare(self.original(ids)[:-1], rows[:-1]))
            return rows

        with Stage(name, len(self.pieces), self._quiet) as stage:
            result = score(compared, self.pieces, lambda _n, ppl: stage.step(note=f"perplexity {ppl:.2f}"))
        kl, same = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return result, Divergence(
            kl_mean=float(kl.mean(dtype=np.float64)),
            kl_error=float(kl.std(dtype=np.float64) / max(len(kl) - 1, 1) ** 0.5),
            kl_p99=float(np.quantile(kl, 0.99)),
            same_top1=float(same.mean(dtype=np.float64)),
        )


def _compare(base: NDArray[Any], rows: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """KL(base || rows) and whether the likeliest tokens are the same, both (positions,)."""
    if base.shape != rows.shape:
        raise OptionError(f"logits of {rows.shape[1]} tokens; the original has {base.shape[1]}")
    expected, got = (torch.from_numpy(x).float().log_softmax(-1) for x in (base, rows))
    return (expected.exp() * (expected - got)).sum(-1), expected.argmax(-1) == got.argmax(-1)
