"""Chat templates: Jinja programs that come with a model and are therefore not trusted.

Rendered as transformers' `apply_chat_template` renders them: the same sandbox, options, filters, globals and
`generation` tag, so that a conversation becomes the same text. On top of the sandbox, loops, every value and
all of them together are limited, for a template that never ends or fills the memory would be as bad as one
that escapes. Each place where a value is made (operator, call, filter, slice, literal, block) measures it;
what can become far larger than what goes in is estimated before it is made.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import string
import threading
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from itertools import chain
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from runtime.errors import TemplateError

MAX_STEPS = 200_000
"""Loop iterations and macro calls of one rendering."""

MAX_CHARS = 16_000_000
"""Characters of one rendering, and of every value on the way."""

MAX_TOTAL = 16 * MAX_CHARS
"""Characters of all values together that one rendering makes."""

PART = 16
"""What an element of a list counts, in characters, beside its own."""

MAX_BITS = 4096
"""Bits of a number."""

MAX_FORMAT = 1000
"""Characters of a date's format."""

CONTAINERS = (Mapping, list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)

LOCALS = ("_loop_vars", "_block_vars")
"""What jinja2 itself gives to every call."""

GROWS = frozenset(
    (
        "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "to_bytes", "replace", "join",
        "indent", "wordwrap", "urlize", "tojson", "batch", "slice", "round",
    )
)  # fmt: skip
"""Methods and filters whose result can be as large as the product of what goes in."""

GATHERS = frozenset(("join", "sum", "urlencode"))
"""Filters that make one value of all that an iterator yields."""

WIDE = re.compile(r"[%)][#0\- +]*\d*\.?\d{5}|%[#0\- +]*\d*\.?\*")
"""In a format of `%`: a width or precision of five digits or more, or one that an argument gives."""

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

    def __repr__(self) -> str:  # one that holds another twice, which holds another twice, would be endless
        return "<Namespace>"


class _Dict:
    """`dict(...)` as a function, not as the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Measured(NodeTransformer):
    """Sends through `_Environment.call` what the sandbox does not: `~`, slices and literals."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenated", node.nodes, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("same", [node], node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._literal(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._literal(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._literal(node, [pair.value for pair in node.items])

    def _literal(self, node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Node:
        constant = all(isinstance(item, nodes.Const) for item in items)
        self.generic_visit(node)
        return node if constant else self._call("same", [node], node)

    def _call(self, method: str, args: list[nodes.Expr], node: nodes.Node) -> nodes.Node:
        call = nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)
        return call.set_lineno(node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, counting steps and measuring values.

    What holds within a rendering: no value is larger than MAX_CHARS, a list within a list counted as often as
    it occurs. So none becomes much larger when it is written as text or JSON.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.steps = self.total = 0
        self.filters["tojson"] = _tojson
        self.filters = {name: self._measured(name, f) for name, f in self.filters.items()}
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_Dict()
        )
        del self.globals["lipsum"]  # text of any length out of nothing

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Measured().visit(tree)
        loops: Iterator[nodes.For | nodes.Macro] = tree.find_all((nodes.For, nodes.Macro))
        for node in loops:
            count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
        tree.set_environment(self)
        return tree

    def count_step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} loop iterations")

    # -- measuring

    def size(self, value: Any) -> int:
        """Characters of a string; of a container those of all it holds, and for each element PART times its
        depth, for that is how far JSON is indented; else 0.

        Raises SecurityError beyond MAX_CHARS, or for a number of more than MAX_BITS.
        """
        if isinstance(value, (str, bytes)):  # most are
            return self.expect(len(value))
        if value is None or value is True or value is False:
            return 0
        size = 0
        levels: list[Iterator[Any]] = [iter((value,))]
        while levels:
            for x in levels[-1]:
                self.spend(1)
                if isinstance(x, (str, bytes)):
                    size += len(x)
                elif isinstance(x, int):
                    if x.bit_length() > MAX_BITS:
                        raise SecurityError(f"a number of {x.bit_length()} bits")
                elif x is not None and isinstance(x, CONTAINERS):
                    size += PART * len(levels) * len(x)
                    levels.append(chain(x.keys(), x.values()) if isinstance(x, Mapping) else iter(x))
                    self.expect(size)
                    break
                self.expect(size)
            else:
                levels.pop()
        return size

    def expect(self, size: int, slack: int = 1) -> int:
        """The size of a value; slack: of one that is not made yet, and perhaps smaller than estimated."""
        if size > slack * MAX_CHARS:
            raise SecurityError(f"a value of {size} characters, {MAX_CHARS} are allowed")
        return size

    def spend(self, size: int) -> None:
        self.total += size
        if self.total > MAX_TOTAL:
            raise SecurityError(f"values of more than {MAX_TOTAL} characters in all")

    def made(self, value: Any) -> Any:
        """The value, measured and counted."""
        size = self.size(value)
        if isinstance(value, (str, bytes)):
            self.spend(size)
        elif size:
            self.spend(PART * len(value))
        return value

    def grown(self, name: str, value: Any, args: Sequence[Any]) -> None:
        """Refuses a call of method or filter `name` of value whose result would be far too large."""
        if name == "replace" and len(args) > 1 and isinstance(value, str):
            old, new = str(args[0]), str(args[1])
            size = len(value) + value.count(old) * max(0, len(new) - len(old))
        elif name == "join":
            separator, parts = (value, args[0]) if isinstance(value, (str, bytes)) else (args[:1], value)
            size = self.size(parts) + self.size(separator) * len(parts)
        else:
            size = max(1, self.size(value))
            for x in args:
                size *= max(1, abs(x) if isinstance(x, int) else self.size(x))
        self.expect(size, slack=4)

    def formatted(self, text: str | bytes, mark: str, args: Any) -> None:
        """Refuses a format with wide fields, or with so many that its result would be far too large."""
        if isinstance(text, bytes):
            text = text.decode("latin-1")
        if mark == "%":
            wide = WIDE.search(text) is not None
        else:
            specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(text)]
            wide = any("{" in spec or re.search(r"\d{5}", spec) for spec in specs)
        if wide:
            raise SecurityError("a format with a width of 10000 or more, or one that an argument gives")
        fields = text.count(mark)
        widest = max((len(digits) for digits in re.findall(r"\d+", text)), default=0)
        self.expect(len(text) + fields * (self.size(args) + 10 ** min(widest, 4)), slack=4)

    # -- where values are made

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = (
                left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
            )
            if bits > MAX_BITS:
                raise SecurityError(f"a number of about {bits} bits")
        elif operator == "*":
            for times, what in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(what, "__len__") and len(what) * times > MAX_CHARS:
                    raise SecurityError(f"a sequence of {len(what) * times} elements")
        elif operator == "%" and isinstance(left, str | bytes):
            self.formatted(left, "%", right)
        return self.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = inspect.unwrap(obj) if inspect.isfunction(obj) else obj  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes) and name == "join" and args:
            args = (self.gathered(args[0]), *args[1:])
        given = [*args, *(v for k, v in kwargs.items() if k not in LOCALS)]
        if given:
            self.size(given)
        if isinstance(owner, str) and name in ("format", "format_map"):
            self.formatted(owner, "{", given)
        elif isinstance(owner, str | bytes | int) and name in GROWS:
            self.grown(name, owner, given)
        return self.made(super().call(context, obj, *args, **kwargs))

    def _measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, its arguments and result measured."""
        first = int(hasattr(function, "jinja_pass_arg"))  # whether jinja2 passes something before the value
        signature = inspect.signature(function) if name in GATHERS else None

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if signature is not None:
                bound = signature.bind(*args, **kwargs)
                values, attribute = args[first], bound.arguments.pop("attribute", None)
                if not isinstance(values, str | Mapping):
                    bound.arguments[list(signature.parameters)[first]] = self.gathered(values, attribute)
                args, kwargs = bound.args, bound.kwargs
            value, given = args[first], [*args[first + 1 :], *kwargs.values()]
            if given:
                self.size(given)
            if name == "format":
                self.formatted(str(value), "%", given)
            elif name in GROWS:
                self.grown(name, value, given)
            return self.made(function(*args, **kwargs))

        return measured

    def gathered(self, values: Iterable[Any], attribute: str | int | None = None) -> Iterable[Any]:
        """All that an iterator yields, or their attributes, as a measured list."""
        if attribute is None and isinstance(values, (str, bytes, *CONTAINERS)):
            return values
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        parts = list(values)
        self.made(parts)
        return parts

    def concat(self, parts: Iterable[str]) -> str:
        """The text of a block or macro."""
        joined: list[str] = []
        size = 0
        for part in parts:
            size = self.expect(size + len(part))
            joined.append(part)
        self.spend(size)
        return "".join(joined)

    @jinja2.pass_eval_context
    def concatenated(self, eval_ctx: EvalContext, *parts: Any) -> str:
        """The operator `~`."""
        return markup_join(parts) if eval_ctx.autoescape else str_join(parts)

    def same(self, value: Any) -> Any:
        """Only to be called: `call` measures."""
        return value


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    if len(format) > MAX_FORMAT:
        raise SecurityError(f"a date's format of {len(format)} characters, {MAX_FORMAT} are allowed")
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


class ChatTemplate:
    """A compiled chat template.

    Raises TemplateError if the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        self._env = _Environment()
        self._lock = threading.Lock()  # the counters belong to one rendering at a time
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
            self._env.steps = self._env.total = 0
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
