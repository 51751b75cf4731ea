"""How much memory a conversion takes, before it begins; docs/MEMORY.md compares it with what was measured."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dbf2gguf import correct, evaluate
from dbf2gguf.archs import features
from dbf2gguf.budget import Plan
from dbf2gguf.calibrate import HEAD_TOKENS
from dbf2gguf.distill import PASS_TOKENS
from dbf2gguf.options import Options
from dbf2gguf.source import Source, decoder_layers
from runtime.errors import OptionError

FLOAT = 4
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """ "6G" -> bytes; K, M, G, T are powers of 1024. Raises OptionError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise OptionError(f"--max-memory is {text!r}; wanted a size such as 800M or 6G")
    return int(float(found[1]) * UNITS[found[2].upper()])


def describe_size(size: int) -> str:
    return f"{size / 2**30:.1f}G" if size >= 2**30 else f"{size / 2**20:.0f}M"


@dataclass(frozen=True)
class Need:
    """Bytes that a conversion takes at its peak, about."""

    base: int  # that the process has already
    whole: int  # with all weights in memory
    streamed: int  # with weights and states in files
    block: int  # of these, the weights of the largest block in float32
    disk: int  # of the files

    def describe(self, streamed: bool) -> str:
        return (
            f"peak memory: about {describe_size(self.streamed if streamed else self.whole)}"
            f"{', weights and states in files' if streamed else ''}"
        )


def find_need(
    source: Source, skeleton: nn.Module, plan: Plan, options: Options, row_tokens: int, base: int
) -> Need:
    """
    skeleton  the model's modules and shapes
    base      bytes that the process has already
    """
    recipe, f, config = options.recipe, features(skeleton.config), skeleton.config
    width, vocabulary = config.hidden_size, config.vocab_size
    layers = [_weights(layer) for layer in decoder_layers(skeleton, source.arch)]
    ends = vocabulary * width * FLOAT
    block = max(*layers, ends // FLOAT) * FLOAT
    heads = config.num_attention_heads * row_tokens * FLOAT if f.attn_softcap else 0  # all scores of a token
    token = (6 * width + 3 * f.d_ff) * FLOAT + 2 * heads  # activations of a block
    head = ends + 4 * HEAD_TOKENS * vocabulary * FLOAT
    state = row_tokens * width * FLOAT  # of one row
    rows = min(recipe.correct_rows, recipe.text_rows)

    batch = min(correct.BATCH_ROWS, rows) * row_tokens
    largest = max(r * c for r, c in plan.shapes.values()) * FLOAT
    gradients = max(layers) * FLOAT + 4 * row_tokens * 3 * token
    correction = max(_correction(plan, group) for group in _groups(source, plan)) + batch * token
    measuring = max(evaluate.BATCH_ROWS * row_tokens * token + largest, 2 * head)
    streamed = base + max(gradients, head, correction, measuring, 2 * ends + largest)

    weights = _weights(skeleton) * FLOAT
    latents = sum(rank * sum(plan.shapes[name]) for name, rank in plan.ranks.items()) * FLOAT
    linears = plan.weights * FLOAT
    records = rows * (7 * state + row_tokens * f.d_ff * FLOAT)  # of one block, for its correction
    training = 4 * latents + 2 * linears + 2 * PASS_TOKENS * len(layers) * token
    after = [records + correction, linears + 2 * ends + measuring]
    whole = base + weights + latents + max([*after, training] if recipe.distill_steps else after)
    kept = 2 * rows * state + records + len(layers) * min(recipe.gradient_rows, recipe.text_rows) * state
    return Need(base, whole, streamed, block, kept + max(layers) * FLOAT + 2 * ends)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _groups(source: Source, plan: Plan) -> Iterable[list[str]]:
    """The layers of the first block that are corrected together."""
    return [[f"blk.0.{name}" for name in group.linears] for group in source.arch.groups]


def _correction(plan: Plan, names: list[str]) -> int:
    """Bytes that the correction of a group takes, whatever comes after what."""
    shapes = [plan.shapes[name] for name in names]
    targets = sum(rows * cols for rows, cols in shapes)
    largest = max(rows * cols for rows, cols in shapes)
    moments = 3 * shapes[0][1] ** 2 + targets + 5 * largest  # the solver copies what it is given
    admm = [
        4 * rows * cols + rank * (2 * (rows + cols) + 3 * max(rows, cols)) + 4 * rank**2
        for (rows, cols), rank in zip(shapes, (plan.ranks[name] for name in names), strict=True)
    ]
    together = max(admm) if largest >= correct.LARGE else sum(admm)
    return max(moments, targets + together) * FLOAT


def choose_streamed(need: Need, limit: int | None, options: Options) -> bool:
    """Whether the model is to be streamed: where it does not fit otherwise.

    limit  bytes of --max-memory; None for what the machine has, which is then no promise

    Raises OptionError, with the number that it would need, if a conversion within the limit is impossible.
    """
    why_not = _why_not_streamed(options)
    if limit is None:
        return need.whole > _physical() and why_not is None
    if need.whole <= limit:
        return False
    wanted = f"--max-memory is {describe_size(limit)}"
    if why_not is not None:
        raise OptionError(
            f"{wanted}; with all weights in memory this conversion needs about {describe_size(need.whole)}; "
            f"with weights and states in files about {describe_size(need.streamed)}, but {why_not}"
        )
    if need.streamed > limit:
        raise OptionError(
            f"{wanted}; this conversion needs about {describe_size(need.streamed)}, with weights and states "
            "in files"
        )
    return True


def _why_not_streamed(options: Options) -> str | None:
    if options.recipe.distill_steps:
        return "distillation needs all weights: add --distill-steps 0"
    if options.device != "cpu":
        return f"that is for --device cpu, not {options.device}"
    if not options.calib:
        return "then the model cannot write its own text: give it some with --calib"
    return None


def _physical() -> int:
    """Bytes of the machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # a system that does not tell
        return sys.maxsize
