"""The story of a conversion: plan, gather text, weigh outputs, factorize, distil, measure, write."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from dbf2gguf.archs import context_length
from dbf2gguf.budget import MAX_BPW, Plan, Shape, least_bpw, plan_uniform
from dbf2gguf.calibrate import output_importance
from dbf2gguf.correct import factorize_model
from dbf2gguf.distill import Student, distill, with_linears
from dbf2gguf.evaluate import Quality, measure
from dbf2gguf.factorize import Factors, balance
from dbf2gguf.files import check_output, check_space, replacing
from dbf2gguf.memory import choose_streamed, find_need, parse_size
from dbf2gguf.options import Options, check_options
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import DEFAULT_PRESET, Recipe, find_recipe
from dbf2gguf.report import Report, describe_plan, describe_refusal, describe_report, describe_try
from dbf2gguf.search import COLLAPSED_KL, bpw_grid, smallest
from dbf2gguf.source import (
    Source,
    _linear,
    linear_names,
    load_model,
    load_tokenizer,
    open_source,
    split_fused,
)
from dbf2gguf.stream import KeptFactors, Scratch, SignsOnly, is_streamed, put_on_disk, stream_model
from dbf2gguf.stream import output_importance as streamed_importance
from dbf2gguf.text import rows_from_files, self_written_rows
from dbf2gguf.work import Work, digest_of
from dbf2gguf.write import (
    dequantized,
    ggml_type,
    head_is_tied,
    verify,
    write_gguf,
)
from runtime.cli import peak_rss
from runtime.errors import FormatError, OptionError, QualityError

GRADIENT_BATCH = 4
DEFAULT_BPW = 1.2


def convert(
    model: str | Path,
    out: str | Path,
    *,
    bpw: float | None = None,
    max_kl: float | None = None,
    preset: str = DEFAULT_PRESET,
    calib: Sequence[str | Path] = (),
    eval_text: str | Path | None = None,
    embed_type: str = "q8_0",
    carrier: str = "dbf1",
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> Report:
    """Factorize the causal language model at `model` and write it to `out` as GGUF.

    model      a Hugging Face folder with safetensors, or a GGUF file
    bpw        bits per weight over the linear layers: signs, filler and scales; 1.2 if there is no max_kl
    max_kl     instead: take the fewest bits per weight, of multiples of 0.05, whose mean KL on the held-out
               rows is no more; each try is factorized and distilled anew
    preset     a name of recipe.PRESETS; `overrides` are fields of recipe.Recipe, None for the preset's
    calib      text files to calibrate and distil on; the model writes what the recipe wants beyond them
    carrier    tensor type of the sign matrices: dbf1, or i8, which every GGUF reader can list
    eval_text  text of the quality receipt; without it, rows held out of the calibration text
    max_memory such as "6G": take no more; without distillation, weights and states then lie in files while
               they are not in use, and the bytes are the same
    force      write the file even if its mean KL is above COLLAPSED_KL or not finite

    What is finished is kept in the folder `out`.work until the end: a conversion that was stopped goes on
    from there when it is called again with the same arguments, and ends with the same bytes.

    An existing `out` is replaced only by a complete new file. Raises DbfError with a message for the user,
    among them QualityError if no file is good enough to be written.
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
        max_kl=max_kl,
        force=force,
    )
    check_options(options, threads)
    limit = None if max_memory is None else parse_size(max_memory)
    if max_kl is not None and (bpw is not None or dry_run):
        raise OptionError(
            f"--max-kl finds the bits per weight; leave out {'--dry-run' if dry_run else '--bpw'}"
        )
    out = Path(out)
    if not dry_run:
        out = check_output(out, [Path(model), *options.calib, *filter(None, [options.eval_text])])
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="dbf2gguf-") as scratch:
        source = open_source(model, Path(scratch))
        skeleton = _skeleton(source)
        options = replace(options, embed_type=_fit_embed_type(skeleton, embed_type))
        if max_kl is None:
            grid = [DEFAULT_BPW if bpw is None else bpw]
        else:
            grid = bpw_grid(least_bpw(_linear_shapes(source, skeleton)), MAX_BPW) or [MAX_BPW]
        plan = make_plan(source, skeleton, grid[0])
        size = _file_size(plan, skeleton, options.embed_type)
        need = find_need(
            source,
            skeleton,
            make_plan(source, skeleton, grid[-1]),
            options,
            _row_tokens(skeleton, options.recipe),
            peak_rss(),
        )
        if max_kl is None and not quiet:
            print(describe_plan(plan, size), file=sys.stderr)
        streamed = choose_streamed(need, limit, options)
        if not quiet:
            print(need.describe(streamed), file=sys.stderr)
        if dry_run:
            return Report(plan, None, size, _count_weights(skeleton), None, {}, peak_rss())
        check_space(out, size + streamed * need.disk)
        work = Work.open(out.with_name(out.name + ".work"), _key(source, options), quiet)
        try:
            with Scratch(work.folder / "states") as states:
                report = _run(source, skeleton, out, grid, options, work, states if streamed else None)
        except BaseException:
            if not work.parts():
                work.remove()
            elif not quiet:
                print(
                    f"note: {work.folder} keeps what is finished; the same command goes on", file=sys.stderr
                )
            raise
        work.remove()
        return report


class _Stages(list[Stage]):
    """The stages of a conversion so far; called to begin the next one."""

    def __init__(self, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet

    def __call__(self, name: str, total: int) -> Stage:
        _return_freed_memory()
        self.append(Stage(name, total, self._quiet))
        return self[-1]

    def seconds(self) -> dict[str, float]:
        """Name -> seconds of all stages of that name."""
        total: dict[str, float] = {}
        for stage in self:
            total[stage.name] = total.get(stage.name, 0.0) + stage.seconds
        return total


@dataclass(frozen=True)
class _Prepared:
    """What a conversion has at hand whatever the bits per weight."""

    source: Source
    options: Options
    skeleton: nn.Module
    model: nn.Module  # the original
    tokenizer: Any
    names: dict[str, str]  # of the linear layers: see source.linear_names
    rows: Tensor
    held_out: Tensor
    written: int  # rows that the model wrote
    importance: dict[str, Tensor]
    work: Work
    scratch: Scratch | None  # where states lie, if the model is streamed


@dataclass(frozen=True)
class _Try:
    """What one plan gave."""

    plan: Plan
    factors: Mapping[str, Factors]  # as stored
    student: nn.Module  # norms, embedding and head are its own
    quality: Quality
    history: list[float]  # of the distillation's loss


def _run(
    source: Source,
    skeleton: nn.Module,
    out: Path,
    grid: list[float],
    options: Options,
    work: Work,
    scratch: Scratch | None,
) -> Report:
    """Prepare once, then write the file of the least bits per weight in `grid` that are good enough.

    Raises QualityError if none are; a single one may be forced.
    """
    stages = _Stages(options.quiet)
    made = _prepare(source, skeleton, options, stages, work, scratch)
    limit = COLLAPSED_KL if options.max_kl is None else options.max_kl
    tries: list[tuple[float, float]] = []
    best: tuple[Plan, Quality] | None = None
    with replacing(out) as temporary:

        def attempt(bpw: float) -> float:
            """The mean KL with so many bits; if it is good enough, the file for now."""
            nonlocal best
            plan = make_plan(source, skeleton, bpw)
            check_space(out, _file_size(plan, skeleton, options.embed_type))
            tried = _try(made, plan, stages)
            kl = tried.quality.kl_mean
            tries.append((bpw, kl))
            if options.max_kl is not None and not options.quiet:
                print(describe_try(tries, limit), file=sys.stderr)
            if kl <= limit or (options.force and options.max_kl is None):
                with stages("write", 1):
                    _write(temporary, made, tried)
                best = tried.plan, tried.quality
            return kl

        smallest(attempt, grid, limit, DEFAULT_BPW)
        if best is None:
            raise QualityError(describe_refusal(out, tries, options))
    weights = _count_weights(skeleton)
    report = Report(
        best[0], out, out.stat().st_size, weights, best[1], stages.seconds(), peak_rss(), tuple(tries)
    )
    if not options.quiet:
        print(describe_report(report), file=sys.stderr)
    return report


def _prepare(
    source: Source,
    skeleton: nn.Module,
    options: Options,
    stages: _Stages,
    work: Work,
    scratch: Scratch | None,
) -> _Prepared:
    recipe = options.recipe
    torch.manual_seed(options.seed)
    with stages("load", 1):
        model = load_model(source, options.device) if scratch is None else stream_model(source, scratch)
        tokenizer = load_tokenizer(source)
    names = linear_names(model, source.arch)
    wanted = recipe.text_rows + (0 if options.eval_text else recipe.eval_rows)
    with stages("text", wanted * _row_tokens(model, recipe)) as progress:
        rows, held_out, written = work.keep(
            "text", lambda: _text(model, tokenizer, options, wanted, progress)
        )
    some = rows[: recipe.gradient_rows]
    steps = len(some) if scratch is None else 2 * model.config.num_hidden_layers
    with stages("gradients", steps) as progress:

        def gradients() -> dict[str, Tensor]:
            if scratch is None:
                return output_importance(model, names, some, GRADIENT_BATCH, progress)
            return streamed_importance(model, source.arch, names, some, GRADIENT_BATCH, progress, scratch)

        importance = work.keep("gradients", gradients)
    return _Prepared(
        source, options, skeleton, model, tokenizer, names, rows, held_out, written, importance, work, scratch
    )


def _try(made: _Prepared, plan: Plan, stages: _Stages) -> _Try:
    """Factorize, distil and measure. Nothing of it depends on the tries before: `made` is left as it was."""
    model, recipe, seed = made.model, made.options.recipe, made.options.seed
    work, scratch = made.work.within(f"{plan.target:g}-"), made.scratch
    if not recipe.distill_steps:
        work = SignsOnly.of(work)
    with stages("factorize", model.config.num_hidden_layers) as progress:
        some = made.rows[: recipe.correct_rows]
        keep = list if scratch is None else scratch.keep
        found: MutableMapping[str, Factors] = {} if scratch is None else KeptFactors(work)
        factorize_model(
            made.source, model, plan, some, made.importance, recipe, seed, progress, work, keep, found
        )
    trained, history = model, []
    if recipe.distill_steps:
        student = Student(model, made.names, found, copy_dense=recipe.dense_rate > 0)
        found.clear()  # the student has copies
        with stages("distil", recipe.distill_steps) as progress:
            history = distill(model, student, made.rows, recipe, seed, progress, work)
        trained, found = student.model, student.factors()
    if isinstance(found, KeptFactors):
        factors: Mapping[str, Factors] = found.finished(as_stored)
    else:
        factors = {name: as_stored(f) for name, f in found.items()}
    with stages("measure", len(made.held_out)) as progress:
        final = as_read(trained, made.names, factors, made.options.embed_type, scratch)
        quality = measure(model, final, made.held_out, progress)
    return _Try(plan, factors, trained, quality, history)


def _write(path: Path, made: _Prepared, tried: _Try) -> None:
    options = made.options
    write_gguf(
        path,
        made.source,
        made.skeleton,
        tried.student,
        made.tokenizer,
        tried.factors,
        options.embed_type,
        tried.plan.bpw,
        _notes(made, tried),
        options.carrier,
    )
    verify(path, made.source, tried.factors)


def _key(source: Source, options: Options) -> dict[str, Any]:
    """What decides the bytes of what is kept, for Work.open; the bits per weight are in the parts' names."""
    weights = [source.gguf] if source.gguf else sorted(source.path.glob("*.safetensors"))
    described = [path for path in sorted(source.path.glob("*.json")) if not source.gguf]
    device = options.device if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    return {
        "model": digest_of([*weights, *described]),
        "recipe": options.recipe.describe(),
        "calib": [digest_of([file]) for file in options.calib],
        "eval_text": digest_of([options.eval_text]) if options.eval_text else None,
        "seed": options.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("dbf2gguf", "torch", "transformers", "tokenizers")},
    }


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
    given = torch.empty(0, length, dtype=torch.int64)
    if options.calib:
        given = rows_from_files(options.calib, tokenizer, wanted, length, seed)
        stage.step(n=given.numel())
    written = wanted - len(given)
    if written and is_streamed(model):
        raise OptionError(
            f"--calib: the files hold {len(given)} of {wanted} rows of {length} tokens, and a model that "
            "does not fit in memory cannot write the others: give more text, or take fewer --text-rows"
        )
    order = torch.randperm(wanted, generator=torch.Generator().manual_seed(seed))
    rows = given
    if written:
        known = order[: recipe.text_rows]  # none is held out
        starts = given[known[known < len(given)]]
        own = self_written_rows(model, tokenizer, written, length, recipe.chat_share, seed, stage, starts)
        rows = torch.cat([given, own])[order]
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
    return plan_uniform(_linear_shapes(source, model), bpw)


def _linear_shapes(source: Source, model: nn.Module) -> dict[str, Shape]:
    names = linear_names(model, source.arch)
    return {name: tuple(model.get_submodule(path).weight.shape) for name, path in names.items()}


def as_stored(factors: Factors) -> Factors:
    """Factors with the scales that the file will hold: balanced, rounded to float16."""
    even = balance(factors)
    scales = [s.to(torch.float16).float() for s in (even.s_out, even.s_mid, even.s_in)]
    return Factors(even.a, even.b, *scales)


def as_read(
    model: nn.Module,
    names: dict[str, str],
    factors: Mapping[str, Factors],
    embed_type: str,
    scratch: Scratch | None = None,
) -> nn.Module:
    """The dense twin: the model that a reader of the file has, factors multiplied out, embedding and head as
    stored. `model` is left as it was. With `scratch`, factors are multiplied out whenever they are used."""
    linears = {}
    for name, path in names.items():
        old = model.get_submodule(path)
        if scratch is None:
            linears[path] = _linear(factors[name].dense()[0], old.bias)
        else:
            linears[path] = linear = _linear(
                torch.empty(old.out_features, old.in_features, device="meta"), old.bias
            )
            put_on_disk(linear, partial(_dense, factors, name), scratch)
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


def _dense(factors: Mapping[str, Factors], name: str) -> Tensor:
    return factors[name].dense()[0]


# --------------------------------------------------------------------------------------------------
# Checks before the work


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


def _notes(made: _Prepared, tried: _Try) -> dict[str, Any]:
    """The recipe and the receipt as metadata. No times: the same input gives the same bytes."""
    options, plan = made.options, tried.plan

    def digest(tokens: Tensor) -> str:
        return hashlib.sha256(tokens.to(torch.int32).numpy().tobytes()).hexdigest()

    texts = [file.name for file in options.calib] + ["self-written"] * (made.written > 0)
    notes: dict[str, Any] = {
        "dbf.sign_bits_per_weight": plan.sign_bits / plan.weights,
        "dbf.recipe.preset": options.preset,
        "dbf.recipe.bpw": plan.target,
        "dbf.recipe.seed": options.seed,
        "dbf.recipe.text": ", ".join(texts),
        "dbf.recipe.text_sha256": digest(made.rows),
        "dbf.recipe.distill_kl": json.dumps([round(kl, 4) for kl in tried.history]),
        "dbf.quality.text_sha256": digest(made.held_out),
        "dbf.quality.context": made.held_out.shape[1],
    }
    notes |= {f"dbf.recipe.{key}": value for key, value in options.recipe.describe().items()}
    notes |= {f"dbf.quality.{key}": value for key, value in tried.quality.describe().items()}
    notes |= {
        f"dbf.recipe.version.{name}": _version(name) for name in ("torch", "transformers", "gguf", "numpy")
    }
    return notes


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path without being installed
        return "unknown"
