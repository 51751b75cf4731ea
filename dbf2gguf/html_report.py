"""OUT.report.html: what a file holds and what its conversion did, one page without scripts or network.

Bits, sizes, loss and receipt come from the file itself; times, memory and errors from the conversion, if the
page is made by one. Charts are inline SVG; colours are the style sheet's, which knows light and dark.
"""

from __future__ import annotations

import json
import math
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dbf2gguf.files import replacing
from dbf2gguf.inspect import (
    MIB,
    NOT_WEIGHTS,
    QUALITY,
    RECIPE,
    FactorizedLinear,
    count_weights,
    describe_architecture,
    escape,
    factorized_linears,
    linear_bpw,
)
from dbf2gguf.report import Report
from dbf2gguf.search import COLLAPSED_KL
from runtime.bench.machine import cpu_name
from runtime.format import FACTORS
from runtime.gguf import GgufFile

TEMPLATE = Path(__file__).with_name("report.html.j2")
WIDTH = 880  # of a chart, in its own units
EMBEDDINGS = ("token_embd.", "output.", "position_embd.")
NO_OPTIONS = ("model", "out", "overrides", "quiet", "dry_run", "report")
"""Arguments of `convert` that a command names without an option, or that do not change the file."""

LABEL, VALUE = 96, 44  # widths of a heat map's row labels and of its means
MOST_POINTS = 240  # of a curve; more steps are drawn as means of some

SVG = Markup(
    '<svg viewBox="0 0 {} {}" style="max-width:{}px;min-width:{}px" role="img" aria-label="{}">{}</svg>'
)
RECT = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" {}><title>{}</title></rect>')
CELL, HOLE = Markup('class="cell" fill-opacity="{}"'), Markup('class="hole"')
CIRCLE = Markup('<circle class="{}" cx="{}" cy="{}" r="3"><title>{}</title></circle>')


def page_path(out: Path) -> Path:
    """Where the page about the file `out` lies."""
    return out.with_name(out.name + ".report.html")


def write_page(report: Report) -> Report:
    """Write the page about a conversion beside its file; the report that knows where. The file is complete
    by then: if the page cannot be written, that is a warning."""
    assert report.file is not None
    path = page_path(report.file)
    with GgufFile(report.file) as file:
        text = page(file, report)
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"warning: {path}: cannot be written: {error.strerror}; the model is complete", file=sys.stderr)
        return report
    return replace(report, page=path)


def page(file: GgufFile, report: Report | None = None) -> str:
    """The page about a file, and about the conversion that wrote it, if that is given. HTML in UTF-8.

    Whatever the file's strings hold, they are text on the page.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, auto_reload=False
    )
    environment.filters |= {"mib": _mib, "seconds": _seconds, "number": _number}
    meta = file.metadata
    linears, _ = factorized_linears(file)
    weights = count_weights(file, linears)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=escape(str(meta.get("general.name", Path(file.path).name))),
        file=escape(str(file.path)),
        architecture=describe_architecture(file),
        size=file.size,
        weights=weights,
        file_bpw=file.size * 8 / weights if weights else 0.0,
        linear_bpw=linear_bpw(linears),
        linears=len(linears),
        quality=_numbers(meta, QUALITY),
        collapsed_kl=COLLAPSED_KL,
        receipt=_section(meta, QUALITY),
        recipe=_section(meta, RECIPE, without=("distill_kl",)),
        maps=_maps(linears, report),
        curve=loss_curve(_history(meta.get(f"{RECIPE}distill_kl"))),
        parts=_parts(file),
        report=report,
        machine=f"{cpu_name()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


# --------------------------------------------------------------------------------------------------
# What the page tells


def command_line(given: Mapping[str, Any]) -> str:
    """The command that does what `convert(**given)` did: of the shell, or of Python where an argument has no
    option of the shell."""
    from dbf2gguf.cli import convert_parser  # which imports, when it works, what imports this

    parser = convert_parser()
    words, named = [str(given["model"]), str(given["out"])], {}
    for name, value in given.items():
        value = list(map(str, value)) if isinstance(value, (list, tuple)) else value
        if name in NO_OPTIONS or value is None or value is False or value == parser.get_default(name):
            continue
        named[name] = str(value) if isinstance(value, Path) else value
        option = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        words += [option] if value is True else [word for one in values for word in (option, str(one))]
    if not parser.parse_known_args(words)[1]:
        return shlex.join(["dbf2gguf", *words])
    arguments = [repr(word) for word in words[:2]] + [f"{key}={value!r}" for key, value in named.items()]
    return f"from dbf2gguf.convert import convert\nconvert({', '.join(arguments)})"


@dataclass(frozen=True)
class _Part:
    """Some bytes of a file."""

    name: str
    nbytes: int


def _parts(file: GgufFile) -> list[_Part]:
    """What the bytes of the file are for; all of them."""
    sizes = dict.fromkeys(("signs", "scales", "embedding and head", "norms, biases and the rest"), 0)
    for name, info in file.tensors.items():
        suffix = name.rpartition(".")[2]
        if suffix in FACTORS:
            sizes["signs" if suffix in ("dbf_a", "dbf_b") else "scales"] += info.nbytes
        elif name.startswith(EMBEDDINGS) and name not in NOT_WEIGHTS:
            sizes["embedding and head"] += info.nbytes
        else:
            sizes["norms, biases and the rest"] += info.nbytes
    sizes["metadata: tokenizer, recipe, names"] = file.size - sum(sizes.values())
    return [_Part(*item) for item in sizes.items()]


def _maps(linears: Sequence[FactorizedLinear], report: Report | None) -> list[dict[str, Any]]:
    """The heat maps: title, what it shows, the drawing."""
    errors = report.errors if report else None
    all_maps = [
        (
            "Bits per weight",
            "Signs, filler and scales, over the weights that they stand for.",
            {x.name: x.bpw for x in linears},
        ),
        (
            "Error of the factorization",
            "‖W′ − W̃‖ / ‖W′‖, weighted by the importance of inputs and outputs, before distillation. W′ is "
            "the weight as corrected for the error of the layers before it.",
            errors.factorized if errors else {},
        ),
        (
            "Difference from the original weights",
            "‖W − W̃‖ / ‖W‖, not weighted, after distillation, as stored. Correction and distillation move "
            "weights on purpose: this says how far, not how good.",
            errors.weights if errors else {},
        ),
    ]
    made = [(title, note, heat_map(values)) for title, note, values in all_maps]
    return [{"title": title, "note": note, "svg": svg} for title, note, svg in made if svg]


def _section(meta: Mapping[str, Any], prefix: str, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    found = [(key.removeprefix(prefix), meta[key]) for key in meta if key.startswith(prefix)]
    return [
        (escape(key), f"{value:.6g}" if isinstance(value, float) else escape(str(value)))
        for key, value in found
        if key not in without
    ]


def _numbers(meta: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        key.removeprefix(prefix): float(meta[key])
        for key in meta
        if key.startswith(prefix) and isinstance(meta[key], (int, float))
    }


def _history(text: Any) -> list[float]:
    """The loss of each step, as the recipe keeps it; empty if there is none that makes sense."""
    try:
        return [float(value) for value in json.loads(text)]
    except (TypeError, ValueError, RecursionError):
        return []


# --------------------------------------------------------------------------------------------------
# Charts


def heat_map(values: Mapping[str, float]) -> Markup | None:
    """Values of linear layers, "blk.3.attn_q" -> value, as layers by kinds; None without any."""
    cells: dict[tuple[str, int], float] = {}
    for name, value in values.items():
        if match := re.fullmatch(r"blk\.(\d{1,5})\.(.+)", name):
            cells[match[2], int(match[1])] = value
    finite = [value for value in cells.values() if math.isfinite(value)]
    if not finite:
        return None
    kinds, layers = list(dict.fromkeys(kind for kind, _ in cells)), sorted({layer for _, layer in cells})
    low, high = min(finite), max(finite)
    span = max(high - low, 0.05 * abs(high)) or 1.0  # what differs little looks alike
    low = high - span
    width = min(44.0, max(9.0, (WIDTH - LABEL - VALUE) / len(layers)))
    height = 24 if len(kinds) <= 12 else 15
    numbers = width >= 24 and height >= 20
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * width >= 20 or step == 100)
    gap = 2 if width >= 14 else 1
    right, bottom = LABEL + width * len(layers), height * len(kinds)
    drawn = []
    for row, kind in enumerate(kinds):
        y, some = row * height, []
        drawn.append(_text(LABEL - 8, y + height / 2 + 4, kind, "label end"))
        for column, layer in enumerate(layers):
            value = cells.get((kind, layer))
            if value is None:
                continue
            known, x = math.isfinite(value), LABEL + column * width
            share = (value - low) / span if known else 0.0
            look = CELL.format(f"{0.07 + 0.73 * share:.3f}") if known else HOLE
            place = map(_at, (x, y, width - gap, height - gap))
            drawn.append(RECT.format(*place, look, f"layer {layer}, {kind}: {value:.4f}"))
            if numbers:
                drawn.append(_text(x + (width - gap) / 2, y + height / 2 + 3, f"{value:.2f}", "in-cell"))
            if known:
                some.append(value)
        if some:
            drawn.append(_text(right + 8, y + height / 2 + 4, f"{sum(some) / len(some):.3f}", "value"))
    for column, layer in enumerate(layers):
        if layer % every == 0:
            drawn.append(_text(LABEL + (column + 0.5) * width - gap / 2, bottom + 13, str(layer), "tick"))
    drawn.append(_text(LABEL - 8, bottom + 13, "layer", "tick end"))
    drawn.append(_text(right + 8, bottom + 13, "mean", "tick start"))
    label = f"heat map, layers by kinds, from {min(finite):.3f} (pale) to {high:.3f}"
    return _svg(right + VALUE, bottom + 20, drawn, label)


def loss_curve(history: Sequence[float]) -> Markup | None:
    """The mean KL of each step of the distillation; None without steps."""
    points = [(step, kl) for step, kl in enumerate(history, 1) if math.isfinite(kl)]
    if not points:
        return None
    size = -(-len(points) // MOST_POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    left, top, height, steps = 48, 10, 220, len(history)
    high = max(kl for _, kl in points) or 1.0
    tick = _round_step(high / 5)
    high = math.ceil(high / tick - 1e-9) * tick
    span = max(1, steps - 1)

    def x(step: float) -> float:
        return left + (step - 1) / span * (WIDTH - left - 20)

    def y(kl: float) -> float:
        return top + (1 - kl / high) * height

    drawn = []
    for number in range(round(high / tick) + 1):
        at = number * tick
        drawn.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                left, WIDTH - 8, _at(y(at)), _at(y(at))
            )
        )
        drawn.append(_text(left - 8, y(at) + 4, f"{at:g}", "tick end"))
    step_tick = max(1, round(_round_step(steps / 8)))
    for step in sorted({1, *range(step_tick, steps + 1, step_tick)}):
        drawn.append(_text(x(step), top + height + 17, str(step), "tick"))
    drawn.append(_text(left - 8, top + height + 17, "step", "tick end"))
    middles = [(sum(s for s, _ in some) / len(some), sum(kl for _, kl in some) / len(some)) for some in bins]
    if size > 1:
        edge = [(m, max(kl for _, kl in some)) for (m, _), some in zip(middles, bins, strict=True)]
        edge += [(m, min(kl for _, kl in some)) for (m, _), some in zip(middles, bins, strict=True)][::-1]
        drawn.append(Markup('<polygon class="band" points="{}"/>').format(_path(edge, x, y)))
    if len(middles) > 1:
        drawn.append(Markup('<polyline class="line" points="{}"/>').format(_path(middles, x, y)))
    dots = "dot" if len(middles) <= 60 else "hit"
    for some, (middle, kl) in zip(bins, middles, strict=True):
        steps_of = f"step {some[0][0]}" if len(some) == 1 else f"steps {some[0][0]} to {some[-1][0]}"
        drawn.append(CIRCLE.format(dots, _at(x(middle)), _at(y(kl)), f"{steps_of}: KL {kl:.4f}"))
    return _svg(WIDTH, top + height + 24, drawn, "mean KL of each distillation step")


def _svg(width: float, height: float, drawn: Sequence[Markup], label: str) -> Markup:
    """A drawing that shrinks with its place until its text would be too small to read."""
    return SVG.format(*map(_at, (width, height, width, 0.75 * width)), label, Markup("").join(drawn))


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text x="{}" y="{}" class="{}">{}</text>').format(_at(x), _at(y), style, escape(text))


def _path(points: Sequence[tuple[float, float]], x: Any, y: Any) -> str:
    return " ".join(f"{_at(x(a))},{_at(y(b))}" for a, b in points)


def _at(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten: the smallest that is `least` or more."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def _mib(nbytes: float) -> str:
    return f"{nbytes / MIB / 1024:.2f} GiB" if nbytes >= 1024 * MIB else f"{nbytes / MIB:.1f} MiB"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 100 else f"{value:.2f}"
