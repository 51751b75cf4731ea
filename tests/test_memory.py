"""What a loaded model takes: the mapped file and its repacked copy never lie in memory together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_gguf
import numpy as np
import pytest

import runtime
from runtime import backend
from runtime.model import load_model_file

pytest.importorskip("cext", reason="the C core is not built")

IDS = [1, 2, 3, 4]


def logits(config, weights):
    b = backend.load(config, weights, backend="c", n_threads=2, n_ctx=8)
    try:
        return b.eval(np.array(IDS, np.int32), 0, len(IDS))
    finally:
        b.close()


def in_memory(weights):
    """The same layers, their signs copied out of the file."""

    def copied(w):
        return replace(w, a=w.a.copy(), b=w.b.copy())

    names = ("q", "k", "v", "o", "gate", "up", "down")
    layers = tuple(replace(x, **{n: copied(getattr(x, n)) for n in names}) for x in weights.layers)
    return replace(weights, layers=layers)


@pytest.fixture
def config():
    """Large enough that every sign matrix holds whole pages."""
    return make_gguf.tiny_config(d_model=256, d_ff=512, n_heads=8, n_kv_heads=8, head_dim=32, rope_dims=32)


def test_mapped_files_are_told_from_memory(tmp_path, config):
    path = make_gguf.write_model(tmp_path / "m.gguf", config, make_gguf.tiny_weights(config, rank=256))
    opened, other = load_model_file(path), load_model_file(path)
    layer = opened.weights.layers[0]
    assert backend.in_one_file(layer)
    assert not backend.in_one_file(in_memory(opened.weights).layers[0])
    assert not backend.in_one_file(replace(layer, up=replace(layer.up, a=layer.up.a.copy())))
    assert not backend.in_one_file(replace(layer, q=other.weights.layers[0].q))
    assert not backend.in_one_file(replace(layer, q=replace(layer.q, a=layer.q.a[::2])))
    opened.file.release()
    opened.close()
    opened.file.release()


def test_nothing_is_lost_when_pages_are_dropped(tmp_path, config):
    weights = make_gguf.tiny_weights(config, rank=256, bias=True)
    path = make_gguf.write_model(tmp_path / "m.gguf", config, weights)
    want = logits(config, weights)
    file = load_model_file(path)
    copies = in_memory(file.weights)
    for w in (file.weights, file.weights, copies, copies):
        np.testing.assert_array_equal(logits(config, w), want)
    file.file.release()
    for mapped, copy, original in zip(file.weights.layers, copies.layers, weights.layers, strict=True):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            for part in ("a", "b", "s_out", "s_mid", "s_in"):
                expected = getattr(getattr(original, name), part)
                np.testing.assert_array_equal(getattr(getattr(mapped, name), part), expected)
                np.testing.assert_array_equal(getattr(getattr(copy, name), part), expected)
    with runtime.load(path, backend="c", n_threads=2, n_ctx=8) as model:
        np.testing.assert_array_equal(model.logits(IDS), want)


PEAK = """
import re, sys, runtime, runtime.model, runtime.backend, cext
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = runtime.load(sys.argv[1], backend="c", n_threads=2, n_ctx=16)
model.logits([1, 2, 3, 4])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory(tmp_path):
    config = make_gguf.tiny_config(
        n_layers=10, d_model=1024, d_ff=4096, n_heads=16, n_kv_heads=16, head_dim=64, rope_dims=64
    )
    path = make_gguf.write_model(tmp_path / "m.gguf", config, make_gguf.tiny_weights(config, rank=1024))
    run = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(run, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    kv = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * 16
    # activations and tables of a chunk of 64 tokens
    work = 64 * 4 * (6 * config.d_model + 2 * config.d_ff + 1024) + 64 * 8 * config.d_ff
    assert path.stat().st_size > 25e6
    assert int(done.stdout) <= 1.15 * path.stat().st_size + kv + work
