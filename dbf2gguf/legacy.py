"""Checkpoints of pytorch_model.bin, pickles, made into safetensors without ever running what they hold."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dbf2gguf.files import check_space, files_of_index
from dbf2gguf.hub import described_by
from runtime.errors import BackendError, FormatError, first_line

NAME, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PART_BYTES = 1 << 30  # of a file that is written: what of the weights is held in memory
SAFE_TORCH = (2, 6)
"""With older ones, weights_only=True can be got round (CVE-2025-32434)."""


def is_legacy(folder: Path) -> bool:
    """Whether a model's weights are there as pickles alone."""
    has = any((folder / name).is_file() for name in (NAME, INDEX))
    return has and not any(folder.glob("*.safetensors"))


def weight_files(folder: Path) -> list[Path]:
    """The pickles of a model's folder. Raises FormatError if its index names others."""
    index = folder / INDEX
    return files_of_index(index) if index.is_file() else [folder / NAME]


def reading_bytes(folder: Path) -> int:
    """How much memory `bin_to_safetensors` takes, about: one file, and what is written of it at a time."""
    sizes = [file.stat().st_size for file in weight_files(folder)]
    return max(sizes) + min(sum(sizes), PART_BYTES)


def bin_to_safetensors(folder: Path, out: Path) -> None:
    """Write the model in `folder` to the new folder `out` with its weights as safetensors.

    Raises FormatError for a file that is broken, or that holds anything but tensors: the loader then stops
    before it runs. BackendError if torch is too old to be trusted with that.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_TORCH:
        raise BackendError(
            f"{folder}: torch {torch.__version__} cannot be trusted with pickles; run: pip install "
            "'torch>=2.6', or take safetensors"
        )
    files = weight_files(folder)
    out.mkdir(parents=True, exist_ok=True)
    check_space(out, sum(file.stat().st_size for file in files), "a copy of the weights")
    for file in described_by(folder):
        if file.name != INDEX:
            shutil.copyfile(file, out / file.name)
    places: dict[str, str] = {}
    for number, part in enumerate(_parts(_tensors(files))):
        name = f"model-{number:05}.safetensors"
        save_file(part, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    if not places:
        raise FormatError(f"{folder}: its {NAME} holds no tensors")
    written = json.dumps({"metadata": {}, "weight_map": places})
    (out / "model.safetensors.index.json").write_text(written, encoding="utf-8")


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            # old files are no archives, which alone can be mapped
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # torch and pickle raise anything
            raise FormatError(
                f"{file}: broken, or holds more than tensors, which could run code and is refused: "
                f"{first_line(error)}; take safetensors"
            ) from None
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
        ):
            raise FormatError(f"{file}: wanted a dict of tensors by name, got {type(found).__name__}")
        yield from found.items()


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors in portions of about PART_BYTES, each with memory of its own, as safetensors wants them."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().to_dense().clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    if part:
        yield part
