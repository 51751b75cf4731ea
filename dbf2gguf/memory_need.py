"""How much memory a conversion takes, before it begins; docs/MEMORY.md compares it with what was measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dbf2gguf import correct, evaluate
from dbf2gguf.archs import features
from dbf2gguf.budget import Plan
from dbf2gguf.calibrate import HEAD_TOKENS
from dbf2gguf.distill import PASS_TOKENS
from dbf2gguf.options import Options
from dbf2gguf.source import Source, decoder_layers
from dbf2gguf.team import torchrun_size
from runtime.errors import OptionError

FLOAT = 4
EXPERT_GROUPS = (("ffn_gate", "ffn_up"), ("ffn_down",))
"""Of all experts, what is corrected together."""


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
    recipe, f, config = options.recipe.at(plan.target), features(skeleton.config), skeleton.config
    width, vocabulary, n_layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    layers = [_weights(layer) for layer in decoder_layers(skeleton, source.arch)]
    ends = vocabulary * width * FLOAT
    block = max(*layers, ends // FLOAT) * FLOAT
    d_ff = f.d_shared + f.n_experts_used * f.d_expert if f.n_experts else f.d_ff
    heads = config.num_attention_heads * row_tokens * FLOAT if f.attn_softcap else 0  # all scores of a token
    token = (6 * width + 3 * d_ff) * FLOAT + 2 * heads  # activations of a block
    head = ends + 4 * HEAD_TOKENS * vocabulary * FLOAT
    state = row_tokens * width * FLOAT  # of one row
    rows = min(recipe.correct_rows, recipe.text_rows)

    batch = min(correct.BATCH_ROWS, rows) * row_tokens
    largest = max(r * c for r, c in plan.shapes.values()) * FLOAT
    gradients = max(layers) * FLOAT + 4 * row_tokens * 3 * token
    correction = max(_correction(plan, group) for group in _groups(source, f.n_experts)) + batch * token
    measuring = max(evaluate.BATCH_ROWS * row_tokens * token + largest, 2 * head)
    streamed = base + max(gradients, head, correction, measuring, 2 * ends + largest)

    weights = _weights(skeleton) * FLOAT
    latents = sum(rank * sum(plan.shapes[name]) for name, rank in plan.ranks.items()) * FLOAT
    linears = plan.weights * FLOAT
    records = rows * (7 * state + row_tokens * d_ff * FLOAT)  # of one block, for its correction
    kept = latents if recipe.distill_steps else 0  # otherwise they are in files
    stages = [kept + records + correction, kept + linears + 2 * ends + measuring]
    if recipe.allocation != "uniform":
        stages.append(2 * linears + 2 * latents)
    if recipe.distill_steps:
        passing = PASS_TOKENS * n_layers * (width * FLOAT if recipe.checkpointing == "on" else 2 * token)
        dense = 4 * (weights - linears) if recipe.dense_rate else 0
        stages.append(5 * latents + 2 * linears + dense + passing)
    whole = base + weights + max(stages)
    disk = 2 * rows * state + records + n_layers * min(recipe.gradient_rows, recipe.text_rows) * state
    return Need(base, whole, streamed, block, disk + max(layers) * FLOAT + 2 * ends)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _groups(source: Source, n_experts: int) -> list[list[str]]:
    """The layers of the first block that are corrected together."""
    groups = [list(group.linears) for group in source.arch.groups]
    if source.arch.experts is not None:
        ends = source.arch.experts.branches(n_experts)
        groups += [[name + end for end in ends for name in names] for names in EXPERT_GROUPS]
    return [[f"blk.0.{name}" for name in group] for group in groups]


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
    at_a_time = 1 if largest >= correct.LARGE else torch.get_num_threads()
    return max(moments, targets + sum(sorted(admm)[-at_a_time:])) * FLOAT


def choose_streamed(need: Need, source: Source, options: Options) -> bool:
    """Whether the model is to be streamed: where it does not fit otherwise. Without --max-memory that is what
    the machine has, and no promise.

    Raises OptionError, with the number that it would need, if a conversion within --max-memory is impossible.
    """
    limit, obstacles = options.max_memory, list(_obstacles(source, options))
    if limit is None:
        return need.whole > _physical() and not obstacles
    if need.whole <= limit:
        return False
    wanted = f"--max-memory is {describe_size(limit)}"
    if obstacles:
        raise OptionError(
            f"{wanted}; with all weights in memory this conversion needs about {describe_size(need.whole)}, "
            f"with weights and states in files {describe_size(need.streamed)}, but {'; '.join(obstacles)}"
        )
    if need.streamed > limit:
        raise OptionError(
            f"{wanted}; this conversion needs about {describe_size(need.streamed)}, with weights and states "
            "in files"
        )
    return True


def _obstacles(source: Source, options: Options) -> Iterator[str]:
    """Why the model cannot be streamed."""
    recipe = options.recipe
    if source.arch.experts is not None:
        yield f"a model with experts ({source.arch.model_type}) is converted with all weights in memory"
    if recipe.distill_steps:
        yield "distillation needs all weights: add --distill-steps 0"
    if recipe.allocation not in ("auto", "uniform"):  # auto is uniform without distillation
        yield f"--allocation {recipe.allocation} needs all weights: take uniform"
    if not options.calib or recipe.written_share:
        yield "the model cannot write text: give enough of it with --calib, and add --written-share 0"
    if options.device != "cpu":
        yield f"that is for --device cpu, not {options.device}"
    if torchrun_size() > 1:
        yield "torchrun's other processes hold all weights"


def _physical() -> int:
    """Bytes of the machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # a system that does not tell
        return sys.maxsize
