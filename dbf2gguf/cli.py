"""The command `dbf2gguf`: convert a model, inspect or export a file. argparse only; the work is elsewhere."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from dbf2gguf.archs import ARCHS
from dbf2gguf.recipe import (
    ALLOCATIONS,
    CARRIERS,
    CHECKPOINTING,
    DEFAULT_PRESET,
    DTYPES,
    EMBED_TYPES,
    FEW_BITS,
    PRESETS,
)
from dbf2gguf.search import COLLAPSED_KL
from runtime.cli import INTERRUPTED, run
from runtime.cli import parser as make_parser
from runtime.errors import BackendError
from runtime.gguf import GgufFile

EPILOG = "Other commands: dbf2gguf inspect FILE, dbf2gguf export FILE OUT; each has its own --help."
COMMANDS = ("convert", "inspect", "export")


def convert_parser() -> argparse.ArgumentParser:
    """Options of `dbf2gguf MODEL OUT`."""
    parser = make_parser(
        "dbf2gguf",
        "Factorize every linear layer of a causal language model into sign matrices; write GGUF.",
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="Hugging Face model folder, id on its hub (owner/name, owner/name@revision), or a GGUF file",
    )
    add("out", metavar="OUT", help="GGUF file to write; replaced only when the new one is complete")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--bpw", type=float, help="bits per weight of the linear layers: signs, filler, scales (default: 1.2)"
    )
    size.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="instead of --bpw: as few bits per weight, in multiples of 0.05, as keep the mean KL from the "
        "original within X nats a token on held-out text; each of several tries is factorized and distilled",
    )
    add("--preset", choices=list(PRESETS), default=DEFAULT_PRESET, help="how much work to do")
    add(
        "--calib",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="texts to calibrate and distil on: plain text, .jsonl, .json, .parquet, or sets of the hub, "
        "hf:owner/name[@revision][:config][:split][:column]; repeatable; MODEL and OUT come before it, after "
        "another option, or after --; the model writes what they lack",
    )
    add(
        "--eval-text",
        metavar="FILE",
        help="text for the quality receipt, whose first rows are scored as runtime.perplexity scores chunks; "
        "without it, rows held out of the calibration text",
    )
    add("--embed-type", choices=EMBED_TYPES, default="q8_0", help="type of the embedding and the head")
    add(
        "--carrier",
        choices=CARRIERS,
        default="dbf1",
        help="tensor type of the sign matrices; i8: the same bytes, which every GGUF reader can list",
    )
    add("--seed", type=int, default=0, help="seed of everything random")
    add(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N, or auto: a GPU if there is one; another device gives other bytes",
    )
    add("-t", "--threads", type=int, default=None, help="CPU threads; torch's default if not given")
    add(
        "--max-memory",
        metavar="SIZE",
        help="such as 6G: stay within it or say what is needed; without distillation, weights and states "
        "that do not fit lie in files while they are not in use; the bytes are the same",
    )
    spread = parser.add_mutually_exclusive_group()
    spread.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="factorize independent layers in N processes instead of threads; the bytes are the same",
    )
    spread.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="or on the workers of the Dask scheduler at tcp://HOST:PORT; the bytes are the same",
    )
    add("--text-rows", type=int, help="rows of calibration text (default: the preset's)")
    add(
        "--written-share",
        type=float,
        help="share of the text that the model writes itself whatever the files hold, 0 to 1 (default: the "
        "preset's)",
    )
    add(
        "--chat-share",
        type=float,
        help="share of chat questions among the model's own prompts, 0 to 1 (default: the preset's)",
    )
    add(
        "--distill-steps",
        type=int,
        help="optimizer steps of distillation, 0 for none (default: the preset's)",
    )
    add("--correct-rows", type=int, help="rows that the sequential correction sees (default: the preset's)")
    add("--admm-iterations", type=int, help="ADMM rounds of each factorization (default: the preset's)")
    add(
        "--allocation",
        choices=ALLOCATIONS,
        help="how the bits are spread over the linear layers, always as many in all; auto: channels below "
        f"{FEW_BITS:g} bits if distillation follows, else uniform (default: the preset's)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="arithmetic of products while the model writes text and in the distillation; auto: bfloat16 "
        "on a GPU and on a CPU that has instructions for it, else float32 (default: the preset's)",
    )
    add(
        "--checkpointing",
        choices=CHECKPOINTING,
        help="whether distillation keeps each layer's input alone and runs the layer twice: less memory, a "
        "third more time; auto: where a GPU's memory wants it (default: the preset's)",
    )
    add(
        "--list-architectures",
        action="version",
        version=", ".join(f"{spec.model_type} ({spec.model_class})" for spec in ARCHS.values()),
        help="print the model families that can be converted (model_type, class) and stop",
    )
    add(
        "--force",
        action="store_true",
        help=f"write the file even if the model has collapsed: its mean KL is above {COLLAPSED_KL:g} or not "
        "finite",
    )
    add(
        "--no-report",
        dest="report",
        action="store_false",
        help="do not write OUT.report.html, the figures of the conversion as a page",
    )
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("-q", "--quiet", action="store_true", help="no progress and no summary")
    return parser


def inspect_parser() -> argparse.ArgumentParser:
    """Options of `dbf2gguf inspect FILE`."""
    parser = make_parser(
        "dbf2gguf inspect", "Show the metadata, the quality receipt and the tensors of a GGUF file."
    )
    parser.add_argument("file", metavar="FILE", help="GGUF file, factorized or not")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--html", action="store_true", help="print a page with bits, sizes, loss and receipt")
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Options of `dbf2gguf export FILE OUT`."""
    parser = make_parser(
        "dbf2gguf export",
        "Multiply the factors of a model back into an ordinary GGUF file, which llama.cpp runs.",
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="GGUF file made by dbf2gguf")
    add("out", metavar="OUT", help="GGUF file to write; replaced only when the new one is complete")
    add("--outtype", choices=["f16", "bf16", "q8_0"], default="f16", help="type of all matrices")
    add("-q", "--quiet", action="store_true", help="no progress and no summary")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else None
    rest = argv[1:] if command else argv
    commands = {"inspect": (inspect_parser, _inspect), "export": (export_parser, _export)}
    parser, work = commands.get(command or "", (convert_parser, _convert))
    return run(work, parser().parse_args(rest))


def _unless_interrupted(work: Callable[[], object]) -> int:
    """Call work(); after Ctrl-C, say what that means for the file."""
    try:
        work()
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from dbf2gguf.inspect import inspect

    if args.html:
        from dbf2gguf.html_report import page

        with GgufFile(args.file) as file:
            print(page(file), end="")
        return 0
    inspect(Path(args.file), tensors=args.tensors, as_json=args.json)
    return 0


def _export(args: argparse.Namespace) -> int:
    from dbf2gguf.export import export

    return _unless_interrupted(lambda: export(args.file, args.out, outtype=args.outtype, quiet=args.quiet))


def _convert(args: argparse.Namespace) -> int:
    try:
        from dbf2gguf.convert import convert
        from dbf2gguf.team import leave
    except ModuleNotFoundError as error:
        raise BackendError(
            f"conversion needs the package {error.name}; run: pip install 'dbf2gguf[convert]'"
        ) from error
    options = {key: value for key, value in vars(args).items() if key != "debug"}
    before = signal.signal(signal.SIGTERM, leave)
    try:
        return _unless_interrupted(lambda: convert(**options))
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
