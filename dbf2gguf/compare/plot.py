"""Perplexity against bits per weight."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbf2gguf.compare.rows import LLAMA_CPP, ONECOMP, ORIGINAL, OURS, PUBLISHED, Row
from runtime.errors import BackendError, OptionError

FORMATS = (".png", ".svg", ".pdf")
STYLES = {
    OURS: {"color": "#c03028", "marker": "o", "linewidth": 2},
    LLAMA_CPP: {"color": "#305090", "marker": "s", "linestyle": ""},
    PUBLISHED: {"color": "#707070", "marker": "^", "linestyle": ""},
    ONECOMP: {"color": "#308050", "marker": "D", "linestyle": ""},
}

LINES = ("-", "--", ":", "-.")


def check(path: Path) -> None:
    """Raises OptionError for a name of another ending, BackendError without matplotlib."""
    if path.suffix not in FORMATS:
        raise OptionError(f"--plot {path}: wanted a name that ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendError(
            "--plot needs the package matplotlib; run: pip install 'dbf2gguf[plot]'"
        ) from error


def curves(rows: Sequence[Row]) -> list[tuple[str, dict[str, Any], list[Row]]]:
    """Label, style and points by rising bits: of each peer, and of each preset of ours."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.bpw, row.ppl)):
        preset = re.search(r"\bpreset (\w+)", row.made_with) if row.series == OURS else None
        found.setdefault((row.series, preset[1] if preset else ""), []).append(row)
    lines = itertools.cycle(LINES)
    drawn = []
    for series, style in STYLES.items():
        presets = [preset for some, preset in found if some == series]
        for preset in sorted(presets, key=lambda preset: (preset != "best", preset)):
            label = f"{series}, {preset}" if preset else series
            look = style | {"linestyle": next(lines)} if series == OURS else style
            drawn.append((label, look, found[series, preset]))
    return drawn


def plot(path: Path, rows: Sequence[Row], form: str) -> None:
    """Draw rows to `path`, of format `form` (png, svg, pdf): lines of our presets, points of the peers."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dbf2gguf"  # the same rows give the same file
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    shown = [row for row in rows if row.series != ORIGINAL and row.bpw < 8]
    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for label, style, points in curves(shown):
        axes.plot([row.bpw for row in points], [row.ppl for row in points], label=label, **style)
        side = (0, 7) if style["linestyle"] in LINES[1:] else (0, -14)  # above all lines but the first
        for row in points:
            by_bits = row.series in (OURS, PUBLISHED)
            text, offset = (f"{row.bpw:.2f}", side) if by_bits else (row.name, (6, 4))
            axes.annotate(
                text, (row.bpw, row.ppl), xytext=offset, textcoords="offset points", fontsize=8,
                color=style["color"], ha="left" if offset[0] else "center",
            )  # fmt: skip
    originals = [row.ppl for row in rows if row.series == ORIGINAL]
    if originals:
        axes.axhline(originals[0], color="black", linestyle=":", linewidth=1, label="original")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", alpha=0.3)
    axes.margins(x=0.12)
    axes.set_xlabel("bits per weight of the linear layers, scales included")
    one = rows[0]
    axes.set_ylabel("perplexity (log)")
    axes.set_title(f"{one.model}, {one.text}: {one.chunks} chunks of {one.ctx} tokens", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    pyplot.close(figure)
