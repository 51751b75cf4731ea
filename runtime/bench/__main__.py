"""Benchmarks: python -m runtime.bench OUT.gguf, like llama-bench

stdout is the table; progress and notes go to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime import cli
from runtime.bench import decode, kernels, machine, peer, stages, synthetic
from runtime.bench.report import FORMATS, Row, Table
from runtime.errors import OptionError

DESCRIPTION = """\
Speed of a model, like llama-bench: ppN reads a prompt of N tokens, tgN writes N tokens, one by one.
"read/token" is what a written token reads of the weights; its rate is compared with the read bandwidth of
this machine's memory, measured in the same run with as many threads (above 100 %: caches hold the model)."""

MAX_REPEATS = 10000


def numbers(text: str) -> list[int]:
    """ "1,2" -> [1, 2], for argparse."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers such as 1,2") from None


def sizes(text: str) -> list[tuple[int, int]]:
    """ "576x576,4096x4096" -> [(576, 576), (4096, 4096)], for argparse."""
    found = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ROWSxCOLS such as 576x576,4096x4096")
    return [(int(m[1]), int(m[2])) for m in found if m]


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser("python -m runtime.bench", DESCRIPTION)
    what = p.add_argument_group("what to measure (one of these)")
    what.add_argument("model", metavar="OUT.gguf", nargs="?", help="a model that dbf2gguf made")
    what.add_argument(
        "--synthetic", choices=tuple(synthetic.SHAPES), help="a model of this shape with random weights"
    )
    what.add_argument("--kernels", action="store_true", help="single kernels of each instruction set")
    what.add_argument("--info", action="store_true", help="nothing: show this machine, and what was chosen")

    p.add_argument("-p", "--n-prompt", type=numbers, default="128", metavar="N,...", help="prompts; 0: none")
    p.add_argument(
        "-n", "--n-gen", type=numbers, default="64", metavar="N,...", help="tokens to write; 0: none"
    )
    p.add_argument(
        "-d", "--depth", type=numbers, default="0", metavar="N,...", help="tokens of context before the test"
    )
    p.add_argument(
        "-t", "--threads", type=numbers, metavar="N,...", help="numbers of threads (default: physical cores)"
    )
    p.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="repetitions of each test")
    p.add_argument("--stages", action="store_true", help="show where the time goes, stage by stage")
    p.add_argument("-o", "--output", choices=FORMATS, default="md", help="form of the table")
    cli.add_common_options(p)

    random = p.add_argument_group("with --synthetic")
    random.add_argument("--bpw", type=float, default=1.2, metavar="X", help="bits per weight, at most")
    random.add_argument("--seed", type=int, default=1, metavar="N", help="of the random weights")
    random.add_argument("--keep", metavar="PATH", help="keep the model there")
    random.add_argument(
        "--peer", action="store_true", help="run the same shape on llama.cpp too (needs llama-cpp-python)"
    )

    single = p.add_argument_group("with --kernels")
    shapes = ",".join(f"{rows}x{cols}" for rows, cols in kernels.SHAPES)
    single.add_argument("--shapes", type=sizes, default=shapes, metavar="RxC,...", help="rows x columns")
    heads = ",".join(f"{rows}x{cols}" for rows, cols in kernels.HEADS)
    single.add_argument("--heads", type=sizes, default=heads, metavar="RxC,...", help="the same of heads")
    batches = ",".join(map(str, kernels.BATCHES))
    single.add_argument("--batch", type=numbers, default=batches, metavar="N,...", help="vectors per product")
    single.add_argument("--seconds", type=float, default=0.3, metavar="X", help="time of each measurement")
    return p


def bench(args: argparse.Namespace) -> int:
    _check(args)
    try:
        if args.info:
            found = machine.machine()
            print(json.dumps(asdict(found), indent=2) if args.output == "json" else machine.describe(found))
        elif args.kernels:
            _print(args, kernels.COLUMNS, kernels.bench(args.shapes, args.heads, args.batch, args.seconds))
        else:
            _bench_model(args)
    finally:
        decode.progress("")  # an error's line begins at the margin
    return 0


def _bench_model(args: argparse.Namespace) -> None:
    cases = decode.plan(args.n_prompt, args.n_gen, args.depth)
    threads = args.threads or [None]
    if args.peer:
        peer.find()  # before anything is written
    with _model(args) as path:
        if args.peer:
            shape = synthetic.SHAPES[args.synthetic]
            rows = peer.bench(path, shape, cases, threads, args.repetitions, args.seed, _note)
            _print(args, peer.COLUMNS, rows)
        elif args.stages:
            options = (args.repetitions, args.backend, args.kv_type, args.activations)
            _print(args, stages.COLUMNS, stages.bench(str(path), cases, threads, *options))
        else:
            options = (args.repetitions, args.backend, args.kv_type, args.activations)
            rows = decode.bench(str(path), cases, threads, *options)
            _print(args, decode.COLUMNS, rows)


def _check(args: argparse.Namespace) -> None:
    chosen = [bool(args.model), bool(args.synthetic), args.kernels, args.info]
    if sum(chosen) != 1:
        raise OptionError("wanted one of: OUT.gguf, --synthetic SHAPE, --kernels, --info")
    for option, needed, given in (
        ("--peer", args.synthetic, args.peer),
        ("--keep", args.synthetic, args.keep),
    ):
        if given and not needed:
            raise OptionError(f"{option} goes with --synthetic SHAPE")
    if args.peer and args.backend == "numba":
        raise OptionError("--peer compares the C backend; leave out --backend numba")
    if args.peer and args.kv_type != "f16":
        raise OptionError(f"--peer compares f16 KV caches; leave out --kv-type {args.kv_type}")
    if args.peer and args.activations != "int16":
        raise OptionError(f"--peer compares int16 activations; leave out --activations {args.activations}")
    if args.stages and (args.peer or args.kernels or args.info):
        raise OptionError("--stages goes with OUT.gguf or --synthetic SHAPE, and without --peer")
    if not 1 <= args.repetitions <= MAX_REPEATS:
        raise OptionError(f"-r {args.repetitions}: wanted 1 to {MAX_REPEATS}")
    if args.seed < 0:
        raise OptionError(f"--seed {args.seed}: wanted 0 or more")
    if not 0 <= args.seconds <= 3600:
        raise OptionError(f"--seconds {args.seconds:g}: wanted 0 to 3600")


@contextmanager
def _model(args: argparse.Namespace) -> Iterator[Path]:
    """The model file to measure; a random one is written first, and removed in the end unless kept."""
    if args.model:
        yield Path(args.model)
        return
    with tempfile.TemporaryDirectory(prefix="dbf-bench-") as folder:
        path = Path(args.keep) if args.keep else Path(folder) / f"{args.synthetic}.gguf"
        synthetic.write_dbf(path, synthetic.SHAPES[args.synthetic], args.bpw, args.seed, decode.progress)
        decode.progress("")
        yield path


def _print(args: argparse.Namespace, columns: Mapping[str, Any], rows: Iterable[Row]) -> None:
    table = Table(sys.stdout, args.output, columns)
    for row in rows:
        table.add(row)
    table.close()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(bench, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
