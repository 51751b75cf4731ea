"""runtime.model: what was written is what is read, and every inconsistency is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from make_gguf import tensors, tiny_config, tiny_weights, write, write_model

from runtime.config import (
    ADJACENT,
    F16,
    GELU,
    LAYER_NORM,
    LOCAL_ROPE,
    NO_ROPE,
    Q4_0,
    Q8_0,
    ROPE,
    Layer,
    Linear,
    Weights,
)
from runtime.errors import FormatError, UnsupportedModelError
from runtime.format import DBF1_TYPE
from runtime.model import load_model_file

Edit = Callable[[dict[str, Any], dict[str, Any]], None]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b))
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("bias", [False, True])
def test_round_trip(tmp_path: Path, bias: bool) -> None:
    config = tiny_config(rope_pairing=ADJACENT, rope_dims=4)
    weights = tiny_weights(config, bias=bias)
    file = load_model_file(write_model(tmp_path / "m.gguf", config, weights, arch="some-arch"))
    assert dataclasses.replace(file.config, norm_eps=config.norm_eps) == config  # it is a float32 in the file
    assert file.config.norm_eps == pytest.approx(config.norm_eps)
    assert same(file.weights, weights)
    assert file.weights.head is file.weights.embed
    assert file.architecture == "some-arch"
    assert file.name == "m.gguf"
    assert file.tokenizer_json is not None
    assert file.chat_template is not None
    linear: Linear = file.weights.layers[0].down
    assert (linear.rows, linear.rank, linear.cols) == (32, 24, 44)
    assert isinstance(file.weights.layers[0], Layer)
    assert isinstance(file.weights, Weights)
    file.close()


def test_defaults(tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        for key in ("head_count_kv", "key_length"):
            del meta[f"llama.attention.{key}"]
        for key in ("rope.freq_base", "rope.dimension_count", "vocab_size"):
            del meta[f"llama.{key}"]

    config = tiny_config(n_kv_heads=4)
    got = load_model_file(write_model(tmp_path / "m.gguf", config, change=change)).config
    assert dataclasses.replace(got, norm_eps=config.norm_eps) == config


def test_features(tmp_path: Path) -> None:
    """What only some models have comes back as it was written."""
    config = tiny_config(
        n_layers=4, activation=GELU, embed_scale=5.5, attn_scale=0.25, attn_softcap=50.0, logit_softcap=30.0,
        rope_factor=8.0, rope_theta_local=500.0, residual_scale=0.5, logit_scale=0.125,
    )  # fmt: skip
    plain, norm = tiny_weights(config), np.linspace(0.5, 1.5, 32, dtype=np.float32)
    head = np.linspace(0.5, 1.5, 8, dtype=np.float32)
    layers = [
        dataclasses.replace(
            layer, window=window, rope=rope, q_norm=head, k_norm=head[::-1].copy(),
            attn_post_norm=norm, ffn_post_norm=norm[::-1].copy(),
        )
        for layer, window, rope in zip(
            plain.layers, (16, 0, 16, 0), (LOCAL_ROPE, ROPE, NO_ROPE, NO_ROPE), strict=True
        )
    ]  # fmt: skip
    weights = dataclasses.replace(plain, layers=tuple(layers))
    got = load_model_file(write_model(tmp_path / "m.gguf", config, weights))
    assert dataclasses.replace(got.config, norm_eps=config.norm_eps) == config
    assert same(got.weights, weights)


def test_norms_after_only_and_of_all_heads(tmp_path: Path) -> None:
    config = tiny_config(joint_norms=1)
    plain = tiny_weights(config)
    q, k, x = (np.linspace(0.5, 1.5, n, dtype=np.float32) for n in (32, 16, 32))
    norms = {
        "attn_norm": None,
        "ffn_norm": None,
        "attn_post_norm": x,
        "ffn_post_norm": x,
        "q_norm": q,
        "k_norm": k,
    }
    layers = tuple(dataclasses.replace(layer, **norms) for layer in plain.layers)
    weights = dataclasses.replace(plain, layers=layers)
    got = load_model_file(write_model(tmp_path / "m.gguf", config, weights))
    assert got.config.joint_norms == 1
    assert same(got.weights, weights)


def test_layernorm_positions_and_no_gate(tmp_path: Path) -> None:
    config = tiny_config(norm=LAYER_NORM, n_positions=20, activation=GELU)
    plain, bias = tiny_weights(config), np.linspace(-0.5, 1.5, 32, dtype=np.float32)
    nothing = {"gate": None, "rope": NO_ROPE}
    layers = tuple(
        dataclasses.replace(layer, attn_norm_bias=bias, ffn_norm_bias=-bias, **nothing)
        for layer in plain.layers
    )
    positions = np.linspace(-1, 1, 20 * 32, dtype=np.float32).reshape(20, 32)
    weights = dataclasses.replace(plain, layers=layers, out_norm_bias=bias, positions=positions)
    got = load_model_file(write_model(tmp_path / "m.gguf", config, weights))
    assert dataclasses.replace(got.config, norm_eps=config.norm_eps) == config
    assert same(got.weights, weights)


@pytest.mark.parametrize("shared", ["none", "plain", "gated"])
def test_experts(tmp_path: Path, shared: str) -> None:
    changes = {"n_experts": 3, "n_experts_used": 2, "d_expert": 20, "norm_experts": int(shared == "none")}
    config = tiny_config(d_ff=20 if shared == "none" else 44, **changes)
    plain = tiny_weights(config)
    gate = np.linspace(-1, 1, 32, dtype=np.float32) if shared == "gated" else None
    parts = {"gate": None, "up": None, "down": None} if shared == "none" else {"shared_gate": gate}
    layers = tuple(dataclasses.replace(layer, **parts) for layer in plain.layers)
    weights = dataclasses.replace(plain, layers=layers)
    got = load_model_file(write_model(tmp_path / "m.gguf", config, weights))
    assert dataclasses.replace(got.config, norm_eps=config.norm_eps) == config
    assert same(got.weights, weights)
    assert len(got.weights.layers[0].gguf_linears) == (4 if shared == "none" else 7) + 3 * 3


def expert_model(path: Path, change: Edit) -> Path:
    config = tiny_config(n_experts=3, n_experts_used=2, d_expert=20)
    return write_model(path, config, tiny_weights(config), change=change)


def test_experts_that_contradict(tmp_path: Path) -> None:
    for edit, message in (
        (meta_is("llama.expert_count", 2**32 - 1), "expert_count is 4294967295, wanted 0 to 4096"),
        (meta_is("llama.expert_count", "3"), "expert_count is '3', wanted int"),
        (meta_is("llama.expert_count", 4), r"ffn_gate_inp\.weight has shape \(3, 32\), wanted \(4, 32\)"),
        (meta_is("llama.expert_used_count", 4), "expert_used_count is 4, wanted 1 to 3, with 3 experts"),
        (meta_is("llama.expert_used_count", 0), "expert_used_count is 0, wanted an integer in"),
        (meta_is("llama.expert_used_count", None), "expert_used_count is missing"),
        (meta_is("llama.expert_feed_forward_length", None), "expert_feed_forward_length is missing"),
        (meta_is("llama.expert_feed_forward_length", 2**31), "wanted an integer in"),
        (meta_is("llama.expert_feed_forward_length", 24), "has shape"),
        (meta_is("llama.expert_weights_norm", None), "expert_weights_norm is missing"),
        (tensor_is("blk.1.ffn_gate_inp.weight", None), r"blk\.1\.ffn_gate_inp\.weight is missing"),
        (tensor_is("blk.1.ffn_up.2.dbf_mid", None), r"blk\.1\.ffn_up\.2\.dbf_mid is missing"),
        (tensor_is("blk.1.ffn_up_shexp.dbf_a", None), r"blk\.1\.ffn_up_shexp\.dbf_a is missing"),
        (tensor_is("blk.0.ffn_gate_inp.weight", nan(96, np.float32).reshape(3, 32)), "not finite"),
    ):
        with pytest.raises(FormatError, match=message):
            load_model_file(expert_model(tmp_path / "m.gguf", edit))
    for edit, message in (
        (meta_is("llama.expert_count", None), "blk.0.ffn_gate_inp.weight|ffn_gate.dbf_mid is missing"),
        (meta_is("llama.expert_gating_func", 2), "gating of experts other than softmax is not implemented"),
        (meta_is("llama.expert_weights_scale", 2.5), "scale of experts is not implemented"),
        (meta_is("llama.expert_group_count", 4), "groups of experts is not implemented"),
        (meta_is("llama.leading_dense_block_count", 1), "among layers without is not implemented"),
        (tensor_is("blk.0.ffn_gate.3.dbf_a", np.ones((20, 3), np.uint8), DBF1_TYPE), "ffn_gate.3.dbf_a"),
    ):
        with pytest.raises((UnsupportedModelError, FormatError), match=message):
            load_model_file(expert_model(tmp_path / "m.gguf", edit))


def test_i8_carrier(tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        meta["dbf.carrier"] = "i8"
        for name, (array, kind) in arrays.items():
            if kind == DBF1_TYPE:
                arrays[name] = (array.view(np.int8), None)

    config = tiny_config()
    weights = tiny_weights(config)
    assert same(
        load_model_file(write_model(tmp_path / "m.gguf", config, weights, change=change)).weights, weights
    )


@pytest.mark.parametrize(("kind", "width"), [(F16, 64), (Q4_0, 18), (Q8_0, 34)])
def test_dense_types_and_head(tmp_path: Path, kind: int, width: int) -> None:
    rng = np.random.default_rng(1)
    embed = rng.integers(0, 60, (300, width), dtype=np.uint8)
    head = rng.integers(0, 60, (300, width), dtype=np.uint8)

    def change(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        ggml = gguf.GGMLQuantizationType(kind)
        for name, data in (("token_embd.weight", embed), ("output.weight", head)):
            arrays[name] = (data.view(np.float16), None) if kind == F16 else (data, ggml)
        arrays["rope_freqs.weight"] = (np.array([1, 1, 2, 8], np.float32), None)

    got = load_model_file(write_model(tmp_path / "m.gguf", change=change)).weights
    assert (got.embed.type, got.embed.rows, got.embed.cols) == (kind, 300, 32)
    assert np.array_equal(got.embed.data, embed)
    assert np.array_equal(got.head.data, head)
    assert got.rope_freqs is not None
    assert got.rope_freqs.tolist() == [1, 1, 2, 8]


def meta_is(key: str, value: Any) -> Edit:
    def edit(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        if value is None:
            meta.pop(key)
        else:
            meta[key] = value

    return edit


def tensor_is(name: str, array: Any, kind: Any = None) -> Edit:
    def edit(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        if array is None:
            arrays.pop(name)
        else:
            arrays[name] = (array, kind)

    return edit


def nan(n: int, dtype: Any, value: float = np.nan) -> Any:
    out = np.ones(n, dtype)
    out[-1] = value
    return out


def windows(size: int, pattern: list[bool]) -> Edit:
    key = "llama.attention.sliding_window"
    return lambda meta, arrays: meta.update({key: size, f"{key}_pattern": pattern})


UNSUPPORTED: dict[str, tuple[Edit, str]] = {
    "plain GGUF": (meta_is("dbf.version", None), "plain GGUF file.*dbf2gguf .* OUT.gguf"),
    "version": (meta_is("dbf.version", 2), "dbf.version is 2"),
    "activation": (
        meta_is("dbf.activation", "gelu"),
        "dbf.activation is 'gelu'; implemented: silu, gelu_tanh",
    ),
    "norm": (meta_is("dbf.norm", "batch"), "dbf.norm is 'batch'; implemented: rms, layer"),
    "pairing": (meta_is("dbf.rope.pairing", "thirds"), "dbf.rope.pairing is 'thirds'"),
    "carrier": (meta_is("dbf.carrier", "i16"), "dbf.carrier"),
    "rope scaling": (meta_is("llama.rope.scaling.type", "yarn"), "RoPE scaling is not implemented"),
    "sliding window": (
        meta_is("llama.attention.sliding_window", 128),
        "sliding_window_pattern does not say in which layers",
    ),
    "scale": (meta_is("llama.attention.scale", 0.5), "a scale of attention scores"),
    "value length": (meta_is("llama.attention.value_length", 16), "different length"),
    "heads per layer": (meta_is("llama.attention.head_count_kv", [2, 4]), "differs from layer to layer"),
    "unknown tensor": (
        tensor_is("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
        "blk.0.attn_sinks.weight",
    ),
    "F64 embedding": (
        tensor_is("token_embd.weight", np.ones((300, 32))),
        "type F64; implemented: F32, F16, Q4_0, Q8_0, Q6_K",
    ),
}

BAD: dict[str, tuple[Edit, str]] = {
    "version type": (meta_is("dbf.version", "1"), "dbf.version is '1', wanted int"),
    "no block count": (meta_is("llama.block_count", None), "llama.block_count is missing"),
    "block count 0": (meta_is("llama.block_count", 0), "wanted an integer in"),
    "block count 1": (meta_is("llama.block_count", 3), "tensor blk.2.attn_q.dbf_mid is missing"),
    "block count huge": (meta_is("llama.block_count", 2**32 - 1), "wanted an integer in"),
    "no eps": (meta_is("llama.attention.layer_norm_rms_epsilon", None), "is missing"),
    "eps 0": (meta_is("llama.attention.layer_norm_rms_epsilon", 0.0), "wanted a positive number"),
    "eps nan": (meta_is("llama.attention.layer_norm_rms_epsilon", float("nan")), "wanted a positive number"),
    "theta inf": (meta_is("llama.rope.freq_base", float("inf")), "wanted a positive number"),
    "theta text": (meta_is("llama.rope.freq_base", "1"), "wanted float"),
    "kv heads": (meta_is("llama.attention.head_count_kv", 3), "no multiple of 3 KV heads"),
    "odd rope": (meta_is("llama.rope.dimension_count", 7), "an even number"),
    "rope too long": (meta_is("llama.rope.dimension_count", 10), "rotates 10 dimensions of 8"),
    "vocabulary": (meta_is("llama.vocab_size", 299), r"has shape \(300, 32\), wanted \(299, 32\)"),
    "width": (meta_is("llama.embedding_length", 40), "has shape"),
    "experts": (meta_is("llama.expert_count", 8), "llama.expert_used_count is missing"),
    "ff": (meta_is("llama.feed_forward_length", 48), "has shape"),
    "no pairing": (meta_is("dbf.rope.pairing", None), "dbf.rope.pairing"),
    "no embedding": (tensor_is("token_embd.weight", None), "token_embd.weight is missing"),
    "no factor": (tensor_is("blk.1.ffn_up.dbf_b", None), "blk.1.ffn_up.dbf_b is missing"),
    "no norm": (tensor_is("output_norm.weight", None), "output_norm.weight is missing"),
    "half of the head norms": (
        tensor_is("blk.0.attn_q_norm.weight", np.ones(8, np.float32)),
        "only one of the tensors attn_q_norm",
    ),
    "post-norm shape": (
        tensor_is("blk.0.post_attention_norm.weight", np.ones(8, np.float32)),
        r"has shape \(8,\), wanted \(32,\)",
    ),
    "window pattern": (windows(128, [True]), "wanted a bool for each of 2 layers"),
    "rope layers": (meta_is("dbf.rope.layers", [True]), "wanted a bool for each of 2 layers"),
    "no norm of a layer": (tensor_is("blk.1.ffn_norm.weight", None), "blk.1.ffn_norm.weight is missing"),
    "window": (windows(1 << 25, [True, False]), "wanted an integer in"),
    "cap": (meta_is("llama.final_logit_softcapping", -1.0), "wanted a number of 0 or more"),
    "embedding scale": (meta_is("dbf.scale.embedding", float("nan")), "wanted a number of 0 or more"),
    "linear scaling": (meta_is("llama.rope.scaling.type", "linear"), "rope.scaling.factor is missing"),
    "norm nan": (tensor_is("blk.0.attn_norm.weight", nan(32, np.float32)), "not finite"),
    "scale inf": (tensor_is("blk.0.attn_q.dbf_out", nan(32, np.float16, np.inf)), "dbf_out .* not finite"),
    "scale type": (tensor_is("blk.0.attn_q.dbf_out", np.ones(32, np.float32)), "type F32, wanted F16"),
    "signs type": (tensor_is("blk.0.attn_q.dbf_a", np.ones((32, 3), np.int8)), "type I8, wanted DBF1"),
    "signs shape": (tensor_is("blk.0.attn_q.dbf_a", np.ones((32, 4), np.uint8), DBF1_TYPE), r"\(32, 32\)"),
    "mid is a matrix": (tensor_is("blk.0.attn_q.dbf_mid", np.ones((3, 8), np.float16)), "wanted .rank,."),
    "rank 12": (tensor_is("blk.0.attn_q.dbf_mid", np.ones(12, np.float16)), "multiple of 8"),
    "rank 32": (tensor_is("blk.0.attn_q.dbf_mid", np.ones(32, np.float16)), "has shape"),
    "bias shape": (tensor_is("blk.0.attn_q.bias", np.ones(31, np.float32)), "has shape"),
    "freqs 0": (tensor_is("rope_freqs.weight", np.zeros(4, np.float32)), "not positive"),
    "freqs shape": (tensor_is("rope_freqs.weight", np.ones(8, np.float32)), "has shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(tmp_path: Path, name: str) -> None:
    edit, message = UNSUPPORTED[name]
    path = write_model(tmp_path / "m.gguf", change=edit)
    with pytest.raises(UnsupportedModelError, match=message) as e:
        load_model_file(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("name", BAD)
def test_inconsistent(tmp_path: Path, name: str) -> None:
    edit, message = BAD[name]
    if name == "no pairing":
        with pytest.raises(UnsupportedModelError, match=message):
            load_model_file(write_model(tmp_path / "m.gguf", change=edit))
        return
    path = write_model(tmp_path / "m.gguf", change=edit)
    with pytest.raises(FormatError, match=message) as e:
        load_model_file(path)
    assert str(path) in str(e.value)


def test_no_architecture(tmp_path: Path) -> None:
    config = tiny_config()
    path = write(tmp_path / "m.gguf", "x", {"dbf.version": 1}, tensors(tiny_weights(config), config))
    data = path.read_bytes().replace(b"general.architecture", b"general.architectura")
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"general\.architecture is missing"):
        load_model_file(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_model_file(tmp_path / "none.gguf")
