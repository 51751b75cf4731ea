"""Zero-shot accuracy of the original: python -m dbf2gguf.zeroshot MODEL TASK.jsonl...

Reads and asks as runtime.zeroshot does; only the log-likelihoods are transformers', in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from runtime import cli
from runtime.errors import BackendError
from runtime.zeroshot import add_task_options, print_scores, read_tasks


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "python -m dbf2gguf.zeroshot",
        "Accuracy of a model on multiple-choice tasks before it is converted, to compare with what "
        "runtime.zeroshot finds after.",
    )
    p.add_argument(
        "model", metavar="MODEL", help="Hugging Face model folder, owner/name on its hub, or a GGUF file"
    )
    add_task_options(p)
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N, or auto: a GPU if there is one")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads; torch's default if not given")
    return p


def zeroshot(args: argparse.Namespace) -> int:
    try:
        import torch

        from dbf2gguf.evaluate import TorchScorer, plain_tokenizer
        from dbf2gguf.options import check_threads, find_device
        from dbf2gguf.source import load_model, load_tokenizer, open_source
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the original needs the package {error.name}; run: pip install 'dbf2gguf[convert]'"
        ) from error
    device = find_device(args.device)
    check_threads(args.threads)
    tasks = read_tasks(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="dbf2gguf-") as scratch:
        source = open_source(args.model, Path(scratch))
        scorer = TorchScorer(load_model(source, device))
        tokenizer = plain_tokenizer(load_tokenizer(source))
        about = {"backend": "transformers", "n_threads": torch.get_num_threads(), "device": device}
        print_scores(args, tasks, scorer, tokenizer, about)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(zeroshot, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
