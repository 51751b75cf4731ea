"""Distillation in little memory: few rows at a time, checkpointed layers, bfloat16 for frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import tiny_hf
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_distill import RECIPE, Setup
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.autograd.graph import saved_tensors_hooks

import dbf2gguf.distill
from dbf2gguf.activations import (
    LEAST_TOKENS,
    Passes,
    checkpointed,
    in_bfloat16,
    plan_passes,
    row_bytes,
    rows_together,
    token_bytes,
)
from dbf2gguf.archs import ARCHS
from dbf2gguf.calibrate import hidden_states
from dbf2gguf.distill import _gradients, _linears_of, kl_and_gradient
from dbf2gguf.recipe import CHECKPOINTING
from dbf2gguf.source import decoder_layers

GB = 10**9


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbf2gguf.distill, "has_bfloat16", lambda _: False)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def saved_bytes(hidden: Callable[[], Any], known: Iterator[Tensor]) -> int:
    """Bytes that the graph of hidden() keeps for the backward pass, without those of `known` tensors."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = hidden()
    del result
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt2"])
def test_what_a_token_keeps(model_type: str, dtype: torch.dtype) -> None:
    """The bound is one, and no more than twice what is kept."""
    rows, kept = torch.zeros(1, 128, dtype=torch.int64), []
    for layers in (1, 3):
        model = tiny_hf.model(0, model_type, num_hidden_layers=layers, max_position_embeddings=256)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.to(dtype)
        model.requires_grad_(True)
        known = iter([*model.parameters(), *model.buffers()])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            kept.append(saved_bytes(lambda model=model: hidden_states(model, input_ids=rows), known))
    counted = (kept[1] - kept[0]) / 2 / rows.numel()
    assert counted <= token_bytes(model.config, dtype) / 3 < 2.2 * counted


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_what_passes_through_a_layer(model_type: str) -> None:
    """It grows with the tokens, and with their square where all scores of attention are there."""
    changes = {**tiny_hf.EXPERTS["qwen3-moe"]} if model_type == "qwen3_moe" else {"model_type": model_type}
    config = tiny_hf.model(0, **changes).config
    few, many = row_bytes(config, 8), row_bytes(config, 16)
    assert many >= 2 * few > 2 * 8 * 4 * 6 * config.hidden_size
    assert (many > 2 * few) == (model_type == "gemma2")


def test_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_hf.model().config
    row = row_bytes(config, 16)
    monkeypatch.setattr(dbf2gguf.activations, "PASS_BYTES", 3 * row + 1)
    assert rows_together(config, 16, 8) == 3
    assert rows_together(config, 16, 2) == 2
    assert rows_together(config, 16, 8, times=2) == 1
    assert rows_together(config, 1600, 8) == 1, "fewer than one there cannot be"


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(decoder_layers(model, ARCHS["llama"]))


@pytest.mark.parametrize("copy_dense", [False, True])
def test_checkpointing_changes_no_bit(setup: Setup, copy_dense: bool) -> None:
    recipe = replace(RECIPE, distill_steps=6, dense_rate=1e-2 * copy_dense)
    plain, again = setup.student(copy_dense), setup.student(copy_dense)
    history = setup.train(plain, replace(recipe, checkpointing="off"))
    assert setup.train(again, replace(recipe, checkpointing="on")) == history
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(layer._compiled_call_impl is None for layer in layers_of(again.model))


def test_checkpointed_layers_keep_their_inputs_alone(setup: Setup) -> None:
    student = setup.student()
    student.multiply_out()
    model, rows = student.model, setup.rows[:4]
    known = [*model.parameters(), *model.buffers(), *(linear.weight for linear in student._linears.values())]
    plain = saved_bytes(lambda: student.hidden_states(rows), iter(known))
    with checkpointed(layers_of(model)):
        few = saved_bytes(lambda: student.hidden_states(rows), iter(known))
    inputs = len(layers_of(model)) * rows.numel() * model.config.hidden_size * 4
    assert inputs <= few < 3 * inputs  # and what the last norm and the mask keep
    assert plain > 2 * few
    assert saved_bytes(lambda: student.hidden_states(rows), iter(known)) == plain  # as it was


def counting(backend: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """The backend of torch.compile, which counts how often its code runs."""

    def compiled(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        code = backend(graph, inputs)

        def run(*args: Any) -> Any:
            calls.append(1)
            return code(*args)

        return run

    return compiled


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_compiled_layers_stay_compiled(setup: Setup, name: str) -> None:
    """Checkpointed layers call the compiled code, forward and again, and give the same gradients."""
    calls: list[int] = []
    plain, again = setup.student(), setup.student()
    tokens = setup.rows[:4]
    wanted = _gradients(setup.model, plain, tokens, kl_and_gradient)
    layers = layers_of(again.model)
    for layer in layers:
        layer.compile(backend=counting(lookup_backend(name), calls))
    before = [layer._compiled_call_impl for layer in layers]
    with checkpointed(layers):
        found = _gradients(setup.model, again, tokens, kl_and_gradient)
    assert len(calls) >= 2 * len(layers)
    assert [layer._compiled_call_impl for layer in layers] == before
    assert torch.allclose(found, wanted, rtol=1e-5)
    for one, other in zip(plain.stacks.parameters(), again.stacks.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, None])
def test_rows_at_a_time_are_one_batch(setup: Setup, rows: int | None) -> None:
    students = setup.student(), setup.student()
    tokens = setup.rows[:6]
    kls = [
        float(_gradients(setup.model, student, tokens, kl_and_gradient, rows=some))
        for student, some in zip(students, (6, rows), strict=True)
    ]
    assert kls[0] == pytest.approx(kls[1], rel=1e-5)
    for one, other in zip(*(student.stacks.parameters() for student in students), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-3 * float(one.grad.abs().max()))


def test_bfloat16_linears_give_the_same_under_autocast() -> None:
    model = tiny_hf.model(attention_bias=True)
    tokens = torch.arange(24).view(1, 24) % tiny_hf.N_VOCAB
    student = Setup().student()
    linears = _linears_of(model, student.model)
    assert len(linears) == 7 * model.config.num_hidden_layers
    before = [linear.weight.data.clone() for linear in linears]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(tokens).logits
        with in_bfloat16(linears):
            assert all(linear.weight.dtype == torch.bfloat16 for linear in linears)
            assert torch.equal(model(tokens).logits, wanted)
    assert all(torch.equal(linear.weight, old) for linear, old in zip(linears, before, strict=True))


def test_what_the_student_shares_stays_float32(setup: Setup) -> None:
    student = setup.student()
    linears = _linears_of(setup.model, student.model)
    with ExitStack() as stack:
        stack.enter_context(in_bfloat16(linears))
        assert all(p.dtype == torch.float32 for p in student.parameters())
        assert setup.model.get_output_embeddings().weight.dtype == torch.float32


def test_a_small_model_passes_at_once() -> None:
    assert plan_passes(32, 512, 30, GB // 2, 1_200_000, 50 * GB, "auto") == Passes(32, False)


def test_a_large_model_is_checkpointed() -> None:
    """3 B in 10 GB: 2.5 GB a row leaves 4 rows, 2048 tokens, at a time; checkpointed, all 32."""
    assert plan_passes(32, 512, 28, 5 * GB // 2, 6_300_000, 10 * GB, "auto") == Passes(32, True)
    assert plan_passes(32, 512, 28, 5 * GB // 2, 6_300_000, 10 * GB, "off") == Passes(4, False)
    assert plan_passes(32, 512, 28, 5 * GB // 2, 6_300_000, 25 * GB, "auto") == Passes(8, False)
    assert plan_passes(32, 512, 28, 5 * GB // 2, 6_300_000, 25 * GB, "on") == Passes(32, True)


@given(
    st.integers(1, 64),
    st.integers(4, 2048),
    st.integers(1, 64),
    st.integers(1, 10**10),
    st.floats(-1e11, 1e11),
    st.sampled_from(CHECKPOINTING),
)
def test_passes_fit(
    batch: int, tokens: int, layers: int, plain: int, free: float, checkpointing: str
) -> None:
    found = plan_passes(batch, tokens, layers, plain, tokens * 4, free, checkpointing)
    assert batch % found.rows == 0
    if found.rows > 1:
        each = 1.5 * plain / layers + layers * tokens * 4 if found.checkpointed else plain
        assert found.rows * each <= free
    if checkpointing == "auto" and not found.checkpointed:
        assert found.rows * tokens >= min(LEAST_TOKENS, batch * tokens)
    assert found.checkpointed == (checkpointing == "on") or checkpointing == "auto"
