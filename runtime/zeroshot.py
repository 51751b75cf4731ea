"""Zero-shot accuracy on multiple-choice tasks: python -m runtime.zeroshot OUT.gguf TASK.jsonl...

A task is a file of JSON lines as mosaicml/llm-foundry packs them, one question a line: a "query" with its
"choices", or "context_options" with the one "continuation" of them all, and "gold", the number of the right
one from 0. The latter is Winogrande's partial evaluation: the contexts differ, what is scored does not.

The model never sees the question as one: each choice is put behind its context, and its log-likelihood there
is its score. `acc` counts the questions whose likeliest choice is the right one, `acc_norm` those where it is
after division by the number of the choice's characters, as lm-evaluation-harness defines the two; texts are
joined and cut into tokens as there, too. Standard errors are those of a mean of zeros and ones.

`score` takes any function that computes log-likelihoods, so that other models (the converter's original,
for one) are scored by this very code.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from runtime import cli
from runtime.bench.decode import progress
from runtime.bench.report import FORMATS, Row, Table
from runtime.engine import Engine, common_prefix
from runtime.errors import BackendError, ContextError, FormatError, OptionError
from runtime.perplexity import token_nll
from runtime.tokenizer import Tokenizer

DELIMITER = " "
DELIMITERS = dict.fromkeys(("piqa", "arc_easy", "arc_challenge"), "\nAnswer: ")
"""What llm-foundry puts between query and choice, by the task file's name, where it is not DELIMITER."""

Choice = tuple[list[int], int]
"""Token ids of a context with a choice behind it, and how many of them, one or more, are the context's."""

Scorer = Callable[[Sequence[Choice]], Sequence[float]]
"""The choices of one question -> the log-likelihood of each one's ids[n:] after its ids[:n], in nats."""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: `continuations[i]` behind `contexts[i]` is choice i."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    characters: tuple[int, ...]  # of each choice, without what joins it to its context
    gold: int
    where: str  # file:line


@dataclass(frozen=True)
class Score:
    """Shares of questions answered right, and their standard errors."""

    questions: int
    acc: float
    acc_error: float
    acc_norm: float
    acc_norm_error: float


# ---- Task files --------------------------------------------------------------------------------------------


def read_task(path: str | Path, delimiter: str | None = None, limit: int | None = None) -> list[Question]:
    """The questions of a task file.

    delimiter  put between a query, or a context, and a choice; None: the one that llm-foundry has for a file
               of this name
    limit      only the first so many questions; None: all

    Raises FormatError with file:line for what is no question, OptionError if limit is below 1.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise OptionError(f"--limit is {limit}, wanted 1 or more")
    delimiter = delimiter_of(path, delimiter)
    questions: list[Question] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(questions) == limit:
                break
            if line.strip():
                questions.append(_question(line, delimiter, f"{path}:{number}"))
    if not questions:
        raise FormatError(f"{path}: no question in it; wanted one JSON object a line")
    return questions


def delimiter_of(path: Path, chosen: str | None) -> str:
    """The chosen delimiter, or the one that llm-foundry has for a file of this name."""
    return DELIMITERS.get(path.stem, DELIMITER) if chosen is None else chosen


def _question(line: bytes, delimiter: str, where: str) -> Question:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{where}: not JSON: {e}") from None
    keys = set(entry) if isinstance(entry, dict) else set()
    if {"query", "choices", "gold"} <= keys:
        choices = _texts(entry["choices"], "choices", where)
        contexts = [_text(entry["query"], "query", where)] * len(choices)
    elif {"context_options", "continuation", "gold"} <= keys:
        contexts = _texts(entry["context_options"], "context_options", where)
        choices = [_text(entry["continuation"], "continuation", where)] * len(contexts)
    else:
        got = ", ".join(sorted(map(repr, keys))) or type(entry).__name__
        raise FormatError(
            f"{where}: wanted an object with 'query', 'choices' and 'gold', or with 'context_options', "
            f"'continuation' and 'gold'; got {got}"
        )
    gold = entry["gold"]
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise FormatError(f"{where}: 'gold' is {gold!r:.40}; wanted 0 to {len(choices) - 1}")
    # White space before a choice belongs to its tokens, not to the context's.
    joined = [context + delimiter for context in contexts]
    bare = [text.rstrip() for text in joined]
    behind = [text[len(b) :] + choice for text, b, choice in zip(joined, bare, choices, strict=True)]
    return Question(tuple(bare), tuple(behind), tuple(map(len, choices)), gold, where)


def _texts(value: Any, key: str, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise FormatError(f"{where}: {key!r} is {value!r:.40}; wanted a list of two texts or more")
    return [_text(text, key, where) for text in value]


def _text(value: Any, key: str, where: str) -> str:
    """The text without the white space around it, as llm-foundry takes it."""
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{where}: {key!r} holds {value!r:.40}; wanted text that is not empty")
    return value.strip()


# ---- Scores ------------------------------------------------------------------------------------------------


def encode_choice(tokenizer: Tokenizer, context: str, continuation: str, where: str) -> Choice:
    """The ids of both texts in one piece, after the begin token if the model wants one; the context has as
    many of them as it has alone.

    Raises FormatError if no token is left for the continuation.
    """
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    n = len(tokenizer.encode(context, add_special=False))
    ids = tokenizer.encode(context + continuation, add_special=False)
    if not 0 < n < len(ids):
        raise FormatError(
            f"{where}: the tokenizer makes {len(ids)} tokens of a choice with its context and {n} of the "
            "context alone; wanted one or more for each"
        )
    return [*begin, *ids], len(begin) + n


def score(
    scorer: Scorer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    note: Callable[[int, float], None] | None = None,
) -> Score:
    """Ask all questions.

    note  called after each with its number, from 1, and acc so far

    Raises FormatError, or ContextError for a question that is too long, with file:line; BackendError if a
    log-likelihood is not finite.
    """
    right = np.zeros((len(questions), 2))
    for i, q in enumerate(questions):
        pairs = zip(q.contexts, q.continuations, strict=True)
        choices = [encode_choice(tokenizer, context, text, q.where) for context, text in pairs]
        try:
            likelihood = np.asarray(scorer(choices), dtype=np.float64)
        except ContextError as e:
            raise ContextError(f"{q.where}: {e}") from None
        if likelihood.shape != (len(choices),) or not np.isfinite(likelihood).all():
            raise BackendError(f"{q.where}: log-likelihoods {likelihood}, wanted {len(choices)} finite ones")
        right[i] = [x.argmax() == q.gold for x in (likelihood, likelihood / q.characters)]
        if note is not None:
            note(i + 1, float(right[: i + 1, 0].mean()))
    acc, acc_norm = map(float, right.mean(0))
    return Score(len(questions), acc, _error(acc, len(questions)), acc_norm, _error(acc_norm, len(questions)))


def _error(share: float, n: int) -> float:
    """Standard error of the mean of n zeros and ones."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0


class EngineScorer:
    """The runtime as a Scorer. What the choices of a question share is evaluated once; so is what the first
    of them shares with the question before."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, choices: Sequence[Choice]) -> list[float]:
        inputs = [ids[:-1] for ids, _ in choices]  # nobody asks what follows the last token
        shared = min(common_prefix(inputs[0], tokens) for tokens in inputs)
        first = min(n for _, n in choices) - 1  # the first position whose logits are wanted
        head = self._logits(inputs[0][:shared], max(0, shared - first))
        out = []
        for (ids, n), tokens in zip(choices, inputs, strict=True):
            split = max(shared, n - 1)
            nll = token_nll(head[n - 1 - first :], ids[n : split + 1]).sum()
            nll += token_nll(self._logits(tokens, len(tokens) - split), ids[split + 1 :]).sum()
            out.append(-float(nll))
        return out

    def _logits(self, ids: list[int], n_last: int) -> Any:
        if n_last == 0:
            return np.empty((0, self._engine.n_vocab), np.float32)
        return self._engine.logits(ids, n_last, reuse=True)


# ---- The program -------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: Path(r["model"]).name,
    "task": lambda r: r["task"],
    "questions:": lambda r: str(r["questions"]),
    "acc:": lambda r: f"{r['acc']:.2%} ± {r['acc_error']:.2%}",
    "acc_norm:": lambda r: f"{r['acc_norm']:.2%} ± {r['acc_norm_error']:.2%}",
    "questions/s:": lambda r: f"{r['questions_per_second']:.2f}",
}


def add_task_options(p: argparse.ArgumentParser) -> None:
    """What every program that scores tasks takes: the files, --limit, --delimiter, -o."""
    p.add_argument("tasks", metavar="TASK.jsonl", nargs="+", help="questions, packed as llm-foundry's")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    p.add_argument(
        "--delimiter",
        metavar="TEXT",
        help="text between question and choice (default: what llm-foundry has for a file of that name: a "
        f"line break and 'Answer: ' for {', '.join(DELIMITERS)}, a space for others)",
    )
    p.add_argument("-o", "--output", choices=FORMATS, default="md", help="form of the table")


def read_tasks(args: argparse.Namespace) -> dict[str, list[Question]]:
    """path -> questions of all files that `add_task_options` took: before any model is loaded."""
    return {path: read_task(path, args.delimiter, args.limit) for path in args.tasks}


def print_scores(
    args: argparse.Namespace,
    tasks: Mapping[str, list[Question]],
    scorer: Scorer,
    tokenizer: Tokenizer,
    about: Mapping[str, Any],
) -> None:
    """Score all tasks and print a row for each on stdout.

    about  what to say of the model beside its name, in CSV and JSON
    """
    table = Table(sys.stdout, args.output, COLUMNS)
    for path, questions in tasks.items():
        name, total = Path(path).stem, len(questions)
        start = time.perf_counter()

        def note(number: int, acc: float, name: str = name, total: int = total, start: float = start) -> None:
            rate = number / (time.perf_counter() - start)
            progress(f"{name}: {number}/{total}, acc {acc:.1%}, {(total - number) / rate:.0f} s left")

        try:
            result = score(scorer, tokenizer, questions, note)
        finally:
            progress("")  # the table's line, or an error's, begins at the margin
        seconds = time.perf_counter() - start
        table.add(
            {
                "model": args.model,
                "task": name,
                "file": path,
                "delimiter": delimiter_of(Path(path), args.delimiter),
                **asdict(result),
                "seconds": seconds,
                "questions_per_second": total / seconds,
                **about,
            }
        )
    table.close()


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "python -m runtime.zeroshot",
        "Accuracy on multiple-choice tasks: which choice is likeliest, in all (acc) and for a character "
        "(acc_norm, as lm-evaluation-harness has it).",
    )
    p.add_argument("model", metavar="OUT.gguf", help="a model that dbf2gguf made")
    add_task_options(p)
    p.add_argument(
        "-c", "--ctx", type=int, metavar="N", help="tokens that a question may have (default: the model's)"
    )
    cli.add_backend_options(p)
    return p


def zeroshot(args: argparse.Namespace) -> int:
    tasks = read_tasks(args)
    with runtime.load(args.model, n_ctx=args.ctx, **cli.load_options(args)) as model:
        about = {
            "backend": model.backend.name,
            "n_threads": model.backend.n_threads,
            "kv_type": args.kv_type,
            "activations": args.activations,
        }
        print_scores(args, tasks, EngineScorer(model.engine), model.tokenizer, about)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(zeroshot, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
