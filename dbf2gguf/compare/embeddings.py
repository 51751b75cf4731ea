"""What types of embedding and head cost: python -m dbf2gguf.compare.embeddings MODEL [OUT.gguf ...]

The original, and every file given, is measured with its embedding (and its head, if that is another matrix)
stored in one type after another; all else stays. Everything is compared with the original's predictions, in
float32, by the code that `python -m dbf2gguf.compare` measures with. A file's own embedding is taken as it is
stored, so a type of more bits gives nothing back.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn

from dbf2gguf.compare.comparison import Comparison, comparison_parser
from dbf2gguf.compare.score import logits_of
from dbf2gguf.convert import as_read
from dbf2gguf.export import export
from dbf2gguf.options import check_threads
from dbf2gguf.recipe import EMBED_TYPES
from dbf2gguf.source import load_model, open_source
from dbf2gguf.write import ggml_type, head_is_tied
from runtime import cli
from runtime.bench.report import Row, Table
from runtime.errors import OptionError

TYPES = (*EMBED_TYPES, "q5_1", "q5_0", "q4_1")
"""What `--embed-type` writes, and what only other programs do."""

COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: r["model"],
    "type": lambda r: r["type"],
    "bits:": lambda r: f"{r['bits']:.2f}",
    "MiB:": lambda r: f"{r['mib']:.1f}",
    "perplexity:": lambda r: f"{r['ppl']:.2f} ± {r['ppl_error']:.2f}",
    "mean KL:": lambda r: f"{r['kl']:.4f}",
    "same top-1:": lambda r: f"{r['same_top1']:.1%}",
}


def build_parser() -> argparse.ArgumentParser:
    p = comparison_parser(
        "python -m dbf2gguf.compare.embeddings",
        "Perplexity and KL divergence of a model with its embedding and head stored in several types.",
    )
    add = p.add_argument
    add("--types", default=",".join(TYPES), metavar="TYPE,...", help="types to try")
    add("-t", "--threads", type=int, default=None, help="CPU threads (default: torch's own)")
    return p


def embeddings(args: argparse.Namespace) -> int:
    """Measure what the options ask for and print the table, row by row."""
    kinds = [kind.strip() for kind in args.types.split(",")]
    for kind in kinds:
        if kind not in TYPES:
            raise OptionError(f"--types: {kind!r} is unknown; there are {', '.join(TYPES)}")
    for file in args.files:
        if not Path(file).is_file():
            raise OptionError(f"{file}: no such file")
    check_threads(args.threads)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    table = Table(sys.stdout, args.output, COLUMNS)
    with tempfile.TemporaryDirectory(prefix="dbf-embeddings-") as scratch:
        run = Comparison(args, Path(scratch), Path(scratch))
        for name, model in _models(run, args.files):
            for kind in _fitting(kinds, name, model):
                table.add(_row(run, name, model, kind))
    table.close()
    return 0


def _models(run: Comparison, files: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The original, and every file multiplied out."""
    yield "original", run.model
    for file in files:
        with tempfile.TemporaryDirectory(dir=run.scratch) as folder:
            twin = Path(folder) / "twin.gguf"
            export(file, twin, outtype="f16", quiet=True)
            model = load_model(open_source(twin, Path(folder)))
            wanted, got = (tuple(m.get_input_embeddings().weight.shape) for m in (run.model, model))
            if got != wanted:
                raise OptionError(f"{file}: its embedding is {got}, that of {run.args.model} {wanted}")
            yield Path(file).name, model


def _fitting(kinds: Sequence[str], name: str, model: nn.Module) -> Iterator[str]:
    """The types of which a row is whole blocks; the others are named on stderr."""
    width = model.get_input_embeddings().weight.shape[1]
    for kind in kinds:
        block, _ = gguf.GGML_QUANT_SIZES[ggml_type(kind)]
        if width % block == 0:
            yield kind
        else:
            print(f"skipped {name} {kind}: rows of {width} are no multiples of {block}", file=sys.stderr)


def _row(run: Comparison, name: str, model: nn.Module, kind: str) -> dict[str, Any]:
    weights = model.get_input_embeddings().weight.numel()
    if not head_is_tied(model):
        weights += model.get_output_embeddings().weight.numel()
    block, size = gguf.GGML_QUANT_SIZES[ggml_type(kind)]
    score, divergence = run.judge.measure(f"{name} {kind}", logits_of(as_read(model, {}, {}, kind)))
    return {
        "model": name,
        "type": kind,
        "bits": 8 * size / block,
        "mib": weights // block * size / 2**20,
        "ppl": score.ppl,
        "ppl_error": score.error,
        "kl": divergence.kl_mean,
        "kl_error": divergence.kl_error,
        "same_top1": divergence.same_top1,
        "text": run.protocol.text,
        "ctx": run.protocol.ctx,
        "chunks": run.protocol.chunks,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(embeddings, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
