"""Bits where the loss cares: plans, and the estimates that they are made from, on a tiny random model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_hf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_budget import SMOLLM2
from torch import Tensor

from dbf2gguf.allocate import (
    CLOSE_SHARES,
    LEAST_SHARE,
    MOST_SHARE,
    Sensitivities,
    allocate,
    attribute_kl,
    channel_scores,
    embedding_costs,
    estimate_kl,
    measure_kl,
    plan_by_channels,
    plan_by_sensitivity,
    probe_errors,
    shrunk,
)
from dbf2gguf.budget import Plan, linear_bits, plan_uniform
from dbf2gguf.calibrate import input_importance, output_importance
from dbf2gguf.convert import make_plan
from dbf2gguf.correct import factorize_model
from dbf2gguf.distill import Student
from dbf2gguf.factorize import Factors
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe
from dbf2gguf.source import Source, linear_names, load_model, open_source
from dbf2gguf.work import Work
from runtime.errors import OptionError

RECIPE = Recipe(row_tokens=32, correct_rows=32, gradient_rows=24, admm_iterations=10)


def costs(scale: dict[str, float], bpw: float = 1.26) -> Sensitivities:
    """Layers of SmolLM2-135M that cost `scale` nats per weight, by kind, else 1e-9."""
    ranks = plan_uniform(SMOLLM2, bpw).ranks
    kl = {n: math.prod(s) * scale.get(n.rpartition(".")[2], 1e-9) for n, s in SMOLLM2.items()}
    return Sensitivities(kl, ranks)


def bpw_of(plan: Plan, name: str) -> float:
    return linear_bits(*plan.shapes[name], plan.ranks[name]) / math.prod(plan.shapes[name])


@settings(deadline=None, max_examples=20)
@given(st.floats(0.8, 3.0), st.integers(0, 1000))
def test_bits_are_those_of_a_uniform_plan(bpw: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kl = torch.randn(len(SMOLLM2), generator=generator).mul(2).exp().tolist()
    found = Sensitivities(dict(zip(SMOLLM2, kl, strict=True)), plan_uniform(SMOLLM2, bpw).ranks)
    plan = plan_by_sensitivity(SMOLLM2, bpw, found)
    assert 0.995 * bpw <= plan.bpw <= bpw
    assert list(plan.ranks) == list(SMOLLM2)
    for name in SMOLLM2:
        assert plan.ranks[name] % 8 == 0
        assert LEAST_SHARE * bpw - 0.07 <= bpw_of(plan, name) <= MOST_SHARE * bpw


def test_equal_costs_per_weight_are_uniform() -> None:
    plan, uniform = plan_by_sensitivity(SMOLLM2, 1.26, costs({})), plan_uniform(SMOLLM2, 1.26)
    assert all(abs(bpw_of(plan, name) - bpw_of(uniform, name)) < 0.1 for name in SMOLLM2)


def test_dear_layers_get_more() -> None:
    """Three times the cost of a weight: ln 3 / 0.94 bits more, by the slope of LOG_ERROR at 1.26 bits."""
    plan = plan_by_sensitivity(SMOLLM2, 1.26, costs({"attn_v": 3e-9}))
    more = bpw_of(plan, "blk.7.attn_v") - bpw_of(plan, "blk.7.ffn_up")
    assert more == pytest.approx(math.log(3) / 0.94, rel=0.25)
    half = plan_by_sensitivity(SMOLLM2, 1.26, costs({"attn_v": 3e-9}), strength=0.5)
    assert bpw_of(half, "blk.7.attn_v") - bpw_of(half, "blk.7.ffn_up") == pytest.approx(more / 2, rel=0.25)


def test_no_single_exchange_of_steps_is_better() -> None:
    """The greedy plan is the best but for what a last step cannot spend."""
    generator = torch.Generator().manual_seed(3)
    shapes = {f"blk.{i}.x": (64, 64) for i in range(6)}
    kl = torch.randn(6, generator=generator).exp().tolist()
    found = Sensitivities(dict(zip(shapes, kl, strict=True)), dict.fromkeys(shapes, 32))
    ranks = plan_by_sensitivity(shapes, 1.5, found).ranks

    def cost(ranks: dict[str, int]) -> float:
        return sum(found.at(name, shapes[name], rank) for name, rank in ranks.items())

    least = plan_uniform({"x": (64, 64)}, 1.5).ranks["x"] * LEAST_SHARE
    tried = 0
    for giver in shapes:
        for taker in shapes:
            other = ranks | {giver: ranks[giver] - 8, taker: ranks[taker] + 8}
            if giver != taker and other[giver] > least:
                tried += 1
                assert cost(other) >= cost(ranks)
    assert tried > 10


def test_worthless_and_helpful_layers_get_the_least() -> None:
    plan = plan_by_sensitivity(SMOLLM2, 2.0, costs({"attn_k": 0.0, "attn_q": -1e-3}))
    for name in ("blk.3.attn_k", "blk.3.attn_q"):
        assert bpw_of(plan, name) == pytest.approx(LEAST_SHARE * 2.0, abs=0.08)


def test_channels() -> None:
    """Of two equal layers, the one with more channels that matter gets the higher rank."""
    shapes = {"blk.0.x": (128, 128), "blk.0.y": (128, 128)}
    more = plan_uniform(shapes, 2.4).ranks["blk.0.x"]
    scores = {"blk.0.x": torch.ones(more), "blk.0.y": torch.full((more,), 0.5)}
    scores["blk.0.y"][:40] = 2.0
    plan = plan_by_channels(shapes, 1.6, scores)
    assert 1.5 < plan.bpw <= 1.6
    assert plan.ranks["blk.0.x"] > plan.ranks["blk.0.y"] >= 40


def test_channels_leave_few_sizes() -> None:
    """Layers of one shape have ranks LEVELS apart, but for what is left over."""
    generator = torch.Generator().manual_seed(0)
    more = plan_uniform(SMOLLM2, 1.5 * 1.26).ranks
    scores = {name: torch.rand(rank, generator=generator) ** 8 for name, rank in more.items()}
    plan = plan_by_channels(SMOLLM2, 1.26, scores)
    assert 1.25 < plan.bpw <= 1.26
    sizes = {(SMOLLM2[name], rank) for name, rank in plan.ranks.items()}
    assert len(sizes) < len(SMOLLM2) // 2


@pytest.mark.parametrize("bpw", [0.01, 99.0, math.nan])
def test_bits_out_of_range(bpw: float) -> None:
    with pytest.raises(OptionError, match="out of range"):
        plan_by_sensitivity(SMOLLM2, bpw, costs({}))
    with pytest.raises(OptionError, match="out of range"):
        plan_by_channels(SMOLLM2, bpw, {})


class Setup:
    def __init__(self, folder: Path) -> None:
        tiny_hf.write_folder(folder, attention_bias=True)
        self.source: Source = open_source(folder, folder / "scratch")
        self.model = load_model(self.source)
        self.names = linear_names(self.model, self.source.arch)
        self.plan: Plan = make_plan(self.source, self.model, 3.0)
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, tiny_hf.N_VOCAB, (32, 32), generator=generator)
        stage = Stage("gradients", 8, quiet=True)
        self.importance = output_importance(self.model, self.names, self.rows[:8], 4, stage)

    def factorized(self, targets: dict[str, Tensor]) -> dict[str, Factors]:
        stage = Stage("factorize", 2, quiet=True)
        return factorize_model(
            self.source,
            self.model,
            self.plan,
            self.rows,
            self.importance,
            RECIPE,
            0,
            stage,
            Work(None),
            targets=targets,
        )

    def allocated(self, kind: str, work: Work) -> Plan:
        stage, recipe = Stage("allocate", 2, quiet=True), replace(RECIPE, allocation=kind)
        return allocate(
            self.source, self.model, self.names, self.plan, self.rows, self.importance, recipe, 0, stage, work
        )

    @torch.no_grad()
    def kl(self, logits: Tensor, rows: Tensor) -> float:
        wanted = torch.log_softmax(self.model(rows).logits, -1)
        got = torch.log_softmax(logits, -1)
        return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("allocate") / "model")


def test_measured_kl_is_that_of_the_whole_model(setup: Setup) -> None:
    generator = torch.Generator().manual_seed(5)
    errors = {name: 0.1 * torch.randn(setup.plan.shapes[name], generator=generator) for name in setup.names}
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    found = measure_kl(setup.source, setup.model, setup.names, errors, setup.rows)
    after = setup.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name in ("blk.0.attn_v", "blk.1.ffn_down"):
        module = setup.model.get_submodule(setup.names[name])
        module.weight.data += errors[name]
        with torch.no_grad():
            logits = setup.model(setup.rows).logits
        module.weight.data -= errors[name]
        assert found[name] == pytest.approx(setup.kl(logits, setup.rows), rel=1e-2)


def test_estimates_rank_layers_as_measurements_do(setup: Setup) -> None:
    """Errors as factorization makes them; labels drawn from the model, whose Fisher matrix the KL follows."""
    generator = torch.Generator().manual_seed(7)
    rows = setup.rows.clone()
    for position in range(1, rows.shape[1]):
        with torch.no_grad():
            p = torch.softmax(setup.model(rows[:, :position]).logits[:, -1], -1)
        rows[:, position] = torch.multinomial(p, 1, generator=generator)[:, 0]
    inputs = input_importance(setup.model, setup.names, rows, 4)
    errors = probe_errors(setup.model, setup.names, setup.plan, inputs, setup.importance)
    errors = {name: 0.3 * error for name, error in errors.items()}
    measured = measure_kl(setup.source, setup.model, setup.names, errors, rows)
    estimated = estimate_kl(setup.model, setup.names, errors, rows)
    pair = torch.tensor([[found[name] for name in setup.names] for found in (measured, estimated)]).log()
    assert float(torch.corrcoef(pair)[0, 1]) > 0.9
    assert float((pair[0] - pair[1]).mean().abs()) < 0.4


def test_shares_sum_to_the_kl_of_small_errors(setup: Setup) -> None:
    generator = torch.Generator().manual_seed(9)
    originals = {name: setup.model.get_submodule(path).weight for name, path in setup.names.items()}
    shifted = {
        name: weight + 2e-3 * torch.randn(weight.shape, generator=generator)
        for name, weight in originals.items()
    }
    shares = attribute_kl(setup.model, setup.names, shifted, originals, setup.rows)
    for name, path in setup.names.items():
        setup.model.get_submodule(path).weight = torch.nn.Parameter(shifted[name], requires_grad=False)
    with torch.no_grad():
        logits = setup.model(setup.rows).logits
    for name, path in setup.names.items():
        setup.model.get_submodule(path).weight = originals[name]
    assert all(share.shape == (len(setup.rows),) for share in shares.values())
    total = float(sum(share.mean() for share in shares.values()))
    assert total == pytest.approx(setup.kl(logits, setup.rows), rel=0.05)


def test_shares_shrink_to_their_kinds_as_far_as_they_are_noise() -> None:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(40, 50, generator=generator)
    apart = {f"blk.{i}.x": 10.0 * i + noise[i] for i in range(20)}  # they differ by far more than rows do
    alike = {f"blk.{i}.y": 3.0 + noise[20 + i] for i in range(20)}
    found = shrunk(apart | alike)
    assert list(found) == [*apart, *alike]
    for name, share in apart.items():
        assert found[name] == pytest.approx(float(share.mean()), abs=0.01)
    before = torch.stack([share.mean() for share in alike.values()])
    after = torch.tensor([found[name] for name in alike])
    assert float(after.std()) < 0.5 * float(before.std())
    assert float(after.mean()) == pytest.approx(3.0, abs=0.1)


def test_targets_are_what_factors_approximate(setup: Setup) -> None:
    targets: dict[str, Tensor] = {}
    factors = setup.factorized(targets)
    assert list(targets) == list(factors) == list(setup.names)
    for name, target in targets.items():
        error = factors[name].dense()[0] - target
        assert float(error.square().sum()) < 0.5 * float(target.square().sum())


def test_channel_scores_are_squared_gradients(setup: Setup) -> None:
    """Against autograd: the loss of one row by the student's own scales."""
    factors = setup.factorized({})
    found = channel_scores(setup.model, setup.names, factors, setup.rows[:2])
    name = "blk.1.ffn_up"
    wanted = torch.zeros(setup.plan.ranks[name])
    f, module = factors[name], setup.model.get_submodule(setup.names[name])
    others = Student(setup.model, setup.names, factors)
    others.multiply_out()
    for row in setup.rows[:2].split(1):
        scale = f.s_mid.clone().requires_grad_(True)
        weight = Factors(f.a, f.b, f.s_out, scale, f.s_in).dense()[0]
        others._linears[name].weight = weight
        logits = setup.model.get_output_embeddings()(others.hidden_states(row))
        with torch.no_grad():
            reference = torch.log_softmax(setup.model(row).logits, -1)
        kl = (reference.exp() * (reference - torch.log_softmax(logits, -1))).sum()
        (gradient,) = torch.autograd.grad(kl, scale)
        wanted += (gradient * f.s_mid)[0].square()
    assert module.weight.shape == weight.shape
    assert torch.allclose(found[name], wanted, rtol=1e-2, atol=1e-3 * float(wanted.max()))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_costs(tied: bool) -> None:
    """Fewer bits cost more; the model is left as it was; what does not fit rows of 64 is left out."""
    model = tiny_hf.model(tie_word_embeddings=tied)
    rows = torch.randint(0, tiny_hf.N_VOCAB, (4, 24), generator=torch.Generator().manual_seed(3))
    before = model.get_input_embeddings().weight.clone()
    found = embedding_costs(model, rows, ("f16", "q8_0", "q6_k", "q4_0"))
    assert list(found) == ["f16", "q8_0", "q4_0"]
    weights = before.numel() * (1 if tied else 2)
    assert [bits / weights for bits, _ in found.values()] == [16, 8.5, 4.5]
    costs = [kl for _, kl in found.values()]
    assert costs == sorted(costs)
    assert costs[0] < 0.1 * costs[2]
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", ["sensitivity", "attribution", "channels"])
def test_allocate(setup: Setup, kind: str, tmp_path: Path) -> None:
    """Equal bits, other ranks; kept, so that a second call makes nothing anew."""
    work = Work.open(tmp_path / "work", {"test": kind}, quiet=True)
    plan = setup.allocated(kind, work)
    assert 0.97 * setup.plan.bpw <= plan.bpw <= setup.plan.target
    assert plan.ranks != setup.plan.ranks
    assert list(plan.ranks) == list(setup.plan.ranks)
    assert work.parts() == 1  # what the model was factorized into for that is gone
    assert setup.allocated(kind, work) == plan
    assert work.parts() == 1


def test_channels_stay_near_uniform_where_bits_are_many(setup: Setup) -> None:
    """Within steps of 8, of which a tiny model's sizes are few."""
    plan, (least, most) = setup.allocated("channels", Work(None)), CLOSE_SHARES
    assert plan.ranks != setup.plan.ranks
    for name, (rows, cols) in plan.shapes.items():
        bits = linear_bits(rows, cols, plan.ranks[name])
        step = linear_bits(rows, cols, 8) - linear_bits(rows, cols, 0)
        assert least * plan.target * rows * cols - step < bits <= most * plan.target * rows * cols


def test_uniform_is_the_plan_itself(setup: Setup) -> None:
    assert setup.allocated("uniform", Work(None)) is setup.plan
    with pytest.raises(OptionError, match="allocation 'best' is unknown"):
        setup.allocated("best", Work(None))
