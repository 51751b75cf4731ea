"""End-to-end training of scales and signs on a tiny random model."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import tiny_hf
import torch
from torch import Tensor, nn
from torch.nn import functional

import dbf2gguf.distill
from dbf2gguf.archs import ARCHS, ArchSpec, features
from dbf2gguf.calibrate import output_importance
from dbf2gguf.distill import (
    FactorStack,
    Student,
    _batches,
    _gradients,
    _schedule,
    distill,
    kl_and_gradient,
    with_linears,
)
from dbf2gguf.factorize import Factors, factorize
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import DTYPES, Recipe
from dbf2gguf.source import decoder_layers, linear_names, split_fused
from dbf2gguf.work import Work
from runtime.errors import QualityError

RECIPE = Recipe(
    row_tokens=32, distill_steps=30, distill_batch=4, warmup_steps=3, scale_rate=1.5e-2, sign_rate=5e-2
)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the CPU has: what is compared with formulas is not rounded to bfloat16."""
    monkeypatch.setattr(dbf2gguf.distill, "has_bfloat16", lambda _: False)


class Setup:
    def __init__(self) -> None:
        self.model: nn.Module = tiny_hf.model(attention_bias=True)
        self.prepare(ARCHS["llama"])

    def prepare(self, arch: ArchSpec) -> None:
        self.names = linear_names(self.model, arch)
        self.rows = torch.randint(0, tiny_hf.N_VOCAB, (12, 32), generator=torch.Generator().manual_seed(2))
        self.factors = {}
        for name, path in self.names.items():
            weight = self.model.get_submodule(path).weight[None]
            ones_in, ones_out = torch.ones(1, weight.shape[2]), torch.ones(1, weight.shape[1])
            self.factors[name] = factorize(weight, 24, ones_in, ones_out, iterations=8, seed=0)

    def student(self, copy_dense: bool = False) -> Student:
        return Student(self.model, self.names, self.factors, copy_dense)

    def train(self, student: Student, recipe: Recipe = RECIPE, seed: int = 0) -> list[float]:
        stage = Stage("distil", recipe.distill_steps, quiet=True)
        return distill(self.model, student, self.rows, recipe, seed, stage, Work(None))

    @torch.no_grad()
    def kl(self, student: Student) -> float:
        """KL(original || student), nats a token, by torch's own function."""
        log_p = torch.log_softmax(self.model(self.rows).logits, -1).flatten(0, 1)
        log_q = torch.log_softmax(logits_of(student, self.rows), -1).flatten(0, 1)
        return float(functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))


def logits_of(student: Student, rows: Tensor) -> Tensor:
    student.multiply_out()
    return student.model.get_output_embeddings()(student.hidden_states(rows))


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def test_kl_falls(setup: Setup) -> None:
    student = setup.student()
    before = setup.kl(student)
    history = setup.train(student)
    assert len(history) == RECIPE.distill_steps
    assert history[0] == pytest.approx(before, rel=0.2)  # a batch of the rows, before any step
    assert setup.kl(student) < 0.7 * before
    assert sum(history[-5:]) < 0.8 * sum(history[:5])


def test_a_loss_that_is_none(setup: Setup) -> None:
    """It ends at the step where the KL is no number, not after all of them."""
    student = setup.student()
    student.stacks[0].s_mid.data.fill_(torch.nan)
    with pytest.raises(QualityError, match="the KL of step 1 of 30 is nan; try another --seed"):
        setup.train(student)


class ExpertSetup(Setup):
    """With a shared expert and 3 more, of which a token uses 1; the last is used by none."""

    def __init__(self) -> None:
        arch = ARCHS["qwen2_moe"]
        sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
        model = tiny_hf.model(model_type="qwen2_moe", num_experts=3, num_experts_per_tok=1, **sizes)
        self.model = split_fused(model, arch)
        for layer in decoder_layers(self.model, arch):
            layer.post_attention_layernorm.weight.fill_(1.0)
            mean = layer.mlp.gate.weight[:2].mean(0)
            layer.mlp.gate.weight[2] = mean  # between the other two
        self.prepare(arch)


@pytest.fixture(scope="module")
def expert_setup() -> ExpertSetup:
    return ExpertSetup()


def test_experts_are_trained(expert_setup: ExpertSetup) -> None:
    """The KL falls, those that tokens use move, and one that none uses stays as it is."""
    student = expert_setup.student()
    before = {name: f.dense().clone() for name, f in student.factors().items()}
    kl = expert_setup.kl(student)
    expert_setup.train(student)
    assert expert_setup.kl(student) < 0.7 * kl
    for name, factors in student.factors().items():
        unused = name.endswith(".2")
        assert torch.allclose(factors.dense(), before[name], atol=1e-6) == unused, name


def test_routers_are_trained_with_the_dense_parts(expert_setup: ExpertSetup) -> None:
    """The router and the gate of the shared expert, in the student alone."""
    student = expert_setup.student(copy_dense=True)
    expert_setup.train(student, replace(RECIPE, dense_rate=1e-2, distill_steps=3))
    for path in ("model.layers.0.mlp.gate", "model.layers.1.mlp.shared_expert_gate"):
        own, original = (m.get_submodule(path).weight for m in (student.model, expert_setup.model))
        assert not torch.equal(own, original), path


def test_importance_of_experts(expert_setup: ExpertSetup) -> None:
    """All 1 where no token passes."""
    stage = Stage("gradients", len(expert_setup.rows), quiet=True)
    found = output_importance(expert_setup.model, expert_setup.names, expert_setup.rows, 4, stage)
    assert list(found) == list(expert_setup.names)
    for name, importance in found.items():
        assert importance.shape == (expert_setup.model.get_submodule(expert_setup.names[name]).out_features,)
        assert torch.allclose(importance, torch.ones(()), atol=1e-5) == name.endswith(".2"), name


def test_the_teacher_is_left_as_it_was(setup: Setup) -> None:
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    setup.train(setup.student())
    after = setup.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in setup.model.parameters())


def test_the_rest_is_shared(setup: Setup) -> None:
    """Only factors are new: a student costs no second embedding."""
    student = setup.student()
    assert student.model.get_input_embeddings().weight is setup.model.get_input_embeddings().weight
    assert student.model.get_output_embeddings().weight is setup.model.get_output_embeddings().weight
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} == {"a", "b", "s_out", "s_mid", "s_in"}
    assert all(n.startswith("stacks.") for n in trained)
    shapes = {setup.model.get_submodule(path).weight.shape for path in setup.names.values()}
    assert len(student.stacks) == len(shapes)  # one for each size


def test_dense_rate_trains_norms_and_embedding(setup: Setup) -> None:
    """They move in the student alone, and the KL falls further than without them."""
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    students = setup.student(), setup.student(copy_dense=True)
    setup.train(students[0])
    setup.train(students[1], replace(RECIPE, dense_rate=1e-2))
    assert setup.kl(students[1]) < setup.kl(students[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.model.state_dict().items())
    assert not torch.equal(
        students[1].model.get_input_embeddings().weight, before["model.embed_tokens.weight"]
    )
    assert not torch.equal(students[1].model.model.norm.weight, before["model.norm.weight"])
    assert not any(p.requires_grad for p in students[1].model.parameters())


def test_no_steps(setup: Setup) -> None:
    student = setup.student()
    assert setup.train(student, Recipe(distill_steps=0)) == []
    for name, factors in student.factors().items():
        assert torch.allclose(factors.dense(), setup.factors[name].dense(), rtol=1e-5, atol=1e-6)


def test_seeds(setup: Setup) -> None:
    recipe = Recipe(row_tokens=32, distill_steps=3, distill_batch=2, warmup_steps=1)
    students = [setup.student() for _ in range(3)]
    histories = [setup.train(s, recipe, seed) for s, seed in zip(students, (5, 5, 6), strict=True)]
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]
    one, again, _ = (s.factors()["blk.0.attn_q"] for s in students)
    assert torch.equal(one.dense(), again.dense())


def test_factors_come_back_as_trained(setup: Setup) -> None:
    """The student's logits are those of a model with the factors multiplied out."""
    student = setup.student()
    setup.train(student, Recipe(distill_steps=2, distill_batch=2))
    linears = {}
    for name, factors in student.factors().items():
        path = setup.names[name]
        linears[path] = nn.Linear(*factors.dense().shape[:0:-1])
        linears[path].weight = nn.Parameter(factors.dense()[0])
        linears[path].bias = setup.model.get_submodule(path).bias
    dense = with_linears(setup.model, linears)
    assert torch.allclose(dense(setup.rows).logits, logits_of(student, setup.rows), rtol=1e-3, atol=1e-4)


def random_factors(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 6, 16), (1, 16, 10), (1, 6), (1, 16), (1, 10))
    return Factors(*(torch.randn(*shape, generator=generator) for shape in shapes))


def test_weights_are_the_formula() -> None:
    given = {"one": random_factors(3), "two": random_factors(4)}
    stack = FactorStack(list(given), list(given.values()))
    weights, back = stack.multiply_out(), stack.factors()
    for name, factors in given.items():
        assert torch.allclose(weights[name], factors.dense()[0], rtol=1e-5, atol=1e-5)
        for f in fields(Factors):
            assert torch.allclose(getattr(back[name], f.name), getattr(factors, f.name), rtol=1e-5)


@pytest.mark.parametrize("part", [1, 10**6], ids=["one by one", "together"])
def test_gradients_pass_through_the_signs(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """A sign's latent gets the gradient that the sign would get; scales get theirs times their rms."""
    monkeypatch.setattr(dbf2gguf.distill, "PART_WEIGHTS", part)
    given = [random_factors(3), random_factors(4)]
    stack = FactorStack(["one", "two"], given)
    upstream = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(5))
    for weight, gradient in zip(stack.multiply_out().values(), upstream, strict=True):
        weight.backward(gradient)
    stack.backward()
    for i, factors in enumerate(given):
        a, b = (torch.where(x[0] < 0, -1.0, 1.0).requires_grad_() for x in (factors.a, factors.b))
        scales = [s[0].clone().requires_grad_() for s in (factors.s_out, factors.s_mid, factors.s_in)]
        s_out, s_mid, s_in = scales
        (s_out[:, None] * ((a * s_mid) @ b) * s_in).backward(upstream[i])
        assert torch.allclose(stack.a.grad[i], a.grad, rtol=1e-4, atol=1e-4)
        assert torch.allclose(stack.b.grad[i], b.grad, rtol=1e-4, atol=1e-4)
        for name, scale in zip(("s_out", "s_mid", "s_in"), scales, strict=True):
            rms = scale.detach().square().mean().sqrt()
            assert torch.allclose(getattr(stack, name).grad[i], scale.grad * rms, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (1.0, 3.0), (0.3, 2.0)])
def test_kl_gradient_is_autograds(scale: float, cap: float) -> None:
    f = replace(features(tiny_hf.model().config), logit_scale=scale, logit_softcap=cap)
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, wanted, head = normal(7, 12).requires_grad_(), normal(7, 12), normal(30, 12)
    kl, error = kl_and_gradient(hidden.detach(), wanted, head, head, f)
    scaled = [h @ head.mT * scale for h in (hidden, wanted)]
    capped = [cap * torch.tanh(x / cap) if cap else x for x in scaled]
    log_q, log_p = (torch.log_softmax(x, -1) for x in capped)
    expected = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    expected.backward()
    assert float(kl) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(error @ head, hidden.grad, rtol=1e-4, atol=1e-5)
    assert float(kl_and_gradient(wanted, wanted, head, head, f)[0]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("pass_tokens", [1, 64, 10**6])
def test_gradient_of_a_step_is_autograds(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, dense: bool, pass_tokens: int
) -> None:
    """The step's gradients, made a few rows and a few logits at a time, are those of the mean KL."""
    monkeypatch.setattr(dbf2gguf.distill, "PASS_TOKENS", pass_tokens)
    tokens = setup.rows[:3]
    by_hand, by_torch = setup.student(dense), setup.student(dense)
    if dense:
        by_hand.requires_grad_(True), by_torch.requires_grad_(True)
    value = float(_gradients(setup.model, by_hand, tokens, kl_and_gradient))
    with torch.no_grad():
        log_p = torch.log_softmax(setup.model(tokens).logits, -1).flatten(0, 1)
    log_q = torch.log_softmax(logits_of(by_torch, tokens), -1).flatten(0, 1)
    loss = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss.backward()
    by_torch.backward()
    assert value == pytest.approx(float(loss.detach()), rel=1e-4)
    theirs = dict(by_torch.named_parameters())
    for name, parameter in by_hand.named_parameters():
        if parameter.requires_grad:
            size = theirs[name].grad.abs().max()
            assert (parameter.grad - theirs[name].grad).abs().max() < 1e-3 * size


def test_schedule() -> None:
    rates = [_schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert max(rates) == pytest.approx(1.0, rel=0.05)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, rel=0.05)


def test_batches() -> None:
    """Every row once before any is used again; the order depends on the seed only."""
    rows = torch.arange(12)[:, None]
    stream, again, other = _batches(rows, 4, 1), _batches(rows, 4, 1), _batches(rows, 4, 2)
    first = [next(stream).flatten().tolist() for _ in range(6)]
    assert [next(again).flatten().tolist() for _ in range(6)] == first
    assert [next(other).flatten().tolist() for _ in range(6)] != first
    for epoch in (first[:3], first[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(12))
    uneven = _batches(rows[:10], 4, 1)  # two epochs are five batches
    drawn = [i for _ in range(5) for i in next(uneven).flatten().tolist()]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert len(next(_batches(rows[:3], 8, 0))) == 3  # fewer rows than a batch


@pytest.mark.parametrize("fast", [False, True])
def test_dtypes(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """Rounded to bfloat16, training goes the same way, as nearly as 8 bits of mantissa allow; what is kept
    stays float32. Which it is if nothing is said depends on the machine."""
    monkeypatch.setattr(dbf2gguf.distill, "has_bfloat16", lambda _: fast)
    losses = {}
    for dtype in DTYPES:
        setup = Setup()
        student = setup.student()
        losses[dtype] = setup.train(student, replace(RECIPE, dtype=dtype))
        assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    assert losses["auto"] == losses["bfloat16" if fast else "float32"]
