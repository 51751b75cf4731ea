"""The list of model families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from dbf2gguf.archs import ARCHS, ArchSpec, context_length, gguf_spec, plain_length
from dbf2gguf.cli import main


@pytest.mark.parametrize("spec", ARCHS.values(), ids=lambda spec: spec.model_type)
def test_class(spec: ArchSpec) -> None:
    """The name that a GGUF file's config.json gets is transformers' own."""
    config = AutoConfig.for_model(spec.model_type)
    assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == spec.model_class


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--list-architectures"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ARCHS)


@pytest.mark.parametrize(("window", "context"), [(None, 100), (0, 100), (64, 64), (200, 100)])
def test_context_length(window: int | None, context: int) -> None:
    config = SimpleNamespace(max_position_embeddings=100, sliding_window=window)
    assert context_length(config) == context
    assert context_length(SimpleNamespace(max_position_embeddings=100)) == 100


@pytest.mark.parametrize(
    ("model_type", "changes", "context", "plain"),
    [
        ("mistral", {"sliding_window": 20}, 100, 20),
        ("mixtral", {"sliding_window": 20}, 100, 20),
        ("phi3", {"sliding_window": 20, "pad_token_id": 0}, 100, 20),
        ("gemma2", {"sliding_window": 20}, 100, 100),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, 20, 20),
        ("qwen2", {"sliding_window": 20}, 100, 100),
    ],
)
def test_windows_that_bound_the_context(
    model_type: str, changes: dict[str, Any], context: int, plain: int
) -> None:
    """Ours: those that are not computed; and those that llama.cpp does not compute."""
    config = AutoConfig.for_model(model_type, max_position_embeddings=100, **changes)
    assert (context_length(config), plain_length(config)) == (context, plain)


def test_family_of_a_gguf_with_a_window() -> None:
    found = [
        gguf_spec(name, has_experts, has_window=True)
        for name, has_experts in (("llama", False), ("llama", True), ("qwen2", False), ("mamba", False))
    ]
    assert [spec and spec.model_type for spec in found] == ["mistral", "mixtral", "qwen2", None]
    assert gguf_spec("llama", False) is ARCHS["llama"]
