"""A tokenizer from the keys `tokenizer.ggml.*` alone, as llama.cpp reads them.

Two kinds: byte-level BPE (`gpt2`: tokens and merges, and a pre-tokenizer by its name) and SentencePiece
(`llama`: pieces and their scores). Either becomes an object of the `tokenizers` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from runtime.errors import FormatError, UnsupportedModelError
from runtime.pretokenizers import (
    ADD_BOS,
    ALIASES,
    IGNORE_MERGES,
    PRE_TOKENIZERS,
    find_pre_tokenizer,
    normalizer_of,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of tokenizer.ggml.token_type."""

MAX_PIECE = 1024
"""Characters of the longest SentencePiece piece: finding its merges takes their square."""

MERGE_FACTOR, MERGE_FLOOR = 16, 1 << 20
"""SentencePiece merges may have MERGE_FACTOR times the characters of their pieces, and MERGE_FLOOR more: the
memory they take is linear in the file. Mistral's have 2.0 times as many (58 980 merges of 31 741 pieces),
Gemma 3's 2.2 times (514 906 of 255 639)."""

SPACE = "\u2581"  # what SentencePiece writes for a space


def build(metadata: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    """The tokenizer that the keys tokenizer.ggml.* describe.

    Unused tokens are left out. Control tokens and the unknown token are special: a text's own "</s>" is plain
    text unless it is asked for. User-defined tokens are always found, before everything else.

    Raises FormatError if a key is missing or makes no sense, UnsupportedModelError for a kind of tokenizer or
    a pre-tokenizer that is not implemented.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _list(metadata, "tokens", str, where)
    types = _list(metadata, "token_type", int, where, len(tokens))
    wrong = next((t for t in types if not NORMAL <= t <= BYTE), None)
    if wrong is not None:
        raise FormatError(f"{where}: tokenizer.ggml.token_type holds {wrong}, wanted {NORMAL} to {BYTE}")
    try:
        if kind == "gpt2":
            made = _bpe(metadata, tokens, types, where)
        elif kind == "llama":
            made = _sentencepiece(metadata, tokens, types, where)
        else:
            raise UnsupportedModelError(
                f"{where}: tokenizer.ggml.model is {kind!r:.60}; implemented: gpt2, llama"
            )
        special, plain = [], []
        for token, kind_of_token in zip(tokens, types, strict=True):
            if kind_of_token in (UNKNOWN, CONTROL):
                special.append(AddedToken(token, special=True, normalized=False))
            elif kind_of_token == USER_DEFINED:
                plain.append(AddedToken(token, special=False, normalized=False))
        made.add_special_tokens(special)
        made.add_tokens(plain)
    except BaseException as e:  # the Rust library's panics are no Exceptions
        if isinstance(e, FormatError | UnsupportedModelError) or (
            not isinstance(e, Exception) and type(e).__name__ != "PanicException"
        ):
            raise
        raise FormatError(f"{where}: tokenizer.ggml.* is no valid tokenizer: {e}") from e
    return made


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether llama.cpp begins a text with the begin token where tokenizer.ggml.add_bos_token is missing."""
    return metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in ADD_BOS


def _list(
    metadata: Mapping[str, Any], name: str, kind: type, where: str, length: int | None = None
) -> list[Any]:
    key = f"tokenizer.ggml.{name}"
    values = metadata.get(key)
    if values is None:
        raise FormatError(f"{where}: metadata key {key} is missing")
    if not isinstance(values, list) or not all(type(v) is kind for v in values):
        raise FormatError(f"{where}: {key} is {values!r:.60}, wanted an array of {kind.__name__}")
    if length is not None and len(values) != length:
        raise FormatError(f"{where}: {key} has {len(values)} values for {length} tokens")
    return values


def _bpe(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str
) -> tokenizers.Tokenizer:
    """Byte-level BPE. add_space_prefix is no matter of it, in llama.cpp either."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        raise FormatError(f"{where}: metadata key tokenizer.ggml.pre is missing")
    pre_tokenizer = find_pre_tokenizer(pre) if isinstance(pre, str) else None
    if pre_tokenizer is None:
        known = f"{', '.join(PRE_TOKENIZERS)}, and {len(ALIASES)} that split like one of these"
        raise UnsupportedModelError(
            f"{where}: tokenizer.ggml.pre is {pre!r:.60}, a pre-tokenizer that is not implemented; "
            f"implemented: {known}"
        )
    merges = []
    for merge in _list(metadata, "merges", str, where):
        left, space, right = merge.partition(" ")
        if not space:
            raise FormatError(f"{where}: tokenizer.ggml.merges holds {merge!r:.60}, wanted two tokens")
        merges.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in IGNORE_MERGES))
    made.pre_tokenizer = pre_tokenizer
    normalizer = normalizer_of(pre)
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of all neighbours that form a piece, those of the highest score are joined first,
    the leftmost of equal ones."""
    scores = _list(metadata, "scores", float, where, len(tokens))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if type(prefix) is not bool:
        raise FormatError(f"{where}: tokenizer.ggml.add_space_prefix is {prefix!r:.60}, wanted bool")
    for name in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"tokenizer.ggml.{name}"):
            raise UnsupportedModelError(f"{where}: tokenizer.ggml.{name} is not implemented")
    unknown = next((tokens[i] for i, t in enumerate(types) if t == UNKNOWN), None)
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    pieces = {token: scores[i] for i, token in enumerate(tokens) if types[i] == NORMAL}
    made = tokenizers.Tokenizer(
        models.BPE(
            vocabulary, _merges(pieces, where), unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return made


def _merges(pieces: dict[str, float], where: str) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best score first."""
    own = {piece: piece for piece in pieces}  # merges share these strings
    most = MERGE_FACTOR * sum(map(len, own)) + MERGE_FLOOR
    size = 0
    found = []
    for piece, score in pieces.items():
        if len(piece) > MAX_PIECE:
            raise FormatError(f"{where}: a token of {len(piece)} characters; wanted {MAX_PIECE} at most")
        for cut in range(1, len(piece)):
            left, right = own.get(piece[:cut]), own.get(piece[cut:])
            if left is not None and right is not None:
                size += len(piece)
                if size > most:
                    raise FormatError(
                        f"{where}: tokenizer.ggml.tokens: the {len(pieces)} pieces can be joined in so many "
                        f"ways that the merges have more than {most} characters; no trained vocabulary has "
                        "so many"
                    )
                found.append((-score, cut, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]
