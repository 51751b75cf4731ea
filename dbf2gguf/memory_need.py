"""How much memory a conversion takes, before it begins; docs/MEMORY.md compares it with what was measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from dbf2gguf import correct, evaluate
from dbf2gguf.activations import BACKWARD, record_bytes, row_bytes, rows_together
from dbf2gguf.archs import EXPERT_GROUPS, features, head_dim
from dbf2gguf.budget import Plan
from dbf2gguf.calibrate import GRADIENT_BATCH, head_tokens
from dbf2gguf.distill import PASS_TOKENS
from dbf2gguf.options import Options
from dbf2gguf.parallel import AHEAD
from dbf2gguf.source import Source, count_weights, decoder_layers
from dbf2gguf.tables import dataset_of
from dbf2gguf.team import torchrun_size
from dbf2gguf.text import BATCH_TOKENS, CONTEXT
from runtime.cli import machine_memory
from runtime.errors import OptionError

FLOAT = 4
LINEAR = 24 << 10
"""Bytes that a linear layer takes beside weights and vectors: modules, names, what the file says of it."""

TOKEN_BYTES = 6
"""Bytes of a text file that certainly hold a token, about."""

BESIDES = 2**26
"""Bytes of what comes with the work and is not counted: buffers of libraries, pages of files."""


def describe_size(size: int) -> str:
    return f"{size / 2**30:.1f}G" if size >= 2**30 else f"{size / 2**20:.0f}M"


@dataclass(frozen=True)
class Need:
    """Bytes that a conversion takes at its peak, about."""

    base: int  # that the process has already
    whole: int  # with all weights in memory
    streamed: int  # with weights and states in files
    block: int  # of these, the weights of the largest block in float32
    disk: int  # of these files
    kept: int = 0  # of what is finished, on the disk

    def on_disk(self, streamed: bool) -> int:
        return self.kept + (self.disk if streamed else 0)

    def at_least(self, peak: int) -> Need:
        """The same, of a process that holds so much before it begins."""
        return replace(self, whole=max(self.whole, peak), streamed=max(self.streamed, peak))

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
    base += BESIDES
    recipe, f, config = options.recipe.at(plan.target), features(skeleton.config), skeleton.config
    width, vocabulary, n_layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    layers = [count_weights(layer) for layer in decoder_layers(skeleton, source.arch)]
    ends = vocabulary * width * FLOAT
    block = max(*layers, ends // FLOAT) * FLOAT
    together = head_tokens(vocabulary) * vocabulary * FLOAT
    logits = 4 * together  # of the text's loss; of both models, to be compared
    state = row_tokens * width * FLOAT  # of one row
    row = row_bytes(config, row_tokens)
    rows = min(recipe.correct_rows, recipe.text_rows)

    passing = rows_together(config, row_tokens, min(correct.BATCH_ROWS, rows)) * row
    scored = rows_together(config, row_tokens, min(evaluate.BATCH_ROWS, recipe.eval_rows)) * row
    backward = rows_together(config, row_tokens, GRADIENT_BATCH, BACKWARD) * row * BACKWARD
    largest = max(r * c for r, c in plan.shapes.values()) * FLOAT
    gradients = max(layers) * FLOAT + backward
    correction = max(_correction(plan, group, passing) for group in _corrected(source, f.n_experts))
    measuring = max(scored + 3 * largest, ends + logits)
    vectors = sum(plan.ranks[name] + sum(shape) for name, shape in plan.shapes.items()) * FLOAT
    always = base + len(plan.shapes) * LINEAR + vectors
    streamed = always + max(gradients, correction, measuring)

    weights = count_weights(skeleton) * FLOAT
    latents = plan.sign_bits * FLOAT
    linears = plan.weights * FLOAT
    records = rows * record_bytes(config, row_tokens)  # of one block, for its correction
    waiting = 2 * max(layers) * FLOAT if f.n_experts else 3 * largest  # targets, what factors give
    kept = latents if recipe.distill_steps else 0  # otherwise they are in files
    stages = [
        n_layers * backward // 2 + backward + logits,  # about half of it waits for the pass back
        kept + records + waiting + correction,
        kept + linears + 2 * ends + measuring,
    ]
    if options.device == "cpu" and _may_write(options, row_tokens):
        rounded = recipe.dtype == "bfloat16"
        cache = 2 * n_layers * f.n_kv_heads * head_dim(config) * (2 if rounded else FLOAT)  # of one token
        one_core = BATCH_TOKENS * cache + 5 * BATCH_TOKENS // CONTEXT * vocabulary * FLOAT
        stages.append(torch.get_num_threads() * one_core + (weights // 2 if rounded else 0))  # a copy
    if recipe.allocation != "uniform":
        stages.append(2 * linears + 2 * latents)
    if recipe.distill_steps:
        held = width * FLOAT if recipe.checkpointing == "on" else 2 * row // row_tokens
        dense = 4 * (weights - linears) if recipe.dense_rate else 0
        stages.append(5 * latents + 2 * linears + dense + PASS_TOKENS * n_layers * held + logits)
    whole = base + weights + max(stages)
    disk = 2 * rows * state + records + n_layers * min(recipe.gradient_rows, recipe.text_rows) * state
    # factors, and those in training with Adam's moments, twice while one file takes the place of another
    finished = 7 * latents if recipe.distill_steps else latents // 32
    return Need(base, whole, streamed, block, disk + 2 * max(layers) * FLOAT + 2 * ends, finished)


def _may_write(options: Options, row_tokens: int) -> bool:
    """Whether the model is to write text, or the files are so small that it may have to."""
    recipe = options.recipe
    if not options.calib or recipe.written_share:
        return True
    if any(map(dataset_of, options.calib)):
        return False
    wanted = (recipe.text_rows + recipe.eval_rows) * row_tokens
    return sum(file.stat().st_size for file in options.calib if file.is_file()) < TOKEN_BYTES * wanted


@dataclass(frozen=True)
class _Corrected:
    """Layers that are corrected together."""

    names: list[str]  # of the first block
    residual: bool  # whether they make up for what the residual stream lacks
    experts: bool


def _corrected(source: Source, n_experts: int) -> Iterator[_Corrected]:
    for group in source.arch.groups:
        yield _Corrected([f"blk.0.{name}" for name in group.linears], group.residual is not None, False)
    if source.arch.experts is not None:
        ends = source.arch.experts.branches(n_experts)
        for names in EXPERT_GROUPS:
            yield _Corrected([f"blk.0.{name}{end}" for end in ends for name in names], False, True)


def _correction(plan: Plan, group: _Corrected, passing: int) -> int:
    """Bytes that correcting and factorizing a group takes, whatever comes after what.

    passing  bytes of activations
    """
    shapes = [plan.shapes[name] for name in group.names]
    sizes = [rows * cols for rows, cols in shapes]
    largest, moments = max(sizes), 2 * max(cols for _, cols in shapes) ** 2
    if group.experts:
        correcting = FLOAT * (moments + 6 * largest) + 2 * passing  # gate and up, then and now
    else:
        correcting = max(
            FLOAT * (moments + largest * (1 + group.residual)) + passing,  # a weight is read for the pass
            FLOAT * (moments + sum(sizes) + largest),  # W C
        )
    taken, admm = [], []  # by a layer that waits or is done, and by one that is at work
    for name, (rows, cols) in zip(group.names, shapes, strict=True):
        rank = plan.ranks[name]
        taken.append(max(rows * cols, rank * (rows + cols)))
        work = rank * (5 * max(rows, cols) + 3 * min(rows, cols)) + 4 * rank**2
        admm.append(rows * cols + work)
    threads = torch.get_num_threads()
    alone = largest >= correct.LARGE and not group.experts
    return max(
        correcting,
        FLOAT * (max(admm) if alone else sum(sorted(taken)[-AHEAD * threads :] + sorted(admm)[-threads:])),
        FLOAT * 6 * largest,  # the error of the factors
    )


def choose_streamed(need: Need, source: Source, options: Options) -> bool:
    """Whether the model is to be streamed: where it does not fit otherwise. Without --max-memory that is what
    the machine has, and no promise.

    Raises OptionError, with the number that it would need, if a conversion within --max-memory is impossible.
    """
    limit, obstacles = options.max_memory, list(_obstacles(source, options))
    if limit is None:
        return need.whole > (machine_memory() or sys.maxsize) and not obstacles
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
