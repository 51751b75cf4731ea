"""llama.cpp's names (`tokenizer.ggml.pre`) of byte-level BPE models' pre-tokenizers, and what they do."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, Tokenizer, normalizers
from tokenizers import pre_tokenizers as pt

PROBE = (
    "Hello  world!\n\n\t I'm we'LL  123456 7.89 a_b \u00e9t\u00e9 \u4f60\u597d "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \U0001f600 --- (x)=y;\r\n  end   \n"
)
"""Text on which no two of the pre-tokenizers below agree."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pt.PreTokenizer:
    return pt.Sequence(
        [pt.Split(Regex(pattern), "isolated"), pt.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


PRE_TOKENIZERS: dict[str, Callable[[], pt.PreTokenizer]] = {
    "smollm": lambda: pt.Sequence(
        [pt.Digits(individual_digits=True), pt.ByteLevel(add_prefix_space=False, use_regex=True)]
    ),
    "gpt-2": lambda: pt.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": lambda: _split(LLAMA3),
    "qwen2": lambda: _split(QWEN2),
}


def normalizer_of(pre: str) -> normalizers.Normalizer | None:
    """The normalizer that goes with a pre-tokenizer."""
    return normalizers.NFC() if pre == "qwen2" else None


IGNORE_MERGES = ("llama-bpe",)
"""Those with which a piece that is a token is that token, whatever the merges would make of it."""

ADD_BOS = ("llama-bpe",)
"""Those with which llama.cpp begins a text with the begin token where a file does not say."""


def find_pre(tokenizer: Tokenizer) -> str | None:
    """The name of a tokenizer's pre-tokenizer, found by what it does to PROBE; None if unknown."""
    if tokenizer.pre_tokenizer is None:
        return None
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    for name, make in PRE_TOKENIZERS.items():
        if make().pre_tokenize_str(PROBE) == pieces:
            return name
    return None
