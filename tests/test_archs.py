"""The list of model families."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from dbf2gguf.archs import ARCHS, ArchSpec, context_length
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
