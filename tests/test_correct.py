"""The sequential correction on a tiny random model."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from torch import Tensor, nn

import dbf2gguf.activations
import dbf2gguf.correct
from dbf2gguf.activations import row_bytes
from dbf2gguf.archs import ARCHS, Group, features
from dbf2gguf.budget import Plan
from dbf2gguf.calibrate import hidden_states
from dbf2gguf.convert import make_plan
from dbf2gguf.correct import _branches, _corrected, _record, batches_of, embed_rows, factorize_model
from dbf2gguf.distill import Student
from dbf2gguf.factorize import Factors, factorize
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe
from dbf2gguf.source import Source, decoder_layers, linear_names, load_model, open_source, split_fused
from dbf2gguf.work import Work
from runtime.errors import QualityError

RECIPE = Recipe(row_tokens=32, correct_rows=48, admm_iterations=12, damping=0.1)


class Setup:
    def __init__(self, folder: Path, **changes: Any) -> None:
        tiny_hf.write_folder(folder, **(changes or {"attention_bias": True}))
        self.source: Source = open_source(folder, folder / "scratch")
        self.model = load_model(self.source)
        self.names = linear_names(self.model, self.source.arch)
        self.plan: Plan = make_plan(self.source, self.model, 4.0)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, tiny_hf.N_VOCAB, (64, 32), generator=generator)
        self.rows, self.held_out = tokens[:48], tokens[48:]
        self.importance = {name: torch.ones(self.plan.shapes[name][0]) for name in self.names}

    def corrected(self, seed: int = 0, rows: Tensor | None = None, quiet: bool = True) -> dict[str, Factors]:
        rows = self.rows if rows is None else rows
        with Stage("factorize", 2, quiet) as stage:
            return factorize_model(
                self.source, self.model, self.plan, rows, self.importance, RECIPE, seed, stage, Work(None)
            )

    def plain(self) -> dict[str, Factors]:
        """Every layer on its own, no importances."""
        found = {}
        for name, path in self.names.items():
            weight = self.model.get_submodule(path).weight[None]
            ones_in, ones_out = torch.ones(1, weight.shape[2]), torch.ones(1, weight.shape[1])
            rank = self.plan.ranks[name]
            found[name] = factorize(weight, rank, ones_in, ones_out, iterations=12, seed=0)
        return found

    @torch.no_grad()
    def error(self, factors: dict[str, Factors]) -> float:
        """Relative error of what the head reads, on text that was not seen."""
        student = Student(self.model, self.names, factors)
        wanted = hidden_states(self.model, input_ids=self.held_out)
        student.multiply_out()
        got = student.hidden_states(self.held_out)
        return float((got - wanted).square().sum() / wanted.square().sum())


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("correct") / "model")


def test_correction_beats_plain_factorization(setup: Setup) -> None:
    """At equal bits and iterations."""
    corrected, plain = setup.error(setup.corrected()), setup.error(setup.plain())
    assert corrected < 0.85 * plain


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@torch.no_grad()
def test_the_equations(monkeypatch: pytest.MonkeyPatch, scale: float | None) -> None:
    """Against the formula in float64; scale None: the output is not added to anything."""
    monkeypatch.setattr(dbf2gguf.correct, "PRODUCT_ROWS", 4)
    generator = torch.Generator().manual_seed(7)

    def batches(size: int) -> Tensor:
        return torch.randn(3, 2, 40, size, generator=generator)  # three of 2 rows

    x, x_now, stream, stream_now = batches(20), batches(20), batches(9), batches(9)
    weights = [torch.randn(9, 20, generator=generator) for _ in range(2 if scale is None else 1)]
    lacks = [None] * 3 if scale is None else stream, [None] * 3 if scale is None else stream_now
    pairs = [zip(a, b, strict=True) for a, b in zip((x, x_now), lacks, strict=True)]
    found, importance = _corrected("blk.0.attn_q", weights, *pairs, 0.1, scale or 1.0)
    a, b, r = (t.double().flatten(0, 2) for t in (x, x_now, stream - stream_now))
    h, c = b.T @ b, a.T @ b
    assert torch.allclose(importance, (h.diagonal() / h.diagonal().mean()).sqrt().float(), rtol=1e-4)
    ridge = 0.1 * h.diagonal().mean() * torch.eye(20)
    lacking = 0 if scale is None else r.T @ b / scale
    for weight, got in zip(weights, found, strict=True):
        wanted = (weight.double() @ (c + ridge) + lacking) @ torch.linalg.inv(h + ridge)
        assert torch.allclose(got.double(), wanted, atol=1e-4)


def test_inputs_that_are_no_numbers() -> None:
    x = torch.tensor([[[1.0, torch.inf]]])
    with pytest.raises(QualityError, match=r"blk\.1\.ffn_up: what the model computes for it is too large"):
        _corrected("blk.1.ffn_up", [torch.ones(3, 2)], [(x, None)], [(x, None)], 0.1, 1.0)


def test_one_block_is_recorded_at_a_time(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    record, known, most = dbf2gguf.correct._record, [], 0

    def watched(*args: Any) -> Any:
        nonlocal most
        made = record(*args)
        known.append(weakref.ref(made))
        most = max(most, sum(other() is not None for other in known))
        return made

    monkeypatch.setattr(dbf2gguf.correct, "_record", watched)
    setup.corrected()
    layers = setup.model.config.num_hidden_layers
    assert layers > 1
    assert most == len(known) // layers


def test_as_many_rows_as_their_activations_allow(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(24, 16, dtype=torch.int64)
    for together, sizes in ((1, [1] * 24), (5, [4] * 6), (100, [8] * 3)):
        monkeypatch.setattr(dbf2gguf.activations, "PASS_BYTES", together * row_bytes(setup.model.config, 16))
        assert [len(batch) for batch in batches_of(rows, setup.model.config)] == sizes


def test_the_model_is_left_as_it_was(setup: Setup) -> None:
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    parameters = dict(setup.model.named_parameters())
    setup.corrected()
    assert dict(setup.model.named_parameters()) == parameters  # the same objects
    after = setup.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in setup.model.modules())


def test_the_model_survives_an_interrupt(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = dict(setup.model.named_parameters())

    def interrupt(*_args: object, **_options: object) -> Factors:
        raise KeyboardInterrupt

    monkeypatch.setattr("dbf2gguf.correct.factorize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        setup.corrected()
    assert dict(setup.model.named_parameters()) == parameters
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in setup.model.modules())


def test_every_layer_has_its_rank(setup: Setup) -> None:
    factors = setup.corrected()
    assert set(factors) == set(setup.names)
    for name, (rows, cols) in setup.plan.shapes.items():
        rank = setup.plan.ranks[name]
        assert factors[name].a.shape == (1, rows, rank)
        assert factors[name].b.shape == (1, rank, cols)


def test_seeds(setup: Setup) -> None:
    one, again, other = (setup.corrected(seed)["blk.1.ffn_down"].dense() for seed in (4, 4, 5))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 7, 13])
def test_odd_numbers_of_rows(setup: Setup, count: int) -> None:
    """Batches need equal sizes; fewer tokens than inputs leave the equations to the damping."""
    factors = setup.corrected(rows=setup.rows[:count])
    assert all(torch.isfinite(f.dense()).all() for f in factors.values())


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda spec: spec.model_type)
def test_groups_hold_every_linear_once(arch: object) -> None:
    groups: tuple[Group, ...] = arch.groups  # type: ignore[attr-defined]
    linears: dict[str, str] = arch.linears  # type: ignore[attr-defined]
    assert sorted(name for group in groups for name in group.linears) == sorted(linears)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"sliding_window": 5},
    "mistral": {"sliding_window": 5},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "olmo2": {"pad_token_id": 0},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "gpt2": {},
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_layers_one_by_one(name: str) -> None:
    """Each layer gets its own arguments (masks, rotations), and each group's residual is what its output is
    added to."""
    arch = ARCHS[name]
    model = split_fused(tiny_hf.model(model_type=name, **FAMILIES[name]), arch)
    scale = features(model.config).residual_scale
    rows = torch.randint(0, tiny_hf.N_VOCAB, (6, 24), generator=torch.Generator().manual_seed(2))
    layers = decoder_layers(model, arch)
    embedded, arguments = embed_rows(model, layers, batches_of(rows, model.config))
    states = list(embedded)
    for layer, own in zip(layers, arguments, strict=True):
        records = [_record(layer, arch, state, own) for state in states]
        for record in records:
            after = [*record.residuals[2:], record.output]  # each residual stream is the next group's
            for group, x, residual in zip(arch.groups, record.inputs, record.residuals, strict=True):
                if residual is not None:
                    (linear,) = (layer.get_submodule(arch.linears[n]) for n in group.linears)
                    wanted = next(stream for stream in after if stream is not None)
                    assert torch.allclose(residual + scale * linear(x), wanted, atol=1e-4)
                    after = [record.output]
        states = [record.output for record in records]
    got = model.get_submodule(arch.out_norm)(torch.cat(states))
    assert torch.allclose(got, hidden_states(model, input_ids=rows), atol=1e-4)


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_split_experts_are_the_librarys(name: str) -> None:
    model = tiny_hf.model(model_type=name, **EXPERTS[name])
    rows = torch.randint(0, tiny_hf.N_VOCAB, (3, 24), generator=torch.Generator().manual_seed(2))
    wanted = model(rows).logits
    split = split_fused(model, ARCHS[name])
    assert not any(p.ndim == 3 for p in split.parameters())
    assert torch.allclose(split(rows).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_branches_are_the_block(name: str) -> None:
    """Experts of the tokens that the router gives them, by their shares, are what the block computes; and the
    shares that divide what the stream lacks sum up to 1."""
    arch = ARCHS[name]
    model = split_fused(tiny_hf.model(model_type=name, **EXPERTS[name]), arch)
    assert arch.experts is not None
    layer = decoder_layers(model, arch)[0]
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(1))
    branches, total = _branches(layer, arch.experts, x[0].split(5))
    y, parts = torch.zeros(50, 32), torch.zeros(50)
    for branch in branches.values():
        y.index_add_(0, branch.tokens, branch.module(x[0, branch.tokens]) * branch.shares)
        parts.index_add_(0, branch.tokens, branch.shares[:, 0] / total[branch.tokens])
    assert torch.allclose(y, layer.get_submodule(arch.experts.block)(x)[0], atol=1e-5)
    assert torch.allclose(parts, torch.ones(50), atol=1e-6)
    assert len(branches) == features(model.config).n_experts + (name == "qwen2_moe")


@pytest.fixture(scope="module", params=EXPERTS)
def expert_setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(
        tmp_path_factory.mktemp("experts") / "model", model_type=request.param, **EXPERTS[request.param]
    )


def test_correction_of_experts(
    expert_setup: Setup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in expert_setup.model.state_dict().items()}
    corrected = expert_setup.corrected(quiet=False)
    assert "too few" not in capsys.readouterr().err
    assert all(torch.equal(t, before[name]) for name, t in expert_setup.model.state_dict().items())
    assert set(corrected) == set(expert_setup.names)
    assert expert_setup.error(corrected) < 0.9 * expert_setup.error(expert_setup.plain())
    monkeypatch.setattr("dbf2gguf.correct.TOKENS_PER_INPUT", 1e9)
    uncorrected = expert_setup.corrected()
    assert expert_setup.error(corrected) < expert_setup.error(uncorrected)


def test_experts_that_see_few_tokens(expert_setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """One row: some experts may not see a single token. They are factorized all the same, and it is said."""
    factors = expert_setup.corrected(rows=expert_setup.rows[:1, :3], quiet=False)
    count = features(expert_setup.model.config).n_experts
    said = capsys.readouterr().err
    assert f"blk.0: {count} of {count} experts saw too few tokens to be corrected (number 0 first)" in said
    assert set(factors) == set(expert_setup.names)
    assert all(torch.isfinite(f.dense()).all() for f in factors.values())


def test_importance_is_used(setup: Setup) -> None:
    """Outputs that weigh more come out closer to the layer's own weight."""
    name = "blk.0.ffn_up"
    module: nn.Module = setup.model.get_submodule(setup.names[name])
    rows = setup.plan.shapes[name][0]
    heavy = torch.arange(rows) < rows // 4
    even = setup.corrected()[name].dense()[0] - module.weight
    setup.importance[name] = torch.where(heavy, 10.0, 1.0)
    try:
        weighted = setup.corrected()[name].dense()[0] - module.weight
    finally:
        setup.importance[name] = torch.ones(rows)
    assert weighted[heavy].square().mean() < 0.7 * even[heavy].square().mean()


def test_errors_are_those_of_the_factors(setup: Setup) -> None:
    """In the first group nothing lacks yet, so that what is factorized is the weight itself: an error that
    can be told from outside, weighted by the inputs' second moments."""
    errors: dict[str, float] = {}
    stage = Stage("factorize", 2, quiet=True)
    factors = factorize_model(
        setup.source,
        setup.model,
        setup.plan,
        setup.rows,
        setup.importance,
        RECIPE,
        0,
        stage,
        Work(None),
        errors=errors,
    )
    assert set(errors) == set(setup.names)
    assert all(0 < error < 1 for error in errors.values())
    seen: list[Tensor] = []
    module = setup.model.get_submodule(setup.names["blk.0.attn_q"])
    hook = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].double()))
    hidden_states(setup.model, input_ids=setup.rows)
    hook.remove()
    moments = torch.cat(seen).square().mean((0, 1))
    weights = (moments / moments.mean() + 1e-6).sqrt()
    for name in ("attn_q", "attn_k", "attn_v"):
        wanted = setup.model.get_submodule(setup.names[f"blk.0.{name}"]).weight.double()
        got = factors[f"blk.0.{name}"].dense()[0].double()
        expected = ((wanted - got) * weights).norm() / (wanted * weights).norm()
        assert errors[f"blk.0.{name}"] == pytest.approx(float(expected), rel=1e-3)
