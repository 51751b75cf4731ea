"""A checkpoint of random weights in a known shape, to measure what a conversion of that size takes.

    python -m dbf2gguf.synthetic FOLDER --shape llama-2-7b

The tokenizer has a token for each byte. The weights are written tensor by tensor, one file for each block.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.cli import parser as make_parser
from runtime.cli import run
from runtime.errors import OptionError

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 48,
        "num_key_value_heads": 16,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}
"""Llama's, 3b near those of its 3.2; what is left out has transformers' default."""

END = "<|endoftext|>"


def write_checkpoint(
    folder: Path, shape: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: int
) -> None:
    """Write config.json, safetensors with an index, and a tokenizer into `folder`, which is made.

    changes  sizes that are not the shape's, such as num_hidden_layers

    Raises OptionError for an unknown shape.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if shape not in SHAPES:
        raise OptionError(f"--shape {shape!r} is unknown; there are {', '.join(SHAPES)}")
    sizes = SHAPES[shape] | changes
    config = LlamaConfig(**sizes, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, dtype=dtype)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in parameters.items():
        block = name.split(".")[2] if name.startswith("model.layers.") else "ends"
        files.setdefault(f"model-{block}.safetensors", {})[name] = tuple(parameter.shape)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for file, tensors in files.items():
        made = {name: _random(name, size, generator).to(dtype) for name, size in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=_byte_tokenizer(), eos_token=END, bos_token=END).save_pretrained(
        folder
    )


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms are 1; what a matrix makes of inputs of mean square 1 has that, too."""
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * shape[1] ** -0.5


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: index for index, token in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m dbf2gguf.synthetic", "Write a checkpoint of random weights.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write; it is made")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny", help="whose shape it has")
    parser.add_argument("--layers", type=int, help="blocks, if not those of the shape")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""

    def work(args: argparse.Namespace) -> int:
        changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
        write_checkpoint(args.folder, args.shape, seed=args.seed, **changes)
        return 0

    return run(work, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
