"""The story of a conversion: plan, gather text, weigh outputs, factorize, distil, measure, write."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from dbf2gguf.archs import context_length
from dbf2gguf.budget import Plan, linear_bits, plan_uniform
from dbf2gguf.calibrate import output_importance
from dbf2gguf.correct import factorize_model
from dbf2gguf.distill import Student, distill, with_linears
from dbf2gguf.evaluate import Quality, measure
from dbf2gguf.factorize import Factors, balance
from dbf2gguf.files import check_output, check_space, replacing
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import CARRIERS, DEFAULT_PRESET, EMBED_TYPES, Recipe, find_recipe
from dbf2gguf.source import Source, linear_names, load_model, load_tokenizer, open_source, split_fused
from dbf2gguf.text import rows_from_files, self_written_rows
from dbf2gguf.write import (
    dequantized,
    ggml_type,
    head_is_tied,
    verify,
    write_gguf,
)
from runtime.cli import peak_rss
from runtime.errors import FormatError, OptionError

GRADIENT_BATCH = 4
MAX_SEED = 1 << 32
COLLAPSED_KL = 3.0  # nats a token: beyond it a model says nothing sensible


@dataclass(frozen=True)
class Options:
    """What a conversion was asked to do: `convert`'s arguments, checked, the preset looked up."""

    preset: str
    recipe: Recipe
    calib: tuple[Path, ...]
    eval_text: Path | None
    embed_type: str
    carrier: str
    seed: int
    device: str
    quiet: bool


@dataclass(frozen=True)
class Report:
    """What a conversion did. Sizes in bytes, times in seconds."""

    plan: Plan
    file: Path | None  # None after a dry run
    file_bytes: int
    model_weights: int  # all parameters, embedding and norms included, tied ones once
    quality: Quality | None
    seconds: dict[str, float]
    peak_rss: int

    @property
    def file_bpw(self) -> float:
        """Bits of the whole file per weight of the whole model."""
        return self.file_bytes * 8 / self.model_weights

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "bpw": self.plan.bpw,
            "sign_bpw": self.plan.sign_bits / self.plan.weights,
            "file_bpw": self.file_bpw,
            "file_bytes": self.file_bytes,
            "quality": self.quality.describe() if self.quality else None,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "peak_rss_bytes": self.peak_rss,
        }


def convert(
    model: str | Path,
    out: str | Path,
    *,
    bpw: float = 1.2,
    preset: str = DEFAULT_PRESET,
    calib: Sequence[str | Path] = (),
    eval_text: str | Path | None = None,
    embed_type: str = "q8_0",
    carrier: str = "dbf1",
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> Report:
    """Factorize the causal language model at `model` and write it to `out` as GGUF.

    model      a Hugging Face folder with safetensors, or a GGUF file
    bpw        bits per weight over the linear layers: signs, filler and scales
    preset     a name of recipe.PRESETS; `overrides` are fields of recipe.Recipe, None for the preset's
    calib      text files to calibrate and distil on; the model writes what the recipe wants beyond them
    carrier    tensor type of the sign matrices: dbf1, or i8, which every GGUF reader can list
    eval_text  text of the quality receipt; without it, rows held out of the calibration text

    An existing `out` is replaced only by a complete new file. Raises DbfError with a message for the user.
    """
    options = Options(
        preset=preset,
        recipe=find_recipe(preset, **overrides),
        calib=tuple(map(Path, calib)),
        eval_text=Path(eval_text) if eval_text else None,
        embed_type=embed_type,
        carrier=carrier,
        seed=seed,
        device=device,
        quiet=quiet,
    )
    _check_options(options, threads)
    out = Path(out)
    if not dry_run:
        out = check_output(out, [Path(model), *options.calib, *filter(None, [options.eval_text])])
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="dbf2gguf-") as scratch:
        source = open_source(model, Path(scratch))
        skeleton = _skeleton(source)
        options = replace(options, embed_type=_fit_embed_type(skeleton, embed_type))
        plan = make_plan(source, skeleton, bpw)
        size = _file_size(plan, skeleton, options.embed_type)
        if not quiet:
            print(describe_plan(plan, size), file=sys.stderr)
        if dry_run:
            return Report(plan, None, size, _count_weights(skeleton), None, {}, peak_rss())
        check_space(out, size)
        return _run(source, out, plan, options)


def _run(source: Source, out: Path, plan: Plan, options: Options) -> Report:
    recipe, seed, embed_type = options.recipe, options.seed, options.embed_type
    stages: list[Stage] = []

    def stage(name: str, total: int) -> Stage:
        _return_freed_memory()
        stages.append(Stage(name, total, options.quiet))
        return stages[-1]

    torch.manual_seed(seed)
    with stage("load", 1):
        model = load_model(source, options.device)
        tokenizer = load_tokenizer(source)
    names = linear_names(model, source.arch)
    wanted = recipe.text_rows + (0 if options.eval_text else recipe.eval_rows)
    with stage("text", wanted * _row_tokens(model, recipe)) as progress:
        rows, held_out, written = _text(model, tokenizer, options, wanted, progress)
    with stage("gradients", min(recipe.gradient_rows, len(rows))) as progress:
        some = rows[: recipe.gradient_rows]
        importance = output_importance(model, names, some, GRADIENT_BATCH, progress)
    with stage("factorize", model.config.num_hidden_layers) as progress:
        some = rows[: recipe.correct_rows]
        factors = factorize_model(source, model, plan, some, importance, recipe, seed, progress)
    student = Student(model, names, factors, copy_dense=recipe.dense_rate > 0)
    factors.clear()  # the student has copies
    with stage("distil", recipe.distill_steps) as progress:
        history = distill(model, student, rows, recipe, seed, progress)
    factors = {name: as_stored(f) for name, f in student.factors().items()}
    with stage("measure", len(held_out)) as progress:
        final = as_read(student.model, names, factors, embed_type)
        quality = measure(model, final, held_out, progress)
    notes = _notes(options, plan, written, rows, held_out, quality, history)
    with stage("write", 1), replacing(out) as temporary:
        write_gguf(
            temporary,
            source,
            model,
            student.model,
            tokenizer,
            factors,
            embed_type,
            plan.bpw,
            notes,
            options.carrier,
        )
        verify(temporary, source, factors)
    seconds = {s.name: s.seconds for s in stages}
    report = Report(plan, out, out.stat().st_size, _count_weights(model), quality, seconds, peak_rss())
    if not options.quiet:
        print(describe_report(report), file=sys.stderr)
    return report


def _return_freed_memory() -> None:
    """To the system: glibc keeps what threads have freed, gigabytes after some stages."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def _text(
    model: nn.Module, tokenizer: Any, options: Options, wanted: int, stage: Stage
) -> tuple[Tensor, Tensor, int]:
    """Rows to calibrate and distil on, rows for the receipt, and how many of them the model wrote.

    wanted  how many of both, without those of --eval-text
    """
    recipe, seed = options.recipe, options.seed
    length = _row_tokens(model, recipe)
    rows = torch.empty(0, length, dtype=torch.int64)
    if options.calib:
        rows = rows_from_files(options.calib, tokenizer, wanted, length, seed)
        stage.step(n=rows.numel())
    written = wanted - len(rows)
    if written:
        own = self_written_rows(model, tokenizer, written, length, recipe.chat_share, seed, stage)
        order = torch.randperm(wanted, generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([rows, own])[order]
    if options.eval_text:
        held_out = rows_from_files([options.eval_text], tokenizer, recipe.eval_rows, length, seed)
        if not len(held_out):
            raise OptionError(f"--eval-text: {options.eval_text} holds less than {length} tokens, one row")
        return rows, held_out, written
    return rows[: recipe.text_rows], rows[recipe.text_rows :], written


def _row_tokens(model: nn.Module, recipe: Recipe) -> int:
    return min(recipe.row_tokens, context_length(model.config))


def make_plan(source: Source, model: nn.Module, bpw: float) -> Plan:
    """The inner size of every linear layer. Raises OptionError if `bpw` is out of range."""
    names = linear_names(model, source.arch)
    shapes = {name: tuple(model.get_submodule(path).weight.shape) for name, path in names.items()}
    return plan_uniform(shapes, bpw)


def as_stored(factors: Factors) -> Factors:
    """Factors with the scales that the file will hold: balanced, rounded to float16."""
    even = balance(factors)
    scales = [s.to(torch.float16).float() for s in (even.s_out, even.s_mid, even.s_in)]
    return Factors(even.a, even.b, *scales)


def as_read(
    model: nn.Module, names: dict[str, str], factors: dict[str, Factors], embed_type: str
) -> nn.Module:
    """The dense twin: the model that a reader of the file has, factors multiplied out, embedding and head as
    stored. `model` is left as it was."""
    linears = {}
    for name, path in names.items():
        weight, bias = factors[name].dense()[0], model.get_submodule(path).bias
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = bias
        linears[path] = linear
    twin = with_linears(model, linears)
    embedding = nn.Parameter(
        dequantized(model.get_input_embeddings().weight, embed_type), requires_grad=False
    )
    head = embedding
    if not head_is_tied(model):
        head = nn.Parameter(
            dequantized(model.get_output_embeddings().weight, embed_type), requires_grad=False
        )
    twin.get_input_embeddings().weight = embedding
    twin.get_output_embeddings().weight = head
    return twin


# --------------------------------------------------------------------------------------------------
# Checks before the work


def _check_options(options: Options, threads: int | None) -> None:
    """Everything that can be told without the model. Raises OptionError."""
    recipe, seed = options.recipe, options.seed
    if options.carrier not in CARRIERS:
        raise OptionError(f"--carrier {options.carrier!r} is unknown; there are {', '.join(CARRIERS)}")
    if options.embed_type not in EMBED_TYPES:
        raise OptionError(
            f"--embed-type {options.embed_type!r} is unknown; there are {', '.join(EMBED_TYPES)}"
        )
    _check_device(options.device)
    for file in [*options.calib, *([options.eval_text] if options.eval_text else [])]:
        if not file.is_file():
            raise OptionError(f"{file}: no such text file")
    least = {
        "row_tokens": 4,
        "text_rows": 1,
        "correct_rows": 1,
        "gradient_rows": 1,
        "eval_rows": 1,
        "admm_iterations": 1,
        "distill_steps": 0,
        "distill_batch": 1,
    }
    for name, minimum in least.items():
        value = getattr(recipe, name)
        if value < minimum:
            raise OptionError(f"--{name.replace('_', '-')} is {value}; wanted {minimum} or more")
    if not 0 <= recipe.chat_share <= 1:
        raise OptionError(f"--chat-share is {recipe.chat_share}; wanted 0 to 1")
    if threads is not None and threads < 1:
        raise OptionError(f"--threads is {threads}; wanted 1 or more")
    if not 0 <= seed < MAX_SEED:
        raise OptionError(f"--seed is {seed}; wanted 0 to {MAX_SEED - 1}")


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise OptionError(f"--device {device!r} is unknown; there are cpu, cuda, cuda:N")
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise OptionError(
            "--device cuda: this machine has no CUDA device that torch can use; take --device cpu"
        )
    if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")


def _skeleton(source: Source) -> nn.Module:
    """The model's modules and shapes without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True)
        if config.max_position_embeddings < 4:
            raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # values that no model can have: transformers raises anything
        line = " ".join(str(error).split()) or repr(error)
        raise FormatError(f"{source.path / 'config.json'}: transformers cannot use it: {line}") from error
    return split_fused(model.requires_grad_(False), source.arch)


def _fit_embed_type(skeleton: nn.Module, embed_type: str) -> str:
    """Rows must be whole blocks; where they are not, say so and take the next larger type that they fit."""
    width = skeleton.get_input_embeddings().weight.shape[1]
    fitting = embed_type
    while width % _block(fitting)[0]:
        fitting = "q8_0" if fitting == "q6_k" else "f16"
    if fitting != embed_type:
        print(
            f"note: embedding rows of {width} are no multiple of {_block(embed_type)[0]}: "
            f"stored as {fitting}, not {embed_type}",
            file=sys.stderr,
        )
    return fitting


def _block(embed_type: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    size: tuple[int, int] = gguf.GGML_QUANT_SIZES[ggml_type(embed_type)]
    return size


# --------------------------------------------------------------------------------------------------
# Figures


def _count_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _file_size(plan: Plan, skeleton: nn.Module, embed_type: str) -> int:
    """Bytes of tensor data, close to the file's size but for metadata."""
    factored = plan.weights
    dense = _count_weights(skeleton) - factored
    block, nbytes = _block(embed_type)
    return plan.bits // 8 + dense * nbytes // block


def _notes(
    options: Options,
    plan: Plan,
    written: int,
    rows: Tensor,
    held_out: Tensor,
    quality: Quality,
    history: list[float],
) -> dict[str, Any]:
    """The recipe and the receipt as metadata. No times: the same input gives the same bytes."""

    def digest(tokens: Tensor) -> str:
        return hashlib.sha256(tokens.to(torch.int32).numpy().tobytes()).hexdigest()

    texts = [file.name for file in options.calib] + ["self-written"] * (written > 0)
    notes: dict[str, Any] = {
        "dbf.sign_bits_per_weight": plan.sign_bits / plan.weights,
        "dbf.recipe.preset": options.preset,
        "dbf.recipe.bpw": plan.target,
        "dbf.recipe.seed": options.seed,
        "dbf.recipe.text": ", ".join(texts),
        "dbf.recipe.text_sha256": digest(rows),
        "dbf.recipe.distill_kl": json.dumps([round(kl, 4) for kl in history]),
        "dbf.quality.text_sha256": digest(held_out),
        "dbf.quality.context": held_out.shape[1],
    }
    notes |= {f"dbf.recipe.{key}": value for key, value in options.recipe.describe().items()}
    notes |= {f"dbf.quality.{key}": value for key, value in quality.describe().items()}
    notes |= {
        f"dbf.recipe.version.{name}": version(name) for name in ("torch", "transformers", "gguf", "numpy")
    }
    return notes


def describe_plan(plan: Plan, size: int) -> str:
    """The plan as a table: one line for each kind of layer."""
    lines = [f"{'layers':<24}{'rows':>7}{'cols':>7}{'rank':>10}{'bpw':>8}"]
    kinds: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for name, shape in plan.shapes.items():
        kinds.setdefault((name.rpartition(".")[2], shape), []).append(plan.ranks[name])
    for (kind, (rows, cols)), ranks in kinds.items():
        low, high = min(ranks), max(ranks)
        bits = sum(linear_bits(rows, cols, r) for r in ranks) / (len(ranks) * rows * cols)
        rank = f"{low}" if low == high else f"{low}-{high}"
        lines.append(f"{len(ranks):>4} x {kind:<17}{rows:>7}{cols:>7}{rank:>10}{bits:>8.3f}")
    lines.append(
        f"linear layers: {plan.bpw:.4f} bits per weight (asked for {plan.target:g}; signs alone "
        f"{plan.sign_bits / plan.weights:.4f}); tensors: {size / 2**20:.1f} MiB"
    )
    return "\n".join(lines)


def describe_report(report: Report) -> str:
    """The summary at the end."""
    total = sum(report.seconds.values())
    times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    lines = [
        f"{report.file}: {report.file_bytes / 2**20:.1f} MiB, {report.plan.bpw:.4f} bpw in the linear "
        f"layers, {report.file_bpw:.3f} bpw over the whole file",
    ]
    if report.quality is not None:
        q = report.quality
        lines.append(
            f"held-out text ({q.tokens} tokens): perplexity {q.ppl:.2f} (original {q.ppl_reference:.2f}), "
            f"KL {q.kl_mean:.3f} mean, {q.kl_p99:.2f} p99, same top token {q.same_top1:.1%}"
        )
        if q.kl_mean > COLLAPSED_KL:
            lines.append(
                f"warning: KL above {COLLAPSED_KL:g}: the model has collapsed; take more bits or a better "
                "preset"
            )
    lines.append(f"{total:.0f} s in all: {times}; peak memory {report.peak_rss / 2**20:.0f} MiB")
    return "\n".join(lines)
