"""Tokenizers made from `tokenizer.ggml.*` alone: ids as of transformers, sentencepiece, llama.cpp."""

from __future__ import annotations

import inspect
import json
import tracemalloc
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from make_gguf import write, write_model
from test_tokenizer import PIECES, samples
from tokenizers import AddedToken, Regex, decoders, models, normalizers, trainers
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import pre_tokenizers as pt

import runtime
from runtime.errors import FormatError, UnsupportedModelError
from runtime.ggml_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, _merges
from runtime.pretokenizers import find_pre
from runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
STORIES = ROOT / "../shared/models/stories260k"
TEXT = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/FORMAT.md")] + [*PIECES]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER = "<tool call>"
WHOLE = "\u0120quicksilver"
"""A token that no merges lead to."""

STRINGS = [
    *samples(600), f"a{USER} b <|im_end|>{USER}", "it is quicksilver", "quicksilver", "I'Ll we'VE", "  x",
    "x \n\n y", "12345678 1 22 333", "a\u00adb", "\u0301e",
]  # fmt: skip

needs_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


# Byte-level BPE -------------------------------------------------------------------------------------------


def published(pre: str) -> tuple[pt.PreTokenizer, normalizers.Normalizer | None]:
    """What models with a pre-tokenizer of this name have in tokenizer.json, from elsewhere than runtime."""
    transformers = pytest.importorskip("transformers")
    if pre == "gpt-2":
        made = transformers.GPT2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
    elif pre == "qwen2":
        made = transformers.Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
    elif pre == "llama-bpe":  # transformers reads original Llama 3 files with it
        from transformers.convert_slow_tokenizer import TikTokenConverter

        pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
        parts = [pt.Split(Regex(pattern), "isolated"), pt.ByteLevel(add_prefix_space=False, use_regex=False)]
        return pt.Sequence(parts), None
    else:
        assert pre == "smollm"
        made = HfTokenizer(models.BPE())
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        parts = [{"type": "Digits", "individual_digits": True}, byte_level]
        description = json.loads(made.to_str())
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        made = HfTokenizer.from_str(json.dumps(description))
    return made.pre_tokenizer, made.normalizer


def reference(pre: str) -> HfTokenizer:
    """A byte-level BPE tokenizer trained with the published pre-tokenizer."""
    made = HfTokenizer(models.BPE())
    made.pre_tokenizer, normalizer = published(pre)
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pt.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT * 3, trainer)
    description = json.loads(made.to_str())
    description["model"]["vocab"][WHOLE] = made.get_vocab_size()
    description["model"]["ignore_merges"] = pre == "llama-bpe"
    made = HfTokenizer.from_str(json.dumps(description))
    made.add_tokens([AddedToken(USER, normalized=False)])
    return made


def bpe_metadata(made: HfTokenizer, pre: str) -> dict[str, Any]:
    """As llama.cpp has it, with two unused tokens at the end."""
    vocabulary = {i: token for token, i in made.get_vocab().items()}
    added = {i: CONTROL if t.special else USER_DEFINED for i, t in made.get_added_tokens_decoder().items()}
    merges = json.loads(made.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [vocabulary[i] for i in range(len(vocabulary))] + ["[PAD1]", "[PAD2]"],
        "tokenizer.ggml.token_type": [added.get(i, NORMAL) for i in range(len(vocabulary))] + [UNUSED] * 2,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="module", params=["smollm", "gpt-2", "llama-bpe", "qwen2"])
def bpe(request: pytest.FixtureRequest) -> tuple[HfTokenizer, dict[str, Any]]:
    made = reference(request.param)
    return made, bpe_metadata(made, request.param)


def test_bpe(bpe: tuple[HfTokenizer, dict[str, Any]]) -> None:
    theirs, metadata = bpe
    ours = Tokenizer.from_metadata(metadata)
    for text in STRINGS:
        for parse in (True, False):
            theirs.encode_special_tokens = not parse
            wanted = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, add_special=False, parse_special=parse) == wanted, text
            assert ours.decode(wanted) == theirs.decode(wanted, skip_special_tokens=False)
            assert ours.decode(wanted, skip_special=True) == theirs.decode(wanted)
    assert ours.stop_ids == {0, 1, 2}
    assert (ours.encode("a")[0] == 1) == (metadata["tokenizer.ggml.pre"] == "llama-bpe")
    assert Tokenizer.from_metadata({**metadata, "tokenizer.ggml.add_bos_token": True}).encode("a")[0] == 1
    assert ours.id("[PAD1]") is None


def test_names_tell_pre_tokenizers_apart(bpe: tuple[HfTokenizer, dict[str, Any]]) -> None:
    """The name that a conversion writes is found by what the published pre-tokenizer does."""
    assert find_pre(bpe[0]) == bpe[1]["tokenizer.ggml.pre"]


# SentencePiece --------------------------------------------------------------------------------------------


class Pieces:
    """A SentencePiece model trained here, or one on disk, and its keys."""

    def __init__(self, model: Path, prefix: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model = SentencePieceProcessor(model_file=str(model))
        kinds = (
            ("is_unknown", UNKNOWN), ("is_control", CONTROL), ("is_unused", UNUSED), ("is_byte", BYTE),
        )  # fmt: skip
        types = []
        for i in range(len(self.model)):
            kind = next((kind for name, kind in kinds if getattr(self.model, name)(i)), NORMAL)
            user = kind == NORMAL and self.model.id_to_piece(i) == "<tool>"
            types.append(USER_DEFINED if user else kind)
        self.metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [self.model.id_to_piece(i) for i in range(len(self.model))],
            "tokenizer.ggml.scores": [self.model.get_score(i) for i in range(len(self.model))],
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        if not prefix:
            self.metadata["tokenizer.ggml.add_space_prefix"] = False


@pytest.fixture(scope="module", params=["prefix", "no-prefix", "no-bytes", "stories260k"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pieces:
    sentencepiece = pytest.importorskip("sentencepiece")
    if request.param == "stories260k":
        if not (STORIES / "tokenizer.model").is_file():
            pytest.skip("stories260k is not here")
        return Pieces(STORIES / "tokenizer.model", prefix=True)
    base = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXT for line in text.splitlines()),
        model_prefix=str(base / "m"), model_type="bpe", vocab_size=700,
        byte_fallback=request.param != "no-bytes",
        user_defined_symbols=["<tool>"], normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=request.param != "no-prefix", split_digits=True, allow_whitespace_only_pieces=True,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return Pieces(base / "m.model", prefix=request.param != "no-prefix")


def test_sentencepiece(pieces: Pieces) -> None:
    """The ids of sentencepiece itself, to whom control tokens are plain text."""
    ours = Tokenizer.from_metadata(pieces.metadata)
    bytes_there = BYTE in pieces.metadata["tokenizer.ggml.token_type"]
    for text in STRINGS:
        if "\u2581" in text or "\x00" in text:  # sentencepiece's own space; the end of a C string
            continue
        wanted = pieces.model.encode(text)
        assert ours.encode(text, add_special=False) == wanted, text
        if bytes_there:
            assert ours.decode(wanted) == text
            assert ours.decode(wanted) == pieces.model.decode(wanted)
    assert ours.encode("a") == [1, *pieces.model.encode("a")]
    assert ours.encode("</s>", parse_special=True) == [1, 2]
    assert ours.stop_ids == {1, 2}


@pytest.mark.skipif(not (STORIES / "tokenizer.json").is_file(), reason="stories260k is not here")
def test_stories260k_as_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(STORIES)
    ours = Tokenizer.from_metadata(Pieces(STORIES / "tokenizer.model", prefix=True).metadata)
    for text in STRINGS:
        assert ours.encode(text, parse_special=True) == theirs(text).input_ids, text
        ids = ours.encode(text, parse_special=True)
        assert ours.decode(ids) == theirs.decode(ids)


# llama.cpp ------------------------------------------------------------------------------------------------


def llama_cpp_ids(path: Path, metadata: dict[str, Any]) -> Callable[[str, bool], list[int]]:
    """llama.cpp's tokenizer of these keys."""
    import llama_cpp

    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 2, "vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    keys: dict[str, Any] = {f"llama.{k}": v for k, v in sizes.items()}
    keys["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    model = llama_cpp.Llama(
        str(write(path, "llama", {**keys, **metadata}, {})), vocab_only=True, verbose=False
    )
    return lambda text, special: model.tokenize(text.encode(), add_bos=False, special=special)


@needs_llama_cpp
def test_bpe_as_llama_cpp(bpe: tuple[HfTokenizer, dict[str, Any]], tmp_path: Path) -> None:
    ours, theirs = Tokenizer.from_metadata(bpe[1]), llama_cpp_ids(tmp_path / "v.gguf", bpe[1])
    for text in STRINGS:
        if bpe[1]["tokenizer.ggml.pre"] == "qwen2" and unicodedata.normalize("NFC", text) != text:
            continue  # llama.cpp does not normalize
        for special in (True, False):
            assert ours.encode(text, add_special=False, parse_special=special) == theirs(text, special), text


@needs_llama_cpp
def test_sentencepiece_as_llama_cpp(pieces: Pieces, tmp_path: Path) -> None:
    if BYTE not in pieces.metadata["tokenizer.ggml.token_type"]:
        pytest.skip("llama.cpp cannot do without byte tokens")
    ours = Tokenizer.from_metadata(pieces.metadata)
    theirs = llama_cpp_ids(tmp_path / "v.gguf", pieces.metadata)
    for text in STRINGS:
        for special in (True, False):
            assert ours.encode(text, add_special=False, parse_special=special) == theirs(text, special), text


# In a file, and errors ------------------------------------------------------------------------------------


def test_file_without_json(bpe: tuple[HfTokenizer, dict[str, Any]], tmp_path: Path) -> None:
    theirs, metadata = bpe

    def change(meta: dict[str, Any], _arrays: dict[str, Any]) -> None:
        del meta["tokenizer.huggingface.json"]
        meta |= metadata

    path = write_model(tmp_path / "m.gguf", change=change)
    with runtime.load(path, backend="c", n_threads=1) as model:
        text = "naïve <|im_end|> 123"
        theirs.encode_special_tokens = False
        assert model.tokenizer.encode(text, add_special=False, parse_special=True) == theirs.encode(text).ids


GOOD = {
    "gpt2": {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.token_type": [1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
    },
    "llama": {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [2, 1, 1, 1], "tokenizer.ggml.scores": [0.0, -3.0, -2.0, -1.0],
        "tokenizer.ggml.add_space_prefix": False,
    },
}  # fmt: skip


def test_good() -> None:
    for kind, id in (("gpt2", 2), ("llama", 3)):
        assert Tokenizer.from_metadata(GOOD[kind]).encode("ab", add_special=False) == [id]


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("gpt2", "pre", "wombat", "tokenizer.ggml.pre is 'wombat', a pre-tokenizer that is not implemented"),
        ("gpt2", "pre", "default", "implemented: smollm, gpt-2, llama-bpe, dbrx, qwen2"),
        ("gpt2", "pre", None, "key tokenizer.ggml.pre is missing"),
        ("gpt2", "model", "bert", "tokenizer.ggml.model is 'bert'; implemented: gpt2, llama"),
        ("gpt2", "model", None, "no tokenizer.huggingface.json and no tokenizer.ggml.model"),
        ("gpt2", "model", 7, "tokenizer.ggml.model is 7, wanted str"),
        ("gpt2", "tokens", None, "key tokenizer.ggml.tokens is missing"),
        ("gpt2", "tokens", "abc", "wanted an array of str"),
        ("gpt2", "tokens", ["a", 7, "ab"], "wanted an array of str"),
        ("gpt2", "merges", None, "key tokenizer.ggml.merges is missing"),
        ("gpt2", "merges", ["ab"], "holds 'ab', wanted two tokens"),
        ("gpt2", "merges", ["a x"], "no valid tokenizer: "),
        ("gpt2", "token_type", None, "key tokenizer.ggml.token_type is missing"),
        ("gpt2", "token_type", [1, 1], "has 2 values for 3 tokens"),
        ("gpt2", "token_type", [1, 1, 7], "holds 7, wanted 1 to 6"),
        ("llama", "scores", None, "key tokenizer.ggml.scores is missing"),
        ("llama", "scores", [1.0], "has 1 values for 4 tokens"),
        ("llama", "scores", [1, 2, 3, 4], "wanted an array of float"),
        ("llama", "add_space_prefix", 1, "add_space_prefix is 1, wanted bool"),
        ("llama", "remove_extra_whitespaces", True, "remove_extra_whitespaces is not implemented"),
        ("llama", "precompiled_charsmap", [1, 2], "precompiled_charsmap is not implemented"),
        ("llama", "tokens", ["<unk>", "a", "b", "x" * 2000], "a token of 2000 characters"),
    ],
)
def test_errors(kind: str, key: str, value: Any, message: str) -> None:
    metadata: dict[str, Any] = {**GOOD[kind], f"tokenizer.ggml.{key}": value}
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises((FormatError, UnsupportedModelError), match=r"^here\.gguf: ") as caught:
        Tokenizer.from_metadata(metadata, "here.gguf")
    assert message in str(caught.value)


def runs(longest: int) -> dict[str, Any]:
    """A vocabulary of "a", "aa", "aaa", ..., of which each can be made of each pair that is as long."""
    tokens = ["<unk>", *("a" * n for n in range(1, longest + 1))]
    return {
        **GOOD["llama"],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [UNKNOWN] + [NORMAL] * longest,
        "tokenizer.ggml.scores": [-float(n) for n in range(longest + 1)],
    }


def test_runs() -> None:
    """Real vocabularies have runs, of spaces for example."""
    ours = Tokenizer.from_metadata(runs(64))
    assert ours.encode("a" * 64, add_special=False) == [64]
    assert ours.decode([64, 3]) == "a" * 67


def test_too_many_merges() -> None:
    """Half a megabyte of pieces makes 523 776 merges of 358 million characters: refused before."""
    metadata = runs(1024)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"^x\.gguf: .* the 1024 pieces can be joined in so many ways"):
            Tokenizer.from_metadata(metadata, "x.gguf")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_merges_share_the_vocabulary() -> None:
    pieces = dict.fromkeys(runs(50)["tokenizer.ggml.tokens"], 0.0)
    own = {id(piece) for piece in pieces}
    merges = _merges(pieces, "x.gguf")
    assert len(merges) == 49 * 50 // 2
    assert all(id(piece) in own for merge in merges for piece in merge)
