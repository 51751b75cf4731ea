"""What a conversion is asked to do, and the checks that need no model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from dbf2gguf.recipe import ALLOCATIONS, CARRIERS, CHECKPOINTING, DTYPES, EMBED_TYPES, Recipe
from dbf2gguf.search import COLLAPSED_KL
from dbf2gguf.tables import check_readable
from dbf2gguf.team import local_rank, torchrun_size
from runtime.errors import OptionError

MAX_SEED = 1 << 32
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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
    device: str  # as find_device found it
    quiet: bool
    max_kl: float | None = None
    force: bool = False
    max_memory: int | None = None  # bytes
    jobs: int | None = None
    cluster: str | None = None


def check_options(options: Options, threads: int | None) -> None:
    """Everything that can be told without the model. Raises OptionError."""
    recipe, seed = options.recipe, options.seed
    if options.carrier not in CARRIERS:
        raise OptionError(f"--carrier {options.carrier!r} is unknown; there are {', '.join(CARRIERS)}")
    if options.embed_type not in EMBED_TYPES:
        raise OptionError(
            f"--embed-type {options.embed_type!r} is unknown; there are {', '.join(EMBED_TYPES)}"
        )
    check_threads(threads)
    _check_executor(options)
    _check_memory(options)
    if options.max_kl is not None and not 0 < options.max_kl <= (inf if options.force else COLLAPSED_KL):
        most = "" if options.force else f" and at most {COLLAPSED_KL:g} without --force"
        raise OptionError(f"--max-kl is {options.max_kl:g}; wanted more than 0{most}")
    for file in [*options.calib, *([options.eval_text] if options.eval_text else [])]:
        check_readable(file)
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
    processes, batch = torchrun_size(), min(recipe.distill_batch, recipe.text_rows)
    if recipe.distill_steps and processes > batch:
        raise OptionError(
            f"torchrun: {processes} processes cannot share batches of {batch} rows; start fewer"
        )
    for name, known in (("allocation", ALLOCATIONS), ("dtype", DTYPES), ("checkpointing", CHECKPOINTING)):
        if (value := getattr(recipe, name)) not in known:
            raise OptionError(f"--{name} {value!r} is unknown; there are {', '.join(known)}")
    for name in ("written_share", "chat_share"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise OptionError(f"--{name.replace('_', '-')} is {getattr(recipe, name)}; wanted 0 to 1")
    if not 0 <= seed < MAX_SEED:
        raise OptionError(f"--seed is {seed}; wanted 0 to {MAX_SEED - 1}")


def _check_executor(options: Options) -> None:
    jobs, cluster = options.jobs, options.cluster
    if jobs is not None and jobs < 1:
        raise OptionError(f"--jobs is {jobs}; wanted 1 or more")
    if jobs is not None and cluster is not None:
        raise OptionError("--jobs and --cluster: wanted one of them")
    if options.device != "cpu" and (jobs is not None or cluster is not None):
        raise OptionError(
            f"--{'jobs' if cluster is None else 'cluster'} is for CPUs, and the device is {options.device}, "
            "which factorizes by itself; take --device cpu, too, or leave it out"
        )


def _check_memory(options: Options) -> None:
    """What a limit cannot be kept with."""
    if options.max_memory is None:
        return
    if options.device != "cpu":
        raise OptionError(
            f"--max-memory is for CPUs, and the device is {options.device}; take --device cpu, too, or leave "
            "it out"
        )
    if options.jobs is not None or torchrun_size() > 1:
        others = "torchrun" if options.jobs is None else "--jobs"
        raise OptionError(f"--max-memory and {others}: its processes would take more; wanted one of them")


def parse_size(text: str) -> int:
    """ "6G" -> bytes; K, M, G, T are powers of 1024. Raises OptionError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise OptionError(f"--max-memory is {text!r}; wanted a size such as 800M or 6G")
    return int(float(found[1]) * UNITS[found[2].upper()])


def find_device(device: str) -> str:
    """cpu or cuda:N for what --device says: auto is a GPU if there is one that torch can use. Under torchrun,
    auto and cuda are a GPU for each process.

    Raises OptionError for a device that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise OptionError(f"--device {device!r} is unknown; there are auto, cpu, cuda, cuda:N")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number, wanted = local_rank() if torchrun_size() > 1 else (0, 1)
    if device == "auto":
        return f"cuda:{number}" if there >= wanted else "cpu"
    if device == "cpu":
        return device
    if not there:
        raise OptionError(
            "--device cuda: this machine has no CUDA device that torch can use; take --device cpu"
        )
    if wanted > there:
        raise OptionError(
            f"--device {device}: torchrun started {wanted} processes here, and there are {there} CUDA devices"
        )
    if ":" not in device:
        return f"cuda:{number}"
    if wanted > 1:
        raise OptionError(f"--device {device}: under torchrun each process takes another; wanted cuda")
    if int(device.partition(":")[2]) >= there:
        raise OptionError(f"--device {device}: this machine has {there} CUDA devices")
    return device


def describe_device(device: str) -> str:
    """The device that find_device found, for the user."""
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return f"{device} ({torch.cuda.get_device_name(device)}); with --device cpu the file has other bytes"


def check_threads(threads: int | None) -> None:
    """Raises OptionError for a bad number of threads."""
    if threads is not None and threads < 1:
        raise OptionError(f"--threads is {threads}; wanted 1 or more")
