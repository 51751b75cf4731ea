"""Perplexity of a text: python -m runtime.perplexity OUT.gguf TEXT

Scored as llama-perplexity scores: the text is tokenised once and cut into chunks of --ctx tokens, each is
evaluated by itself, and only predictions from the middle of a chunk on count, so that every one of them
has half a chunk of context. `score` takes any function that computes logits, so that other models (the
converter's original, for one) are measured by this very code. With --kl-base, the same predictions are
compared with those of another file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
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


@dataclass(frozen=True)
class Divergence:
    """How far predictions are from a base model's, over the predictions that `score` counts."""

    base_ppl: float
    kl_mean: float  # of KL(base || model), nats a token
    kl_error: float  # standard error of the mean
    kl_p99: float
    same_top1: float  # share of predictions with the same most likely token

    def __str__(self) -> str:
        return (
            f"Base PPL = {self.base_ppl:.4f}\n"
            f"Mean KLD = {self.kl_mean:.6f} ± {self.kl_error:.6f}, 99% KLD = {self.kl_p99:.6f}\n"
            f"Same top token = {self.same_top1:.3%}"
        )


def token_kl(base: NDArray[Any], logits: NDArray[Any]) -> NDArray[np.float64]:
    """KL(softmax(base[i]) || softmax(logits[i])), nats

    base, logits  (n, n_vocab)  any float dtype
    ->            (n,)          float64
    """
    out = np.empty(len(base), dtype=np.float64)
    for i in range(len(base)):
        log_p, log_q = (_log_softmax(rows[i]) for rows in (base, logits))
        out[i] = np.exp(log_p) @ (log_p - log_q)
    return out


def _log_softmax(row: NDArray[Any]) -> NDArray[np.float64]:
    x = np.asarray(row, dtype=np.float64)
    x = x - x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


class Comparison:
    """A model's logits, compared with a base model's on the way: called as the `logits` of `score`."""

    def __init__(
        self, logits: Callable[[list[int]], NDArray[Any]], base: Callable[[list[int]], NDArray[Any]]
    ):
        self._logits, self._base = logits, base
        self._kl: list[NDArray[np.float64]] = []
        self._base_nll: list[NDArray[np.float64]] = []
        self._same: list[NDArray[np.bool_]] = []

    def __call__(self, ids: list[int]) -> NDArray[Any]:
        counted = len(ids) - len(ids) // 2
        rows = self._logits(ids)
        got, base = rows[-counted:-1], self._base(ids)[-counted:-1]
        if got.shape != base.shape:
            raise OptionError(
                f"perplexity: logits of {got.shape[1:]} and, of the base, {base.shape[1:]} tokens: these are "
                "not models of one vocabulary"
            )
        self._kl.append(token_kl(base, got))
        self._base_nll.append(token_nll(base, ids[-counted + 1 :]))
        self._same.append(base.argmax(1) == got.argmax(1))
        return rows

    def result(self) -> Divergence:
        """Over all calls so far."""
        kl = np.concatenate(self._kl)
        return Divergence(
            base_ppl=_exp(np.concatenate(self._base_nll).mean()),
            kl_mean=float(kl.mean()),
            kl_error=float(kl.std() / math.sqrt(len(kl) - 1)) if len(kl) > 1 else 0.0,
            kl_p99=float(np.quantile(kl, 0.99)),
            same_top1=float(np.concatenate(self._same).mean()),
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser("python -m runtime.perplexity", "Perplexity of a text, as llama-perplexity computes it.")
    p.add_argument("model", metavar="OUT.gguf", help="a model that dbf2gguf made")
    p.add_argument("text", metavar="TEXT", help="a UTF-8 text file")
    p.add_argument("-c", "--ctx", type=int, default=CTX, metavar="N", help="tokens of a chunk")
    p.add_argument("--chunks", type=int, metavar="N", help="how many chunks to score (default: all)")
    p.add_argument(
        "--kl-base",
        metavar="BASE.gguf",
        help="compare every prediction with this file's, run with int16 activations and a float16 KV cache; "
        "OUT.gguf itself shows what --activations or --kv-type cost",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    cli.add_backend_options(p)
    return p


def perplexity(args: argparse.Namespace) -> int:
    with open(args.text, "rb") as f:
        text = f.read().decode("utf-8", "replace")
    with ExitStack() as stack:
        model = stack.enter_context(runtime.load(args.model, n_ctx=args.ctx, **cli.load_options(args)))
        ids = model.tokenizer.encode(text)
        bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
        pieces = chunks(ids, args.ctx, args.chunks, bos)
        n_last = args.ctx - args.ctx // 2
        logits: Callable[[list[int]], NDArray[Any]] = partial(model.logits, n_last=n_last)
        if args.kl_base:
            base = stack.enter_context(
                runtime.load(args.kl_base, backend=args.backend, n_threads=args.threads, n_ctx=args.ctx)
            )
            if base.tokenizer.encode(text) != ids:
                raise OptionError(f"{args.kl_base}: its tokens of {args.text} are not those of {args.model}")
            logits = Comparison(logits, partial(base.logits, n_last=n_last))
        start = time.perf_counter()
        result = score(logits, pieces, _progress)
        seconds = time.perf_counter() - start
        print(file=sys.stderr)
        divergence = logits.result() if isinstance(logits, Comparison) else None
        if args.json:
            rate = len(pieces) * args.ctx / seconds
            extra = {"seconds": seconds, "tokens_per_second": rate, "model": args.model, "text": args.text}
            extra |= {
                "backend": model.backend.name,
                "kv_type": args.kv_type,
                "activations": args.activations,
            }
            compared = {"kl_base": args.kl_base, **asdict(divergence)} if divergence else {}
            print(json.dumps({**asdict(result), **compared, **extra}))
        else:
            if divergence:
                print(divergence)
            print(result)
    return 0


def _progress(number: int, ppl: float) -> None:
    print(f"[{number}]{ppl:.4f},", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(perplexity, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
