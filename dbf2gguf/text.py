"""Calibration text: the user's files, or text that the model writes itself; as rows of tokens."""

from __future__ import annotations

import copy
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from dbf2gguf.archs import ARCHS, features, head_dim
from dbf2gguf.attention import CAUSAL, suits
from dbf2gguf.graphs import Recorder, can_compile, compiled
from dbf2gguf.kvcache import GrowingCache, cache_argument
from dbf2gguf.parallel import map_on_cores, stop_if_unwanted
from dbf2gguf.progress import Stage
from dbf2gguf.prompts import chat_questions, foreign_openings, openings
from dbf2gguf.source import decoder_layers
from dbf2gguf.tables import entries, is_read_whole, is_table, plain_texts
from dbf2gguf.team import ALONE, Team
from runtime.errors import FormatError
from runtime.perplexity import chunks
from runtime.tokenizer import END_TOKENS

CHAT_KEYS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
COLUMNS = {"text", "messages", "instances", "input", *itertools.chain.from_iterable(CHAT_KEYS)}
"""What an entry of calibration text may hold."""

PIECE = 2**16  # characters of a text that are tokenized as one
TOGETHER = 2**18  # characters that are tokenized at a time
AROUND = 256  # characters on both sides of a cut that must have the same tokens without it
WORD_END = re.compile(r"(?<=\S)\s")  # where it may be cut
WAYS = ((0, 0), (0, 1), (1, 0))  # characters, and then tokens, of which the next piece is rid
TRIES = 64  # places that are tried, before it is tried a PIECE further

TODAY = date(2024, 7, 26)  # in chat templates, so that text does not change from day to day
FORMATS = {f"%{letter}": TODAY.strftime(f"%{letter}") for letter in "aAbBcdHIjmMpSUwWxXyY"} | {
    "%-d": f"{TODAY.day}",
    "%-m": f"{TODAY.month}",
    "%e": f"{TODAY.day:2}",
    "%F": f"{TODAY}",
}

CONTEXT = 256  # tokens that the model writes before it starts over: bounds the KV cache
MAX_PROMPT = 96  # tokens of a prompt that are taken, at least
MOST_PROMPT = 0.75  # share of a text that a chat prompt may take, if it is longer
SPAN = (8, 33)  # tokens of a prompt that is cut from a given text: at least, and less than
TURNS = {"opening": 1, "given": 2}  # how often each kind of prompt but chat comes
POOL = 8  # prompts drawn for each text of a block; further ones are these again
BATCH_TOKENS = 32768  # tokens of KV cache that one core fills at a time
GPU_BATCH_TOKENS = 32 * BATCH_TOKENS
WARM_UP_STEPS = 2  # on a GPU: tokens that are written before steps are recorded
COMPILED_STEPS = 4096  # so many pay for compiling


def rows_from_files(files: Sequence[Path], tokenizer: Any, rows: int, row_tokens: int, seed: int) -> Tensor:
    """Rows of tokens drawn from text files, equally from each as far as it goes.

    files   .jsonl (one object a line: "text", "messages", or a question and its answer), .json (an array of
            such objects), .parquet (columns of these names), hf:owner/name (see tables) or plain text
    ->      (<= rows, row_tokens) int64 in random order; fewer if the files hold less

    Plain text and .jsonl up to 16 MiB are tokenized to the end, and rows drawn from all of it. Of what is
    larger, and of other tables, no more is read than `rows` take: parts of 16 KiB from all over the file, row
    groups, entries, in an order that the seed gives; each part of a text is a document of its own.

    Raises FormatError for a file that cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for file in files:
        most = sys.maxsize if is_read_whole(file) else rows * row_tokens
        ids = torch.from_numpy(np.fromiter(_file_tokens(file, tokenizer, seed, most), np.int64))
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


def first_rows(file: Path, tokenizer: Any, rows: int, row_tokens: int, seed: int) -> Tensor:
    """The start of a text, cut as runtime.perplexity cuts it: one row after the other. If the model wants a
    begin token, it stands before the text, and in place of the first token of every other row.
    -> (<= rows, row_tokens) int64

    Raises FormatError for a file that cannot be read.
    """
    begin = tokenizer.bos_token_id if adds_begin(tokenizer) else None
    own = _file_tokens(file, tokenizer, seed, rows * row_tokens, spread=False)
    tokens = itertools.chain([] if begin is None else [begin], own)
    ids = list(itertools.islice(tokens, rows * row_tokens))
    if len(ids) < row_tokens:
        return torch.empty(0, row_tokens, dtype=torch.int64)
    return torch.tensor(chunks(ids, row_tokens, rows, begin), dtype=torch.int64)


def adds_begin(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers puts the begin token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _file_tokens(
    file: Path, tokenizer: Any, seed: int, most: int = sys.maxsize, spread: bool = True
) -> Iterator[int]:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return _tokens(_documents(file, tokenizer, seed, spread), end, tokenizer, most)


def _tokens(texts: Iterable[str], end: list[int], tokenizer: Any, most: int = sys.maxsize) -> Iterator[int]:
    """The tokens of texts, `end` after each, up to `most`. Pieces of many texts are tokenized together, which
    a tokenizer does side by side if it can; no more texts are taken than `most` tokens, of a character at
    least, may want."""

    def encode(some: list[str]) -> list[list[int]]:
        found = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    pieces = itertools.chain.from_iterable(_pieces(text, encode) for text in texts)
    while most > 0 and (some := _together(pieces, min(TOGETHER, most))):
        for piece, ids in zip(some, encode([piece.text for piece in some]), strict=True):
            own = ids[piece.extra :] + (end if piece.last else [])
            yield from own[:most]
            most = max(most - len(own), 0)


class _Piece(NamedTuple):
    """A part of a text, which has the tokens that it has there but for some too many."""

    text: str
    extra: int  # tokens too many at its start
    last: bool  # whether the text ends with it


def _together(pieces: Iterator[_Piece], characters: int) -> list[_Piece]:
    """The next pieces, until they hold so many characters, each one's end among them."""
    some: list[_Piece] = []
    while characters > 0 and (piece := next(pieces, None)):
        some.append(piece)
        characters -= len(piece.text) + 1
    return some


def _pieces(text: str, encode: Callable[[list[str]], list[list[int]]]) -> Iterator[_Piece]:
    """A text piece by piece, for a tokenizer takes hundreds of bytes a token. It is cut where that changes
    none."""
    begin = extra = 0
    for end, following, following_extra in _cuts(text, encode):
        yield _Piece(text[begin:end], extra, last=False)
        begin, extra = following, following_extra
    yield _Piece(text[begin:], extra, last=True)


def _cuts(text: str, encode: Callable[[list[str]], list[list[int]]]) -> Iterator[tuple[int, int, int]]:
    """Places where a text can be cut: the end of a piece, the start of the next, and how many tokens too many
    that begins with. A tokenizer may put a space before each text: then the next piece leaves out its own, or
    begins with a token too many."""
    start = PIECE
    while start < len(text):
        for found in itertools.islice(WORD_END.finditer(text, start, start + PIECE), TRIES):
            place = found.start()
            before, after = text[max(place - AROUND, 0) : place], text[place : place + AROUND]
            starts = [after[skip:] for skip, _ in WAYS]
            whole, first, *others = encode([before + after, before, *starts])
            tried = zip(WAYS, others, strict=True)
            if way := next((way for way, ids in tried if first + ids[way[1] :] == whole), None):
                yield place, place + way[0], way[1]
                start = place
                break
        start += PIECE


def _documents(file: Path, tokenizer: Any, seed: int, spread: bool = True) -> Iterator[str]:
    """See tables.entries and tables.plain_texts."""
    if not is_table(file):
        return plain_texts(file, seed, spread)
    return (_document(row, tokenizer, where) for where, row in entries(file, COLUMNS, seed, spread))


def _document(entry: Any, tokenizer: Any, where: str) -> str:
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return str(entry["text"])
        if "messages" in entry:
            return _chat(entry["messages"], tokenizer, where)
        if isinstance(entry.get("instances"), list) and "instruction" in entry:
            return _chat(list(_turns(entry["instruction"], entry["instances"])), tokenizer, where)
        for ask, reply in CHAT_KEYS:
            if ask in entry and reply in entry:
                read = entry.get("input") if ask == "instruction" else None
                only = {"input": read, "output": entry[reply]}
                return _chat(list(_turns(entry[ask], [only])), tokenizer, where)
    pairs = ", ".join(f"{ask!r} and {reply!r}" for ask, reply in CHAT_KEYS)
    raise FormatError(f"{where}: wanted an object with 'text', 'messages', or {pairs}")


def _turns(instruction: Any, instances: list[Any]) -> Iterator[Any]:
    """Turns of a task: one instruction, and inputs with their outputs; several in those of Self-Instruct
    (arXiv:2212.10560)."""
    for number, instance in enumerate(instances):
        if not isinstance(instance, dict) or "output" not in instance:
            yield instance  # for `_chat` to refuse
            continue
        parts = [instruction] * (number == 0) + [instance.get("input")]
        texts = [str(part).strip() for part in parts if part is not None]
        yield {"role": "user", "content": "\n\n".join(filter(None, texts))}
        yield {"role": "assistant", "content": str(instance["output"]).strip()}


def _chat(messages: Any, tokenizer: Any, where: str) -> str:
    """A conversation in the model's own form; turns with empty lines between them if it has none."""
    if not isinstance(messages, list) or not messages or not all(_is_turn(m) for m in messages):
        raise FormatError(f"{where}: 'messages': wanted a list of objects with 'role' and 'content'")
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **_dated(tokenizer)))
    except (TemplateError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: the model's chat template refuses it: {error}") from None


def _dated(tokenizer: Any) -> dict[str, str]:
    """Arguments of `apply_chat_template` with which it is always TODAY. Templates ask a function for the date
    that transformers lets nobody replace: a macro of its name hides it."""
    source = str(tokenizer.get_chat_template())
    if "strftime_now" not in source:
        return {}
    filters = "".join(f"|replace({key!r}, {value!r})" for key, value in FORMATS.items())
    macro = f"{{% macro strftime_now(form) %}}{{{{ form{filters} }}}}{{% endmacro %}}\n"
    return {"chat_template": macro + source}


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
    rounded: bool,
    stage: Stage,
    given: Tensor | None = None,
    team: Team = ALONE,
) -> Tensor:
    """Text that the model writes at temperature 1 from many short prompts: openings of texts of many kinds,
    in all languages that the tokenizer was made for, a few words out of given texts, and chat questions,
    where the tokenizer has a chat template.

    chat_share  chat questions among the prompts, 0 to 1; none, and `stage` says so, if the chat template
                leaves no room in a text for an answer
    rounded     whether products are of bfloat16, a copy of the model's weights
    given       (n, tokens) int64 texts; where there are some, most of the other prompts are cut from them
    ->          (rows, row_tokens) int64

    `stage` gets one step for each token. When the model ends a text, the next prompt follows in its place.
    A team shares the work: all of it call this with the same arguments but `stage`.
    """
    pieces = row_tokens // CONTEXT if row_tokens % CONTEXT == 0 else 1
    device = next(model.parameters()).device
    batch = team.share(max(1, _batch_tokens(model.config, device, rounded) // row_tokens))
    blocks = -(-rows // batch)
    size = -(-rows // blocks)  # rows of a block; more than enough of them in all
    kinds = _prompts(tokenizer)
    if "chat" in kinds and not _keep_fitting(kinds, row_tokens // pieces) and chat_share:
        stage.say(
            "note: no chat questions: the model's chat template leaves no room for answers in texts of "
            f"{row_tokens // pieces} tokens"
        )
    width = max([MAX_PROMPT, *map(len, kinds.get("chat", []))])
    ends = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    ends[list(_end_ids(tokenizer))] = True

    def prompts(generator: torch.Generator) -> Iterator[list[int]]:
        if given is None or not len(given):
            return _by_turns(kinds, chat_share, generator)
        return _by_turns(kinds | {"given": _spans(given, generator)}, chat_share, generator)

    def write(writer: _Writer, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * rows + number * size)
        return writer.write(prompts(generator), generator, stage).view(-1, row_tokens)

    shape = (size * pieces, row_tokens // pieces)
    mine = range(blocks)[team.part(blocks)]
    written = torch.zeros(blocks, size, row_tokens, dtype=torch.int64)
    if rounded:
        model = copy.deepcopy(model).to(torch.bfloat16)
        if suits(model.config, shape[1]):
            model.set_attn_implementation(CAUSAL)
    if device.type == "cuda":
        pays = len(mine) * shape[1] >= COMPILED_STEPS and not features(model.config).n_experts
        compiles = pays and can_compile(device)
        with compiled(_without_cache(model)) if compiles else nullcontext():
            writer = _Writer(model, ends.to(device), shape, width, records=len(mine) > 1, compiles=compiles)
            for number in mine:
                written[number] = write(writer, number)
        writer.recorded.clear()  # what they refer to refers to them: nothing else would free its memory soon
    else:
        own = map_on_cores(lambda n: write(_Writer(model, ends, shape, width), n), mine)
        for number, block in zip(mine, own, strict=True):
            written[number] = block
    team.sum([written])
    stage.step(n=(blocks - len(mine)) * size * row_tokens)  # the others'
    return written.flatten(0, 1)[:rows]


def _batch_tokens(config: Any, device: torch.device, rounded: bool) -> int:
    """Tokens of KV cache that are filled at a time. On a GPU that has little memory they are fewer, and then
    the text is another one."""
    if device.type != "cuda":
        return BATCH_TOKENS
    width = features(config).n_kv_heads * head_dim(config)
    token = 2 * (2 if rounded else 4) * config.num_hidden_layers * width  # bytes: keys and values
    return int(min(GPU_BATCH_TOKENS, torch.cuda.mem_get_info(device)[0] // 2 // token))


def _without_cache(model: nn.Module) -> Iterator[nn.Module]:
    """Of every layer all but the attention, whose shapes are others at every position."""
    arch = ARCHS[model.config.model_type]
    attention = arch.linears[arch.groups[0].linears[0]].partition(".")[0]
    for layer in decoder_layers(model, arch):
        yield from (module for name, module in layer.named_children() if name != attention)


class _Writer:
    """Writes blocks of texts, those of a block side by side, token by token. All that a token needs is on the
    model's device."""

    def __init__(
        self,
        model: nn.Module,
        ends: Tensor,
        shape: tuple[int, int],
        width: int,
        records: bool = False,
        compiles: bool = False,
    ) -> None:
        """
        model     the model that writes
        ends      (n_vocab,) bool, tokens that end a text
        shape     texts of a block, tokens of a text
        width     tokens of a prompt that are taken
        records   whether steps are recorded, on a GPU, for further blocks
        compiles  whether sampling is compiled
        """
        self.model, self.ends = model, ends
        self.count, self.length = shape
        self.cache = GrowingCache(self.length)
        self.cached = {cache_argument(model): self.cache}
        device = ends.device
        self.pool = torch.zeros(self.count * POOL, width, dtype=torch.int64, device=device)
        self.pool_lengths = torch.zeros(len(self.pool), dtype=torch.int64, device=device)
        self.uniform = torch.zeros(self.length, self.count, 1, device=device)
        self.prompt, self.place, self.ids = torch.zeros(3, self.count, dtype=torch.int64, device=device)
        self.taken = torch.zeros((), dtype=torch.int64, device=device)  # prompts of the pool, so far
        self.out = torch.zeros(self.count, self.length, dtype=torch.int64, device=device)
        self.sample = torch.compile(_sample) if compiles else _sample
        self.recorded: list[Callable[[], None]] = []  # steps; a circle of references to this
        if records:
            record = Recorder("writing text", WARM_UP_STEPS)
            self.recorded = [record(partial(self._step, position)) for position in range(self.length)]

    def write(self, prompts: Iterator[list[int]], generator: torch.Generator, stage: Stage) -> Tensor:
        """The next block of texts, (count, length) int64 on the CPU. `stage` gets a step for each token."""
        some = list(itertools.islice(prompts, len(self.pool)))
        width = self.pool.shape[1]
        self.pool_lengths.copy_(torch.tensor([min(len(prompt), width) for prompt in some]))
        self.pool.copy_(torch.tensor([(p + [0] * width)[:width] for p in some]))
        self.uniform.copy_(torch.rand(self.uniform.shape, generator=generator))
        self.prompt.copy_(torch.arange(self.count))
        self.ids.copy_(self.pool[: self.count, 0])
        self.place.fill_(1)
        self.taken.fill_(self.count)
        for position in range(self.length):
            stop_if_unwanted()
            if self.recorded:
                self.recorded[position]()
            else:
                self._step(position)
            stage.step(n=self.count)
        return self.out.cpu()

    def _step(self, position: int) -> None:
        """Keep the tokens at `position` and find those at the next."""
        self.out[:, position] = self.ids
        if position + 1 == self.length:
            return
        self.cache.crop(position)
        logits = self.model(self.ids[:, None], **self.cached, use_cache=True).logits[:, -1]
        free = self.sample(logits, self.uniform[position])
        in_prompt = self.place < self.pool_lengths[self.prompt]
        forced = self.pool[self.prompt, self.place.clamp(max=self.pool.shape[1] - 1)]
        self.ids.copy_(torch.where(in_prompt, forced, free))
        ended = ~in_prompt & self.ends[free]
        following = (self.taken + ended.cumsum(0) - 1) % len(self.pool)
        self.prompt.copy_(torch.where(ended, following, self.prompt))
        self.place.add_(1).masked_fill_(ended, 0)
        self.taken.add_(ended.sum())


def _sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row from softmax(logits), by inverting the cumulative sum at uniform (rows, 1)."""
    reached = torch.softmax(logits.float(), -1).cumsum(-1)
    return torch.searchsorted(reached, uniform * reached[:, -1:]).clamp_(max=logits.shape[1] - 1)[:, 0]


def _spans(given: Tensor, generator: torch.Generator) -> list[list[int]]:
    """A few tokens out of the middle of each text (n, tokens): where else a text may go on from."""
    sizes = torch.randint(*SPAN, (len(given),), generator=generator).clamp_(max=given.shape[1])
    starts = (torch.rand(len(given), generator=generator) * (given.shape[1] - sizes + 1)).long()
    return [row[a : a + n].tolist() for row, a, n in zip(given, starts.tolist(), sizes.tolist(), strict=True)]


def _prompts(tokenizer: Any) -> dict[str, list[list[int]]]:
    """Kind of prompt -> prompts as tokens. A kind that the tokenizer has no form for is left out."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=True)["input_ids"])

    kinds = {"opening": [ids(text) for text in openings()]}
    if foreign := foreign_openings(lambda text: len(ids(text))):
        kinds["foreign"] = [ids(text) for text in foreign]
    if tokenizer.chat_template:
        how = {"add_generation_prompt": True, "return_dict": True, **_dated(tokenizer)}
        kinds["chat"] = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], **how)["input_ids"]
            for text in chat_questions()
        ]
    return kinds


def _keep_fitting(kinds: dict[str, list[list[int]]], length: int) -> bool:
    """Leave out chat prompts that are long and leave little room in a text of `length` tokens; the kind, and
    False, if none is left."""
    most = max(MAX_PROMPT, int(length * MOST_PROMPT))
    kinds["chat"] = [prompt for prompt in kinds["chat"] if len(prompt) <= most]
    if not kinds["chat"]:
        del kinds["chat"]
    return "chat" in kinds


def _by_turns(
    prompts: dict[str, list[list[int]]], chat_share: float, generator: torch.Generator
) -> Iterator[list[int]]:
    """Prompts without end: chat questions spread evenly among the other kinds, which take turns, foreign
    openings one in every two rounds; each kind in random order."""
    streams = {kind: _shuffled(some, generator) for kind, some in prompts.items()}
    chat, foreign = streams.pop("chat", None), streams.pop("foreign", None)
    turns = [stream for kind, stream in streams.items() for _ in range(TURNS[kind])]
    others = itertools.cycle([*turns, *turns, foreign] if foreign else turns)
    for turn in itertools.count():
        is_chat = int((turn + 1) * chat_share) > int(turn * chat_share)
        yield next(chat if chat and is_chat else next(others))


def _shuffled(items: list[list[int]], generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            yield items[index]


def _end_ids(tokenizer: Any) -> set[int]:
    """The tokens that end a text: EOS, and those of END_TOKENS that the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}
