"""Peers' quality beside ours, on one model and one text: python -m dbf2gguf.compare MODEL [OUT.gguf ...]

Every file is scored as llama-perplexity scores, by the code of runtime.perplexity, and its predictions are
compared with the original model's, in float32. llama.cpp's files are read back with gguf-py, dequantized and
run in transformers; ours are run by this project's runtime. Where a model's rows are no multiples of 256,
llama.cpp gets the model padded with zeros (see `padding`): its bits are then per padded weight.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dbf2gguf.calibrate import GRADIENT_BATCH, input_importance, output_importance
from dbf2gguf.compare import llama_cpp, onecomp, plot, published
from dbf2gguf.compare.comparison import Comparison, comparison_parser
from dbf2gguf.compare.llama_cpp import F16, MissingPeerError
from dbf2gguf.compare.padding import padded
from dbf2gguf.compare.rows import (
    COLUMNS,
    LLAMA_CPP,
    ONECOMP,
    ORIGINAL,
    OURS,
    PUBLISHED,
    Row,
    merged,
    read_rows,
    write_rows,
)
from dbf2gguf.compare.score import logits_of
from dbf2gguf.convert import as_stored, make_plan
from dbf2gguf.files import check_output, replacing
from dbf2gguf.progress import Stage
from dbf2gguf.source import count_weights, linear_names, load_model, open_source
from dbf2gguf.work import digest_of_code
from dbf2gguf.write import write_dense, write_gguf
from runtime import cli
from runtime.bench.report import Table
from runtime.errors import DbfError, OptionError

PEERS = ("llama.cpp", "published", "onecomp")
GRADIENT_ROWS = 16


def numbers(text: str) -> list[float]:
    """ "2,1.2" -> [2.0, 1.2], for argparse."""
    return [float(part) for part in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    p = comparison_parser(
        "python -m dbf2gguf.compare",
        "Perplexity, KL divergence and bits of what several quantizers make of one model, in one table.",
    )
    add = p.add_argument
    add(
        "--calib",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="text (.txt, .jsonl) that the peers calibrate on; never of the kind that is scored",
    )
    add("--calib-rows", type=int, default=128, metavar="N", help="rows of 512 tokens drawn from it")
    add(
        "--peers",
        metavar="NAME,...",
        help=f"of {', '.join(PEERS)}, or none (default: all; with --with, none)",
    )
    add(
        "--types",
        default=",".join(llama_cpp.TYPES),
        metavar="TYPE,...",
        help="llama-quantize's types; F16: padding alone",
    )
    add("--llama-bin", metavar="DIR", help="folder of llama-quantize and llama-imatrix (default: PATH)")
    add("--published", type=numbers, default="2.0,1.2", metavar="BPW,...", help="bits of DBF as published")
    add("--published-iterations", type=int, default=25, metavar="N", help="its ADMM rounds")
    add("--onecomp", default="dbf:2,mdbf:2", metavar="METHOD:BITS,...", help="what onecomp makes: dbf, mdbf")
    add("--onecomp-iterations", type=int, default=0, metavar="N", help="its ADMM rounds; 0: its own default")
    add("--onecomp-python", default=sys.executable, metavar="PYTHON", help="the Python that has onecomp")
    add(
        "--with",
        dest="others",
        metavar="ROWS.csv",
        action="append",
        default=[],
        help="rows of an earlier run to reuse; repeatable",
    )
    add("--save", metavar="ROWS.csv", help="also write all rows there, after each file and at the end")
    add("--plot", metavar="FILE", help="also draw perplexity against bits: .png, .svg or .pdf")
    add("--keep", metavar="DIR", help="keep the peers' files there, and use those that are there")
    add("--seed", type=int, default=0, help="of the draw of calibration rows and of factorization")
    add("-t", "--threads", type=int, default=None, help="CPU threads (default: each program's own)")
    return p


def compare(args: argparse.Namespace) -> int:
    """Measure what the options ask for and print the table."""
    peers = _peers(args)
    _check(args)
    if args.plot:
        plot.check(Path(args.plot))
    for path in filter(None, (args.save, args.plot)):
        check_output(Path(path), [Path(args.model), Path(args.text), *map(Path, args.files)])
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with _folder(args.keep) as folder, tempfile.TemporaryDirectory(prefix="dbf-compare-") as scratch:
        run = Comparison(args, folder, Path(scratch))
        rows = merged(row for path in args.others for row in read_rows(Path(path), run.protocol))
        for made in _measurements(run, args, peers, rows):
            rows = merged([*rows, made])
            _note(args, f"{made.series} {made.name}: {made.bpw:.2f} bpw, perplexity {made.ppl:.2f}")
            _save(rows, args.save)
        _save(rows, args.save)  # those of --with, should nothing have been measured
    if args.plot and rows:
        with replacing(Path(args.plot).resolve()) as temporary:
            plot.plot(temporary, rows, Path(args.plot).suffix[1:])
    table = Table(sys.stdout, args.output, COLUMNS)
    for row in rows:
        table.add(row.cells())
    table.close()
    return 0


def _save(rows: Sequence[Row], path: str | None) -> None:
    if path:
        with replacing(Path(path).resolve()) as temporary:
            write_rows(temporary, rows)


# --------------------------------------------------------------------------------------------------
# The rows


def _measurements(
    run: Comparison, args: argparse.Namespace, peers: Sequence[str], known: list[Row]
) -> Iterator[Row]:
    """Every row that is to be measured, as it is done; a peer that is missing or fails is skipped."""
    files = [Path(file) for file in args.files]
    for file in files:
        if not file.is_file():
            raise OptionError(f"{file}: no such file")
    if peers:  # read before the work: what is wrong with it is said at once
        _note(args, f"peers are calibrated on {run.calibrated_on()}")
        _check_kept(run)
    if not any(row.series == ORIGINAL for row in known):
        yield _original(run)
    for file in files:
        yield run.run_file(OURS, file.name, file, _recipe(file))
    makers: dict[str, Callable[[Comparison], Iterator[Row]]] = {
        "llama.cpp": _llama_cpp,
        "published": _published,
        "onecomp": _onecomp,
    }
    for peer in peers:
        try:
            yield from makers[peer](run)
        except (MissingPeerError, DbfError) as error:
            print(f"skipped {peer}: {error}", file=sys.stderr)


def _original(run: Comparison) -> Row:
    stored = str(run.source.config.get("dtype") or run.source.config.get("torch_dtype") or "float32")
    bits = torch.finfo(getattr(torch, stored.removeprefix("torch."))).bits
    size = run.source.gguf.stat().st_size if run.source.gguf else count_weights(run.model) * bits // 8
    return run.row(
        ORIGINAL, stored, bits, 1, size, run.judge.original, f"transformers {version('transformers')}"
    )


def _llama_cpp(run: Comparison) -> Iterator[Row]:
    args, folder = run.args, run.folder
    tools = llama_cpp.find_tools(args.llama_bin)
    dense, imatrix = folder / "f16.gguf", folder / "imatrix.gguf"
    note = _write_padded(run, dense)
    kinds = args.types.split(",")
    if F16 in kinds:
        yield run.read_file(LLAMA_CPP, F16, dense, f"gguf-py {version('gguf')}{note}")
        kinds.remove(F16)
    rows, length = run.calibration.shape
    with Stage("imatrix", 1, args.quiet):
        _make(
            imatrix,
            lambda out: llama_cpp.make_imatrix(
                tools, dense, run.calibration_text, out, length, rows, args.threads
            ),
        )
    for kind in kinds:
        file = folder / f"{kind}.gguf"
        try:
            _make(
                file,
                lambda out, kind=kind: llama_cpp.quantize(tools, dense, imatrix, kind, out, args.threads),
            )
            made_with = f"llama-quantize {tools.version}, imatrix of {run.calibrated_on()}{note}"
            yield run.read_file(LLAMA_CPP, kind, file, made_with)
        except DbfError as error:
            print(f"skipped llama.cpp {kind}: {error}", file=sys.stderr)


def _write_padded(run: Comparison, file: Path) -> str:
    """Write the original, padded if need be, as F16; what `made_with` says about that."""
    model = padded(run.model, run.source.arch)
    _make(file, lambda out: write_dense(out, run.source, model, run.tokenizer))
    was, now = run.model.config, model.config
    if model is run.model:
        return ""
    return (
        f"; padded: width {was.hidden_size} -> {now.hidden_size}, heads {was.num_attention_heads} -> "
        f"{now.num_attention_heads}, inner {was.intermediate_size} -> {now.intermediate_size}"
    )


def _published(run: Comparison) -> Iterator[Row]:
    args, source, model = run.args, run.source, run.model
    names, rows = linear_names(model, source.arch), run.calibration
    iterations = args.published_iterations
    with Stage("inputs", len(rows), args.quiet) as stage:
        inputs = input_importance(model, names, rows, GRADIENT_BATCH, stage)
    with Stage("gradients", len(rows[:GRADIENT_ROWS]), args.quiet) as stage:
        outputs = output_importance(model, names, rows[:GRADIENT_ROWS], GRADIENT_BATCH, stage)
    for bpw in args.published:
        plan = make_plan(source, model, bpw)
        file = run.folder / f"published-{bpw:g}-{iterations}-{digest_of_code()[:8]}.gguf"

        def make(out: Path, plan: Any = plan) -> None:
            with Stage(f"factorize {plan.bpw:.2f}", len(names), args.quiet) as stage:
                factors = published.factorize_each(
                    model, names, plan, inputs, outputs, iterations, args.seed, stage
                )
            factors = {name: as_stored(f) for name, f in factors.items()}
            write_gguf(out, source, model, model, run.tokenizer, factors, "q8_0", plan.bpw, {})

        _make(file, make)
        made_with = (
            f"dbf2gguf {version('dbf2gguf')}: {iterations} ADMM rounds a layer, importances from "
            f"{run.calibrated_on()}, no correction, no distillation"
        )
        yield run.run_file(PUBLISHED, f"{bpw:g}", file, made_with)


def _onecomp(run: Comparison) -> Iterator[Row]:
    args = run.args
    onecomp.find(args.onecomp_python)
    rows, length = run.calibration.shape
    for one in onecomp.parse(args.onecomp):
        folder = run.folder / f"onecomp-{one.method}-{one.bits:g}-{args.onecomp_iterations}"
        try:
            if not (folder / "bits.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                layers = len(linear_names(run.model, run.source.arch))
                with Stage(f"quantize {one.name}", layers, args.quiet) as stage:
                    onecomp.quantize(
                        args.onecomp_python,
                        run.source.path,
                        run.calibration_text,
                        folder,
                        one,
                        args.onecomp_iterations,
                        rows,
                        length,
                        stage,
                    )
            about = onecomp.read_bits(folder)
            model = load_model(open_source(folder, run.scratch))
            made_with = (
                f"onecomp {about['version']} on {about['device']}, {about['iterations']} iterations, "
                f"calibrated on {run.calibrated_on()}"
            )
            yield run.row(
                ONECOMP, one.name, about["bits"], about["weights"], None, logits_of(model), made_with
            )
        except DbfError as error:
            print(f"skipped onecomp {one.name}: {error}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Small things


def _peers(args: argparse.Namespace) -> tuple[str, ...]:
    if args.peers is None:
        return () if args.others else PEERS
    names = tuple(name.strip() for name in args.peers.split(",") if name.strip() not in ("", "none"))
    for name in names:
        if name not in PEERS:
            raise OptionError(f"--peers: {name!r} is unknown; there are {', '.join(PEERS)}, none")
    return names


def _check(args: argparse.Namespace) -> None:
    """What can be told without the model. Raises OptionError."""
    onecomp.parse(args.onecomp)
    for name, least in {
        "threads": 1,
        "calib_rows": 1,
        "published_iterations": 1,
        "onecomp_iterations": 0,
    }.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise OptionError(f"--{name.replace('_', '-')} is {value}; wanted {least} or more")


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    """Where the peers' files go: `keep`, which is made, or a temporary folder."""
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="dbf-compare-") as folder:
        yield Path(folder)


def _check_kept(run: Comparison) -> None:
    """Files in the folder of --keep are of this model and calibration text. Raises OptionError."""
    rows = run.calibration.to(torch.int32).numpy().tobytes()
    origin = f"{run.source.name} {run.args.seed} {hashlib.sha256(rows).hexdigest()}\n"
    mark = run.folder / "origin.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") != origin:
        raise OptionError(
            f"--keep {run.folder}: holds files of another model, seed or calibration text; take another"
        )
    mark.write_text(origin, encoding="utf-8")


def _make(file: Path, make: Callable[[Path], None]) -> None:
    """Let `make` write `file`, unless it is there: from --keep."""
    if not file.is_file():
        with replacing(file) as temporary:
            make(temporary)


def _recipe(file: Path) -> str:
    """What a file of dbf2gguf says about how it was made."""
    from runtime.gguf import GgufFile

    with GgufFile(file) as opened:
        keys = ("preset", "text", "text_rows", "row_tokens", "distill_steps", "distill_batch")
        found = {key: opened.metadata.get(f"dbf.recipe.{key}") for key in keys}
    return "dbf2gguf: " + ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)


def _note(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(compare, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
