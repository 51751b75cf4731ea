"""What a conversion is asked to do, and the checks that need no model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from dbf2gguf.recipe import ALLOCATIONS, CARRIERS, CHECKPOINTING, EMBED_TYPES, Recipe
from dbf2gguf.search import COLLAPSED_KL
from runtime.errors import OptionError

MAX_SEED = 1 << 32


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
    max_kl: float | None = None
    force: bool = False


def check_options(options: Options, threads: int | None) -> None:
    """Everything that can be told without the model. Raises OptionError."""
    recipe, seed = options.recipe, options.seed
    if options.carrier not in CARRIERS:
        raise OptionError(f"--carrier {options.carrier!r} is unknown; there are {', '.join(CARRIERS)}")
    if options.embed_type not in EMBED_TYPES:
        raise OptionError(
            f"--embed-type {options.embed_type!r} is unknown; there are {', '.join(EMBED_TYPES)}"
        )
    check_machine(options.device, threads)
    if options.max_kl is not None and not 0 < options.max_kl <= (inf if options.force else COLLAPSED_KL):
        most = "" if options.force else f" and at most {COLLAPSED_KL:g} without --force"
        raise OptionError(f"--max-kl is {options.max_kl:g}; wanted more than 0{most}")
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
    for name, known in (("allocation", ALLOCATIONS), ("checkpointing", CHECKPOINTING)):
        if (value := getattr(recipe, name)) not in known:
            raise OptionError(f"--{name} {value!r} is unknown; there are {', '.join(known)}")
    if not 0 <= recipe.chat_share <= 1:
        raise OptionError(f"--chat-share is {recipe.chat_share}; wanted 0 to 1")
    if not 0 <= seed < MAX_SEED:
        raise OptionError(f"--seed is {seed}; wanted 0 to {MAX_SEED - 1}")


def check_machine(device: str, threads: int | None) -> None:
    """Raises OptionError for a device that torch does not have here, or a bad number of threads."""
    if threads is not None and threads < 1:
        raise OptionError(f"--threads is {threads}; wanted 1 or more")
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
