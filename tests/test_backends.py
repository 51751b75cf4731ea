"""Whole models: the backends against each other, bit for bit, and against oracle.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny

from runtime import backend
from runtime.config import (
    ADJACENT,
    F16,
    F32,
    GELU,
    LAYER_NORM,
    LOCAL_ROPE,
    NO_ROPE,
    Q4_0,
    Q6_K,
    Q8_0,
    ROPE,
    kv_bytes_per_token,
)
from runtime.errors import BackendError, OptionError

cext = pytest.importorskip("cext", reason="the C core is not built")
ffi, lib = cext.ffi, cext.lib

ISAS = [ffi.string(lib.dbf_isa_name(i)).decode() for i in range(lib.dbf_isa_count())]
N_CTX = 100

MODELS = {
    "odd sizes": (tiny.config(), {}),
    "no GQA, adjacent": (tiny.config(n_kv_heads=6, rope_pairing=ADJACENT), {"tied": True}),
    "one KV head, biases": (tiny.config(n_kv_heads=1), {"bias": True, "kind": F16}),
    "part rotated": (tiny.config(head_dim=20, rope_dims=8, d_model=33, d_ff=65), {"bias": True}),
    "not rotated": (tiny.config(rope_dims=0, n_layers=1), {"kind": F16, "tied": True}),
    "Q8_0": (tiny.config(d_model=64, n_vocab=65), {"kind": Q8_0, "tied": True, "bias": True}),
    "Q4_0": (tiny.config(d_model=96, n_vocab=65, n_layers=1), {"kind": Q4_0, "tied": True}),
    "Q6_K": (tiny.config(d_model=256, n_vocab=131, n_layers=1), {"kind": Q6_K}),
    "heads of 64": (tiny.config(head_dim=64, rope_dims=64, n_layers=1), {}),
    "20 queries share a KV head": (tiny.config(n_heads=20, n_kv_heads=1, head_dim=128, n_layers=1), {}),
    "head norms": (tiny.config(head_dim=20, rope_dims=20), {"head_norms": True}),
    "wide heads": (tiny.config(head_dim=96, rope_dims=96, n_layers=1), {"kind": F32}),
    "GELU": (tiny.config(activation=GELU, n_layers=1), {}),
    "windows": (
        tiny.config(n_layers=4, rope_theta_local=50.0, rope_factor=8.0),
        {"windows": (1, 5, 0, 40), "ropes": (LOCAL_ROPE, LOCAL_ROPE, ROPE, NO_ROPE)},
    ),
    "a window on wide heads": (tiny.config(head_dim=128, rope_dims=128, n_layers=1), {"windows": (33,)}),
    "scales and soft caps": (
        tiny.config(embed_scale=48**0.5, attn_scale=0.7, attn_softcap=2.0, logit_softcap=3.0),
        {"tied": True},
    ),
    "LayerNorm, positions, no gate": (
        tiny.config(norm=LAYER_NORM, n_positions=N_CTX, activation=GELU),
        {"bias": True, "norm_biases": True, "gated": False, "ropes": (NO_ROPE, NO_ROPE)},
    ),
    "LayerNorm without biases": (tiny.config(norm=LAYER_NORM, n_layers=1), {"tied": True}),
    "norms after only, and of all heads": (
        tiny.config(joint_norms=1),
        {"head_norms": True, "post_norms": True, "pre_norms": False},
    ),
    "scales of what is added and of logits": (
        tiny.config(residual_scale=0.22, logit_scale=0.125, logit_softcap=3.0),
        {"bias": True},
    ),
    "experts": (
        tiny.config(n_experts=7, n_experts_used=3, d_expert=40, norm_experts=1),
        {"shared": False},
    ),
    "experts and a shared one": (
        tiny.config(n_experts=5, n_experts_used=2, d_expert=65, d_ff=36, residual_scale=0.5),
        {"shared_gate": True, "bias": True, "tied": True},
    ),
    "experts with GELU and a norm after": (
        tiny.config(n_experts=9, n_experts_used=9, d_expert=100, activation=GELU, n_layers=1),
        {"post_norms": True},
    ),
    "norms after": (tiny.config(head_dim=20, rope_dims=20), {"head_norms": True, "post_norms": True}),
}


def ids_of(config, n):
    return np.random.default_rng(n).integers(0, config.n_vocab, n).astype(np.int32)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


def assert_same(x, y):
    np.testing.assert_array_equal(bits(x), bits(y))


def run(config, weights, ids, *, name="c", n_threads=1, step=None, n_ctx=N_CTX, **options):
    """Logits of all ids, `step` at a time."""
    b = backend.load(config, weights, backend=name, n_threads=n_threads, n_ctx=n_ctx, **options)
    step = step or len(ids)
    out = [b.eval(ids[i : i + step], i, len(ids[i : i + step])) for i in range(0, len(ids), step)]
    b.close()
    return np.concatenate(out)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    config, options = MODELS[request.param]
    weights = tiny.weights(config, **options)
    ids = ids_of(config, 75)  # more than a chunk of 64
    return config, weights, ids, run(config, weights, ids)


def test_oracle(model):
    config, weights, ids, logits = model
    want = oracle.forward(config, weights, ids)
    assert want.std() > 0.1
    # activations have 14 bits, keys and values 11: measured 2e-4 .. 1e-3 of the logits' size; bound 3e-3
    assert np.sqrt(np.mean((logits - want) ** 2)) < 3e-3 * want.std()


def test_numba_is_identical(model):
    pytest.importorskip("numba")
    config, weights, ids, logits = model
    assert_same(run(config, weights, ids[:30], name="numba"), logits[:30])


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_are_identical(model, isa):
    config, weights, ids, logits = model
    try:
        assert lib.dbf_isa_use(isa.encode()) == lib.DBF_OK
        assert_same(run(config, weights, ids), logits)
        assert_same(run(config, weights, ids, step=1), logits)
    finally:
        lib.dbf_isa_use(ffi.NULL)


@pytest.mark.parametrize("n_threads", range(2, 9))
def test_threads_are_identical(model, n_threads):
    config, weights, ids, logits = model
    assert_same(run(config, weights, ids, n_threads=n_threads), logits)
    assert_same(run(config, weights, ids[:6], n_threads=n_threads, step=1), logits[:6])


@pytest.mark.parametrize("name", ["odd sizes", "Q8_0"])
def test_threads_are_identical_on_every_instruction_set(name):
    config, options = MODELS[name]
    weights, ids = tiny.weights(config, **options), ids_of(config, 7)
    want = run(config, weights, ids)
    try:
        for isa in ISAS:
            assert lib.dbf_isa_use(isa.encode()) == lib.DBF_OK
            for n_threads in range(1, 9):
                assert_same(run(config, weights, ids, n_threads=n_threads), want)
                assert_same(run(config, weights, ids[:3], n_threads=n_threads, step=1), want[:3])
    finally:
        lib.dbf_isa_use(ffi.NULL)


@pytest.mark.parametrize("step", [1, 2, 7, 18, 19, 32, 33, 50, 51, 63, 64, 65])
def test_batches_are_identical(model, step):
    config, weights, ids, logits = model
    assert_same(run(config, weights, ids, step=step, n_threads=2), logits)


@pytest.fixture(scope="module", params=[(6, 2, 32), (4, 4, 64), (3, 1, 160)], ids=str)
def q8_0_cache(request):
    """A model of some heads, KV heads and head_dim, and its logits with keys and values held as Q8_0."""
    heads, kv_heads, dim = request.param
    config = tiny.config(n_heads=heads, n_kv_heads=kv_heads, head_dim=dim, rope_dims=dim)
    weights, ids = tiny.weights(config), ids_of(config, 75)
    return config, weights, ids, run(config, weights, ids, kv_type="q8_0")


def test_q8_0_cache(q8_0_cache):
    config, weights, ids, logits = q8_0_cache
    want = oracle.forward(config, weights, ids)
    error = np.sqrt(np.mean((logits - want) ** 2)) / want.std()
    # a step is 1/127 of a block's largest value: measured 7e-3 .. 8e-3 of the logits' size, as F16 6e-4
    assert 2e-3 < error < 2e-2


def test_q8_0_cache_is_identical_everywhere(q8_0_cache):
    config, weights, ids, logits = q8_0_cache
    try:
        for isa in ISAS:
            assert lib.dbf_isa_use(isa.encode()) == lib.DBF_OK
            for n_threads, step, n in ((1, None, 75), (2, 7, 75), (5, 64, 75), (3, 1, 20)):
                some = run(config, weights, ids[:n], n_threads=n_threads, step=step, kv_type="q8_0")
                assert_same(some, logits[:n])
    finally:
        lib.dbf_isa_use(ffi.NULL)
    pytest.importorskip("numba")
    assert_same(run(config, weights, ids[:20], name="numba", kv_type="q8_0"), logits[:20])


@pytest.mark.parametrize("name", ["c", "numba"])
def test_kv_type_that_does_not_fit(name):
    config = tiny.config(n_layers=1)
    weights = tiny.weights(config)
    for kv_type, words in [
        ("q8_0", r"12 dimensions \(head_dim\), no multiple of 32"),
        ("q4_0", "'q4_0' is unknown"),
    ]:
        with pytest.raises(OptionError, match=words):
            backend.load(config, weights, backend=name, n_ctx=10, kv_type=kv_type)


def test_kv_bytes_per_token():
    config = tiny.smollm2()
    assert kv_bytes_per_token(config, "f16") == 2 * 30 * 3 * 64 * 2
    assert kv_bytes_per_token(config, "q8_0") == 2 * 30 * 3 * 68


@pytest.fixture(scope="module", params=["odd sizes", "one KV head, biases", "part rotated", "Q8_0"])
def int8(request):
    config, options = MODELS[request.param]
    weights, ids = tiny.weights(config, **options), ids_of(config, 75)
    return config, weights, ids, run(config, weights, ids, activations="int8")


def test_int8_activations(int8):
    config, weights, ids, logits = int8
    want = oracle.forward(config, weights, ids)
    error = np.sqrt(np.mean((logits - want) ** 2)) / want.std()
    # a step is 1/126 of a vector's largest value: measured 1.2e-2 .. 2.5e-2 of the logits' size; int16 2e-4
    assert 4e-3 < error < 7e-2


def test_int8_activations_are_identical_everywhere(int8):
    config, weights, ids, logits = int8
    try:
        for isa in ISAS:
            assert lib.dbf_isa_use(isa.encode()) == lib.DBF_OK
            for n_threads, step, n in ((1, None, 75), (2, 7, 75), (5, 64, 75), (3, 1, 20)):
                some = run(config, weights, ids[:n], n_threads=n_threads, step=step, activations="int8")
                assert_same(some, logits[:n])
    finally:
        lib.dbf_isa_use(ffi.NULL)
    pytest.importorskip("numba")
    for step in (None, 1):
        some = run(config, weights, ids[:20], name="numba", step=step, activations="int8")
        assert_same(some, logits[:20])


@pytest.mark.parametrize("name", ["c", "numba"])
def test_activations_by_name(name):
    if name == "numba":
        pytest.importorskip("numba")
    config = tiny.config(n_layers=1)
    weights = tiny.weights(config)
    b = backend.load(config, weights, backend=name, n_threads=1, n_ctx=10, activations="int8")
    assert b.activations == "int8"
    assert b.description.endswith("1 thread, int8 activations")
    with pytest.raises(OptionError, match="'int4' are unknown; there are int16, int8"):
        backend.load(config, weights, backend=name, n_ctx=10, activations="int4")


@pytest.mark.parametrize("name", ["c", "numba"])
def test_logits_of_the_last(name):
    if name == "numba":
        pytest.importorskip("numba")
    config = tiny.config()
    weights, ids = tiny.weights(config), ids_of(config, 75)
    b = backend.load(config, weights, backend=name, n_threads=2, n_ctx=N_CTX)
    every = b.eval(ids, 0, 75)
    for n in (0, 1, 2, 10, 11, 12, 74):
        last = b.eval(ids, 0, n)
        assert last.shape == (n, config.n_vocab)
        assert_same(last, every[75 - n :])


@pytest.mark.parametrize("name", ["c", "numba"])
def test_cache_is_rewritten_and_prefixes_are_reused(name):
    if name == "numba":
        pytest.importorskip("numba")
    config = tiny.config()
    weights = tiny.weights(config)
    first, second = ids_of(config, 30), ids_of(config, 31)
    second[:12] = first[:12]
    b = backend.load(config, weights, backend=name, n_threads=2, n_ctx=N_CTX)
    b.eval(first, 0, 1)
    assert_same(b.eval(second[12:], 12, 19), run(config, weights, second)[12:])
    assert_same(b.eval(first, 0, 30), run(config, weights, first))


@pytest.mark.parametrize("name", ["c", "numba"])
def test_bad_arguments(name):
    if name == "numba":
        pytest.importorskip("numba")
    config = tiny.config(n_layers=1)
    b = backend.load(config, tiny.weights(config), backend=name, n_threads=1, n_ctx=10)
    assert (b.name, b.n_ctx, b.n_threads) == (name, 10, 1)
    ids = np.zeros(4, np.int32)
    for tokens, pos, n_logits, words in [
        (ids, 1, 1, "holds 0"), (ids, -1, 1, "holds 0"), (ids[:0], 0, 0, "shape"), (ids[None], 0, 1, "shape"),
        (np.zeros(11, np.int32), 0, 1, "context of 10"), (ids, 0, 5, "5 logits"), (ids, 0, -1, "-1 logits"),
        (ids - 1, 0, 1, "token -1"), (ids + config.n_vocab, 0, 1, f"token {config.n_vocab}"),
    ]:  # fmt: skip
        with pytest.raises(BackendError, match=words):
            b.eval(tokens, pos, n_logits)
    b.eval(np.zeros(8, np.int32), 0, 0)
    with pytest.raises(BackendError, match="context of 10"):
        b.eval(ids[:3], 8, 1)
    b.eval(ids[:2], 8, 1)
    b.close()
    b.close()
    with pytest.raises(BackendError, match="closed"):
        b.eval(ids, 0, 1)


def test_weights_that_do_not_fit():
    config = tiny.config(n_layers=1)
    w = tiny.weights(config, bias=True)
    layer = w.layers[0]
    bad = [
        (replace(w, layers=()), "0 layers, wanted 1"),
        (replace(w, out_norm=w.out_norm[1:]), "out_norm"),
        (replace(w, out_norm=w.out_norm.astype(np.float64)), "out_norm"),
        (replace(w, embed=replace(w.embed, rows=5)), "embed"),
        (replace(w, head=replace(w.head, type=3)), "type 3"),
        (replace(w, head=replace(w.head, type=Q6_K)), "type 14"),
        (replace(w, head=replace(w.head, type=Q8_0)), "type 8"),
        (replace(w, head=replace(w.head, data=w.head.data[1:])), "head.data"),
    ]
    for name in ("a", "b", "s_out", "s_mid", "s_in", "bias"):
        linear = replace(layer.q, **{name: getattr(layer.q, name)[:-1]})
        bad.append((replace(w, layers=(replace(layer, q=linear),)), "layer 0: q"))
    for weights, words in bad:
        with pytest.raises(BackendError, match=words):
            backend.load(config, weights, backend="c", n_ctx=10)
    with pytest.raises(BackendError, match="dbf_model_new"):
        backend.load(replace(config, norm_eps=float("nan")), w, backend="c", n_ctx=10)
    for options in ({"n_ctx": 0}, {"n_ctx": 10, "n_threads": 0}, {"n_ctx": 10, "backend": "fortran"}):
        with pytest.raises(BackendError):
            backend.load(config, w, **options)


def test_features_that_do_not_fit():
    config = tiny.config(n_positions=12, n_layers=1)
    w = tiny.weights(config)
    layer = w.layers[0]
    for weights, words in [
        (replace(w, positions=None), "n_positions is 12"),
        (replace(w, positions=w.positions[1:]), "positions: got"),
        (replace(w, out_norm_bias=w.out_norm[1:]), "out_norm_bias"),
        (replace(w, layers=(replace(layer, gate=None),)), "no gate, which only GELU"),
        (replace(w, layers=(replace(layer, window=-1),)), "window is -1"),
        (replace(w, layers=(replace(layer, rope=2),)), "rope is 2"),
        (replace(w, layers=(replace(layer, q_norm=layer.attn_norm),)), "q_norm without k_norm"),
        (replace(w, layers=(replace(layer, attn_post_norm=w.out_norm[1:]),)), "attn_post_norm"),
        (replace(w, layers=(replace(layer, ffn_norm_bias=w.out_norm[1:]),)), "ffn_norm_bias"),
    ]:
        with pytest.raises(BackendError, match=words):
            backend.load(config, weights, backend="c", n_ctx=10)
    experts = {"n_experts": 3, "n_experts_used": 2, "d_expert": 40}
    config_e = tiny.config(n_layers=1, **experts)
    e = tiny.weights(config_e, shared_gate=True)
    layer = e.layers[0]
    for change, weights, words in [
        ({}, replace(e, layers=(replace(layer, router=None),)), "wanted 3 and, for any, a router"),
        ({}, replace(e, layers=(replace(layer, router=layer.router[1:]),)), "router: got"),
        ({}, replace(e, layers=(replace(layer, experts=layer.experts[1:]),)), "2 experts, wanted 3"),
        ({}, replace(e, layers=(replace(layer, down=None),)), "half of one"),
        ({}, replace(e, layers=(replace(layer, gate=None, up=None, down=None),)), "without a shared expert"),
        ({}, replace(e, layers=(replace(layer, shared_gate=layer.shared_gate[1:]),)), "shared_gate: got"),
        ({"d_expert": 41}, e, "gate of expert 0.a: got"),
        ({"n_experts_used": 4}, e, "4 experts used, wanted 1 to 3"),
        ({"n_experts": 0}, e, "3 experts, wanted 0"),
    ]:
        with pytest.raises(BackendError, match=words):
            backend.load(replace(config_e, **change), weights, backend="c", n_ctx=10)
    with pytest.raises(BackendError, match="no feed-forward"):
        backend.load(config, replace(w, layers=(replace(w.layers[0], up=None, down=None),)), n_ctx=10)
    with pytest.raises(OptionError, match="a context of 13 tokens, but the model knows 12 positions"):
        backend.load(config, w, backend="c", n_ctx=13)
    for change in ({"attn_softcap": -1.0}, {"embed_scale": float("inf")}, {"activation": 2}, {"norm": 2}):
        with pytest.raises(BackendError, match="dbf_model_new"):
            backend.load(replace(config, **change), w, backend="c", n_ctx=10)


def test_non_finite_weights_do_not_crash():
    config = tiny.config(n_layers=1)
    w = tiny.weights(config)
    w.layers[0].q.s_in[3] = np.inf
    w.layers[0].gate.s_mid[3] = np.nan
    ids = ids_of(config, 9)
    for isa in ISAS:
        lib.dbf_isa_use(isa.encode())
        assert np.isnan(run(config, w, ids)).all()
    lib.dbf_isa_use(ffi.NULL)


def test_c_itself_checks():
    config = tiny.config(n_layers=1)
    b = backend.load(config, tiny.weights(config), backend="c", n_ctx=10)
    s, n_vocab = b._session, config.n_vocab
    tokens, logits = ffi.new("int32_t[16]"), ffi.new("float[]", n_vocab)
    assert lib.dbf_eval(s, tokens, 11, 0, logits, 1) == lib.DBF_ECONTEXT
    for args in [
        (ffi.NULL, tokens, 1, 0, logits, 1), (s, ffi.NULL, 1, 0, logits, 1), (s, tokens, 0, 0, logits, 0),
        (s, tokens, 1, 1, logits, 1), (s, tokens, 1, -1, logits, 1), (s, tokens, 1, 0, ffi.NULL, 1),
        (s, tokens, 1, 0, logits, 2), (s, tokens, 1, 0, logits, -1),
    ]:  # fmt: skip
        assert lib.dbf_eval(*args) == lib.DBF_EINVAL
    for token in (-1, n_vocab):
        tokens[0] = token
        assert lib.dbf_eval(s, tokens, 1, 0, logits, 1) == lib.DBF_EINVAL
    session = ffi.new("dbf_session **")
    assert lib.dbf_session_new(session, b._model, 0, logits, lib.DBF_F16, 16) == lib.DBF_EINVAL
    assert lib.dbf_session_new(session, b._model, 5, ffi.NULL, lib.DBF_F16, 16) == lib.DBF_EINVAL
    assert lib.dbf_session_new(session, b._model, 5, logits, lib.DBF_F16, 4) == lib.DBF_EINVAL
    for kv_type in (lib.DBF_F32, lib.DBF_Q8_0, -1):  # Q8_0: heads of 12
        assert lib.dbf_session_new(session, b._model, 5, logits, kv_type, 16) == lib.DBF_EINVAL


def test_stages_change_nothing():
    config = tiny.config()
    weights, ids = tiny.weights(config), ids_of(config, 9)
    b = backend.load(config, weights, backend="c", n_threads=2, n_ctx=N_CTX)
    want = b.eval(ids, 0, 9)
    with pytest.raises(BackendError, match="stop_stages"):
        b.stop_stages()
    b.start_stages()
    assert_same(b.eval(ids, 0, 9), want)
    seconds = b.stop_stages()
    assert len(seconds) == lib.DBF_STAGES
    assert min(seconds.values()) >= 0 < sum(seconds.values())
    b.start_stages()  # from zero again
    assert set(b.stop_stages().values()) == {0.0}
    assert lib.dbf_stage_name(-1) == lib.dbf_stage_name(lib.DBF_STAGES) == ffi.NULL
    assert lib.dbf_stages_start(ffi.NULL) == lib.dbf_stages_stop(ffi.NULL, ffi.NULL) == lib.DBF_EINVAL


def test_two_models_in_two_threads():
    config = tiny.config()
    weights, ids = tiny.weights(config), ids_of(config, 40)
    want, got = run(config, weights, ids), {}
    work = [
        threading.Thread(target=lambda i=i: got.update({i: run(config, weights, ids, n_threads=3, step=3)}))
        for i in range(2)
    ]
    for t in work:
        t.start()
    for t in work:
        t.join()
    for i in range(2):
        assert_same(got[i], want)


def python(code, **env):
    """Run code in a new process, in this folder."""
    setup = "import tiny; from runtime import backend; c = tiny.config(n_layers=1)"
    return subprocess.run(
        [sys.executable, "-c", f"{setup}\n{code}"],
        cwd=Path(__file__).parent, env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip


LOAD = "print(backend.load(c, tiny.weights(c), n_threads=1, n_ctx=9).description)"


def test_environment():
    assert python(LOAD, DBF_ISA="scalar").stdout == "C, scalar, 1 thread\n"
    assert python(LOAD).stdout == f"C, {ISAS[-1]}, 1 thread\n"
    bad = python(LOAD, DBF_ISA="mmx")
    assert bad.returncode == 1
    assert "BackendError: DBF_ISA=mmx: this machine has scalar" in bad.stderr


def test_environment_numba():
    pytest.importorskip("numba")
    assert python(LOAD, DBF_BACKEND="numba").stdout == "Numba, 1 thread\n"


def test_missing_backends():
    no_c = f"import sys; sys.modules['cext'] = None\n{LOAD}"
    missing = python(f"sys_modules = __import__('sys').modules; sys_modules['numba'] = None\n{no_c}")
    assert missing.returncode == 1
    assert "warning: the C core is not built" in missing.stderr
    assert "BackendError: no backend: Numba is missing" in missing.stderr
    forced = python(no_c, DBF_BACKEND="c")
    assert "BackendError: the C core is not built" in forced.stderr


def test_numba_replaces_c_with_a_warning():
    pytest.importorskip("numba")
    run = python(f"import sys; sys.modules['cext'] = None\n{LOAD}")
    assert run.stdout == "Numba, 1 thread\n"
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("warning: the C core is not built")
