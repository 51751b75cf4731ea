"""Calibration text: files, and text that the model writes."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import tokenizers
import torch
from test_convert import MODELS
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import dbf2gguf.text
from dbf2gguf.kvcache import GrowingCache
from dbf2gguf.progress import Stage
from dbf2gguf.prompts import ENGLISH, LANGUAGES, foreign_openings
from dbf2gguf.text import (
    CONTEXT,
    MAX_PROMPT,
    MOST_PROMPT,
    SPAN,
    _by_turns,
    _documents,
    _end_ids,
    _prompts,
    _tokens,
    rows_from_files,
    self_written_rows,
)
from runtime.errors import DbfError, FormatError

TOKENIZER = tiny_hf.tokenizer()
END = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def jsonl(path: Path, *entries: Any) -> Path:
    path.write_text("\n".join(json.dumps(e) for e in entries) + "\n\n", encoding="utf-8")
    return path


def read(path: Path, rows: int = 100, row_tokens: int = 4, seed: int = 0) -> torch.Tensor:
    return rows_from_files([path], TOKENIZER, rows, row_tokens, seed)


def as_set(rows: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in rows.tolist()}


def pieces(tokens: list[int], size: int = 4) -> set[tuple[int, ...]]:
    """All whole rows of a stream of tokens."""
    return {tuple(tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size)}


def test_plain_text(tmp_path: Path) -> None:
    """Every whole row of the file, once; the end token closes the text."""
    text = "the cat sat on the mat; naïve café 1234 🙂"
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    rows = read(file)
    assert rows.dtype == torch.int64
    assert as_set(rows) == pieces([*ids(text), END])


USER = {"role": "user", "content": "Hi there"}


@pytest.mark.parametrize(
    "entry",
    [
        {"prompt": " Hi there ", "response": "Good day to you"},
        {"question": "Hi there", "answer": "Good day to you\n", "source": "x"},
        {"instruction": "Hi there", "output": "Good day to you"},
        {"messages": [USER, {"role": "assistant", "content": "Good day to you"}]},
    ],
    ids=["prompt", "question", "instruction", "messages"],
)  # fmt: skip
def test_conversations(tmp_path: Path, entry: dict[str, Any]) -> None:
    """All spellings of one exchange give the tokens of the chat template."""
    text = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nGood day to you<|im_end|>\n"
    assert 2 in ids(text)  # control tokens are parsed
    assert as_set(read(jsonl(tmp_path / "a.jsonl", entry))) == pieces([*ids(text), END])


def test_documents_of_jsonl(tmp_path: Path) -> None:
    """Documents follow each other with the end token between; empty lines are nothing."""
    first, second = "the cat sat on the mat", "and the hat, 1234 times"
    file = jsonl(tmp_path / "a.jsonl", {"text": first}, {"text": second})
    assert as_set(read(file)) == pieces([*ids(first), END, *ids(second), END])


def test_deterministic(tmp_path: Path) -> None:
    file = tiny_hf.write_text(tmp_path / "a.txt")
    assert torch.equal(read(file, seed=3), read(file, seed=3))
    assert not torch.equal(read(file, seed=3), read(file, seed=4))
    assert as_set(read(file, rows=9999, seed=3)) == as_set(read(file, rows=9999, seed=4))


def test_as_many_as_asked(tmp_path: Path) -> None:
    """No more than asked, no row twice, and from each file alike as far as it goes."""
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("mat " * 40, encoding="utf-8")
    large.write_text("cat " * 4000, encoding="utf-8")
    rows = rows_from_files([large, small], TOKENIZER, 10, 8, 0)
    assert rows.shape == (10, 8)
    of_small = sum("mat" in TOKENIZER.decode(row) for row in rows)
    assert of_small == 5
    many = rows_from_files([large, small], TOKENIZER, 300, 8, 0)
    assert len(many) == 300
    held = len(pieces([*ids("mat " * 40), END], 8))
    assert 1 <= sum("mat" in TOKENIZER.decode(row) for row in many) <= max(held, 40)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n\n[1, 2]\n', r"a\.jsonl:3: wanted an object with 'text'"),
        ("a.jsonl", b'{"title": "one"}\n', r"a\.jsonl:1: wanted an object with 'text', 'messages'"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: wanted an object"),
        ("a.jsonl", b'"text"\n', r"a\.jsonl:1: wanted an object"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt: cannot be read as UTF-8 text"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read(tmp_path / name)


def test_line_ends_inside_strings(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 or U+0085 as they are; only a line feed ends a line."""
    text = "one\u2028two\u0085three\x1cfour"
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert as_set(read(file)) == pieces([*ids(text), END])


@pytest.mark.parametrize(
    "messages",
    [7, "Hi", [7], [{}], [{"role": "user"}], [{"content": "Hi"}], [], None, [{"role": 1, "content": None}]],
    ids=str,
)
@pytest.mark.parametrize("template", [True, False])
def test_bad_messages(tmp_path: Path, messages: Any, template: bool) -> None:
    """Whatever "messages" holds: rows, or an error for the user; never another exception."""
    tokenizer = tiny_hf.tokenizer()
    if not template:
        tokenizer.chat_template = None
    file = jsonl(tmp_path / "a.jsonl", {"messages": messages}, {"text": "the cat sat on the mat"})
    try:
        rows_from_files([file], tokenizer, 4, 2, 0)
    except DbfError as error:
        assert "a.jsonl:1" in str(error)  # noqa: PT017


def test_self_instruct_tasks(tmp_path: Path) -> None:
    """The instruction is said once; every input and output is a turn."""
    task = {
        "instruction": "cat?",
        "instances": [{"input": "one", "output": "a"}, {"input": "two", "output": "b"}],
    }
    turns = [("user", "cat?\n\none"), ("assistant", "a"), ("user", "two"), ("assistant", "b")]
    text = TOKENIZER.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert as_set(read(jsonl(tmp_path / "a.jsonl", task))) == pieces([*ids(text), END])
    bare = {"instruction": "cat?", "instances": [{"input": "", "output": "a"}]}
    text = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "a"}], tokenize=False
    )
    assert as_set(read(jsonl(tmp_path / "b.jsonl", bare))) == pieces([*ids(text), END])
    for instances in ([], [7], [{"input": "one"}]):
        file = jsonl(tmp_path / "c.jsonl", {"instruction": "cat?", "instances": instances})
        with pytest.raises(FormatError, match=r"c\.jsonl:1: 'messages'"):
            read(file)


def test_inputs_of_alpaca(tmp_path: Path) -> None:
    """They are part of what is asked; most are empty."""
    for name, given, asked in (
        ("a", " cat\n", "Translate to French\n\ncat"),
        ("b", "", "Translate to French"),
        ("c", " ", "Translate to French"),
        ("d", None, "Translate to French"),
    ):
        entry = {"instruction": "Translate to French ", "input": given, "output": "chat"}
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "chat"}]
        text = TOKENIZER.apply_chat_template(turns, tokenize=False)
        assert as_set(read(jsonl(tmp_path / f"{name}.jsonl", entry))) == pieces([*ids(text), END])


TEXT = "".join(
    f"{word} {n}{end}"
    for n, (word, end) in enumerate(
        itertools.islice(
            itertools.product(
                ["The cat", "naïve café", "x = [1, 2]", "🙂🙂", "Don't  go", "猫坐在垫子上。", "<|im_end|>"],
                [".\n", "\n\n", "  ", " ", ",\r\n", "!\n\n\n", "\t", "\u2028"] * 9,
            ),
            500,
        )
    )
)


def sentencepiece_like(between: str) -> PreTrainedTokenizerFast:
    """As of Llama 2: a space goes before each text, words are not parted, unknown characters are bytes.

    between  of the texts that it is trained on, in TEXT; if they begin with spaces, two spaces are a token
    """
    model = tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60, show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(re.split(between, TEXT), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", " ", r"(?=\s)"])
def test_pieces_have_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZER if kind == "bytes" else sentencepiece_like(kind)
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    cat = tokenizer("cat", add_special_tokens=False)["input_ids"]
    assert len(whole) > 1500
    lengths: list[int] = []

    def counted(texts: list[str], **how: Any) -> Any:
        lengths.extend(map(len, texts))
        together.append(sum(map(len, texts)))
        return tokenizer(texts, **how)

    together: list[int] = []
    texts, wanted = [TEXT, "", "cat", TEXT], [*whole, END, END, *cat, END, *whole, END]
    for piece in (100, 101, 333, 1024):
        monkeypatch.setattr(dbf2gguf.text, "PIECE", piece)
        monkeypatch.setattr(dbf2gguf.text, "TOGETHER", 500)
        monkeypatch.setattr(dbf2gguf.text, "AROUND", 40)
        assert list(_tokens(texts, [END], counted)) == wanted
        assert max(lengths) < max(80, piece + 80)
        assert 490 <= max(together) < 500 + piece + 80
        lengths.clear()
        together.clear()


def test_a_text_that_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because it has no spaces, or tokens reach over all of them: it stays whole."""
    monkeypatch.setattr(dbf2gguf.text, "PIECE", 50)
    assert list(_tokens(["cat" * 100], [], TOKENIZER)) == ids("cat" * 100)

    def odd(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(text)] for text in texts]}

    assert list(_tokens(["cat " * 100], [], odd)) == [400]
    assert list(_tokens([""], [], TOKENIZER)) == list(_tokens([], [], TOKENIZER)) == []


def test_too_short(tmp_path: Path) -> None:
    """What there is, if it is nothing: the caller knows what it needs."""
    (tmp_path / "a.txt").write_text("cat")
    assert read(tmp_path / "a.txt", row_tokens=64).shape == (0, 64)
    (tmp_path / "b.txt").write_text("")
    assert len(read(tmp_path / "b.txt")) == 0


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "cat and dog " * 50 + '"}', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "' + "cat and dog " * 50 + '"}', encoding="utf-8-sig")
    assert torch.equal(read(tmp_path / "a.jsonl"), read(tmp_path / "b.jsonl"))


def write_rows(
    rows: int, length: int, seed: int = 0, template: bool = True, rounded: bool = False
) -> torch.Tensor:
    tokenizer = tiny_hf.tokenizer()
    if not template:
        tokenizer.chat_template = None
    stage = Stage("text", rows, quiet=True)
    return self_written_rows(tiny_hf.model(), tokenizer, rows, length, 0.5, seed, rounded, stage)


def test_no_cache_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys and values of a block are freed with it, not when Python's collector comes."""
    made: list[weakref.ref[GrowingCache]] = []

    def watched(capacity: int) -> GrowingCache:
        cache = GrowingCache(capacity)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(dbf2gguf.text, "GrowingCache", watched)
    monkeypatch.setattr(dbf2gguf.text, "BATCH_TOKENS", 40)
    gc.disable()
    try:
        write_rows(3, 40)
        assert [cache() for cache in made] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize(("template", "rounded"), [(True, False), (False, False), (True, True)])
def test_self_written(template: bool, rounded: bool) -> None:
    rows = write_rows(5, 40, template=template, rounded=rounded)
    assert rows.shape == (5, 40)
    assert rows.dtype == torch.int64
    assert rows.min() >= 0
    assert rows.max() < tiny_hf.N_VOCAB
    assert len(as_set(rows)) == 5
    starts = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    chats = sum(int(row[0]) == starts for row in rows)
    assert (chats > 0) == template  # by turns with texts of other kinds


def test_self_written_is_deterministic() -> None:
    for rounded in (False, True):
        assert torch.equal(
            write_rows(3, 24, seed=1, rounded=rounded), write_rows(3, 24, seed=1, rounded=rounded)
        )
    assert not torch.equal(write_rows(3, 24, seed=1), write_rows(3, 24, seed=2))


def test_self_written_is_the_models_text() -> None:
    """A model that knows one token only writes it, once its prompt is over."""
    made = tiny_hf.model(tie_word_embeddings=False)
    made.lm_head.weight.zero_()
    made.lm_head.weight[77] = 1.0
    made.model.norm.weight.fill_(1.0)
    for layer in made.model.layers:  # the residual stream is the embedding, whose sum has one sign
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    made.model.embed_tokens.weight.fill_(1.0)
    rows = self_written_rows(made, TOKENIZER, 2, 120, 0.5, 0, False, Stage("text", 2, quiet=True))
    assert (rows[:, -10:] == 77).all()


def test_prompts_are_text_of_the_tokenizer() -> None:
    prompts = _prompts(TOKENIZER)
    assert set(prompts) == {"opening", "chat"}  # its tokens are letters
    for prompt in itertools.islice(_by_turns(prompts, 0.5, torch.Generator().manual_seed(0)), 20):
        assert prompt
        assert all(isinstance(i, int) and 0 <= i < tiny_hf.N_VOCAB for i in prompt)


@pytest.mark.parametrize(
    ("share", "turns"), [(0.0, "oooooooo"), (0.25, "ooocoooc"), (0.5, "ococococ"), (1.0, "cccccccc")]
)
def test_chat_share(share: float, turns: str) -> None:
    prompts = {"opening": [[1]], "chat": [[2]]}
    stream = _by_turns(prompts, share, torch.Generator().manual_seed(0))
    assert "".join(" oc"[prompt[0]] for prompt in itertools.islice(stream, 8)) == turns
    stream = _by_turns({"opening": [[1]]}, share, torch.Generator().manual_seed(0))
    assert next(stream) == [1]


def long_template(tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose chat prompts begin with a text of so many tokens."""
    made = tiny_hf.tokenizer()
    made.chat_template = "the" * tokens + "{{ messages[0].content }}\n"
    return made


def write_chats(tokenizer: PreTrainedTokenizerFast, length: int, stage: Stage) -> Tensor:
    return self_written_rows(tiny_hf.model(), tokenizer, 8, length, 1.0, 0, False, stage)


def test_long_chat_prompts_are_whole() -> None:
    """A long system text does not cut the question off, nor the answer."""
    tokenizer = long_template(100)
    questions = {tuple(prompt) for prompt in _prompts(tokenizer)["chat"]}
    rows = write_chats(tokenizer, CONTEXT, Stage("text", 8 * CONTEXT, quiet=True)).tolist()
    asked = [{len(q) for q in questions if tuple(row[: len(q)]) == q} for row in rows]
    assert all(asked)
    assert min(map(max, asked)) > MAX_PROMPT
    assert max(map(max, asked)) <= CONTEXT * MOST_PROMPT


def test_no_room_for_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Then there are other texts, and a note."""
    tokenizer = long_template(CONTEXT)
    openings = {tuple(prompt) for prompt in _prompts(tokenizer)["opening"]}
    with Stage("text", 8 * 40) as stage:
        rows = write_chats(tokenizer, 40, stage).tolist()
    assert all(any(tuple(row[: len(o)]) == o[:40] for o in openings) for row in rows)
    assert "text: note: no chat questions: the model's chat template" in capsys.readouterr().err


def test_languages() -> None:
    """Those in which a text takes hardly more tokens than in English; one in three openings is foreign."""
    assert foreign_openings(lambda text: 10) == [text for _, some in LANGUAGES.values() for text in some]
    assert foreign_openings(lambda text: 10 if text == ENGLISH else 18) == []
    assert foreign_openings(len) == []
    spanish, openings = LANGUAGES["Spanish"]
    found = foreign_openings(lambda text: {ENGLISH: 10, spanish: 16}.get(text, 17))
    assert found == list(openings)
    stream = _by_turns({"opening": [[1]], "given": [[2]], "foreign": [[3]]}, 0, torch.Generator())
    assert list(itertools.islice(stream, 14)) == [[1], [2], [2], [1], [2], [2], [3]] * 2


def test_prompts_are_cut_as_before() -> None:
    """Those of no more than MAX_PROMPT tokens are taken, however short the texts; nothing is said."""
    kinds = {"chat": [[1] * MAX_PROMPT, [1] * (MAX_PROMPT + 1)]}
    assert dbf2gguf.text._keep_fitting(kinds, 24)
    assert [len(prompt) for prompt in kinds["chat"]] == [MAX_PROMPT]


@pytest.mark.parametrize("start", ["", "  ", "\n", "{% set a = 1 %}\n  {% set b = 2 %}\n"])
def test_it_is_always_the_same_day(tmp_path: Path, start: str) -> None:
    """In prompts and in given conversations, and nothing else of the text is changed."""
    tokenizer = tiny_hf.tokenizer()
    source = start + (
        "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
        "{% if strftime_now is defined %}{{ day() }}, {{ strftime_now('%B %-d, %F') }}{% endif %}"
        ":\n{{ messages[0].content }}"
    )
    tokenizer.chat_template = source
    (text,) = _documents(jsonl(tmp_path / "a.jsonl", {"messages": [USER]}), tokenizer, 0)
    assert text.endswith("26 Jul 2024, July 26, 2024-07-26:\nHi there")
    prompts = {tokenizer.decode(prompt) for prompt in _prompts(tokenizer)["chat"]}
    assert all("26 Jul 2024, July 26, 2024-07-26:\n" in prompt for prompt in prompts)
    for asked, told in (("%d %b %Y", "26 Jul 2024"), ("%B %-d, %F", "July 26, 2024-07-26")):
        source = source.replace(f"strftime_now('{asked}')", f"'{told}'")
    tokenizer.chat_template = source
    assert text == tokenizer.apply_chat_template([USER], tokenize=False)


def test_what_ends_a_text() -> None:
    """Also a token that doubles as the unknown one."""
    tokenizer = tiny_hf.tokenizer()
    end = tokenizer.get_vocab()["<|endoftext|>"]
    assert end in _end_ids(tokenizer)
    tokenizer.unk_token = "<|endoftext|>"
    assert {end, tokenizer.eos_token_id} <= _end_ids(tokenizer)


@pytest.mark.parametrize("name", ["mha-separate-head", "mistral", "gemma2", "gpt2"])
def test_bfloat16_writes_nearly_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model's own attention where its windows or caps need it; the model is left as it was."""
    made = tiny_hf.model(**MODELS[name])
    before = copy.deepcopy(made.state_dict())
    attention = made.config._attn_implementation
    seen: list[Tensor] = []
    monkeypatch.setattr(dbf2gguf.text, "_sample", lambda logits, _: seen.append(logits) or logits.argmax(-1))

    def write(rounded: bool) -> Tensor:
        stage = Stage("text", 96, quiet=True)
        self_written_rows(made, tiny_hf.tokenizer(), 2, 48, 0.0, 0, rounded, stage)
        logits = torch.stack(seen[:4])  # of prompts, whatever the model makes of them
        seen.clear()
        return logits

    exact, rounded = write(False), write(True)
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.std()
    assert made.config._attn_implementation == attention
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in before.items())


def test_prompts_follow_where_a_text_ends() -> None:
    """A model that ends every text at once writes prompt after prompt, those of given texts among them."""
    made = tiny_hf.model(tie_word_embeddings=False)
    made.lm_head.weight.zero_()
    made.lm_head.weight[END] = 1.0
    made.model.norm.weight.fill_(1.0)
    for layer in made.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    made.model.embed_tokens.weight.fill_(1.0)
    given = torch.full((30, 60), 55)
    stage = Stage("text", 8 * 120, quiet=True)
    rows = self_written_rows(made, TOKENIZER, 8, 120, 0.0, 0, False, stage, given)
    texts = []
    for row in rows.tolist():
        ends = [i for i, token in enumerate(row) if token == END]
        texts += [tuple(row[a + 1 : b]) for a, b in itertools.pairwise([-1, *ends])]
    known = {tuple(prompt) for prompt in _prompts(TOKENIZER)["opening"]}
    spans = [text for text in texts if set(text) == {55}]
    assert {len(text) for text in spans} <= set(range(*SPAN))
    assert len(set(map(len, spans))) > 3
    assert all(text in known for text in texts if text not in spans)
    assert len(spans) == pytest.approx(2 / 3 * len(texts), abs=len(texts) / 5)
