"""runtime.tokenizer and runtime.template against transformers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_gguf import CHAT_TEMPLATE, tokenizer_json

from runtime.errors import FormatError, OptionError, TemplateError
from runtime.template import ChatTemplate
from runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
FOLDERS = [
    ROOT / "../shared/models/stories260k",
    ROOT / "demo/SmolLM2-135M-Instruct",
    *(Path(p) for p in os.environ.get("DBF_TEST_MODELS", "").split(os.pathsep) if p),
]
"""Hugging Face folders to compare with transformers on; absent ones are skipped."""


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda p: p.name)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer of a folder and ours."""
    folder: Path = request.param
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{folder.name} is not here")
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    metadata = {
        "tokenizer.huggingface.json": (folder / "tokenizer.json").read_text(encoding="utf-8"),
        "tokenizer.ggml.bos_token_id": theirs.bos_token_id,
        "tokenizer.ggml.eos_token_id": theirs.eos_token_id,
        "tokenizer.ggml.add_bos_token": config["add_bos_token"],
    }
    if theirs.chat_template is not None:
        metadata["tokenizer.chat_template"] = theirs.chat_template
    return theirs, Tokenizer.from_metadata(metadata)


PIECES = (
    "Hello", "world", " the", "it's", "I'LL", "don't", "naïve", "Zürich", "日本語", "中文字符",
    "한국어", "العربية", "हिन्दी", "🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "e\u0301", "\u00a0", "\u200b",
    "\ufeff", "\ufffd", "\u3000", "\x00", "\x7f", "\x1b[0m", "0", "12", "1234567", "3.14", "1,000",
    "½", "²", "٣", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n ",
    "def f(x):\n    return x**2\n", "if (a<b && c!=d) { }", "#include <stdio.h>", "```", "{{ }}",
    "<p>", "</p>", "\\", "https://example.org/?q=1&r=2", "a_b-c", "...", "!?", "“quoted”", "—", "€",
    "𝔘𝔫𝔦", "ﬁ", "Ａ", "ß", "İ", "ǅ", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>",
    "<|endoftext|>", "<0x0A>", "▁", "Ġ", "<|im_", "end|>",
)  # fmt: skip


def samples(n: int) -> list[str]:
    rng = np.random.default_rng(11)
    out = ["", " ", "  x", "x  ", *PIECES]
    while len(out) < n:
        out.append("".join(PIECES[i] for i in rng.integers(0, len(PIECES), rng.integers(1, 12))))
    return out


def test_encode_as_transformers(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    for text in samples(2500):
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text, add_special=False) == plain, text
        parsed = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special=False, parse_special=True) == parsed, text
        assert ours.encode(text, parse_special=True) == theirs(text).input_ids, text


def test_decode_as_transformers(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    rng = np.random.default_rng(5)
    for text in samples(800):
        ids = ours.encode(text, parse_special=True)
        assert ours.decode(ids) == theirs.decode(ids), text
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True), text
    for _ in range(800):
        ids = rng.integers(0, ours.n_vocab, 10).tolist()
        assert ours.decode(ids) == theirs.decode(ids)


def test_stream_is_decode(pair: tuple[Any, Tokenizer]) -> None:
    """Pieces of a stream join to what decode gives, and no piece holds half a character."""
    _, ours = pair
    for text in samples(1200):
        if "\ufffd" in text:
            continue
        ids = ours.encode(text)
        stream = ours.stream()
        pieces = [stream.push(i) for i in ids]
        assert "\ufffd" not in "".join(pieces), text
        assert "".join(pieces) + stream.flush() == ours.decode(ids, skip_special=True), text


def test_stream_continues_a_context(pair: tuple[Any, Tokenizer]) -> None:
    _, ours = pair
    for text in samples(800):
        if "\ufffd" in text:
            continue
        ids = ours.encode(text)
        for cut in {1, len(ids) // 2, len(ids) - 1}:
            if not 0 < cut < len(ids):
                continue
            before, stream = ours.decode(ids[:cut], skip_special=True), ours.stream(ids[:cut])
            if before.endswith("\ufffd"):
                continue
            after = "".join(stream.push(i) for i in ids[cut:]) + stream.flush()
            assert before + after == ours.decode(ids, skip_special=True), (text, cut)


def test_chat_as_transformers(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    if theirs.chat_template is None:
        pytest.skip("no chat template")
    for text in samples(300):
        for messages in (
            [{"role": "user", "content": text}],
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": text},
                {"role": "user", "content": ""},
            ],
        ):
            for header in (True, False):
                want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
                assert ours.render(messages, add_generation_prompt=header) == want
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages) == ids


# -- without transformers ---------------------------------------------------------------------------


def tiny(**changes: Any) -> Tokenizer:
    return Tokenizer(
        tokenizer_json(), **{"bos_id": 1, "eos_id": 2, "chat_template": CHAT_TEMPLATE, **changes}
    )


TINY = tiny(add_bos=True)


def test_special_tokens() -> None:
    assert TINY.encode("a<|im_end|>")[0] == 1
    assert 2 not in TINY.encode("a<|im_end|>")
    assert TINY.encode("a<|im_end|>", parse_special=True)[-1] == 2
    assert TINY.encode("", add_special=False) == []
    assert TINY.stop_ids == {0, 1, 2}  # <|endoftext|> and the begin token end an answer, too
    assert TINY.token(2) == "<|im_end|>"
    assert TINY.token(10**6) is None
    assert tiny(add_eos=True).encode("a")[-1] == 2
    assert tiny().encode("\ud800x") == tiny().encode("?x")


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_round_trip(text: str) -> None:
    ids = TINY.encode(text, add_special=False)
    clean = text.encode("utf-8", "replace").decode()
    assert TINY.decode(ids) == clean
    stream = TINY.stream()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == clean


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=40))
def test_stream_of_any_bytes(ids: list[int]) -> None:
    stream = TINY.stream()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == TINY.decode(ids, skip_special=True)


def test_stream_holds_half_characters_back() -> None:
    ids = TINY.encode("€🙂", add_special=False)
    assert len(ids) == 7
    stream = TINY.stream()
    assert [stream.push(i) for i in ids] == ["", "", "€", "", "", "", "🙂"]
    assert [stream.push(ids[0]), stream.flush(), stream.flush()] == ["", "\ufffd", ""]


def test_stream_stays_fast() -> None:
    stream = TINY.stream()
    for _ in range(2000):
        stream.push(TINY.encode("a", add_special=False)[0])
    assert len(stream._window) < 8


@pytest.mark.parametrize("bad", ["", "{}", "[1]", "null", tokenizer_json()[:2000], "[" * 5000])
def test_bad_tokenizer(bad: str) -> None:
    with pytest.raises(FormatError, match="no valid tokenizer"):
        Tokenizer(bad)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no tokenizer.huggingface.json"),
        ({"tokenizer.huggingface.json": 3}, "wanted str"),
        ({"tokenizer.huggingface.json": tokenizer_json(), "tokenizer.ggml.eos_token_id": "2"}, "wanted int"),
        ({"tokenizer.huggingface.json": tokenizer_json(), "tokenizer.ggml.add_bos_token": 1}, "wanted bool"),
    ],
)
def test_bad_metadata(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=f"x.gguf: .*{message}"):
        Tokenizer.from_metadata(metadata, "x.gguf")


@pytest.mark.parametrize("ids", [[-1], [1 << 32]])
def test_decode_bad_ids(ids: list[int]) -> None:
    with pytest.raises(OptionError, match="outside"):
        TINY.decode(ids)


def test_no_template() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        tiny(chat_template=None).render([])


USER = [{"role": "user", "content": "<hi> & 'you' é"}]

TEMPLATES = (
    CHAT_TEMPLATE,
    "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'user' %}\n  [INST] {{ m.content | trim }}"
    " [/INST]\n    {%- endif %}\n{% endfor %}{{ eos_token }}{{ missing }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n > 1 %}"
    "{% break %}{% endif %}{{ ns.n }} {{ m | tojson }} {{ m | tojson(indent=2) }}\n{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% macro f(x) %}({{ x }}){% endmacro %}{{ f(messages[0]['content']) }}{{ messages | length * 3 }}"
    "{{ 'ab' * 3 }}",
    "{% if tools %}tools{% else %}none{% endif %}{{ dict(a=1).items() | list }}{{ range(3) | list }}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}{{ loop.last }}{% else %}none{% endfor %}",
    "{{ 'a' ~ 1 ~ none ~ [1, 'b'] ~ missing ~ {'k': (1, 2)} ~ 1.5 }}{{ messages[1:] | length }}"
    "{% for a, b in [(1, 2), (3, messages)] %}{{ a }}{% if a in [1, tools] %}{{ b }}{% endif %}{% endfor %}"
    "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m['content'][1:-1].split('&')[-1] }}{% endfor %}",
    "{{ bos_token[1:] }}{{ 'a' + 'b' + messages[0].content }}{{ '%s-%03d %5.1f%%' % ('x', 7, 2) }}{{ 7 % 4 }}"
    "{{ '%(a)s' % {'a': 1} }}{{ '{0:>4}'.format(5) }}{{ '{a.b}{c[0]:.3f}'.format(a={}, c=[1]) }}"
    "{{ [1] + [2] }}{{ [messages, {'a': messages}] | tojson(separators=(',', ':')) }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | join('|', attribute='role') }}"
    "{{ ['a', 1, none] | join }}{{ [1, 2] | sum }}{{ [{'n': 1}] | sum(attribute='n', start=2) }}"
    "{{ {'a b': 'c&d'} | urlencode }}{{ [('a', 1)] | urlencode }}{{ 'a b' | urlencode }}{{ range(3) | sum }}",
    "{% set x %}{{ messages[0].content | replace('h', 'HH') | indent(2) | upper }}{% endset %}"
    "{{ x | center(60) }}{{ x.ljust(70) }}|{{ '%s %s' | format('a', x) }}{{ [3, 1] | sort }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 2.567 | round(1) }}"
    "{{ [1, 2, 3] | batch(2, 'x') | list }}{{ ','.join(['a', 'b']) }}{{ ','.join('ab' | map('upper')) }}",
    "{% autoescape true %}{{ '<' ~ ('>' | safe) ~ messages[0].content }}{% endautoescape %}{{ '<' ~ 1 }}",
    "{{ strftime_now('%Y') | length }}{{ messages[0].content.split('&')[0] }}{{ messages[-1].role.title() }}",
)


@pytest.mark.parametrize("source", TEMPLATES)
def test_template_as_transformers(source: str) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    conversations = (USER, USER + USER, [{"role": "system", "content": "\n x"}, *USER])
    for messages in conversations:
        for header in (True, False):
            want = render_jinja_template(
                conversations=[messages], chat_template=source, add_generation_prompt=header, **variables
            )
            want = want[0] if isinstance(want, tuple) else want
            got = ChatTemplate(source).render(messages, add_generation_prompt=header, **variables)
            assert [got] == list(want)


BIG = "{% set x = 'a' * 10000000 %}"
ROUNDS = "{% set ns = namespace(x='a', y=[], z={}) %}{% for i in range(99) %}"

TOO_LARGE = (
    "{% set x = 'a'.ljust(10 ** 10) %}{{ x | length }}",
    "{{ 'a'.rjust(10 ** 10) | length }}",
    "{{ 'a'.center(10 ** 10) | length }}",
    "{{ 'a'['zfill'](10 ** 10) | length }}",
    "{{ 'a'.encode().ljust(10 ** 10) | length }}",
    "{{ ('\t' * 9999).expandtabs(10 ** 7) | length }}",
    "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    BIG + "{{ x.translate({97: x}) | length }}",
    BIG + "{{ x.replace('a', x) | length }}",
    BIG + "{{ x.join(x) | length }}",
    BIG + "{{ x.join(range(9999) | map('string')) | length }}",
    BIG + "{{ (x + x) | length }}",
    BIG + "{{ (x ~ x ~ x ~ x) | length }}",
    BIG + "{% set y %}{{ x }}{{ x }}{% endset %}{{ y | length }}",
    BIG + "{% macro f() %}{{ x }}{{ x }}{% endmacro %}{{ f() | length }}",
    BIG + "{{ [x, x] | length }}",
    BIG + "{{ (x, x) | length }}",
    BIG + "{{ {'a': x, 'b': x} | length }}",
    BIG + "{{ ([x] * 9999) | string | length }}",
    "{{ ('%10000000000d' % 1) | length }}",
    "{{ ('%(a(b))010000000000d' % {'a(b)': 1}) | length }}",
    "{{ ('%*d' % (10 ** 9, 1)) | length }}",
    "{{ ('%-5.*f' % (10 ** 9, 1)) | length }}",
    "{{ ('%.10000000000f' % 1) | length }}",
    "{{ ('%(a)9999d' * 99999 % {'a': 1}) | length }}",
    BIG + "{{ ('%(a)s' * 999 % {'a': x}) | length }}",
    BIG + "{{ ('%s' * 999) | format(x) | length }}",
    "{{ '%10000000000d' | format(1) | length }}",
    "{{ '{:10000000000}'.format(1) | length }}",
    "{{ '{:{}}'.format(1, 10 ** 10) | length }}",
    "{{ '{a:{b}}'.format_map({'a': 1, 'b': '10000000000'}) | length }}",
    BIG + "{{ ('{0}' * 999).format(x) | length }}",
    BIG + "{{ ('{0}' * 999)['format'](x) | length }}",
    "{{ 'a' | center(10 ** 10) | length }}",
    "{{ ['a'] | map('center', 10 ** 10) | join | length }}",
    "{{ 'a\nb' | indent(10 ** 10) | length }}",
    "{{ [[1]] | tojson(indent=10 ** 10) | length }}",
    "{{ [1, 2] | tojson(separators=('a' * 9999999, ':')) | tojson(separators=('a' * 9999999, ':')) }}",
    "{{ 'ab' | batch(10 ** 10, 'x') | list | length }}",
    "{{ 'ab' | slice(10 ** 10) | list | length }}",
    "{{ 2.5 | round(10 ** 10, 'floor') }}",
    BIG + "{{ x | replace('a', x) | length }}",
    BIG + "{{ range(99999) | map(attribute='no', default=x) | join | length }}",
    BIG + "{% set n = namespace(x=x) %}{{ ([n] * 9999) | join(attribute='x') | length }}",
    BIG + "{{ range(99999) | map(attribute='no', default=['a', x]) | urlencode | length }}",
    "{% set x = [1] * 99999 %}{{ range(99999) | map(attribute='no', default=x) | sum(start=[]) | length }}",
    "{{ strftime_now('%c' * 10 ** 6) | length }}",
    ROUNDS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    ROUNDS + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    ROUNDS + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}{{ ns.x | length }}",
    ROUNDS + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}{{ ns.x | length }}",
    ROUNDS + "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}{{ ns.x | length }}",
    ROUNDS + "{% set ns.x = ns.x | tojson | tojson %}{% endfor %}{{ ns.x | length }}",
    ROUNDS + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y }}",
    ROUNDS + "{% set ns.y = ns.y + [1] + ns.y %}{% endfor %}{{ ns.y | length }}",
    ROUNDS + "{% set ns.z = dict(a=ns.z, b=ns.z) %}{% endfor %}{{ ns.z }}",
    "{% macro f() %}{% set ns.y = varargs %}{% endmacro %}"
    + ROUNDS + "{{ f(ns.y, ns.y) }}{% endfor %}{{ ns.y | string | length }}",
    BIG + ROUNDS + "{% set ns.y = [ns.y, x[i:]] %}{% endfor %}",
    BIG + "{% set ns = namespace(y=[]) %}{% for i in range(99) %}{{ x[i:] | length }}{% endfor %}",
)  # fmt: skip
"""Templates that fill the memory, each in its own way."""


@pytest.fixture
def little_memory() -> Iterator[None]:
    """400 MB more than now; Python raises MemoryError beyond. Only where there is /proc."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + 400_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("source", TOO_LARGE)
def test_too_large_template(source: str) -> None:
    """Each is refused before it has taken much memory."""
    with pytest.raises(TemplateError, match=r"something forbidden: (a|values of) "):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__()[0]() }}",
        "{{ raise_exception.__globals__['json'].codecs }}",
        "{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ namespace.__init__.__globals__.json.loads('1') }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ ''|attr('__class__') ~ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') ~ ('{0.__class__.__init__.__globals__}'.format(dict)) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('id') }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ [0] * 999999999 }}",
        "{{ range(10 ** 9) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ lipsum(10 ** 10) | length }}",
        "{{ messages[7].content.x }}",
        "{{ 'x' + 1 }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_hostile_template(source: str) -> None:
    """Each raises TemplateError or, where the sandbox hides what was asked for, shows nothing of it."""
    try:
        text = ChatTemplate(source).render(USER)
    except TemplateError as e:
        assert str(e).startswith("the chat template")  # noqa: PT017
    else:
        assert "class" not in text
        assert "module" not in text


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x", "{% nope %}", "{% for %}", "{{ " + "(" * 3000 + " }}"]
)
def test_broken_template(source: str) -> None:
    with pytest.raises(TemplateError, match="cannot be compiled"):
        ChatTemplate(source)


def test_refusal_is_named() -> None:
    with pytest.raises(TemplateError, match="refuses this conversation: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(USER)
