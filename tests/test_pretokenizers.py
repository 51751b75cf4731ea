"""Pre-tokenizers by llama.cpp's names: how each splits, that no two are mistaken, llama.cpp's examples."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models
from tokenizers import pre_tokenizers as pt

from runtime import pretokenizers
from runtime.gguf import GgufFile
from runtime.pretokenizers import ALIASES, IGNORE_MERGES, PRE_TOKENIZERS, PROBE, find_pre, find_pre_tokenizer
from runtime.tokenizer import Tokenizer as OurTokenizer

VOCABULARIES = os.environ.get("DBF_TEST_VOCABS", "")
"""The folder models/ of a llama.cpp checkout: vocabularies with examples and their tokens."""

SPLITS: dict[str, tuple[str, list[str]]] = {
    "smollm": ("I'M 123 don't", ["I", "'", "M", " ", "1", "2", "3", " don", "'t"]),
    "gpt-2": ("I'M 123 don't", ["I", "'", "M", " 123", " don", "'t"]),
    "llama-bpe": ("I'M 1234 don't", ["I", "'M", " ", "123", "4", " don", "'t"]),
    "dbrx": ("I'M 1234 don't", ["I", "'M", " ", "123", "4", " don", "'t"]),
    "qwen2": ("I'M 123\n\n\nx", ["I", "'M", " ", "1", "2", "3", "\n\n\n", "x"]),
    "qwen35": ("e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
    "tekken": ("HTTPServer 12 a/b//\n", ["HTTPServer", " ", "1", "2", " a", "/b", "//\n"]),
    "gpt-4o": ("camelCase don't 1234", ["camel", "Case", " don't", " ", "123", "4"]),
    "deepseek-llm": ("a\nb 123 \u4e2d\u6587!", ["a", "\n", "b", " ", "123", " ", "\u4e2d\u6587", "!"]),
    "deepseek-coder": ("a\nb 123 x_y", ["a", "\n", "b", " ", "1", "2", "3", " x", "_", "y"]),
    "deepseek-v3": ("x_y 1234 \u4e2d\u6587", ["x", "_y", " ", "123", "4", " ", "\u4e2d\u6587"]),
    "falcon": ("a,b 12345 $<", ["a", ",", "b", " ", "123", "45", " ", "$<"]),
    "jais-2": ("a" + " " * 7 + "b", ["a", " " * 4, " " * 2, " b"]),
    "seed-coder": ("x!?\n\ny", ["x", "!?", "\n\n", "y"]),
    "poro-chat": ("a1b, c", ["a1b", ",", " c"]),
    "viking": ("a1b, c", ["a", "1", "b", ",", " c"]),
}
"""A text where each is not like the next, and its pieces."""


def tokenizer(pre: pt.PreTokenizer | None, ignore_merges: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE({}, [], ignore_merges=ignore_merges))
    if pre is not None:
        made.pre_tokenizer = pre
    return made


def pieces(pre: pt.PreTokenizer, text: str) -> list[str]:
    """Of the text itself, by their places: the pieces are of bytes."""
    spans = [span for _, span in pre.pre_tokenize_str(text)]
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_splits(name: str) -> None:
    text, wanted = SPLITS[name]
    assert pieces(PRE_TOKENIZERS[name](), text) == wanted


def test_no_two_agree() -> None:
    """On PROBE, but for those with and without merges."""
    seen: dict[tuple[str, ...], str] = {}
    for name, make in PRE_TOKENIZERS.items():
        key = (*pieces(make(), PROBE), str(name in IGNORE_MERGES))
        assert key not in seen, (name, seen.get(key))
        seen[key] = name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_found_by_what_it_does(name: str) -> None:
    """From the tokenizer.json too, which is all that a conversion has."""
    made = tokenizer(PRE_TOKENIZERS[name](), name in IGNORE_MERGES)
    assert find_pre(made) == name
    assert find_pre(Tokenizer.from_str(made.to_str())) == name


def test_merges_are_no_reason_to_know_nothing() -> None:
    """Qwen's splits with ignore_merges are Qwen's."""
    assert find_pre(tokenizer(PRE_TOKENIZERS["qwen2"](), ignore_merges=True)) == "qwen2"


def test_unknown() -> None:
    byte_level = pt.ByteLevel(add_prefix_space=False, use_regex=False)
    lone = pt.Sequence([pt.Split(Regex(r"\w+|\W"), "isolated"), byte_level])
    assert find_pre(tokenizer(lone)) is None
    assert find_pre(tokenizer(None)) is None
    assert find_pre(tokenizer(pt.ByteLevel(add_prefix_space=True))) is None
    assert find_pre_tokenizer("nonsense") is None


def test_one_form_of_a_family_is_another() -> None:
    """A tokenizer.json may say it otherwise than ours: digits as a regular expression are SmolLM's."""
    parts = [pt.Split(Regex(r"\p{N}"), "isolated"), pt.ByteLevel(add_prefix_space=False)]
    assert find_pre(tokenizer(pt.Sequence(parts))) == "smollm"


def test_aliases_lead_somewhere() -> None:
    assert not ALIASES.keys() & PRE_TOKENIZERS.keys()
    assert set(ALIASES.values()) <= set(PRE_TOKENIZERS)
    known = {*ALIASES, *PRE_TOKENIZERS}
    assert known >= {*IGNORE_MERGES, *pretokenizers.ADD_BOS}
    for name in known:
        assert find_pre_tokenizer(name) is not None
    assert len(known) > 50


@pytest.mark.skipif(not VOCABULARIES, reason="DBF_TEST_VOCABS names no folder of llama.cpp's models/")
def test_llama_cpp_examples() -> None:
    """Vocabularies of byte-level BPE that llama.cpp tests itself with: the same tokens."""
    tried = []
    for file in sorted(Path(VOCABULARIES).glob("ggml-vocab-*.gguf")):
        examples, wanted = file.with_name(file.name + ".inp"), file.with_name(file.name + ".out")
        with GgufFile(file) as vocabulary:
            metadata = dict(vocabulary.metadata)
        if metadata["tokenizer.ggml.model"] != "gpt2" or not examples.exists():
            continue
        made = OurTokenizer.from_metadata(metadata)
        texts = examples.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        for text, ids in zip(texts, wanted.read_text().split("\n"), strict=False):
            assert made.encode(text, add_special=False) == list(map(int, ids.split())), (file.name, text)
        tried.append(file.name)
    assert len(tried) >= 8


def test_an_unknown_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the file says nothing rather than something wrong; its tokenizer is exact all the same."""
    pytest.importorskip("torch")
    import tiny_hf

    from dbf2gguf.convert import convert

    folder = tiny_hf.write_folder(tmp_path / "model")
    file = folder / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    file.write_text(json.dumps(description), encoding="utf-8")
    convert(folder, tmp_path / "out.gguf", **tiny_hf.QUICK)
    assert "warning: unknown pre-tokenizer: the file has no tokenizer.ggml.pre" in capsys.readouterr().err
    with GgufFile(tmp_path / "out.gguf") as made:
        assert "tokenizer.ggml.pre" not in made.metadata
