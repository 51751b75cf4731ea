"""llama.cpp's quantizers: llama-imatrix and llama-quantize, run as programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import BackendError

F16 = "F16"
TYPES = (F16, "Q3_K_S", "Q2_K", "IQ2_M", "IQ2_XXS", "IQ1_M")
HOW_TO_GET = (
    "build them from llama.cpp (https://github.com/ggml-org/llama.cpp, or vendor/llama.cpp of the sdist of "
    "llama-cpp-python): cmake -B build -DLLAMA_BUILD_TOOLS=ON -DLLAMA_CURL=OFF && "
    "cmake --build build --target llama-quantize llama-imatrix; then give --llama-bin build/bin"
)


class MissingPeerError(Exception):
    """A peer is not installed; the text says how to get it."""


@dataclass(frozen=True)
class Tools:
    """The programs, and which llama.cpp they are of."""

    quantize: Path
    imatrix: Path
    version: str


def find_tools(folder: str | None) -> Tools:
    """The programs in `folder`; without one, on PATH. Raises MissingPeerError."""
    found = {name: shutil.which(name, path=folder) for name in ("llama-quantize", "llama-imatrix")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        where = f"in {folder}" if folder else "on PATH"
        raise MissingPeerError(f"no {' and no '.join(missing)} {where}; {HOW_TO_GET}")
    quantize, imatrix = (Path(str(path)) for path in found.values())
    return Tools(quantize, imatrix, _version(imatrix))


def make_imatrix(
    tools: Tools, model: Path, text: Path, out: Path, ctx: int, chunks: int, threads: int | None
) -> None:
    """Write the importances of `model`'s channels on `text` to `out`. Raises BackendError."""
    command = [tools.imatrix, "-m", model, "-f", text, "-o", out, "-c", ctx, "--chunks", chunks]
    _run([*command, "--parse-special", "--no-ppl", "-ngl", 0, *(["-t", threads] if threads else [])])


def quantize(tools: Tools, model: Path, imatrix: Path, kind: str, out: Path, threads: int | None) -> None:
    """Write `model` as llama-quantize's type `kind` to `out`. Raises BackendError, also if
    a matrix got another type because its rows do not fit."""
    command = [tools.quantize, "--imatrix", imatrix, model, out, kind, *([threads] if threads else [])]
    output = _run(command)
    fallback = re.search(r"\d+ of \d+ tensor\(s\) required fallback", output)
    if fallback:
        raise BackendError(
            f"llama-quantize {kind}: {fallback[0]}: rows of these are no multiples of the type's blocks"
        )


def _version(program: Path) -> str:
    """As `--version` tells it: "build b8000 (abc1234)"."""
    found = re.search(r"version: (.*)", _run([program, "--version"]))
    return found[1].strip() if found else "of unknown version"


def _run(command: Sequence[object]) -> str:
    """Run a program; its output. Raises BackendError with its last words if it fails."""
    words = [os.fspath(w) if isinstance(w, Path) else str(w) for w in command]
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except OSError as error:
        raise BackendError(f"{words[0]}: cannot be run: {error.strerror}") from error
    output = done.stdout + done.stderr
    if done.returncode:
        last = [line for line in output.splitlines() if line.strip()][-3:]
        raise BackendError(f"{Path(words[0]).name} ends with code {done.returncode}: {' / '.join(last)}")
    return output
