"""runtime.zeroshot and dbf2gguf.zeroshot: task files, lm-evaluation-harness' definitions, both scorers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hf
import torch
from fake_backend import FakeBackend, FakeModule, next_token
from hypothesis import given, settings
from hypothesis import strategies as st
from make_gguf import tokenizer_json, write_model

import runtime
from dbf2gguf import zeroshot as original
from dbf2gguf.convert import convert
from dbf2gguf.evaluate import TorchScorer, plain_tokenizer
from dbf2gguf.source import load_model, load_tokenizer, open_source
from runtime import zeroshot
from runtime.engine import Engine
from runtime.errors import BackendError, ContextError, FormatError, OptionError
from runtime.tokenizer import Tokenizer
from runtime.zeroshot import Choice, EngineScorer, Question, encode_choice, read_task, score

SHARED = Path(__file__).parents[1] / "../shared"
PACKED = SHARED / "data/eval/zeroshot"
STORIES = SHARED / "models/stories260k"

ENTRIES: list[dict[str, Any]] = [
    {"query": "the cat sat on", "choices": ["the mat", "a naïve café", "12"], "gold": 0},
    {"query": "Question: where is the hat?\n", "choices": ["on the mat, and on the mat", "in"], "gold": 1},
    {"context_options": ["the cat and the hat: the cat", "the cat and the hat: the hat"], "continuation":
     "sat.", "gold": 0},
    {"query": "1 2 3", "choices": ["4", "5", "6", "4"], "gold": 2},
    {"query": "the mat\nChoices:\nA. the cat\nB. the hat\nAnswer:", "choices": ["A", "B"], "gold": 1},
]  # fmt: skip


def write_task(path: Path, entries: Sequence[Any] = ENTRIES) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def tokenizer(**options: Any) -> Tokenizer:
    return Tokenizer(tokenizer_json(), bos_id=1, eos_id=2, **options)


# Task files -----------------------------------------------------------------------------------------------


def test_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"query": " Why?\\n", "choices": ["a ", "caf\xc3\xa9"], "gold": 1}\n\n'
        b'{"context_options": ["x", "yy"], "continuation": "went.", "gold": 0, "idx": 7}'
    )
    assert read_task(path) == [
        Question(("Why?", "Why?"), (" a", " café"), (1, 4), 1, f"{path}:1"),
        Question(("x", "yy"), (" went.", " went."), (5, 5), 0, f"{path}:3"),
    ]
    assert [q.where for q in read_task(path, limit=1)] == [f"{path}:1"]
    assert len(read_task(path, limit=9)) == 2
    (question,) = read_task(path, delimiter="\n\tA: ", limit=1)
    assert question.contexts[0] + question.continuations[0] == "Why?\n\tA: a"
    assert question.continuations[0] == " a"
    (question,) = read_task(path, delimiter="", limit=1)
    assert (question.contexts[0], question.continuations[0]) == ("Why?", "a")
    with pytest.raises(OptionError, match="--limit is 0"):
        read_task(path, limit=0)


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "arc_challenge"])
def test_delimiter_of_the_name(tmp_path: Path, name: str) -> None:
    """As llm-foundry's tasks.yaml has them; with that, PIQA is put as lm-evaluation-harness puts it."""
    (question,) = read_task(write_task(tmp_path / f"{name}.jsonl", [ENTRIES[1]]))
    assert question.contexts[0] == "Question: where is the hat?\nAnswer:"
    assert question.continuations[0] == " on the mat, and on the mat"
    assert question.characters[0] == 26


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ("\udcff", "not JSON"),
        ("3", "wanted an object with 'query', 'choices' and 'gold', or with .*; got int"),
        ('{"context": "a", "answer": "b"}', ".*; got 'answer', 'context'"),
        ('{"query": "a", "choices": ["b", "c"]}', ".*; got 'choices', 'query'"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "'choices' is .*wanted a list of two texts or more"),
        ('{"query": "a", "choices": "bc", "gold": 0}', "'choices' is 'bc'"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "'choices' holds 3"),
        ('{"query": "a", "choices": ["b", " "], "gold": 0}', "'choices' holds ' '; wanted text"),
        ('{"query": "", "choices": ["b", "c"], "gold": 0}', "'query' holds ''"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "'gold' is 2; wanted 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": -1}', "'gold' is -1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "'gold' is True"),
        ('{"query": "a", "choices": ["b", "c"], "gold": "1"}', "'gold' is '1'"),
        ('{"context_options": ["a", null], "continuation": "b", "gold": 0}', "'context_options' holds None"),
        ('{"context_options": ["a", "b"], "continuation": ["c"], "gold": 0}', "'continuation' holds"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: str, message: str) -> None:
    path = write_task(tmp_path / "task.jsonl", ENTRIES[:2])
    path.write_bytes(path.read_bytes() + b"\n" + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(FormatError, match=rf"task\.jsonl:4: {message}"):
        read_task(path)
    assert len(read_task(path, limit=2)) == 2


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_bytes(b"\n \n")
    with pytest.raises(FormatError, match=r"task\.jsonl: no question in it"):
        read_task(tmp_path / "task.jsonl")


@pytest.mark.skipif(not PACKED.is_dir(), reason="the packed tasks are not here")
@pytest.mark.parametrize(
    ("name", "questions"),
    [("piqa", 1838), ("winogrande", 1267), ("openbook_qa", 500), ("siqa", 1954), ("copa", 100)],
)
def test_packed_tasks(name: str, questions: int) -> None:
    assert len(read_task(PACKED / f"{name}.jsonl")) == questions


# Definitions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
def test_encoding(add_bos: bool) -> None:
    """In one piece; an end token has no place; control tokens' names are text."""
    ours = tokenizer(add_bos=add_bos, add_eos=True)
    ids, n = encode_choice(ours, "the cat", " sat<|im_end|>", "")
    assert ids[n:] == ours.encode(" sat<|im_end|>", add_special=False)
    assert ours.decode(ids[add_bos:]) == "the cat sat<|im_end|>"
    assert (ids[0] == 1, 2 in ids) == (add_bos, False)
    with pytest.raises(FormatError, match=r"f:3: the tokenizer makes 1 tokens .* 1 of the context alone"):
        encode_choice(ours, "t", "he", "f:3")  # "the" is one token


def test_score() -> None:
    """Sums, characters and errors, written out."""

    def question(characters: tuple[int, ...], gold: int) -> Question:
        texts = tuple(f" {'x' * n}" for n in characters)
        return Question(("a",) * len(texts), texts, characters, gold, "f:1")

    questions = [question((10, 2), 0), question((10, 2), 1), question((4, 4, 4), 2), question((1, 1), 0)]
    answers = iter([(-9.0, -3.0), (-9.0, -3.0), (-3.0, -2.0, -1.0), (-1.0, -1.0)])
    seen: list[tuple[int, float]] = []
    got = score(lambda choices: next(answers), tokenizer(), questions, lambda *now: seen.append(now))
    # likeliest: 1, 1, 2, and the first of two that are as likely; for a character -0.9 > -1.5: 0, 0, 2, 0
    assert (got.questions, got.acc, got.acc_norm) == (4, 0.75, 0.75)
    assert seen == [(1, 0.0), (2, 0.5), (3, 2 / 3), (4, 0.75)]
    assert got.acc_error == pytest.approx(np.std([0, 1, 1, 1], ddof=1) / 2)
    assert got.acc_norm_error == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert score(lambda choices: (0.0, -1.0), tokenizer(), questions[3:]).acc_error == 0


@pytest.mark.parametrize("answer", [(0.0, math.nan), (0.0, -math.inf), (0.0,), ()])
def test_bad_likelihoods(tmp_path: Path, answer: tuple[float, ...]) -> None:
    questions = read_task(write_task(tmp_path / "task.jsonl"), limit=2)[1:]
    with pytest.raises(BackendError, match=r"task\.jsonl:2: log-likelihoods .*wanted 2 finite"):
        score(lambda choices: answer, tokenizer(), questions)


# The runtime as a scorer ----------------------------------------------------------------------------------


def by_hand(choice: Choice, n_vocab: int = 300) -> float:
    """What FakeBackend's logits of 50 and 0 make of it."""
    ids, n = choice
    total = math.log(math.exp(50) + n_vocab - 1)
    return sum((50.0 if next_token(ids[:i], n_vocab) == ids[i] else 0.0) - total for i in range(n, len(ids)))


def extended(ids: list[int], plan: list[int]) -> list[int]:
    """ids and a continuation: the likeliest token where the plan says 0, another one elsewhere."""
    out = list(ids)
    for step in plan:
        out.append(3 + (next_token(out, 300) - 3 + step) % 297)
    return out


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.lists(st.integers(3, 5), min_size=1, max_size=6),
                st.lists(st.integers(0, 1), min_size=1, max_size=5),
            ),
            min_size=2,
            max_size=4,
        ),
        max_size=3,
    )
)
def test_engine_scorer(questions: list[list[tuple[list[int], list[int]]]]) -> None:
    """Whatever the choices share, with each other and with the question before, the answer is the same."""
    backend = FakeBackend()
    scorer = EngineScorer(Engine(backend, backend.n_vocab))
    for parts in questions:
        choices = [(extended(context, plan), len(context)) for context, plan in parts]
        assert scorer(choices) == pytest.approx([by_hand(c) for c in choices], abs=1e-4)


def test_what_is_shared_is_evaluated_once() -> None:
    """(tokens, position, logits) of every call: the last token of a choice is never evaluated."""
    backend = FakeBackend()
    scorer = EngineScorer(Engine(backend, backend.n_vocab))
    context = [5, 6, 7, 8]
    scorer([([*context, 10, 11, 12], 4), ([*context, 20], 4), ([*context, 10, 30], 4)])
    assert backend.calls == [(4, 0, 1), (2, 4, 2), (1, 4, 1)]
    backend.calls.clear()
    scorer([([*context, 9, 1], 5), ([*context, 9, 2], 5)])  # one call tells both; 5 to 8 were there
    assert backend.calls == [(1, 4, 1)]
    backend.calls.clear()
    scorer([([5, 6, 40, 41], 3), ([5, 6, 50, 41], 3)])  # Winogrande's: the contexts differ
    assert backend.calls == [(1, 2, 1), (1, 2, 1)]


def test_too_long(tmp_path: Path) -> None:
    questions = read_task(write_task(tmp_path / "task.jsonl"))
    backend = FakeBackend(n_ctx=12)
    with pytest.raises(ContextError, match=r"task\.jsonl:2: the prompt has \d+ tokens, the context 12"):
        score(EngineScorer(Engine(backend, backend.n_vocab)), tokenizer(), questions[1:])


# Against transformers -------------------------------------------------------------------------------------


def reference(model: Any, encode: Any, entry: dict[str, Any], delimiter: str = " ") -> list[float]:
    """The log-likelihood of each choice, one whole sequence at a time, by nothing of runtime.zeroshot."""
    out = []
    for i in range(len(entry.get("choices", entry.get("context_options")))):
        context = entry["query"].strip() if "query" in entry else entry["context_options"][i]
        text = entry["choices"][i] if "query" in entry else entry["continuation"]
        n, ids = len(encode(context)), encode(context + delimiter + text)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        out.append(float(sum(log_probs[i - 1, ids[i]] for i in range(n, len(ids)))))
    return out


def picks(likelihoods: list[float], entry: dict[str, Any]) -> tuple[int, int]:
    texts = entry.get("choices") or [entry["continuation"]] * len(likelihoods)
    pairs = zip(likelihoods, texts, strict=True)
    return int(np.argmax(likelihoods)), int(np.argmax([x / len(text) for x, text in pairs]))


def folder_of(kind: str, base: Path) -> Path:
    if kind == "stories260k":
        if not (STORIES / "config.json").is_file():
            pytest.skip("stories260k is not here")
        return STORIES
    return tiny_hf.write_folder(base / "model", **({"num_hidden_layers": 1} if kind == "one-layer" else {}))


@pytest.mark.parametrize("kind", ["random", "one-layer", "stories260k"])
def test_against_transformers(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Original and converted file: both scorers, and both programs, against the plain way in float64."""
    folder, out = folder_of(kind, tmp_path), tmp_path / "out.gguf"
    convert(folder, out, embed_type="f16", **tiny_hf.QUICK)
    source = open_source(folder, tmp_path)
    theirs = load_tokenizer(source)

    def encode(text: str) -> list[int]:
        return list(theirs(text)["input_ids"])

    model, twin = load_model(source), tiny_hf.dense_twin(out, folder, "f16", tmp_path / "scratch")
    task = write_task(tmp_path / "task.jsonl")
    questions = read_task(task)
    with runtime.load(out, backend="c", n_threads=1) as running:
        scorers = (
            (TorchScorer(model), plain_tokenizer(theirs)),
            (EngineScorer(running.engine), running.tokenizer),
        )
        for (scorer, ours), plain, tolerance in zip(scorers, (model, twin), (1e-4, 0.05), strict=True):
            right = np.zeros((len(ENTRIES), 2))
            for i, (entry, q) in enumerate(zip(ENTRIES, questions, strict=True)):
                pairs = zip(q.contexts, q.continuations, strict=True)
                got = list(scorer([encode_choice(ours, *pair, q.where) for pair in pairs]))
                wanted = reference(plain, encode, entry)
                assert got == pytest.approx(wanted, abs=tolerance)
                assert picks(got, entry) == picks(wanted, entry)
                right[i] = [pick == entry["gold"] for pick in picks(wanted, entry)]
            counted = score(scorer, ours, questions)
            assert (counted.acc, counted.acc_norm) == tuple(right.mean(0))
    for program, path, plain in ((original, folder, model), (zeroshot, out, twin)):
        assert program.main([str(path), str(task), "-o", "json", "-t", "1"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        wanted = [picks(reference(plain, encode, entry), entry)[0] == entry["gold"] for entry in ENTRIES]
        assert row["acc"] == np.mean(wanted)


# The programs ---------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FakeModule, list[str]]:
    fake = FakeModule()
    monkeypatch.setattr(runtime, "backend", fake, raising=False)
    tasks = [write_task(tmp_path / f"{name}.jsonl") for name in ("copa", "piqa")]
    return fake, list(map(str, [write_model(tmp_path / "m.gguf"), *tasks]))


def test_program(place: tuple[FakeModule, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    fake, files = place
    assert zeroshot.main([*files, "-t", "2", "--kv-type", "q8_0", "--activations", "int8", "-c", "99"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal
    lines = out.splitlines()
    assert lines[0] == "| model | task | questions | acc | acc_norm | questions/s |"
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| m.gguf", "copa", "5"],
        ["| m.gguf", "piqa", "5"],
    ]
    assert "%" in lines[2].split(" | ")[3]
    assert fake.asked == {
        "backend": "auto", "n_threads": 2, "n_ctx": 99, "kv_type": "q8_0", "activations": "int8",
    }  # fmt: skip
    assert fake.loaded[0].closed


def test_program_as_csv_and_json(
    place: tuple[FakeModule, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, files = place
    assert zeroshot.main([*files, "-o", "json", "--limit", "3"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["file"], row["questions"]) for row in rows] == [
        ("copa", files[1], 3),
        ("piqa", files[2], 3),
    ]
    assert [row["delimiter"] for row in rows] == [" ", "\nAnswer: "]
    assert rows[0]["model"] == files[0]
    assert rows[0]["questions_per_second"] == pytest.approx(3 / rows[0]["seconds"])
    assert {row["activations"] for row in rows} == {"int16"}
    assert zeroshot.main([*files, "-o", "csv", "--limit", "3"]) == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(read[0]) == list(rows[0])
    assert [float(row["acc"]) for row in read] == [row["acc"] for row in rows]


def test_program_progress(
    place: tuple[FakeModule, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, one line that is gone before the table's."""
    _, files = place
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert zeroshot.main([*files[:2], "--limit", "2"]) == 0
    shown = capsys.readouterr().err.split("\r\x1b[K")
    assert [text.partition(", acc ")[0] for text in shown] == ["", "copa: 1/2", "copa: 2/2", ""]
    assert shown[1].endswith(" s left")


def test_program_delimiter(
    place: tuple[FakeModule, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, files = place
    asked: list[str] = []

    def remember(ours: Tokenizer, context: str, continuation: str, where: str) -> Choice:
        asked.append(context + continuation)
        return encode_choice(ours, context, continuation, where)

    monkeypatch.setattr(zeroshot, "encode_choice", remember)
    assert zeroshot.main([files[0], files[2], "--limit", "1"]) == 0
    assert zeroshot.main([files[0], files[2], "--limit", "1", "--delimiter", "|"]) == 0
    assert asked[0] == "the cat sat on\nAnswer: the mat"
    assert asked[3] == "the cat sat on|the mat"


@pytest.mark.parametrize("program", [zeroshot, original])
def test_program_errors(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before a model is loaded: there is none here."""
    task = write_task(tmp_path / "task.jsonl", [*ENTRIES, {"context": "a"}])
    for arguments, message in (
        (["no.gguf", str(task)], f"error: {task}:6: wanted an object"),
        (["no.gguf", str(tmp_path / "none.jsonl")], f"error: {tmp_path / 'none.jsonl'}: No such file"),
        (["no.gguf", str(task), "--limit", "0"], "error: --limit is 0"),
        (["no.gguf", str(task), "--limit", "2"], "error: no.gguf: "),
    ):
        assert program.main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(message)
        assert err.count("\n") == 1


def test_original_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = str(write_task(tmp_path / "task.jsonl"))
    for option, value in (("--device", "tpu"), ("-t", "0")):
        assert original.main([str(tmp_path), task, option, value]) == 1
        assert "error: --" in capsys.readouterr().err


def test_original_too_long(tmp_path: Path) -> None:
    model = tiny_hf.model(max_position_embeddings=8)
    with pytest.raises(ContextError, match="a choice has 9 tokens with its context, the model takes 8"):
        TorchScorer(model)([(list(range(3, 13)), 4), ([3, 4], 1)])
