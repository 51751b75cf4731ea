"""Conversions end to end, on tiny random models: the file holds what it should, and the runtime runs it.

The reference is the dense twin: transformers, float32, with the factors of the file multiplied out.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_hf
import torch
from gguf import GGUFReader

import dbf2gguf.files
import runtime
from dbf2gguf import from_gguf
from dbf2gguf.archs import context_length
from dbf2gguf.convert import SAME_TEXT, _text, convert
from dbf2gguf.evaluate import measure
from dbf2gguf.export import export
from dbf2gguf.from_gguf import gguf_to_hf
from dbf2gguf.options import Options
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import find_recipe
from dbf2gguf.report import Report, describe_report
from dbf2gguf.source import load_model, load_tokenizer, open_source
from dbf2gguf.text import first_rows, rows_from_files
from dbf2gguf.write import verify, write_dense
from runtime import Sampler, ggml_tokenizer, perplexity
from runtime.errors import FormatError, OptionError, UnsupportedModelError
from runtime.format import DBF1_TYPE
from runtime.gguf import GgufFile
from runtime.tokenizer import Tokenizer

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"
IDS = [1, 60, 7, 8, 90, 11, 12, 33, 200, 100, 44, 250, 17, 294, 3, 2, 60, 7, 8, 91]

COLUMNS = ("tokens", "scores", "token_type")
"""Of a SentencePiece vocabulary in llama.cpp's keys."""

TOLERANCE = 1e-2
"""Largest difference of a logit, over the standard deviation of all logits.

The runtime rounds every linear's inputs to integers of 14 bits, one scale a vector: an error of 2^-13 of the
vector's largest entry at most, and of about 1e-4 of its root mean square on average. Two such roundings a
linear, 7 linears a layer and a few layers add up to about 5e-4 of a logit's size on average, and 4 of these
at the worst of some thousand logits. Measured: 1e-3 to 5e-3. Wrong signs, scales, rotations or heads, or any
feature of any family left out: > 0.1.
"""

GEMMA: dict[str, Any] = {
    "head_dim": 16, "num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip

PHI_LONG: dict[str, Any] = {
    "model_type": "phi3", "pad_token_id": 0, "hidden_size": 64, "tie_word_embeddings": False,
    "sliding_window": 11,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64, "short_factor": [1.0, 1.1, 1.3, 1.5, 1.75, 2.0],
        "long_factor": [1.0, 1.5, 3.0, 5.0, 9.0, 20.0],
    },
    "original_max_position_embeddings": 64,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "gqa-tied": {},
    "mha-separate-head": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "one-kv-head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 16, "attention_bias": True},
    "odd-sizes": {
        "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 45,
    },
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "eps-and-theta": {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "one-layer": {"num_hidden_layers": 1, "max_position_embeddings": 20},
    "llama-3.2": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 16384,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "gemma3": {**GEMMA, "model_type": "gemma3_text"},
    "gemma3-pattern": {
        **GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 6, "layer_types": None,
    },
    "gpt2": {"model_type": "gpt2", "bos_token_id": 1, "n_inner": 52},
    "granite": {
        "model_type": "granite", "embedding_multiplier": 2.5, "attention_multiplier": 0.05,
        "residual_multiplier": 0.4, "logits_scaling": 8.0, "pad_token_id": 0,
    },
    "granite-plain": {"model_type": "granite", "attention_multiplier": 8**-0.5, "attention_bias": True},
    **tiny_hf.EXPERTS,
    "mixtral-window": {**tiny_hf.EXPERTS["mixtral"], "sliding_window": 6},
    "qwen3-moe-plain-shares": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 20,
        "norm_topk_prob": False, "num_hidden_layers": 1,
    },
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False, "pad_token_id": 0},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "pad_token_id": 0},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "sliding_window": 8},
    "phi3-longrope": PHI_LONG,
    "gemma2": {
        **GEMMA, "model_type": "gemma2", "layer_types": None, "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
    },
    "gemma3-scales": {
        **GEMMA, "model_type": "gemma3_text", "query_pre_attn_scalar": 30, "final_logit_softcapping": 2.0,
        "sliding_window": 4, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
    },
}  # fmt: skip

NUMBA = [
    "gqa-tied", "odd-sizes", "mistral", "qwen2", "qwen3", "gemma3", "gemma3-scales", "gemma2", "phi3",
    "phi3-longrope", "smollm3", "granite", "olmo2", "gpt2", "mixtral", "qwen2-moe", "qwen3-moe", "biases",
    "llama3-rope", "llama-3.2", "linear-rope",
]  # fmt: skip
"""Models that the Numba backend runs, too."""


ROUTED = ["mixtral", "mixtral-window", "qwen2-moe", "qwen3-moe", "qwen3-moe-plain-shares"]
"""Models with experts."""

WINDOWED = {"mistral": 7, "phi3": 8, "phi3-longrope": 11}
"""Models of which all layers have a sliding window, and its length."""


class Case:
    """A converted model."""

    def __init__(self, base: Path, changes: dict[str, Any], embed_type: str = "f16") -> None:
        self.folder = tiny_hf.write_folder(base / "model", **changes)
        self.out, self.embed_type, self.scratch = base / "out.gguf", embed_type, base / "scratch"
        self.report: Report = convert(self.folder, self.out, embed_type=embed_type, **tiny_hf.QUICK)

    def twin_logits(self, ids: list[int], **changes: Any) -> np.ndarray:
        """Those of transformers; `changes` of its config."""
        twin = tiny_hf.dense_twin(self.out, self.folder, self.embed_type, self.scratch)
        twin.config.update(changes)
        with torch.no_grad():
            return twin(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Conversions of MODELS, each made once."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case(tmp_path_factory.mktemp(name), MODELS[name])
        return made[name]

    return case


def largest_difference(got: np.ndarray, wanted: np.ndarray, routed: bool = False) -> float:
    """routed: at a near tie of the router, a token may pass other experts than in the reference; the quarter
    of the tokens that differ most is left out"""
    worst = np.sort(np.abs(got - wanted).max(-1))
    return float(worst[: len(worst) * 3 // 4 if routed else None].max())


def assert_close(got: np.ndarray, wanted: np.ndarray, routed: bool = False) -> None:
    assert largest_difference(got, wanted, routed) < TOLERANCE * wanted.std()


# What the runtime computes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_dense_twins(make: Callable[[str], Case], name: str) -> None:
    case = make(name)
    with runtime.load(case.out, backend="c", n_threads=1, n_ctx=32) as model:
        assert_close(model.logits(IDS), case.twin_logits(IDS), name in ROUTED)


def test_longrope_in_long_contexts(make: Callable[[str], Case]) -> None:
    """Other factors, once there is room for more than the original context."""
    case, ids = make("phi3-longrope"), IDS * 5
    with runtime.load(case.out, backend="c", n_threads=1, n_ctx=128) as model:
        assert_close(model.logits(ids), case.twin_logits(ids))
        long = model.logits(IDS)
    with runtime.load(case.out, backend="c", n_threads=1, n_ctx=64) as model:
        assert np.abs(long - model.logits(IDS)).max() > 10 * TOLERANCE * long.std()


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_is_as_long_as_transformers_says(make: Callable[[str], Case], name: str) -> None:
    """Of all layers: one position more or fewer, or none, is another model, as soon as a window is full."""
    case, length = make(name), WINDOWED[name]
    with runtime.load(case.out, backend="c", n_threads=1, n_ctx=32) as model:
        assert [layer.window for layer in model.file.weights.layers] == [length] * 2
        got = model.logits(IDS)
    wanted = case.twin_logits(IDS)
    far = largest_difference(got, wanted) / wanted.std()
    assert far < TOLERANCE
    for other in (None, length - 1, length + 1):
        logits = case.twin_logits(IDS, sliding_window=other)
        same = min(length, other or length)
        np.testing.assert_allclose(logits[:same], wanted[:same], atol=1e-4)
        assert largest_difference(got[length - 1 :], logits[length - 1 :]) > 10 * TOLERANCE * wanted.std()


def test_a_window_on_a_q8_0_cache(tmp_path: Path) -> None:
    case = Case(tmp_path, {"model_type": "mistral", "sliding_window": 8, "head_dim": 32})
    wanted = case.twin_logits(IDS)
    with runtime.load(case.out, backend="c", n_threads=1, n_ctx=32, kv_type="q8_0") as model:
        whole = model.logits(IDS)
        steps = [model.backend.eval(np.array([token], np.int32), i, 1) for i, token in enumerate(IDS)]
    assert np.array_equal(whole, np.concatenate(steps))
    assert largest_difference(whole, wanted) < 10 * TOLERANCE * wanted.std()
    other = case.twin_logits(IDS, sliding_window=9)
    assert largest_difference(whole, other) > 50 * TOLERANCE * wanted.std()


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")
@pytest.mark.parametrize("name", NUMBA)
def test_numba_is_the_same(make: Callable[[str], Case], name: str) -> None:
    """The same logits as C, bit for bit, of a prompt, of tokens one by one, and after a cache that held other
    tokens behind the shared ones; and the same greedy tokens."""
    case, wanted = make(name), None
    other = [*IDS[:9], *IDS[:2:-1]]
    for backend, threads in (("c", 1), ("c", 3), ("numba", 1)):
        with runtime.load(case.out, backend=backend, n_threads=threads, n_ctx=32) as model:
            run, ids, other_ids = model.backend.eval, np.array(IDS, np.int32), np.array(other, np.int32)
            whole = run(ids, 0, len(ids))
            assert_close(whole, case.twin_logits(IDS), name in ROUTED)
            steps = [run(ids[i : i + 1], i, 1) for i in range(len(ids))]
            run(other_ids, 0, 0)
            reused = run(ids[9:], 9, len(ids) - 9)
            tokens = list(model.engine.generate(IDS[:5], Sampler(temperature=0), 15, frozenset()))
        assert len(tokens) == 15
        wanted = (whole, tokens) if wanted is None else wanted
        assert tokens == wanted[1]
        for logits in (whole, np.concatenate(steps), np.concatenate([whole[:9], reused])):
            np.testing.assert_array_equal(logits.view(np.uint32), wanted[0].view(np.uint32))


@pytest.mark.parametrize(("embed_type", "width"), [("q8_0", 32), ("q6_k", 256), ("q4_0", 32)])
def test_quantized_embedding(tmp_path: Path, embed_type: str, width: int) -> None:
    """Separate head: both as stored."""
    sizes = {"tie_word_embeddings": False, "hidden_size": width, "num_hidden_layers": 1}
    case = Case(tmp_path, sizes, embed_type)
    with runtime.load(case.out, backend="c", n_threads=1) as model:
        assert_close(model.logits(IDS), case.twin_logits(IDS))
    with GgufFile(case.out) as file:
        assert file.tensors["token_embd.weight"].type_name == embed_type.upper()
        assert file.tensors["output.weight"].type_name == embed_type.upper()
        tensors = sum(t.nbytes for t in file.tensors.values())
    plan = convert(case.folder, case.out, embed_type=embed_type, dry_run=True, **tiny_hf.QUICK)
    assert plan.file_bytes == pytest.approx(tensors, rel=0.05)  # norms count as embedding there


@pytest.mark.parametrize(
    ("embed_type", "sizes", "stored", "block"),
    [
        ("q8_0", MODELS["odd-sizes"], "f16", 32),
        ("q4_0", MODELS["odd-sizes"], "f16", 32),
        ("q6_k", MODELS["odd-sizes"], "f16", 256),
        ("q6_k", {}, "q8_0", 256),
    ],
)
def test_rows_of_no_whole_block(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    embed_type: str,
    sizes: dict[str, Any],
    stored: str,
    block: int,
) -> None:
    """Rows that are no whole blocks: the embedding is stored as another type, and the user is told."""
    case = Case(tmp_path, {**sizes, "num_hidden_layers": 1}, embed_type)
    width = sizes.get("hidden_size", 32)
    note = f"embedding rows of {width} are no multiple of {block}: stored as {stored}, not {embed_type}\n"
    assert note in capsys.readouterr().err
    with GgufFile(case.out) as file:
        assert file.tensors["token_embd.weight"].type_name == stored.upper()


# What the file holds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arch", "length"), [("mistral", "llama", 7), ("mixtral-window", "llama", 6), ("phi3", "phi3", 8)]
)
def test_keys_of_windows(make: Callable[[str], Case], name: str, arch: str, length: int) -> None:
    """Of all layers, and of some; none bounds the context."""
    with GgufFile(make(name).out) as file:
        assert file.metadata["general.architecture"] == arch
        assert file.metadata[f"{arch}.context_length"] == 128
        assert file.metadata[f"{arch}.attention.sliding_window"] == length
        assert file.metadata[f"{arch}.attention.sliding_window_pattern"] == [True, True]
    with GgufFile(make("gemma3").out) as file:
        assert file.metadata["gemma3.context_length"] == 128
        assert file.metadata["gemma3.attention.sliding_window"] == 7
        assert file.metadata["gemma3.attention.sliding_window_pattern"] == [True, False, True]


@pytest.mark.parametrize(("model_type", "keys"), [("mistral", {}), ("phi3", {"sliding_window": 0})])
def test_keys_without_a_window(tmp_path: Path, model_type: str, keys: dict[str, int]) -> None:
    """llama.cpp wants Phi-3's key; where others read Mistral's, 0 might mean something else."""
    sizes = {"model_type": model_type, "sliding_window": None, "pad_token_id": 0, "num_hidden_layers": 1}
    case = Case(tmp_path, sizes)
    with runtime.load(case.out, backend="c", n_threads=1) as model:
        assert [layer.window for layer in model.file.weights.layers] == [0]
    with GgufFile(case.out) as file:
        arch = f"{file.metadata['general.architecture']}.attention."
        found = {k.removeprefix(arch): v for k, v in file.metadata.items() if k.startswith(arch)}
        assert {k: v for k, v in found.items() if "window" in k} == keys
        assert file.metadata["dbf.version"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_bits_per_weight(make: Callable[[str], Case], name: str) -> None:
    """What the file takes is what was asked for, and what the plan and the metadata say."""
    case = make(name)
    plan = case.report.plan
    with GgufFile(case.out) as file:
        held = sum(8 * t.nbytes for t in file.tensors.values() if ".dbf_" in t.name)
        assert held == plan.bits
        assert 0.9 * 4.0 <= plan.bpw <= 4.0  # tiny layers: one step is a lot
        assert file.metadata["dbf.bits_per_weight"] == pytest.approx(plan.bpw)
        assert file.metadata["dbf.recipe.bpw"] == 4.0
        assert file.metadata["dbf.recipe.sign_rate"] == find_recipe("balanced").at(4.0).sign_rate
        assert max(map(len, file.tensors)) < 64
    assert case.report.file_bytes == case.out.stat().st_size
    assert case.report.model_weights == load_model(open_source(case.folder, case.scratch)).num_parameters()


def test_gguf_reads_it(make: Callable[[str], Case]) -> None:
    """gguf's own reader, with DBF1 registered: the same tensors, dequantized to signs."""
    case = make("biases")
    reader = GGUFReader(case.out)
    with GgufFile(case.out) as file:
        assert {t.name: tuple(map(int, t.shape[::-1])) for t in reader.tensors} == {
            t.name: t.shape for t in file.tensors.values()
        }
    factors = tiny_hf.file_factors(case.out, open_source(case.folder, case.scratch))
    (tensor,) = (t for t in reader.tensors if t.name == "blk.1.ffn_up.dbf_b")
    signs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(signs, factors["blk.1.ffn_up"].b[0].numpy())


@pytest.mark.parametrize("name", ["gqa-tied", "odd-sizes"])
def test_carrier_i8(make: Callable[[str], Case], tmp_path: Path, name: str) -> None:
    """The same bytes as I8 tensors: the same logits bit for bit, and a reader without DBF1 lists them all."""
    case, out = make(name), tmp_path / "i8.gguf"
    convert(case.folder, out, embed_type="f16", carrier="i8", **tiny_hf.QUICK)
    with GgufFile(case.out) as file, GgufFile(out) as other:
        assert set(other.metadata) == {*file.metadata, "dbf.carrier"}
        assert "dbf.carrier" not in file.metadata
        assert list(file.tensors) == list(other.tensors)
        for tensor in file.tensors.values():
            twin = other.tensors[tensor.name]
            assert twin.type_name == ("I8" if tensor.type_name == "DBF1" else tensor.type_name)
            assert file.data(tensor.name).tobytes() == other.data(tensor.name).tobytes()
    for backend in ["c", *(["numba"] if find_spec("numba") else [])]:
        with (
            runtime.load(case.out, backend=backend, n_threads=1) as one,
            runtime.load(out, backend=backend, n_threads=1) as two,
        ):
            assert np.array_equal(one.logits(IDS), two.logits(IDS))
    code = (
        "import sys, gguf\n"
        "for t in gguf.GGUFReader(sys.argv[1]).tensors: print(t.name, t.tensor_type.name, *t.data.shape)\n"
        "assert 'runtime' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run([*command, out], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with GgufFile(out) as file:
        listed = [f"{t.name} {t.type_name} {' '.join(map(str, t.shape))}" for t in file.tensors.values()]
    assert run.stdout.splitlines() == listed
    run = subprocess.run([*command, case.out], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "826688068" in run.stderr
    for source in (case.out, out):
        export(source, tmp_path / f"{source.stem}-twin.gguf", quiet=True)
    assert (tmp_path / "i8-twin.gguf").read_bytes() == (tmp_path / "out-twin.gguf").read_bytes()


def test_unknown_carrier(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--carrier 'i16' is unknown; there are dbf1, i8"):
        convert(tmp_path, tmp_path / "out.gguf", carrier="i16")


def test_keys(make: Callable[[str], Case]) -> None:
    with GgufFile(make("llama3-rope").out) as file:
        meta = file.metadata
        assert meta["general.architecture"] == "llama"
        assert meta["llama.attention.head_count"] == 4
        assert meta["llama.attention.head_count_kv"] == 2
        assert meta["llama.rope.dimension_count"] == 8
        assert meta["llama.rope.freq_base"] == 500.0
        assert meta["llama.vocab_size"] == tiny_hf.N_VOCAB == len(meta["tokenizer.ggml.tokens"])
        assert meta["tokenizer.ggml.bos_token_id"] == 1
        assert meta["tokenizer.ggml.eos_token_id"] == 2
        assert "rope_freqs.weight" in file.tensors
    with GgufFile(make("gqa-tied").out) as file:
        assert "rope_freqs.weight" not in file.tensors
        assert "output.weight" not in file.tensors


def test_keys_of_experts(make: Callable[[str], Case]) -> None:
    wanted = {
        "mixtral": ("llama", 4, 2, 48, True, None),
        "qwen3-moe": ("qwen3moe", 6, 3, 24, True, None),
        "qwen2-moe": ("qwen2moe", 6, 2, 24, False, 40),
        "qwen3-moe-plain-shares": ("qwen3moe", 4, 1, 20, False, None),
    }
    keys = [f"expert_{name}" for name in ("count", "used_count", "feed_forward_length", "weights_norm")]
    keys.append("expert_shared_feed_forward_length")
    for name, (arch, *values) in wanted.items():
        with GgufFile(make(name).out) as file:
            assert file.metadata["general.architecture"] == arch
            assert [file.metadata.get(f"{arch}.{key}") for key in keys] == values
            assert file.metadata[f"{arch}.feed_forward_length"] == 48
            assert file.tensors[
                "blk.1.ffn_gate_inp.weight"
                if name != "qwen3-moe-plain-shares"
                else "blk.0.ffn_gate_inp.weight"
            ].shape == (values[0], 32)
            assert f"blk.0.ffn_up.{values[0] - 1}.dbf_a" in file.tensors
            assert ("blk.0.ffn_up_shexp.dbf_a" in file.tensors) == (name == "qwen2-moe")
            assert "blk.0.ffn_up.dbf_a" not in file.tensors


def test_tokenizer(make: Callable[[str], Case]) -> None:
    """The file's tokenizer and chat template do what the folder's do; padding entries fill the vocabulary."""
    case = make("gqa-tied")
    theirs = load_tokenizer(open_source(case.folder, case.scratch))
    text = "the cat <|im_end|> sat; naïve café 🙂  1234\n"
    messages = [{"role": "user", "content": "Hi"}]
    with GgufFile(case.out) as file:
        ours = Tokenizer.from_metadata(file.metadata)
        assert ours.encode(text, parse_special=True) == theirs(text).input_ids
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ours.render(messages) == wanted
        tokens, types = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
        assert tokens[: len(theirs)] == theirs.convert_ids_to_tokens(range(len(theirs)))
        assert types[:3] == [gguf.TokenType.CONTROL] * 3
        assert types[len(theirs) :] == [gguf.TokenType.UNUSED] * (tiny_hf.N_VOCAB - len(theirs))
        assert len(file.metadata["tokenizer.ggml.merges"]) == len(theirs) - 3 - 256


@pytest.mark.parametrize("begins", [False, True])
def test_receipt_is_of_the_file(tmp_path: Path, begins: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The quality in the metadata is what the file's own dense twin scores on the same text, and what
    runtime.perplexity measures, in 16-bit arithmetic."""
    folder = tiny_hf.write_folder(tmp_path / "model")
    if begins:
        tiny_hf.begin_texts(folder)
    text = tiny_hf.write_text(tmp_path / "held_out.txt")
    out = tmp_path / "out.gguf"
    report = convert(folder, out, eval_text=text, seed=3, **tiny_hf.QUICK)
    source = open_source(folder, tmp_path / "scratch")
    tokenizer = load_tokenizer(source)
    rows = first_rows(text, tokenizer, 2, 24, 3)
    assert bool((rows[:, 0] == tokenizer.bos_token_id).all()) == begins
    twin = tiny_hf.dense_twin(out, folder, "q8_0", tmp_path / "scratch")
    got = measure(load_model(source), twin, rows, Stage("measure", 2, quiet=True)).describe()
    assert report.quality is not None
    with GgufFile(out) as file:
        for key, value in got.items():
            assert file.metadata[f"dbf.quality.{key}"] == pytest.approx(value, rel=1e-3), key
            assert getattr(report.quality, key) == pytest.approx(value, rel=1e-3)
    capsys.readouterr()
    assert perplexity.main([str(out), str(text), "--ctx", "24", "--chunks", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ppl"] == pytest.approx(report.quality.ppl, rel=5e-3)


def test_text_of_the_receipt_changes_nothing_else(make: Callable[[str], Case], tmp_path: Path) -> None:
    case, out = make("gqa-tied"), tmp_path / "out.gguf"
    text = tiny_hf.write_text(tmp_path / "held_out.txt")
    convert(case.folder, out, embed_type="f16", eval_text=text, **tiny_hf.QUICK)
    with GgufFile(out) as file, GgufFile(case.out) as other:
        assert file.metadata["dbf.recipe.text_sha256"] == other.metadata["dbf.recipe.text_sha256"]
        assert file.tensors.keys() == other.tensors.keys()
        for name in file.tensors:
            assert np.array_equal(file.data(name), other.data(name)), name


# Determinism, sources -------------------------------------------------------------------------------------


def test_same_seed_same_bytes(make: Callable[[str], Case], tmp_path: Path) -> None:
    case = make("gqa-tied")
    for seed, same in ((0, True), (1, False)):
        out = tmp_path / f"{seed}.gguf"
        convert(case.folder, out, embed_type="f16", seed=seed, **tiny_hf.QUICK)
        assert (out.read_bytes() == case.out.read_bytes()) == same


def test_text_is_used(make: Callable[[str], Case], tmp_path: Path) -> None:
    case, text = make("gqa-tied"), tiny_hf.write_text(tmp_path / "a.txt")
    convert(case.folder, tmp_path / "out.gguf", calib=[text], **tiny_hf.QUICK)
    with GgufFile(tmp_path / "out.gguf") as file, GgufFile(case.out) as other:
        assert file.metadata["dbf.recipe.text"] == "a.txt"  # which holds more rows than are wanted
        assert other.metadata["dbf.recipe.text"] == "self-written"
        key = "dbf.recipe.text_sha256"
        assert file.metadata[key] != other.metadata[key]


def test_the_model_writes_what_the_files_lack(make: Callable[[str], Case], tmp_path: Path) -> None:
    case, text = make("gqa-tied"), tmp_path / "short.txt"
    text.write_text(tiny_hf.write_text(tmp_path / "a.txt").read_text()[:200])
    stage = Stage("text", 1, quiet=True)
    recipe = find_recipe("fast", row_tokens=24, text_rows=30, eval_rows=3)
    tokenizer, model = tiny_hf.tokenizer(), tiny_hf.model()
    options = Options("fast", recipe, (text,), None, "q8_0", "dbf1", seed=0, device="cpu", quiet=True)
    rows, held_out, written = _text(model, tokenizer, options, 33, stage, dict.fromkeys(SAME_TEXT))
    from_file = rows_from_files([text], tokenizer, 33, 24, 0)
    assert (len(rows), len(held_out), written) == (30, 3, 33 - len(from_file))
    assert 0 < written < 33
    every = {tuple(row.tolist()) for row in torch.cat([rows, held_out])}
    assert {tuple(row.tolist()) for row in from_file} < every
    convert(case.folder, tmp_path / "out.gguf", calib=[text], **tiny_hf.QUICK | {"text_rows": 40})
    with GgufFile(tmp_path / "out.gguf") as file:
        assert file.metadata["dbf.recipe.text"] == "short.txt, self-written"


def test_a_share_is_written_whatever_the_files_hold(tmp_path: Path) -> None:
    text = tiny_hf.write_text(tmp_path / "a.txt", 400)
    recipe = find_recipe("fast", row_tokens=24, text_rows=18, eval_rows=2, written_share=0.75)
    options = Options("fast", recipe, (text,), None, "q8_0", "dbf1", seed=0, device="cpu", quiet=True)
    rows, held_out, written = _text(
        tiny_hf.model(),
        tiny_hf.tokenizer(),
        options,
        20,
        Stage("text", 1, quiet=True),
        dict.fromkeys(SAME_TEXT),
    )
    assert (len(rows), len(held_out), written) == (18, 2, 15)


@pytest.mark.parametrize(
    "name",
    [
        "gqa-tied",
        "mha-separate-head",
        "biases",
        "wide-heads",
        "qwen2",
        "qwen3",
        "llama-3.2",
        "linear-rope",
        "gemma3-pattern",
        "gemma2",
        "gpt2",
        "granite",
        "granite-plain",
        "mixtral",
        "olmo2",
        "qwen2-moe",
        "qwen3-moe",
        "smollm3",
        "phi3",
        "phi3-longrope",
    ],
)
def test_gguf_input(make: Callable[[str], Case], tmp_path: Path, name: str) -> None:
    """The model as llama.cpp writes it, q and k permuted, comes back as the folder it was."""
    case = make(name)
    with GgufFile(case.out) as file:
        pre = file.metadata["tokenizer.ggml.pre"]
    plain = tiny_hf.write_standard_gguf(tmp_path / "plain.gguf", case.folder, pre)
    gguf_to_hf(plain, tmp_path / "back")
    theirs, ours = (open_source(f, tmp_path) for f in (case.folder, tmp_path / "back"))
    original, back = load_model(theirs).state_dict(), load_model(ours).state_dict()
    assert set(original) == set(back)
    for key, weight in original.items():
        assert torch.equal(back[key], weight.bfloat16().float()), key
    rounded, ids = load_model(theirs), torch.tensor([IDS])
    for parameter in rounded.parameters():
        parameter.copy_(parameter.bfloat16())
    assert torch.allclose(load_model(ours)(ids).logits, rounded(ids).logits, rtol=1e-4, atol=1e-4)
    one, two = load_tokenizer(theirs), load_tokenizer(ours)
    text = "the cat <|im_end|> sat; naïve café 🙂  1234\n"
    assert two(text).input_ids == one(text).input_ids
    assert two.chat_template == one.chat_template
    assert (two.bos_token_id, two.eos_token_id) == (one.bos_token_id, one.eos_token_id)
    report = convert(plain, tmp_path / "out.gguf", embed_type="f16", **tiny_hf.QUICK)
    assert report.plan == case.report.plan
    with GgufFile(tmp_path / "out.gguf") as file, GgufFile(case.out) as other:
        for key in ("tokens", "token_type", "merges", "pre", "model", "bos_token_id", "eos_token_id"):
            key = f"tokenizer.ggml.{key}"
            assert file.metadata[key] == other.metadata[key], key
        shapes = {t.name: (t.type, t.shape) for t in file.tensors.values()}
        assert shapes == {t.name: (t.type, t.shape) for t in other.tensors.values()}


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_write_dense_with_experts(make: Callable[[str], Case], tmp_path: Path, name: str) -> None:
    """All experts in one tensor, as llama.cpp has them: what is read back is the model, rounded to F16."""
    source = open_source(make(name).folder, tmp_path)
    model = load_model(source)
    write_dense(tmp_path / "dense.gguf", source, model, load_tokenizer(source))
    gguf_to_hf(tmp_path / "dense.gguf", tmp_path / "back", torch.float32)
    back = load_model(open_source(tmp_path / "back", tmp_path)).state_dict()
    for key, weight in model.state_dict().items():
        router = key.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        rounded = weight if weight.ndim == 1 or router else weight.half().float()
        assert torch.equal(back[key], rounded), key


@pytest.mark.parametrize("name", ["mistral", "mixtral-window"])
def test_gguf_input_with_a_window(make: Callable[[str], Case], tmp_path: Path, name: str) -> None:
    """A window of all layers is the model's again, with and without llama.cpp's list of layers; one that
    leaves layers out is nobody's."""
    source, file = open_source(make(name).folder, tmp_path), tmp_path / "dense.gguf"
    model = load_model(source)
    write_dense(file, source, model, load_tokenizer(source))
    key = b"attention.sliding_window_pattern"
    listed = key + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL, 2) + b"\1\1"
    written = file.read_bytes()
    assert written.count(listed) == 1
    for number, data in enumerate((written, written.replace(key, key[::-1]))):
        file.write_bytes(data)
        gguf_to_hf(file, tmp_path / f"{number}", torch.float32)
        back = load_model(open_source(tmp_path / f"{number}", tmp_path))
        assert back.config.model_type == model.config.model_type
        assert back.config.sliding_window == model.config.sliding_window == MODELS[name]["sliding_window"]
        assert context_length(back.config) == 128
        ids = torch.tensor([IDS])
        assert_close(back(ids).logits[0].numpy(), model(ids).logits[0].numpy(), name in ROUTED)
    file.write_bytes(written.replace(listed, listed[:-1] + b"\0"))
    with pytest.raises(UnsupportedModelError, match="sliding_window_pattern leaves layers out; supported in"):
        gguf_to_hf(file, tmp_path / "some")


def test_gguf_tensor_by_tensor(
    make: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two tensors of a GGUF file are in memory at a time; rows may be read in parts."""
    plain = tiny_hf.write_standard_gguf(tmp_path / "plain.gguf", make("gqa-tied").folder)
    gguf_to_hf(plain, tmp_path / "whole")
    read, known = from_gguf._read, []

    def watched(*args: Any) -> Any:
        assert not any(array() is not None for array in known), "the last one is still there"
        array = read(*args)
        known.append(weakref.ref(array))
        return array

    monkeypatch.setattr(from_gguf, "_read", watched)
    monkeypatch.setattr(from_gguf, "ROWS_AT_ONCE", 3)
    gguf_to_hf(plain, tmp_path / "parts")
    assert len(known) > 10
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other


@pytest.mark.parametrize(
    "kind", [k for k in gguf.quants._type_traits if k != DBF1_TYPE], ids=lambda k: k.name
)
def test_gguf_of_every_type(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Of every type that the package gguf dequantizes, K- and IQ-quants among them; blocks of any bytes."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    cols = 512 // block * block
    data = rng.integers(0, 0x3C, (5, cols // block * size), np.uint8)  # no scale is NaN or infinite
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "one.gguf") as file:
        got = from_gguf._read(file, "blk.0.ffn_up.weight", (5, cols), 0.0, None)
    wanted = gguf.dequantize(data, kind)
    assert got.shape == (5, cols)
    assert got.dtype == np.float32
    assert len(np.unique(got)) > 2
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.bos_token_id", 9999, "bos_token_id is 9999; wanted one of"),
        ("tokenizer.ggml.eos_token_id", -1, "eos_token_id is -1; wanted one of"),
        ("tokenizer.ggml.padding_token_id", "a", "padding_token_id is 'a'; wanted one of"),
        ("llama.attention.head_count", 3, "attn_q.weight has 32 rows; wanted an even number for each of 3"),
        ("llama.block_count", 0xFFFFFFFF, "block_count is 4294967295; there are tensors of 2"),
    ],
)
def test_gguf_input_that_contradicts_itself(
    make: Callable[[str], Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: Any,
    message: str,
) -> None:
    class Changed(GgufFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            assert key in self.metadata or "padding" in key
            self.metadata = dict(self.metadata) | {key: value}

    plain = tiny_hf.write_standard_gguf(tmp_path / "plain.gguf", make("gqa-tied").folder)
    monkeypatch.setattr(from_gguf, "GgufFile", Changed)
    with pytest.raises(FormatError, match=re.escape(message)):
        gguf_to_hf(plain, tmp_path / "back")


def test_gguf_input_without_a_token(
    make: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's -1, as the file's type has it."""

    class Changed(GgufFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.metadata = dict(self.metadata) | {"tokenizer.ggml.padding_token_id": 0xFFFFFFFF}

    plain = tiny_hf.write_standard_gguf(tmp_path / "plain.gguf", make("gqa-tied").folder)
    monkeypatch.setattr(from_gguf, "GgufFile", Changed)
    gguf_to_hf(plain, tmp_path / "back")
    assert load_tokenizer(open_source(tmp_path / "back", tmp_path)).pad_token_id is None


def test_what_a_plan_needs_is_little(
    make: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a GGUF file are dequantized when it is known that there is memory and disk for them."""
    plain = tiny_hf.write_standard_gguf(tmp_path / "plain.gguf", make("gqa-tied").folder)
    with monkeypatch.context() as patch:
        patch.setattr(from_gguf, "weights_to_hf", lambda *_: pytest.fail("dequantized"))
        convert(plain, tmp_path / "out.gguf", dry_run=True, **tiny_hf.QUICK)
        with pytest.raises(OptionError, match="--max-memory is 1M"):
            convert(plain, tmp_path / "out.gguf", max_memory="1M", **tiny_hf.QUICK)
        with pytest.raises(OptionError, match=r"--bpw 0\.001 is out of range"):
            convert(plain, tmp_path / "out.gguf", **tiny_hf.QUICK | {"bpw": 1e-3})
    monkeypatch.setattr(dbf2gguf.files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    monkeypatch.setattr(from_gguf, "prod", lambda _: 1 << 30)
    with pytest.raises(OptionError, match=r"1024\.0 MiB free; the dequantized model needs"):
        gguf_to_hf(plain, tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.safetensors"))


def test_gguf_input_without_some_experts(make: Callable[[str], Case], tmp_path: Path) -> None:
    """gate and up of experts are one tensor in transformers: both must be there, and alike."""
    plain = tiny_hf.write_standard_gguf(tmp_path / "plain.gguf", make("mixtral").folder)
    bad = plain.read_bytes().replace(b"blk.1.ffn_up_exps.weight", b"blk.3.ffn_up_exps.weight")
    plain.write_bytes(bad)
    with pytest.raises(FormatError, match="ffn_up_exps is missing or not like ffn_gate_exps in a layer"):
        gguf_to_hf(plain, tmp_path / "back")


def test_sharded_folder(make: Callable[[str], Case], tmp_path: Path) -> None:
    """A folder of several safetensors files converts to the same bytes."""
    case = make("gqa-tied")
    folder = tmp_path / "model"
    shutil.copytree(case.folder, folder)
    (folder / "model.safetensors").unlink()
    tiny_hf.model().save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    convert(folder, tmp_path / "out.gguf", embed_type="f16", **tiny_hf.QUICK)
    assert (tmp_path / "out.gguf").read_bytes() == case.out.read_bytes()


def test_dry_run(make: Callable[[str], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make("gqa-tied")
    options = {**tiny_hf.QUICK, "quiet": False}
    report = convert(case.folder, tmp_path / "out.gguf", dry_run=True, embed_type="f16", **options)
    assert report.plan == case.report.plan
    assert report.quality is None
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().err
    assert "2 x attn_q" in said
    assert "bits per weight" in said
    assert 0.5 * report.file_bytes < case.report.file_bytes  # the estimate leaves out the metadata


def test_report(make: Callable[[str], Case]) -> None:
    report = make("gqa-tied").report
    described = report.describe()
    json.dumps(described)
    assert described["bpw"] <= 4.0
    assert described["file_bpw"] == pytest.approx(report.file_bytes * 8 / report.model_weights)
    assert set(report.seconds) == {"load", "text", "gradients", "factorize", "distil", "measure", "write"}
    assert described["elapsed_seconds"] == round(report.elapsed, 2)
    assert report.elapsed > sum(report.seconds.values())  # what lies between stages counts
    assert f"{report.elapsed:.0f} s in all: load " in describe_report(report)


# Reading back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["dbf_a", "dbf_b", "dbf_out", "dbf_mid", "dbf_in"])
@pytest.mark.parametrize("linear", ["blk.0.attn_q", "blk.1.ffn_down"])
def test_verify_sees_a_changed_byte(
    make: Callable[[str], Case], tmp_path: Path, linear: str, part: str
) -> None:
    case = make("gqa-tied")
    source = open_source(case.folder, case.scratch)
    factors = tiny_hf.file_factors(case.out, source)
    verify(case.out, source, factors)
    with GgufFile(case.out) as file:
        info = file.tensors[f"{linear}.{part}"]
    data = bytearray(case.out.read_bytes())
    data[info.offset + info.nbytes - 2] ^= 0x04
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(FormatError, match=rf"{linear}\.{part}: 1 of \d+ values differ"):
        verify(bad, source, factors)


def test_verify_counts_layers(make: Callable[[str], Case]) -> None:
    case = make("gqa-tied")
    source = open_source(case.folder, case.scratch)
    factors = tiny_hf.file_factors(case.out, source)
    with pytest.raises(FormatError, match="holds 14 linear layers; wanted 15"):
        verify(case.out, source, {**factors, "blk.2.attn_q": factors["blk.1.attn_q"]})
    del factors["blk.0.attn_k"]
    with pytest.raises(FormatError, match=r"blk\.0\.attn_k was not written"):
        verify(case.out, source, factors)


# SentencePiece -------------------------------------------------------------------------------


@pytest.mark.skipif(not (STORIES / "config.json").is_file(), reason="stories260k is not here")
def test_stories260k(tmp_path: Path) -> None:
    """A feed-forward size of 172, no multiple of 8, and a vocabulary of SentencePiece."""
    from sentencepiece import SentencePieceProcessor

    out = tmp_path / "out.gguf"
    convert(STORIES, out, **tiny_hf.QUICK)
    twin = tiny_hf.dense_twin(out, STORIES, "q8_0", tmp_path / "scratch")
    pieces = SentencePieceProcessor(model_file=str(STORIES / "tokenizer.model"))
    text = "Once upon a time, there was a little girl. Zoë had 3 cats.\n"
    with runtime.load(out, backend="c", n_threads=1) as model:
        ids = model.tokenizer.encode(text)
        assert ids == [pieces.bos_id(), *pieces.encode(text)]
        assert model.tokenizer.decode(ids, skip_special=True) == text
        with torch.no_grad():
            assert_close(model.logits(ids), twin(torch.tensor([ids])).logits[0].numpy())
        meta = model.file.metadata
        assert meta["tokenizer.ggml.model"] == "llama"
        assert meta["tokenizer.ggml.pre"] == "default"
        assert meta["tokenizer.ggml.tokens"] == [pieces.id_to_piece(i) for i in range(512)]
        assert meta["tokenizer.ggml.scores"] == [pieces.get_score(i) for i in range(512)]
        kinds = meta["tokenizer.ggml.token_type"]
        assert kinds[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
        assert all((kinds[i] == gguf.TokenType.BYTE) == pieces.is_byte(i) for i in range(512))
        assert meta["tokenizer.ggml.bos_token_id"] == pieces.bos_id()
        assert meta["tokenizer.ggml.eos_token_id"] == pieces.eos_id()
        assert meta["tokenizer.ggml.unknown_token_id"] == pieces.unk_id()
        assert meta["tokenizer.ggml.add_bos_token"] is True
        assert meta["llama.feed_forward_length"] == 172


def write_gemma_tokenizer(folder: Path) -> None:
    """A SentencePiece vocabulary as Gemma has it: no space in front of a text, runs of spaces as tokens."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import PreTrainedTokenizerFast

    kinds = gguf.TokenType
    pieces = [(token, 0.0, kinds.CONTROL) for token in ("<pad>", "<eos>", "<bos>")]
    pieces += [("<unk>", 0.0, kinds.UNKNOWN)]
    pieces += [(token, 0.0, kinds.USER_DEFINED) for token in ("<mask>", "\n\n", "\u2581\u2581", "<unused0>")]
    pieces += [(f"<0x{byte:02X}>", 0.0, kinds.BYTE) for byte in range(256)]
    words = ["\u2581", "t", "h", "e", "c", "a", "th", "the", "\u2581the", "ca", "\u2581ca"]
    pieces += [(word, -float(i), kinds.NORMAL) for i, word in enumerate(words)]
    proto = ModelProto()
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=int(kind))
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    for name, index in ids.items():
        setattr(proto.trainer_spec, name, index)
        setattr(proto.trainer_spec, name.replace("id", "piece"), pieces[index][0])
    proto.normalizer_spec.name, proto.normalizer_spec.add_dummy_prefix = "identity", False
    proto.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    columns = zip(*pieces, strict=True)
    metadata = {f"tokenizer.ggml.{name}": list(column) for name, column in zip(COLUMNS, columns, strict=True)}
    metadata["tokenizer.ggml.token_type"] = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
    metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}
    made = PreTrainedTokenizerFast(
        tokenizer_object=ggml_tokenizer.build(metadata, "test"), bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", pad_token="<pad>",
    )  # fmt: skip
    made.save_pretrained(folder)


def test_sentencepiece_of_gemma(tmp_path: Path) -> None:
    """llama.cpp's keys: added tokens as they stand in a text, those that look special as control tokens."""
    folder = tiny_hf.write_folder(tmp_path / "model", **MODELS["gemma3"])
    write_gemma_tokenizer(folder)
    convert(folder, tmp_path / "out.gguf", **tiny_hf.QUICK)
    theirs, text = load_tokenizer(open_source(folder, tmp_path)), "the  cat\n\nthe \u00e9 <mask>"
    with GgufFile(tmp_path / "out.gguf") as file:
        meta = file.metadata
        ours = Tokenizer.from_metadata(meta)
        assert ours.encode(text, add_special=False, parse_special=True) == theirs(text).input_ids
        assert ours.decode(theirs(text).input_ids) == text
        assert meta["tokenizer.ggml.model"] == "llama"
        assert meta["tokenizer.ggml.add_space_prefix"] is False
        kinds = gguf.TokenType
        tokens, scores, types = (meta[f"tokenizer.ggml.{name}"] for name in COLUMNS)
        assert (tokens[4], types[4]) == ("<mask>", kinds.CONTROL)
        assert (tokens[6], types[6], scores[6]) == ("  ", kinds.USER_DEFINED, -1000.0)
        assert types[7] == kinds.CONTROL
        assert types[8:264] == [kinds.BYTE] * 256
        assert (tokens[271], types[271], scores[271]) == ("the", kinds.NORMAL, -7.0)
        assert (tokens[299], types[299]) == ("[PAD299]", kinds.UNUSED)


@pytest.mark.parametrize("name", ["gemma", "stories260k"])
def test_sentencepiece_without_its_model(tmp_path: Path, name: str) -> None:
    """tokenizer.json alone, as transformers 5 saves it: the merges say the scores' order."""
    folder = tmp_path / "model"
    if name == "gemma":
        write_gemma_tokenizer(tiny_hf.write_folder(folder, **MODELS["gemma3"]))
        text = "the  cat\n\nthe \u00e9 <mask>"
    elif (STORIES / "config.json").is_file():
        shutil.copytree(STORIES, folder)
        text = "Once upon a time, there was a little girl.  Zoë had 3 cats.\n"
    else:
        pytest.skip("stories260k is not here")
    convert(folder, tmp_path / "with.gguf", **tiny_hf.QUICK)
    (folder / "tokenizer.model").unlink()
    convert(folder, tmp_path / "without.gguf", **tiny_hf.QUICK)
    theirs = load_tokenizer(open_source(folder, tmp_path))
    with GgufFile(tmp_path / "with.gguf") as wanted, GgufFile(tmp_path / "without.gguf") as got:
        ours = Tokenizer.from_metadata(got.metadata)
        assert ours.encode(text, add_special=False, parse_special=True) == [
            i for i in theirs(text).input_ids if i != theirs.bos_token_id
        ]
        by_ggml = [
            Tokenizer.from_metadata(
                {key: file.metadata[key] for key in file.metadata if key != "tokenizer.huggingface.json"}
            ).encode(text, add_special=False, parse_special=True)
            for file in (wanted, got)
        ]
        assert by_ggml[1] == by_ggml[0]
        for key in (
            "model",
            "pre",
            "tokens",
            "token_type",
            "bos_token_id",
            "eos_token_id",
            "unknown_token_id",
        ):
            key = f"tokenizer.ggml.{key}"
            assert got.metadata[key] == wanted.metadata[key], key
        assert got.metadata.get("tokenizer.ggml.add_space_prefix") == wanted.metadata.get(
            "tokenizer.ggml.add_space_prefix"
        )


def test_a_broken_sentencepiece_model(tmp_path: Path) -> None:
    folder = tiny_hf.write_folder(tmp_path / "model", **MODELS["gemma3"])
    write_gemma_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    with pytest.raises(FormatError, match=r"tokenizer\.model: not a SentencePiece model"):
        convert(folder, tmp_path / "out.gguf", **tiny_hf.QUICK)


@pytest.mark.skipif(not (STORIES / "config.json").is_file(), reason="stories260k is not here")
def test_sentencepiece_gguf_input(tmp_path: Path) -> None:
    """The keys of its tokenizer pass on as they are, and mean the same."""
    convert(STORIES, tmp_path / "one.gguf", **tiny_hf.QUICK)
    export(tmp_path / "one.gguf", tmp_path / "dense.gguf", quiet=True)
    convert(tmp_path / "dense.gguf", tmp_path / "two.gguf", **tiny_hf.QUICK)
    with GgufFile(tmp_path / "one.gguf") as one, GgufFile(tmp_path / "two.gguf") as two:
        keys = [key for key in one.metadata if key.startswith("tokenizer.ggml.")]
        assert "tokenizer.ggml.scores" in keys
        assert all(two.metadata[key] == one.metadata[key] for key in keys)
        first, second = (Tokenizer.from_metadata(f.metadata, str(f.path)) for f in (one, two))
    for text in ("Once upon a time", " two  spaces", "naïve 🙂\n\tend", ""):
        assert second.encode(text) == first.encode(text)
        assert second.decode(second.encode(text)) == first.decode(first.encode(text))
