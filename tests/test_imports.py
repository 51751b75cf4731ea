"""What an import brings along: the runtime never needs torch, and takes Numba only when asked to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numba", "scipy", "pandas")


def loaded_by(statement: str) -> set[str]:
    """Which of HEAVY are in sys.modules after a statement, in a fresh process."""
    code = f"import sys; {statement}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "runtime", "runtime.bench.__main__", "runtime.chat", "runtime.perplexity", "runtime.engine",
        "runtime.gguf", "runtime.model", "runtime.sampling", "runtime.template", "runtime.tokenizer",
        "runtime.zeroshot", "dbf2gguf.zeroshot",
    ],
)  # fmt: skip
def test_light(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_backend_is_light() -> None:
    if not (ROOT / "runtime/backend.py").exists():
        pytest.skip("no backend yet")
    assert loaded_by("import runtime.backend") == set()


def test_runtime_alone_is_cheap() -> None:
    code = "import sys; import runtime; print('numpy' in sys.modules, 'gguf' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
