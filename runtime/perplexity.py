"""Perplexity of a text: python -m runtime.perplexity OUT.gguf TEXT

Scored as llama-perplexity scores: the text is tokenised once and cut into chunks of --ctx tokens, each is
evaluated by itself, and only predictions from the middle of a chunk on count, so that every one of them
has half a chunk of context. `score` takes any function that computes logits, so that other models (the
converter's original, for one) are measured by this very code.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import runtime
from runtime import cli
from runtime.errors import BackendError, OptionError

CTX = 512


@dataclass(frozen=True)
class Score:
    """Perplexity and its standard error."""

    ppl: float
    error: float
    tokens: int  # predictions scored
    chunks: int
    ctx: int

    def __str__(self) -> str:
        return f"Final estimate: PPL = {self.ppl:.4f} ± {self.error:.5f}"


def chunks(
    ids: Sequence[int], ctx: int = CTX, n_chunks: int | None = None, bos_id: int | None = None
) -> list[list[int]]:
    """Cut a text's ids into consecutive chunks of ctx tokens; the rest at the end is dropped.

    n_chunks  how many; None: all
    bos_id    put in place of each chunk's first token, if the model wants a begin token

    Raises OptionError if there is not one whole chunk.
    """
    if ctx < 4:
        raise OptionError(f"perplexity: the context is {ctx}, wanted 4 or more")
    if n_chunks is not None and n_chunks < 1:
        raise OptionError(f"perplexity: {n_chunks} chunks, wanted 1 or more")
    n = len(ids) // ctx
    if n == 0:
        raise OptionError(
            f"perplexity: the text has {len(ids)} tokens, wanted {ctx} or more; try a smaller --ctx"
        )
    out = [list(ids[i * ctx : (i + 1) * ctx]) for i in range(n if n_chunks is None else min(n, n_chunks))]
    if bos_id is not None:
        for chunk in out:
            chunk[0] = bos_id
    return out


def token_nll(logits: NDArray[Any], targets: Sequence[int]) -> NDArray[np.float64]:
    """-log softmax(logits[i])[targets[i]]

    logits   (n, n_vocab)  any float dtype
    targets  (n,)
    ->       (n,)          float64
    """
    out = np.empty(len(targets), dtype=np.float64)
    for i, target in enumerate(targets):  # row by row: no second copy of all logits
        row = np.asarray(logits[i], dtype=np.float32)
        top = row.max()
        out[i] = np.log(np.exp(row - top).sum(dtype=np.float64)) - (float(row[target]) - float(top))
    return out


def score(
    logits: Callable[[list[int]], NDArray[Any]],
    pieces: Sequence[list[int]],
    progress: Callable[[int, float], None] | None = None,
) -> Score:
    """Perplexity of `chunks`.

    logits    ids -> (n, n_vocab): logits of a chunk's last n positions, n at least ctx - ctx/2 (so all
              of them, or only those that count)
    pieces    what `chunks` returned; all of one length
    progress  called after each chunk with its number, from 1, and the perplexity so far

    Raises BackendError if the logits have another shape or are not finite.
    """
    ctx = len(pieces[0])
    first = ctx // 2  # predictions of the tokens first+1 .. ctx-1 count
    total = squares = 0.0
    count = 0
    for number, ids in enumerate(pieces, 1):
        rows = logits(ids)
        if rows.ndim != 2 or not ctx - first <= rows.shape[0] <= ctx:
            raise BackendError(
                f"perplexity: logits of shape {rows.shape}, wanted ({ctx - first} to {ctx}, vocabulary)"
            )
        nll = token_nll(rows[rows.shape[0] - (ctx - first) : -1], ids[first + 1 :])
        if not np.isfinite(nll).all():
            raise BackendError(
                f"perplexity: chunk {number} has a probability of 0, or logits that are not finite"
            )
        total += float(nll.sum())
        squares += float((nll * nll).sum())
        count += nll.shape[0]
        if progress is not None:
            progress(number, _exp(total / count))
    mean = total / count
    variance = squares / count - mean * mean
    error = math.sqrt(variance / (count - 1)) * _exp(mean) if variance > 0 and count > 1 else 0.0
    return Score(_exp(mean), error, count, len(pieces), ctx)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser("python -m runtime.perplexity", "Perplexity of a text, as llama-perplexity computes it.")
    p.add_argument("model", metavar="OUT.gguf", help="a model that dbf2gguf made")
    p.add_argument("text", metavar="TEXT", help="a UTF-8 text file")
    p.add_argument("-c", "--ctx", type=int, default=CTX, metavar="N", help="tokens of a chunk")
    p.add_argument("--chunks", type=int, metavar="N", help="how many chunks to score (default: all)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the last line")
    cli.add_backend_options(p)
    return p


def perplexity(args: argparse.Namespace) -> int:
    with open(args.text, "rb") as f:
        text = f.read().decode("utf-8", "replace")
    with runtime.load(
        args.model,
        backend=args.backend,
        n_threads=args.threads,
        n_ctx=args.ctx,
        kv_type=args.kv_type,
        activations=args.activations,
    ) as model:
        tokenizer = model.tokenizer
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        pieces = chunks(tokenizer.encode(text), args.ctx, args.chunks, bos)
        start = time.perf_counter()
        n_last = args.ctx - args.ctx // 2
        result = score(lambda ids: model.logits(ids, n_last), pieces, _progress)
        seconds = time.perf_counter() - start
        print(file=sys.stderr)
        if args.json:
            rate = len(pieces) * args.ctx / seconds
            extra = {"seconds": seconds, "tokens_per_second": rate, "model": args.model, "text": args.text}
            extra |= {
                "backend": model.backend.name,
                "kv_type": args.kv_type,
                "activations": args.activations,
            }
            print(json.dumps({**asdict(result), **extra}))
        else:
            print(result)
    return 0


def _progress(number: int, ppl: float) -> None:
    print(f"[{number}]{ppl:.4f},", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(perplexity, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
