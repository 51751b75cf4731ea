"""How far the factorized model is from the original, on text that no other stage saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dbf2gguf.activations import rows_together
from dbf2gguf.archs import context_length
from dbf2gguf.calibrate import head_tokens, hidden_states, logits
from dbf2gguf.progress import Stage
from dbf2gguf.text import adds_begin
from runtime.errors import ContextError
from runtime.tokenizer import Tokenizer
from runtime.zeroshot import Choice

BATCH_ROWS = 8  # that pass together, at most


@dataclass(frozen=True)
class Quality:
    """Scores over the second half of every row, as llama-perplexity counts; KL in nats a token."""

    tokens: int
    ppl: float
    ppl_reference: float
    kl_mean: float
    kl_p99: float
    same_top1: float  # share of positions where both models' likeliest token is the same

    def describe(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure(reference: nn.Module, model: nn.Module, rows: Tensor, stage: Stage) -> Quality:
    """Score `model` against `reference` on rows (n, tokens) int64. `stage` gets one step for each row.

    KL is KL(reference || model) of the next-token distributions.
    """
    device = next(reference.parameters()).device
    losses, reference_losses, divergences, agreements = [], [], [], []
    half, size = rows.shape[1] // 2, head_tokens(reference.config.vocab_size)
    together = rows_together(reference.config, rows.shape[1], BATCH_ROWS)
    for chunk in rows.split(together):  # every pass reads all weights
        tokens = chunk.to(device)
        both = (hidden_states(m, input_ids=tokens)[:, half:-1] for m in (reference, model))
        for row in zip(*both, tokens[:, half + 1 :, None], strict=True):
            for wanted_hidden, hidden, target in zip(*(part.split(size) for part in row), strict=True):
                expected = torch.log_softmax(logits(reference, wanted_hidden), -1)
                got = torch.log_softmax(logits(model, hidden), -1)
                losses.append(-got.gather(1, target)[:, 0].cpu())
                reference_losses.append(-expected.gather(1, target)[:, 0].cpu())
                agreements.append((expected.argmax(-1) == got.argmax(-1)).float().cpu())
                torch.sub(expected, got, out=got)  # in place: vocabularies may be large
                divergences.append(got.mul_(expected.exp_()).sum(-1).cpu())
            stage.step()
    divergence = torch.cat(divergences)
    return Quality(
        tokens=len(divergence),
        ppl=float(torch.cat(losses).mean().exp()),
        ppl_reference=float(torch.cat(reference_losses).mean().exp()),
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.quantile(divergence.numpy(), 0.99)),
        same_top1=float(torch.cat(agreements).mean()),
    )


class TorchScorer:
    """A model of transformers as a Scorer of `runtime.zeroshot`: the choices of a question are one batch."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._n_ctx = context_length(model.config)

    @torch.no_grad()
    def __call__(self, choices: Sequence[Choice]) -> list[float]:
        inputs = [tuple(ids[:-1]) for ids, _ in choices]
        batch = {tokens: place for place, tokens in enumerate(dict.fromkeys(inputs))}  # "A" or "B": one row
        longest = max(map(len, batch))
        if longest > self._n_ctx:
            raise ContextError(
                f"a choice has {longest} tokens with its context, the model takes {self._n_ctx}"
            )
        tokens = torch.tensor(
            [[*row, *[0] * (longest - len(row))] for row in batch]
        )  # no token sees the filler
        hidden = hidden_states(self._model, input_ids=tokens.to(next(self._model.parameters()).device))
        out = []
        for row, (ids, n) in zip(inputs, choices, strict=True):
            scores = logits(self._model, hidden[batch[row], n - 1 : len(row)])
            target = torch.tensor(ids[n:], device=scores.device)[:, None]
            out.append(float(torch.log_softmax(scores, -1).gather(1, target).double().sum()))
        return out


def plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer of transformers as the runtime's, which puts the same begin token before a text and takes
    a control token's name in it for plain text."""
    return Tokenizer(
        tokenizer.backend_tokenizer.to_str(),
        bos_id=tokenizer.bos_token_id,
        add_bos=adds_begin(tokenizer),
    )
