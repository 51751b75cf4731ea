"""onecomp's DBF and MDBF: run by the Python that has it, read back as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbf2gguf.compare import onecomp_child
from dbf2gguf.compare.llama_cpp import MissingPeerError
from dbf2gguf.progress import Stage
from runtime.errors import BackendError, OptionError

METHODS = ("dbf", "mdbf")
HOW_TO_GET = (
    "it needs Python 3.12 or 3.13: python3.12 -m venv V && V/bin/pip install onecomp; "
    "then give --onecomp-python V/bin/python"
)


@dataclass(frozen=True)
class Wanted:
    """One quantization to make."""

    method: str
    bits: float

    @property
    def name(self) -> str:
        return f"{self.method.upper()} {self.bits:g}"


def parse(text: str) -> list[Wanted]:
    """ "dbf:1.5,mdbf:1" -> what it asks for. Raises OptionError."""
    found = []
    for part in text.split(","):
        method, _, bits = part.strip().partition(":")
        try:
            found.append(Wanted(method, float(bits)))
        except ValueError:
            raise OptionError(f"--onecomp {part!r}: wanted METHOD:BITS such as dbf:1.5") from None
        if method not in METHODS or not 0 < found[-1].bits <= 8:
            raise OptionError(f"--onecomp {part!r}: methods are {', '.join(METHODS)}, bits above 0 to 8")
    return found


def find(python: str) -> str:
    """The version of onecomp that `python` imports. Raises MissingPeerError."""
    program = shutil.which(python)
    if program is None:
        raise MissingPeerError(f"--onecomp-python {python}: no such program; {HOW_TO_GET}")
    done = subprocess.run(
        [program, "-c", "import onecomp; print(onecomp.__version__)"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
        raise MissingPeerError(f"{python} cannot import onecomp ({reason}); {HOW_TO_GET}")
    return done.stdout.strip().splitlines()[-1]


def quantize(
    python: str,
    model: Path,
    text: Path,
    out: Path,
    wanted: Wanted,
    iterations: int,
    rows: int,
    row_tokens: int,
    stage: Stage,
) -> None:
    """Write the quantized model, weights multiplied out, and bits.json to the folder `out`, which is made.

    iterations  0: onecomp's default (600 for DBF, 260 for MDBF)
    stage       gets a step for each layer

    Raises BackendError with onecomp's last words if it fails.
    """
    words = [wanted.method, wanted.bits, iterations, rows, row_tokens]
    # -P: this folder, which holds a module onecomp, stays out of sys.path
    command = [python, "-P", onecomp_child.__file__, model, text, out, *words]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=errors, encoding="utf-8",
            errors="replace",
        ) as child:  # fmt: skip
            try:
                for line in child.stdout or ():
                    if line.strip() == onecomp_child.DONE:
                        stage.step()
            except BaseException:
                child.kill()
                raise
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()] or ["it does not say why"]
    if child.returncode:
        raise BackendError(f"onecomp ends with code {child.returncode}: {lines[-1]}")


def read_bits(folder: Path) -> dict[str, Any]:
    """What bits.json says: see onecomp_child."""
    about: dict[str, Any] = json.loads((folder / "bits.json").read_text(encoding="utf-8"))
    return about
