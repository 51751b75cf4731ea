"""Calibration text: the user's files, or text that the model writes itself; as rows of tokens."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from dbf2gguf.kvcache import GrowingCache
from dbf2gguf.parallel import map_on_cores, stop_if_unwanted
from dbf2gguf.progress import Stage
from dbf2gguf.prompts import chat_questions, openings
from runtime.errors import FormatError
from runtime.tokenizer import END_TOKENS

CHAT_KEYS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
CONTEXT = 256  # tokens that the model writes before it starts over: bounds the KV cache
TEMPERATURE = 1.0
BATCH_TOKENS = 32768  # tokens of KV cache that one core fills at a time
GPU_BATCH_TOKENS = 16 * BATCH_TOKENS


def rows_from_files(files: Sequence[Path], tokenizer: Any, rows: int, row_tokens: int, seed: int) -> Tensor:
    """Rows of tokens drawn from text files, equally from each as far as it goes.

    files   .jsonl (one object a line: "text", "messages", or a question and its answer) or plain text
    ->      (<= rows, row_tokens) int64 in random order; fewer if the files hold less

    Raises FormatError for a file that cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for file in files:
        ids = torch.tensor(list(_file_tokens(file, tokenizer)), dtype=torch.int64)
        count = len(ids) // row_tokens
        cut = ids[: count * row_tokens].view(count, row_tokens)
        pools.append(cut[torch.randperm(count, generator=generator)])
    drawn: list[Tensor] = []
    left = rows
    for place, pool in enumerate(sorted(pools, key=len)):
        take = min(len(pool), left // (len(pools) - place))
        drawn.append(pool[:take])
        left -= take
    result = torch.cat([*drawn, torch.empty(0, row_tokens, dtype=torch.int64)])
    return result[torch.randperm(len(result), generator=generator)]


def _file_tokens(file: Path, tokenizer: Any) -> Iterator[int]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    documents: Iterable[str] = _jsonl_documents(file, text, tokenizer) if file.suffix == ".jsonl" else [text]
    for document in documents:
        yield from tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        yield from end


def _jsonl_documents(file: Path, text: str, tokenizer: Any) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{file}:{number}: not JSON: {error}") from None
        yield _document(entry, tokenizer, f"{file}:{number}")


def _document(entry: Any, tokenizer: Any, where: str) -> str:
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return str(entry["text"])
        if "messages" in entry:
            return _chat(entry["messages"], tokenizer, where)
        for ask, reply in CHAT_KEYS:
            if ask in entry and reply in entry:
                turns = (("user", entry[ask]), ("assistant", entry[reply]))
                messages = [{"role": role, "content": str(text).strip()} for role, text in turns]
                return _chat(messages, tokenizer, where)
    pairs = ", ".join(f"{ask!r} and {reply!r}" for ask, reply in CHAT_KEYS)
    raise FormatError(f"{where}: wanted an object with 'text', 'messages', or {pairs}")


def _chat(messages: Any, tokenizer: Any, where: str) -> str:
    """A conversation in the model's own form; turns with empty lines between them if it has none."""
    if not isinstance(messages, list) or not messages or not all(_is_turn(m) for m in messages):
        raise FormatError(f"{where}: 'messages': wanted a list of objects with 'role' and 'content'")
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: the model's chat template refuses it: {error}") from None


def _is_turn(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))


@torch.no_grad()
def self_written_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: int,
    row_tokens: int,
    chat_share: float,
    seed: int,
    stage: Stage,
) -> Tensor:
    """Text that the model writes at temperature 1 from many short prompts: openings of texts of many kinds,
    and chat questions, where the tokenizer has a chat template.

    chat_share  chat questions among the prompts, 0 to 1
    ->          (rows, row_tokens) int64

    `stage` gets one step for each token. When the model ends a text, the next prompt follows in its place.
    """
    pieces = row_tokens // CONTEXT if row_tokens % CONTEXT == 0 else 1
    on_gpu = next(model.parameters()).is_cuda
    batch = max(1, (GPU_BATCH_TOKENS if on_gpu else BATCH_TOKENS) // row_tokens)
    blocks = torch.arange(rows).tensor_split(-(-rows // batch))
    prompts, ends = _prompts(tokenizer), _end_ids(tokenizer)

    def write(block: Tensor) -> Tensor:
        """Rows whose numbers `block` holds; the first of them is the seed."""
        generator = torch.Generator().manual_seed(seed * rows + int(block[0]))
        shape = (len(block) * pieces, row_tokens // pieces)
        turns = _by_turns(prompts, chat_share, generator)
        return _sample_block(model, ends, turns, shape, generator, stage).view(-1, row_tokens)

    return torch.cat(list(map(write, blocks) if on_gpu else map_on_cores(write, blocks)))


def _sample_block(
    model: nn.Module,
    ends: set[int],
    prompts: Iterator[list[int]],
    shape: tuple[int, int],
    generator: torch.Generator,
    stage: Stage,
) -> Tensor:
    """`shape` = (rows, tokens) of text, its rows written side by side."""
    count, length = shape
    device = next(model.parameters()).device
    forced = [deque(next(prompts)) for _ in range(count)]
    out = torch.empty(count, length, dtype=torch.int64)
    cache = GrowingCache(length)
    ids = [queue.popleft() for queue in forced]
    for position in range(length):
        stop_if_unwanted()
        tokens = torch.tensor(ids)
        out[:, position] = tokens
        stage.step(n=count)
        if position + 1 == length:
            break
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(tokens[:, None].to(device), past_key_values=cache, use_cache=True).logits[:, -1]
        ids = _sample(logits.float() / TEMPERATURE, generator).tolist()
        for row, queue in enumerate(forced):
            if queue:
                ids[row] = queue.popleft()
            elif ids[row] in ends:
                queue.extend(next(prompts))
    return out


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row from softmax(logits), by inverting the cumulative sum: (rows,) int64 on the CPU."""
    reached = torch.softmax(logits, -1).cumsum(-1)
    wanted = torch.rand(len(logits), 1, generator=generator).to(logits.device) * reached[:, -1:]
    return torch.searchsorted(reached, wanted).clamp_(max=logits.shape[1] - 1)[:, 0].cpu()


def _prompts(tokenizer: Any) -> dict[str, list[list[int]]]:
    """Kind of prompt -> prompts as tokens. A kind that the tokenizer has no form for is left out."""
    kinds = {"opening": [tokenizer(text, add_special_tokens=True)["input_ids"] for text in openings()]}
    if tokenizer.chat_template:
        kinds["chat"] = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for text in chat_questions()
        ]
    return kinds


def _by_turns(
    prompts: dict[str, list[list[int]]], chat_share: float, generator: torch.Generator
) -> Iterator[list[int]]:
    """Prompts without end: chat questions spread evenly among openings, each kind in random order."""
    streams = {kind: _shuffled(some, generator) for kind, some in prompts.items()}
    if "chat" not in streams:
        chat_share = 0.0
    for turn in itertools.count():
        is_chat = int((turn + 1) * chat_share) > int(turn * chat_share)
        yield next(streams["chat" if is_chat else "opening"])


def _shuffled(items: list[list[int]], generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            yield items[index]


def _end_ids(tokenizer: Any) -> set[int]:
    """The tokens that end a text: EOS, and those of END_TOKENS that the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}
