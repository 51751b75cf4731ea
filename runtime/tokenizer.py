"""Text to ids and back, exactly as the original model's tokenizer does it.

The file carries the Hugging Face tokenizer as it was (metadata key `tokenizer.huggingface.json`); where it
does not, one is made from llama.cpp's keys (`runtime.ggml_tokenizer`). The `tokenizers` package runs either.
What is special about a model (begin and end tokens, chat template) comes from the standard keys.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from runtime import ggml_tokenizer
from runtime.errors import FormatError, OptionError, TemplateError
from runtime.template import ChatTemplate, Message

JSON_KEY = "tokenizer.huggingface.json"
TEMPLATE_KEY = "tokenizer.chat_template"

END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
              "<|end|>", "<|return|>", "<eos>", "</s>")  # fmt: skip
"""Control tokens that end an answer where a vocabulary has them: models name one as eos, but use others."""

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 16


class Tokenizer:
    """Encodes, decodes, renders conversations.

    Attributes: bos_id, eos_id (None if the model has none), add_bos, add_eos, stop_ids (the tokens that end
    an answer), chat_template (its source, or None).

    Raises FormatError if the JSON is no tokenizer.
    """

    def __init__(
        self,
        source: str | tokenizers.Tokenizer,  # JSON text, or the tokenizer itself, which is taken over
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        end_ids: Sequence[int] = (),
        chat_template: str | None = None,
        where: str = "tokenizer",
    ) -> None:
        try:
            self._hf = tokenizers.Tokenizer.from_str(source) if isinstance(source, str) else source
            self._hf.no_truncation()
            self._hf.no_padding()
        except BaseException as e:  # the Rust library's panics are no Exceptions
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise FormatError(f"{where}: {JSON_KEY} is no valid tokenizer: {e}") from e
        self._lock = threading.Lock()  # encode_special_tokens is a state of the shared object
        self.bos_id, self.eos_id = bos_id, eos_id
        self.add_bos, self.add_eos = add_bos and bos_id is not None, add_eos and eos_id is not None
        self.chat_template = chat_template
        special = {t.content: i for i, t in self._hf.get_added_tokens_decoder().items() if t.special}
        ends = {eos_id, bos_id, *end_ids, *(special[t] for t in END_TOKENS if t in special)}
        self.stop_ids = frozenset(i for i in ends if i is not None)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str = "tokenizer") -> Tokenizer:
        """The tokenizer of a GGUF file.

        Raises FormatError if the metadata hold none, or values of wrong types; UnsupportedModelError if it is
        there only in llama.cpp's keys, and of a kind that is not implemented.
        """

        def get(key: str, kind: type) -> Any:
            value = metadata.get(key)
            if value is not None and type(value) is not kind:
                raise FormatError(f"{where}: {key} is {value!r:.80}, wanted {kind.__name__}")
            return value

        def token(name: str) -> int | None:
            value: int | None = get(f"tokenizer.ggml.{name}_token_id", int)
            return value

        source, add_bos = get(JSON_KEY, str), get("tokenizer.ggml.add_bos_token", bool)
        if source is None:
            if get("tokenizer.ggml.model", str) is None:
                raise FormatError(
                    f"{where}: no {JSON_KEY} and no tokenizer.ggml.model; convert the model with dbf2gguf, "
                    "which stores both"
                )
            source = ggml_tokenizer.build(metadata, where)
            add_bos = ggml_tokenizer.adds_bos(metadata) if add_bos is None else add_bos
        return cls(
            source,
            bos_id=token("bos"),
            eos_id=token("eos"),
            add_bos=bool(add_bos),
            add_eos=bool(get("tokenizer.ggml.add_eos_token", bool)),
            end_ids=[i for i in (token("eot"), token("eom")) if i is not None],
            chat_template=get(TEMPLATE_KEY, str),
            where=where,
        )

    @property
    def n_vocab(self) -> int:
        return int(self._hf.get_vocab_size(with_added_tokens=True))

    def token(self, id: int | None) -> str | None:
        """A token's own text, such as "<s>"; None if there is no such token."""
        return None if id is None or id < 0 else self._hf.id_to_token(id)

    def id(self, token: str) -> int | None:
        """The id of a token, such as "<s>"; None if there is no such token."""
        return self._hf.token_to_id(token)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Text to ids.

        add_special    add the begin and end tokens that the model wants around a text
        parse_special  a control token's name in the text, like "<s>", becomes that token, not plain text
        """
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates, from a terminal, become ?
        with self._lock:
            self._hf.encode_special_tokens = not parse_special
            ids = list(self._hf.encode(text, add_special_tokens=False).ids)
        if add_special and self.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD.

        Raises OptionError for ids that no vocabulary has.
        """
        if any(not 0 <= i < 1 << 32 for i in ids):
            raise OptionError(f"decode: got an id outside 0..{(1 << 32) - 1}")
        return str(self._hf.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """A decoder for ids that come one by one, after those of `context`."""
        return TextStream(self, context)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise TemplateError("this model has no chat template; it can only continue text (--raw)")
        return ChatTemplate(self.chat_template)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as text, by the model's chat template.

        Raises TemplateError if there is no template, or it fails or refuses the conversation.
        """
        tokens = {"bos_token": self.token(self.bos_id), "eos_token": self.token(self.eos_id)}
        known = {name: text for name, text in tokens.items() if text is not None}
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, **{**known, **variables}
        )

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """A conversation as ids: the template writes the special tokens, so nothing is added."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special=False, parse_special=True)


class TextStream:
    """Decodes ids one by one into text that can be printed at once; control tokens are left out.

    The text of one token depends on its neighbours: a character may be spread over tokens, a leading space
    may be dropped. So a window of the last tokens is decoded, and what is new in it is given out. A
    replacement character at the end may be half a character, of which at most 3 bytes and thus 3 tokens
    can be there: up to 3 tokens, nothing is given out, for some decoders turn the whole run of bytes into
    replacement characters until it is complete. After more, the bytes are no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        for n in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):  # begin with a whole character
            self._window = [int(i) for i in context[-n:]]
            if not self._decode(self._window).startswith(REPLACEMENT):
                break
        self._start = len(self._window)  # first token after the part of the window that is all out
        self._out = len(self._decode(self._window))  # characters of the window that are out
        self._waiting = 0  # tokens since the text last ended with a whole character

    def push(self, id: int) -> str:
        """Take one more token; returns the text that it completes, possibly none."""
        self._window.append(int(id))
        text = self._decode(self._window)
        end = len(text)
        if text.endswith(REPLACEMENT):
            self._waiting += 1
            if self._waiting < 4:
                return ""
            end = max(end - 3, len(text.rstrip(REPLACEMENT)))
        else:
            self._waiting = 0
        new = text[self._out : end]
        self._out = max(self._out, end)
        if self._waiting == 0 and self._decode(self._window[self._start :]):
            del self._window[: self._start]
            self._start = len(self._window)
            self._out = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """The rest, when no more tokens come: half characters become U+FFFD."""
        text = self._decode(self._window)
        new, self._out = text[self._out :], len(text)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=True)
