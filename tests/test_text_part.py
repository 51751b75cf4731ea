"""Text models that are a part of models that read images, too: what is converted is what the part alone is.

The reference is the same text model in a folder of its own, and transformers' whole model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hf
import torch
from safetensors.torch import load_file, save_file
from test_convert import IDS, MODELS, assert_close
from test_stream import OPTIONS, streaming
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import runtime
from dbf2gguf.archs import features, find_arch
from dbf2gguf.convert import convert
from dbf2gguf.source import Source, load_model, model_config, open_source
from dbf2gguf.stream import Scratch, stream_model
from runtime.errors import FormatError, UnsupportedModelError

TEXT = MODELS["gemma3-scales"] | {"final_logit_softcapping": None}  # the whole model would ignore it
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
WHOLE: dict[str, Any] = {"mm_tokens_per_image": 4, "image_token_index": 290, "boi_token_index": 291}

LAYOUTS = {
    "old": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
    "new": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.lm_head.": "lm_head.",
    },
}
"""How names of tensors begin in files of either layout, by how they begin in the other."""


def write_text(path: Path, **changes: Any) -> Path:
    """The folder of the text model alone."""
    return tiny_hf.write_folder(path, **{**TEXT, **changes})


def write_whole(
    path: Path, layout: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """The folder of a model with the weights of `write_text` and a tower that reads images, random.

    layout  one of LAYOUTS; None: as the library writes it
    """
    text = tiny_hf.model(**{**TEXT, **changes})
    config = Gemma3Config(
        text_config=text.config,
        vision_config=VISION,
        tie_word_embeddings=text.config.tie_word_embeddings,
        **WHOLE,
    )
    torch.manual_seed(1)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.to(dtype).save_pretrained(path)
    tiny_hf.tokenizer().save_pretrained(path)
    if layout is not None:
        file = path / "model.safetensors"
        tensors = {renamed(name, LAYOUTS[layout]): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def renamed(name: str, starts: dict[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in starts.items() if name.startswith(old)), name)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    edit(config)
    file.write_text(json.dumps(config), encoding="utf-8")


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return found


# The result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    """As of the text model in a folder of its own, in memory and streamed, of either layout."""
    options = OPTIONS | {"calib": [tiny_hf.write_text(tmp_path / "text.txt")]}
    convert(write_text(tmp_path / "text" / "tiny", tie_word_embeddings=tied), tmp_path / "0.gguf", **options)
    assert "note: " not in capsys.readouterr().err
    wanted = (tmp_path / "0.gguf").read_bytes()
    folders = [
        write_whole(tmp_path / layout / "tiny", layout, tie_word_embeddings=tied) for layout in LAYOUTS
    ]
    starts = ["language_model.model.", "model.language_model."]
    for folder, start in zip(folders, starts, strict=True):
        names = list(load_file(folder / "model.safetensors"))
        assert any(name.startswith(start) for name in names)
        assert any("vision_tower." in name for name in names)
        convert(folder, tmp_path / "1.gguf", **options)
        assert "note: " in (said := capsys.readouterr().err)
        assert str(folder) in said
        assert (tmp_path / "1.gguf").read_bytes() == wanted
    streaming(monkeypatch)
    for folder in folders:
        convert(folder, tmp_path / "2.gguf", **options)
        assert (tmp_path / "2.gguf").read_bytes() == wanted


def test_logits(tmp_path: Path) -> None:
    """The file's are those of its weights in transformers; distilled, as all are without `max_memory`."""
    folder, out = write_whole(tmp_path / "model"), tmp_path / "out.gguf"
    convert(folder, out, embed_type="f16", **tiny_hf.QUICK)
    wanted = logits(tiny_hf.dense_twin(out, folder, "f16", tmp_path / "scratch"))
    for backend in ["c", *(["numba"] if find_spec("numba") else [])]:
        with runtime.load(out, backend=backend, n_threads=1, n_ctx=32) as model:
            assert_close(model.logits(IDS), wanted)


# Reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_model(tmp_path: Path, layout: str | None, dtype: torch.dtype) -> None:
    """The text model's logits are the whole model's."""
    folder = write_whole(tmp_path / "model", layout, dtype)
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    source = open_source(folder, tmp_path)
    np.testing.assert_array_equal(logits(load_model(source)), wanted)
    with Scratch(tmp_path / "states") as scratch:
        np.testing.assert_array_equal(logits(stream_model(source, scratch)), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("says", ["whole", "part", "both"])
def test_a_head_of_its_own(tmp_path: Path, layout: str, says: str) -> None:
    """Whichever entry of config.json says that the head is not the embedding: versions of the library differ
    in which they read."""
    folder = write_whole(tmp_path / "model", layout, tie_word_embeddings=False)

    def edit(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = says == "part"
        config["text_config"]["tie_word_embeddings"] = says == "whole"

    edit_config(folder, edit)
    source = open_source(folder, tmp_path)
    wanted = logits(tiny_hf.model(**{**TEXT, "tie_word_embeddings": False}))
    np.testing.assert_array_equal(logits(load_model(source)), wanted)
    with Scratch(tmp_path / "states") as scratch:
        np.testing.assert_array_equal(logits(stream_model(source, scratch)), wanted)


GEMMA_3_4B = {
    "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
}  # fmt: skip
"""text_config as it is published: all that is not the library's default."""


@pytest.mark.parametrize("without", [[], ["model_type"]])
def test_defaults(tmp_path: Path, without: list[str]) -> None:
    text = {key: value for key, value in GEMMA_3_4B.items() if key not in without}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": VISION}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arch = find_arch(config, "config.json")
    assert (arch.model_type, arch.gguf) == ("gemma3", "gemma3")
    found = model_config(Source(tmp_path, config, arch, "gemma"))
    f = features(found)
    assert found.model_type == "gemma3_text"
    assert (found.vocab_size, found.max_position_embeddings) == (262208, 131072)
    assert (found.num_attention_heads, f.n_kv_heads, found.head_dim) == (8, 4, 256)
    assert (f.rope_theta, f.rope_theta_local, f.rope_factor, f.attn_scale) == (1e6, 1e4, 8.0, 0.0)
    assert f.windows == ((1024,) * 5 + (0,)) * 5 + (1024,) * 4
    assert found.tie_word_embeddings


# Errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_config": None}, FormatError, "text_config is None; wanted an object"),
        ({"text_config": [1]}, FormatError, "text_config is [1]; wanted an object"),
        (
            {"text_config": {"model_type": "llama"}},
            UnsupportedModelError,
            "text_config has the model_type 'llama'; supported: 'gemma3_text'",
        ),
        (
            {"text_config": {"rope_scaling": {"rope_type": "yarn"}}},
            UnsupportedModelError,
            "config.json: text_config: RoPE scaling 'yarn' is not supported",
        ),
        ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "the weights are quantized already"),
        (
            {"text_config": {"quantization_config": {"bits": 4}}},
            UnsupportedModelError,
            "the weights are quantized already",
        ),
    ],
)
def test_what_config_json_may_not_say(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        find_arch({"model_type": "gemma3", "text_config": GEMMA_3_4B} | changes, "config.json")
    assert message in str(raised.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"audio_tower.weight": torch.zeros(2)}, "1 tensors have no place"),
        (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up_proj" not in k}, "layers.1.mlp.up_proj"),
        (lambda t: {k: v[:-1] if "layers.1.mlp.up" in k else v for k, v in t.items()}, "shapes contradict"),
        (lambda t: {k: v * np.nan if "layers.1.mlp.up" in k else v for k, v in t.items()}, "holds NaN"),
    ],
)
def test_wrong_tensors(tmp_path: Path, layout: str, change: Any, message: str) -> None:
    folder = write_whole(tmp_path / "model", layout)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder, tmp_path)
    with pytest.raises(FormatError, match=message):
        load_model(source)
    with Scratch(tmp_path / "states") as scratch, pytest.raises(FormatError, match=message):
        logits(stream_model(source, scratch))
