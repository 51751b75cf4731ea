"""Chat templates: Jinja programs that come with a model and are therefore not trusted.

Rendered as transformers' `apply_chat_template` renders them: the same sandbox, options, filters, globals and
`generation` tag, so that a conversation becomes the same text. On top of the sandbox, loops, products, powers
and the output are limited, for a template that never ends would be as bad as one that escapes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from runtime.errors import TemplateError

MAX_STEPS = 200_000
"""Loop iterations and macro calls of one rendering."""

MAX_CHARS = 16_000_000
"""Characters of one rendering, and of a repeated string."""

MAX_BITS = 4096
"""Bits of a product or power."""

Message = Mapping[str, Any]


class _Refused(jinja2.TemplateError):
    """`raise_exception` was called: the template rejects this conversation."""


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}: marks what the model wrote; renders as its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _Namespace(Namespace):
    """`namespace()` without underscored attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` as a function, not as the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, counting steps and bounding what grows."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.steps = 0
        self.filters["tojson"] = _tojson
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_Dict()
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        loops: Iterator[nodes.For | nodes.Macro] = tree.find_all((nodes.For, nodes.Macro))
        for node in loops:
            count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
        return tree

    def count_step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} loop iterations")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
            )
            if bits > MAX_BITS:
                raise SecurityError(f"a number of about {bits} bits")
        elif operator == "*":
            for times, what in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(what, "__len__") and len(what) * times > MAX_CHARS:
                    raise SecurityError(f"a sequence of {len(what) * times} elements")
        return super().call_binop(context, operator, left, right)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


class ChatTemplate:
    """A compiled chat template.

    Raises TemplateError if the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        self._env = _Environment()
        self._lock = threading.Lock()  # the step counter belongs to one rendering at a time
        try:
            self._template = self._env.from_string(source)
        except Exception as e:  # a compiler fed with hostile text: also RecursionError, MemoryError, ...
            raise TemplateError(f"the chat template cannot be compiled: {_text(e)}") from e

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as text.

        messages               dicts with role and content
        add_generation_prompt  end with the header of the assistant's answer
        variables              what else the template sees: bos_token, eos_token, tools, ...

        Raises TemplateError, saying whether the template refuses the conversation or is itself at fault.
        """
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        scope = {"tools": None, "documents": None, **variables}
        with self._lock:
            self._env.steps = 0
            try:
                parts, size = [], 0
                for part in self._template.generate(
                    messages=plain, add_generation_prompt=add_generation_prompt, **scope
                ):
                    size += len(part)
                    if size > MAX_CHARS:
                        raise SecurityError(f"more than {MAX_CHARS} characters")
                    parts.append(part)
            except _Refused as e:
                raise TemplateError(f"the chat template refuses this conversation: {_text(e)}") from e
            except SecurityError as e:
                raise TemplateError(f"the chat template does something forbidden: {_text(e)}") from e
            except Exception as e:  # whatever its code runs into: TypeError, RecursionError, ...
                raise TemplateError(f"the chat template fails: {_text(e)}") from e
        return "".join(parts)


def _text(e: BaseException) -> str:
    message = " ".join(str(e).split())[:300]
    return message if isinstance(e, jinja2.TemplateError) and message else f"{type(e).__name__}: {message}"
