"""The whole runtime on a tiny random model, with every backend that is here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from make_gguf import tiny_config, tiny_weights, write_model

import runtime
from runtime import Sampler
from runtime.errors import BackendError

ROOT = Path(__file__).parents[1]
IDS = [5, 60, 7, 8, 90, 11, 12]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(n_layers=1)
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", config, tiny_weights(config, bias=True))


@pytest.fixture(params=["c", "numba"])
def model(request: pytest.FixtureRequest, path: Path) -> Iterator[runtime.Model]:
    if request.param == "numba" and find_spec("numba") is None:
        pytest.skip("Numba is not installed")
    try:
        opened = runtime.load(path, backend=request.param, n_ctx=40)
    except BackendError as e:
        pytest.skip(str(e))
    with opened:
        yield opened


def test_tokens_follow_from_logits(model: runtime.Model) -> None:
    """Token by token, all at once, and with the cache reused: the same continuation."""
    greedy = Sampler(temperature=0)
    out = list(model.generate(IDS, greedy, 20))
    assert model.stats.finish == "length"
    rows = model.logits([*IDS, *out], len(out) + 1)
    assert rows[:-1].argmax(axis=1).tolist() == out
    for cut in (1, 7, 19):
        assert list(model.generate([*IDS, *out[:cut]], greedy, 20 - cut)) == out[cut:]
        assert model.stats.reused_tokens > 0
    model.logits(IDS[1:])  # nothing in the cache begins like IDS
    assert list(model.generate(IDS, greedy, 20)) == out
    assert model.stats.reused_tokens == 0


def test_logits_do_not_depend_on_what_came_before(model: runtime.Model) -> None:
    first = model.logits(IDS)
    model.logits(IDS[::-1])
    assert np.array_equal(model.logits(IDS), first)
    assert np.array_equal(model.logits(IDS, 2), first[-2:])
    assert np.isfinite(first).all()
    assert first.std() > 0.1


def test_backends_agree(path: Path) -> None:
    pytest.importorskip("numba")
    rows, tokens = [], []
    for backend in ("c", "numba"):
        try:
            model = runtime.load(path, backend=backend, n_ctx=40)
        except BackendError as e:
            pytest.skip(str(e))
        with model:
            rows.append(model.logits(IDS))
            tokens.append(list(model.generate(IDS, Sampler(temperature=0), 30)))
    assert tokens[0] == tokens[1]
    assert np.allclose(rows[0], rows[1], rtol=1e-3, atol=1e-3)


def test_chat_program(path: Path) -> None:
    command = [sys.executable, "-m", "runtime.chat", str(path), "--seed", "1", "-n", "12", "--stats"]
    runs = [
        subprocess.run([*command, "-p", "Hi"], cwd=ROOT, capture_output=True, check=False) for _ in range(2)
    ]
    if b"error: no backend" in runs[0].stderr:
        pytest.skip("no backend")
    for run in runs:
        assert run.returncode == 0, run.stderr
        run.stdout.decode("utf-8")
        assert b"tokens/s" in run.stderr
    assert runs[0].stdout == runs[1].stdout
