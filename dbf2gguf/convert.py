"""The story of a conversion: plan, gather text, weigh outputs, factorize, distil, measure, write."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from dbf2gguf import hub
from dbf2gguf.activations import BACKWARD, rows_together
from dbf2gguf.allocate import allocate
from dbf2gguf.archs import context_length
from dbf2gguf.budget import MAX_BPW, Plan, Shape, least_bpw, plan_uniform
from dbf2gguf.cache import cached_text
from dbf2gguf.calibrate import GRADIENT_BATCH, output_importance
from dbf2gguf.correct import factorize_model
from dbf2gguf.distill import Student, distill, dtype_on, with_linears
from dbf2gguf.evaluate import Quality, measure
from dbf2gguf.executors import Executor, open_executor
from dbf2gguf.factorize import Factors, balance, relative_error
from dbf2gguf.files import alone_in, check_output, check_space, replacing
from dbf2gguf.follow import Load, Write, call_to_distil, follow
from dbf2gguf.html_report import command_line, page_path, write_page
from dbf2gguf.malloc import return_freed
from dbf2gguf.memory_need import Need, choose_streamed, find_need
from dbf2gguf.options import Options, check_options, describe_device, find_device, parse_size
from dbf2gguf.peak_memory import resident
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import DEFAULT_PRESET, Recipe, find_recipe
from dbf2gguf.report import Errors, Report, describe_plan, describe_refusal, describe_report, describe_try
from dbf2gguf.search import COLLAPSED_KL, bpw_grid, smallest
from dbf2gguf.source import (
    Source,
    as_linear,
    count_weights,
    find_source,
    linear_names,
    load_model,
    load_tokenizer,
    model_config,
    reading_bytes,
    split_fused,
    weight_files,
    with_weights,
)
from dbf2gguf.stream import KeptFactors, OnDisk, Scratch, SignsOnly, is_streamed, put_on_disk, stream_model
from dbf2gguf.stream import output_importance as streamed_importance
from dbf2gguf.tables import dataset_of
from dbf2gguf.team import ALONE, Team, joined
from dbf2gguf.text import first_rows, rows_from_files, self_written_rows
from dbf2gguf.work import Work, digest_of, digest_of_code
from dbf2gguf.write import (
    dequantized,
    ggml_type,
    head_is_tied,
    verify,
    write_gguf,
)
from runtime.cli import peak_rss
from runtime.errors import FormatError, OptionError, QualityError

DEFAULT_BPW = 1.2
SAME_TEXT = ("model", "device", "threads", "versions")
TEXT_MODULES = ("text", "prompts", "kvcache", "attention", "graphs")


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
    device: str = "auto",
    threads: int | None = None,
    max_memory: str | None = None,
    jobs: int | None = None,
    cluster: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    report: bool = True,
    **overrides: Any,
) -> Report:
    """Factorize the causal language model at `model` and write it to `out` as GGUF.

    model      a Hugging Face folder, the id of a model on its hub (owner/name[@revision]), or a GGUF file
    bpw        bits per weight over the linear layers: signs, filler and scales; 1.2 if there is no max_kl
    max_kl     instead: take the fewest bits per weight, of multiples of 0.05, whose mean KL on the held-out
               rows is no more; each try is factorized and distilled anew
    preset     a name of recipe.PRESETS; `overrides` are fields of recipe.Recipe, None for the preset's
    calib      texts to calibrate and distil on, files and data sets of the hub: see text.rows_from_files; the
               model writes what the recipe wants beyond them
    carrier    tensor type of the sign matrices: dbf1, or i8, which every GGUF reader can list
    eval_text  text of the quality receipt, scored as runtime.perplexity scores its first chunks; without it,
               rows held out of the calibration text
    device     cpu, cuda, cuda:N, or auto: a GPU if there is one that torch can use
    max_memory such as "6G": take no more; without distillation, weights and states then lie in files while
               they are not in use, and the bytes are the same
    jobs       on a CPU: so many processes factorize layers that are independent, instead of threads
    cluster    or the workers of the Dask scheduler at tcp://HOST:PORT do; the bytes are the same
    report     write `out`.report.html, too: see html_report
    force      write the file even if its mean KL is above COLLAPSED_KL or not finite

    What is finished is kept in the folder `out`.work until the end: a conversion that was stopped goes on
    from there when it is called again with the same arguments, and ends with the same bytes.

    An existing `out` is replaced only by a complete new file. Raises DbfError with a message for the user,
    among them QualityError if no file is good enough to be written.

    Under torchrun every process calls this with the same arguments; all share the distillation, the first
    does the rest, and all get its report.
    """
    arguments, began = locals() | overrides, time.monotonic()
    device = find_device(device)
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
        max_memory=None if max_memory is None else parse_size(max_memory),
        jobs=jobs,
        cluster=cluster,
    )
    check_options(options, threads)
    if max_kl is not None and (bpw is not None or dry_run):
        raise OptionError(
            f"--max-kl finds the bits per weight; leave out {'--dry-run' if dry_run else '--bpw'}"
        )
    out = Path(out)
    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(device)
    with ExitStack() as stack:
        team = stack.enter_context(joined(device))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="dbf2gguf-"))
        if team.rank > 0:
            followed: Report = follow(team, model, Path(scratch), device)
            return followed
        if not dry_run:
            inputs = [Path(model), *options.calib, *filter(None, [options.eval_text])]
            out = check_output(out, inputs)
            if report:
                check_output(page_path(out), inputs)
        source = find_source(model, Path(scratch))
        if source.arch.text is not None:
            print(
                f"note: {source.path}: the text model alone is converted; the file reads no images",
                file=sys.stderr,
            )
        skeleton = _skeleton(source)
        options = _settled(options, skeleton)
        if max_kl is None:
            grid = [DEFAULT_BPW if bpw is None else bpw]
        else:
            grid = bpw_grid(least_bpw(_linear_shapes(source, skeleton)), MAX_BPW) or [MAX_BPW]
        plan = make_plan(source, skeleton, grid[0])
        size = _file_size(plan, skeleton, options.embed_type)
        if max_kl is None and not quiet:
            print(describe_plan(plan, size), file=sys.stderr)
        held, length = resident() or peak_rss(), _row_tokens(skeleton, options.recipe)

        def need_of(plan: Plan) -> Need:
            need = find_need(source, skeleton, plan, options, length, held)
            return need.at_least(held + reading_bytes(source))

        def check(plan: Plan) -> None:
            """Of a further try, whose latents in distillation may want more room than those before."""
            need, size = need_of(plan), _file_size(plan, skeleton, options.embed_type)
            kept = need.on_disk(choose_streamed(need, source, options))
            check_space(out, size + kept, f"a try with {plan.target:g} bits per weight")

        # without distillation all tries want about the same, and whether the model is streamed is one choice
        first = _start(grid) if options.recipe.distill_steps else grid[-1]
        need = need_of(make_plan(source, skeleton, first))
        streamed = choose_streamed(need, source, options)
        if device == "cpu" and not quiet:
            print(need.describe(streamed), file=sys.stderr)
        if dry_run:
            planned = Report(plan, None, size, count_weights(skeleton), None, {}, peak_rss())
            team.share(planned)
            return planned
        check_space(out, size + need.on_disk(streamed), "the conversion")
        folder = out.with_name(out.name + ".work")
        stack.enter_context(alone_in(folder))
        source = with_weights(source, stack.enter_context(Scratch(folder / "model")).folder)
        executor = stack.enter_context(open_executor(jobs, cluster))
        if not quiet:
            print(f"device: {describe_device(device)}", file=sys.stderr)
        key = _key(source, options, team)
        work = Work.open(folder, key, quiet)
        try:
            with Scratch(folder / "states") as states:
                means = _Means(work, key, executor, team, states if streamed else None)
                done = _run(source, skeleton, out, grid, options, means, check)
        except BaseException:
            if not work.parts():
                work.clear()
            elif not quiet:
                print(
                    f"note: {work.folder} keeps what is finished; the same command goes on", file=sys.stderr
                )
            raise
        work.clear()
        command = command_line(arguments | {"threads": torch.get_num_threads()})
        done = replace(done, elapsed=time.monotonic() - began, command=command)
        if report:
            done = write_page(done)
        if not quiet:
            print(describe_report(done), file=sys.stderr)
        team.share(done)
        return done


class _Stages(list[Stage]):
    """The stages of a conversion so far; called to begin the next one."""

    def __init__(self, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet

    def __call__(self, name: str, total: int) -> Stage:
        return_freed()
        self.append(Stage(name, total, self._quiet))
        return self[-1]

    def seconds(self) -> dict[str, float]:
        """Name -> seconds of all stages of that name."""
        total: dict[str, float] = {}
        for stage in self:
            total[stage.name] = total.get(stage.name, 0.0) + stage.seconds
        return total

    def memory(self) -> dict[str, int]:
        """Name -> bytes of memory, the most that a stage of that name took."""
        most: dict[str, int] = {}
        for stage in self:
            most[stage.name] = max(most.get(stage.name, 0), stage.peak_memory)
        return most


@dataclass(frozen=True)
class _Means:
    """What a conversion works with."""

    work: Work
    key: dict[str, Any]  # see `_key`
    executor: Executor
    team: Team
    scratch: Scratch | None  # where weights and states lie, if the model is streamed


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
    means: _Means


@dataclass(frozen=True)
class _Try:
    """What one plan gave."""

    plan: Plan
    factors: Mapping[str, Factors]  # as stored
    student: nn.Module  # norms, embedding and head are its own
    quality: Quality
    history: list[float]  # of the distillation's loss
    errors: Errors


def _start(grid: Sequence[float]) -> float:
    """The bits per weight that are tried first."""
    return min(max(DEFAULT_BPW, grid[0]), grid[-1])


def _run(
    source: Source,
    skeleton: nn.Module,
    out: Path,
    grid: list[float],
    options: Options,
    means: _Means,
    check: Callable[[Plan], None],
) -> Report:
    """Prepare once, then write the file of the least bits per weight in `grid` that are good enough.

    check  raises an error if there is no room for a try

    Raises QualityError if none are; a single one may be forced.
    """
    stages = _Stages(options.quiet)
    made = _prepare(source, skeleton, options, stages, means)
    limit = COLLAPSED_KL if options.max_kl is None else options.max_kl
    tries: list[tuple[float, float]] = []
    best: tuple[Plan, Quality, Errors] | None = None
    with replacing(out, means.work.folder) as temporary:

        def attempt(bpw: float) -> float:
            """The mean KL with so many bits; if it is good enough, the file for now."""
            nonlocal best
            plan = make_plan(source, skeleton, bpw)
            if tries:
                check(plan)
            tried = _try(made, plan, stages)
            kl = tried.quality.kl_mean
            tries.append((bpw, kl))
            if options.max_kl is not None and not options.quiet:
                print(describe_try(tries, limit), file=sys.stderr)
            if kl <= limit or (options.force and options.max_kl is None):
                with stages("write", 1):
                    _write(temporary, made, tried)
                best = tried.plan, tried.quality, tried.errors
            return kl

        smallest(attempt, grid, limit, _start(grid))
        if best is None:
            raise QualityError(describe_refusal(out, tries, options))
    weights = count_weights(skeleton)
    return Report(
        plan=best[0],
        file=out,
        file_bytes=out.stat().st_size,
        model_weights=weights,
        quality=best[1],
        seconds=stages.seconds(),
        peak_rss=peak_rss(),
        tries=tuple(tries),
        memory=stages.memory(),
        errors=best[2],
    )


def _prepare(
    source: Source, skeleton: nn.Module, options: Options, stages: _Stages, means: _Means
) -> _Prepared:
    recipe, work, team, scratch = options.recipe, means.work, means.team, means.scratch
    return_freed(from_now_on=scratch is not None)
    torch.manual_seed(options.seed)
    with stages("load", 1):
        length = _row_tokens(skeleton, recipe)
        model = (
            load_model(source, options.device, length) if scratch is None else stream_model(source, scratch)
        )
        tokenizer = load_tokenizer(source)
    team.share(Load(length))
    names = linear_names(model, source.arch)
    wanted = recipe.text_rows + recipe.eval_rows
    with stages("text", wanted * length) as progress:
        rows, held_out, written = work.keep(
            "text", lambda: _text(model, tokenizer, options, wanted, progress, means.key, team)
        )
    some = rows[: recipe.gradient_rows]
    steps = len(some) if scratch is None else 2 * model.config.num_hidden_layers
    with stages("gradients", steps) as progress:

        def gradients() -> dict[str, Tensor]:
            together = rows_together(model.config, rows.shape[1], GRADIENT_BATCH, BACKWARD)
            how = names, some, together, progress
            if scratch is None:
                return output_importance(model, *how)
            return streamed_importance(model, source.arch, *how, scratch)

        importance = work.keep("gradients", gradients)
    importance = {name: value.to(options.device) for name, value in importance.items()}  # kept on the CPU
    return _Prepared(
        source, options, skeleton, model, tokenizer, names, rows, held_out, written, importance, means
    )


def _try(made: _Prepared, plan: Plan, stages: _Stages) -> _Try:
    """Factorize, distil and measure. Nothing of it depends on the tries before: `made` is left as it was."""
    model, recipe, seed = made.model, made.options.recipe.at(plan.target), made.options.seed
    work, team, scratch = made.means.work.within(f"{plan.target:g}-"), made.means.team, made.means.scratch
    errors = Errors()
    if recipe.allocation != "uniform":
        with stages("allocate", model.config.num_hidden_layers) as progress:
            plan = allocate(
                made.source, model, made.names, plan, made.rows, made.importance, recipe, seed, progress, work
            )
        if not made.options.quiet:
            size = _file_size(plan, made.skeleton, made.options.embed_type)
            print(describe_plan(plan, size), file=sys.stderr)
    found: MutableMapping[str, Factors] = {}
    if not recipe.distill_steps:
        work = SignsOnly.of(work)
        found = KeptFactors(work, made.options.device)
    with stages("factorize", model.config.num_hidden_layers) as progress:
        factorize_model(
            made.source,
            model,
            plan,
            made.rows[: recipe.correct_rows],
            made.importance,
            recipe,
            seed,
            progress,
            work,
            made.means.executor,
            errors=errors.factorized,
            keep=None if scratch is None else scratch.keep,
            result=found,
        )
    trained, history = model, []
    if isinstance(found, KeptFactors):
        factors: Mapping[str, Factors] = found.finished(as_stored)
    else:
        call_to_distil(team, found, made.rows, recipe, seed)
        student = Student(model, made.names, found, copy_dense=recipe.dense_rate > 0)
        found.clear()  # the student has copies
        with stages("distil", recipe.distill_steps) as progress:
            history = distill(model, student, made.rows, recipe, seed, progress, work, team)
        trained, factors = student.model, {name: as_stored(f) for name, f in student.factors().items()}
    with stages("measure", len(made.held_out)) as progress:
        final = as_read(trained, made.names, factors, made.options.embed_type, scratch)
        quality = measure(model, final, made.held_out, progress)
        for name, path in made.names.items():
            wanted, got = (some.get_submodule(path).weight for some in (model, final))
            errors.weights[name] = relative_error(wanted, got)
    return _Try(plan, factors, trained, quality, history, errors)


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


def _key(source: Source, options: Options, team: Team) -> dict[str, Any]:
    """What decides the bytes of what is kept, for Work.open; the bits per weight are in the parts' names.
    Those of SAME_TEXT decide what the model writes, with the code of TEXT_MODULES."""
    files = [source.gguf] if source.gguf else [*weight_files(source.path), *hub.described_by(source.path)]
    device = options.device if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    return {
        "model": digest_of(files),
        "recipe": asdict(options.recipe),
        "calib": [_text_digest(file) for file in options.calib],
        "eval_text": _text_digest(options.eval_text) if options.eval_text else None,
        "seed": options.seed,
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "processes": team.size,
        "versions": {name: _version(name) for name in ("dbf2gguf", "torch", "transformers", "tokenizers")},
        "code": digest_of_code(),
    }


def _text_digest(text: Path) -> str:
    """Of a text file; the name of a data set, which is not read for that."""
    return str(text) if dataset_of(text) else digest_of([text])


def _text(
    model: nn.Module,
    tokenizer: Any,
    options: Options,
    wanted: int,
    stage: Stage,
    key: dict[str, Any],
    team: Team = ALONE,
) -> tuple[Tensor, Tensor, int]:
    """Rows to calibrate and distil on, rows for the receipt, and how many of them the model wrote.

    wanted  how many of both; --eval-text takes the place of those for the receipt, and changes nothing else
    key     see `_key`
    """
    recipe, seed = options.recipe, options.seed
    length = _row_tokens(model, recipe)
    given = torch.empty(0, length, dtype=torch.int64)
    if options.calib:
        most = wanted - int(wanted * recipe.written_share)
        given = rows_from_files(options.calib, tokenizer, most, length, seed)
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
        rounded = recipe.dtype == "bfloat16"
        how = written, length, recipe.chat_share, seed, rounded

        def write() -> Tensor:
            team.share(Write(*how, starts))
            return self_written_rows(model, tokenizer, *how, stage, starts, team)

        own, known_already = cached_text(
            {name: key[name] for name in SAME_TEXT}
            | {"how": how, "starts": _tokens_digest(starts), "code": digest_of_code(*TEXT_MODULES)},
            write,
        )
        if known_already:
            stage.step(n=own.numel(), note="written before")
        rows = torch.cat([given, own])[order]
    if options.eval_text:
        held_out = first_rows(options.eval_text, tokenizer, recipe.eval_rows, length, seed)
        if not len(held_out):
            raise OptionError(f"--eval-text: {options.eval_text} holds less than {length} tokens, one row")
        return rows[: recipe.text_rows], held_out, written
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
            linears[path] = as_linear(factors[name].dense()[0], old.bias)
        else:
            shape = old.out_features, old.in_features
            linears[path] = as_linear(torch.empty(shape, device="meta"), old.bias)
            put_on_disk(linears[path], partial(_dense, factors, name), scratch)
    twin = with_linears(model, linears)

    def stored(module: nn.Module) -> nn.Parameter:
        weight = module.weight.detach()
        into = weight if isinstance(module, OnDisk) else None  # it was read for this
        return nn.Parameter(dequantized(weight, embed_type, into), requires_grad=False)

    twin.get_input_embeddings().weight = head = stored(model.get_input_embeddings())
    if not head_is_tied(model):
        del head  # before there is another one
        head = stored(model.get_output_embeddings())
    twin.get_output_embeddings().weight = head
    return twin


def _dense(factors: Mapping[str, Factors], name: str) -> Tensor:
    return factors[name].dense()[0]


# --------------------------------------------------------------------------------------------------
# Checks before the work


def _skeleton(source: Source) -> nn.Module:
    """The model's modules and shapes without its weights."""
    from transformers import AutoModelForCausalLM

    try:
        config = model_config(source)
        if config.max_position_embeddings < 4:
            raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # values that no model can have: transformers raises anything
        line = " ".join(str(error).split()) or repr(error)
        raise FormatError(f"{source.path / 'config.json'}: transformers cannot use it: {line}") from error
    return split_fused(model.requires_grad_(False), source.arch)


def _settled(options: Options, skeleton: nn.Module) -> Options:
    """The options with what depends on the model and the machine decided, so that the file says it."""
    kind = str(dtype_on(torch.device(options.device), options.recipe.dtype)).removeprefix("torch.")
    recipe = replace(options.recipe, dtype=kind)
    return replace(options, recipe=recipe, embed_type=_fit_embed_type(skeleton, options.embed_type))


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


def _file_size(plan: Plan, skeleton: nn.Module, embed_type: str) -> int:
    """Bytes of tensor data, close to the file's size but for metadata."""
    factored = plan.weights
    dense = count_weights(skeleton) - factored
    block, nbytes = _block(embed_type)
    return plan.bits // 8 + dense * nbytes // block


def _notes(made: _Prepared, tried: _Try) -> dict[str, Any]:
    """The recipe and the receipt as metadata. No times: the same input gives the same bytes."""
    options, plan = made.options, tried.plan

    texts = [str(file) if dataset_of(file) else file.name for file in options.calib]
    texts += ["self-written"] * (made.written > 0)
    notes: dict[str, Any] = {
        "dbf.sign_bits_per_weight": plan.sign_bits / plan.weights,
        "dbf.recipe.preset": options.preset,
        "dbf.recipe.bpw": plan.target,
        "dbf.recipe.seed": options.seed,
        "dbf.recipe.text": ", ".join(texts),
        "dbf.recipe.text_sha256": _tokens_digest(made.rows),
        "dbf.recipe.distill_kl": json.dumps([round(kl, 4) for kl in tried.history]),
        "dbf.quality.text_sha256": _tokens_digest(made.held_out),
        "dbf.quality.context": made.held_out.shape[1],
    }
    notes |= {f"dbf.recipe.{key}": value for key, value in options.recipe.at(plan.target).describe().items()}
    notes |= {f"dbf.quality.{key}": value for key, value in tried.quality.describe().items()}
    notes |= {
        f"dbf.recipe.version.{name}": _version(name) for name in ("torch", "transformers", "gguf", "numpy")
    }
    return notes


def _tokens_digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.to(torch.int32).numpy().tobytes()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path without being installed
        return "unknown"
