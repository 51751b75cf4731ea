"""SmolLM2-135M-Instruct as `make demo` converts it: the runtime against transformers.

Skipped where the demo was not made. DBF_TEST_GGUF=FILE tests another conversion of the same model.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hf
import torch
from torch import nn

import runtime
from dbf2gguf.source import load_tokenizer, open_source
from runtime import Sampler
from runtime.gguf import GgufFile
from runtime.tokenizer import JSON_KEY, Tokenizer

DEMO = Path(__file__).parents[1] / "demo"
FOLDER = DEMO / "SmolLM2-135M-Instruct"
FILE = Path(os.environ.get("DBF_TEST_GGUF", DEMO / "smollm2-135m.gguf"))

pytestmark = pytest.mark.skipif(
    not (FOLDER / "config.json").is_file() or not FILE.is_file(),
    reason=f"{FOLDER.name} or {FILE.name} is not here; `make demo` makes them",
)

TOLERANCE_RMS, TOLERANCE_MAX = (3e-2, 0.3) if "DBF_TEST_GGUF" in os.environ else (5e-3, 6e-2)
"""Difference of the logits over their standard deviation: root mean square, and largest of all.

Each linear's inputs are rounded to 14 bits a vector (see test_convert.py): 420 roundings of 1e-4 to 1e-3 of
the signal, more where a few large entries set the scale, as in this model's residual stream. They add up as
their squares do. Measured on the demo's file: 0.7e-3 to 1.1e-3 rms, the worst of two million logits 7e-3. A
file converted in a hurry amplifies them: 2.4e-3 to 7.1e-3 rms, at worst 4.3e-2, hence its wider bound. Wrong
signs, scales, heads or rotations: > 0.1 rms.
"""

TEXTS = {
    "prose": (
        "The river rises in the hills north of the town and runs for about forty miles before it reaches "
        "the sea. In the nineteenth century several mills stood on its banks; two of them still do."
    ),
    "code": "def mean(values):\n    total = 0\n    for v in values:\n        total += v\n    return total\n",
    "chat": (
        "<|im_start|>user\nWhy is the sky blue? Answer in 1 sentence, s'il vous plaît 🙂<|im_end|>\n"
        "<|im_start|>assistant\nBecause air scatters short waves of light more than long ones.<|im_end|>\n"
    ),
}

LLAMA_CPP_KEYS = (
    "general.architecture", "general.type", "general.name", "general.size_label", "general.file_type",
    "general.quantization_version",
    "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.key_length", "llama.attention.value_length", "llama.rope.freq_base",
    "llama.rope.dimension_count", "llama.vocab_size",
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_bos_token",
    "tokenizer.chat_template",
)  # fmt: skip
"""What convert_hf_to_gguf.py writes for this model (without what it takes from a model card)."""


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    with GgufFile(FILE) as file:
        embed_type = file.tensors["token_embd.weight"].type_name.lower()
    return tiny_hf.dense_twin(FILE, FOLDER, embed_type, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def model() -> Iterator[runtime.Model]:
    with runtime.load(FILE, backend="c", n_ctx=512) as opened:
        yield opened


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(open_source(FOLDER, tmp_path_factory.mktemp("scratch")))


def assert_close(got: np.ndarray, twin: nn.Module, ids: list[int]) -> None:
    with torch.no_grad():
        wanted = twin(torch.tensor([ids])).logits[0].numpy()
    error = (got - wanted) / wanted.std()
    assert np.sqrt(np.square(error).mean()) < TOLERANCE_RMS
    assert np.abs(error).max() < TOLERANCE_MAX


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_logits(model: runtime.Model, twin: nn.Module, text: str) -> None:
    ids = model.tokenizer.encode(text, parse_special=True)
    assert_close(model.logits(ids), twin, ids)


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")
def test_numba(model: runtime.Model, twin: nn.Module) -> None:
    ids = model.tokenizer.encode("The capital of France is")
    with runtime.load(FILE, backend="numba", n_ctx=32) as mirror:
        got = mirror.logits(ids)
        assert_close(got, twin, ids)
        assert np.array_equal(got.argmax(-1), model.logits(ids).argmax(-1))


def test_tokenizer(model: runtime.Model, theirs: Any) -> None:
    for text in [*TEXTS.values(), "", " ", "12345 1,000", "naïve\u00a0日本語\r\n\tx"]:
        assert model.tokenizer.encode(text, parse_special=True) == theirs(text).input_ids
    tokens = model.file.metadata["tokenizer.ggml.tokens"]
    assert tokens == theirs.convert_ids_to_tokens(range(len(tokens)))


def test_tokenizer_of_ggml_keys(model: runtime.Model, theirs: Any) -> None:
    """Without its JSON, the tokenizer is made from llama.cpp's keys, and is the same."""
    metadata = {k: v for k, v in model.file.metadata.items() if k != JSON_KEY}
    assert len(metadata) == len(model.file.metadata) - 1
    ours = Tokenizer.from_metadata(metadata)
    for text in [*TEXTS.values(), "", " ", "12345 1,000", "naïve\u00a0日本語\r\n\tx"]:
        ids = theirs(text).input_ids
        assert ours.encode(text, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.stop_ids == model.tokenizer.stop_ids


def test_chat_template(model: runtime.Model, theirs: Any) -> None:
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there."},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    for messages in (conversation, [{"role": "system", "content": "Be brief."}, *conversation]):
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert model.tokenizer.render(messages) == wanted
        assert model.tokenizer.encode_chat(messages) == theirs(wanted).input_ids


@pytest.mark.parametrize("key", LLAMA_CPP_KEYS)
def test_keys(model: runtime.Model, key: str) -> None:
    assert key in model.file.metadata


def test_values(model: runtime.Model) -> None:
    meta = model.file.metadata
    assert meta["tokenizer.ggml.pre"] == "smollm"
    assert meta["tokenizer.ggml.add_bos_token"] is False
    assert meta["general.size_label"] == "135M"
    assert meta["llama.rope.freq_base"] == 100000.0
    assert len(meta["tokenizer.ggml.merges"]) == 48900
    assert meta["dbf.bits_per_weight"] <= meta["dbf.recipe.bpw"] * (1 + 1e-6)
    assert meta["dbf.bits_per_weight"] > 0.995 * meta["dbf.recipe.bpw"]
    assert meta["dbf.quality.ppl"] > meta["dbf.quality.ppl_reference"] > 1


@pytest.mark.skipif("DBF_TEST_GGUF" in os.environ, reason="only the demo's own file must speak")
def test_golden_question(model: runtime.Model) -> None:
    """An answer, and no loop: no 8 tokens in a row come three times."""
    ids = model.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    answer = list(model.generate(ids, Sampler(temperature=0), 80))
    assert model.tokenizer.decode(answer, skip_special=True).strip()
    runs = Counter(tuple(answer[i : i + 8]) for i in range(len(answer) - 7))
    assert max(runs.values(), default=0) < 3
