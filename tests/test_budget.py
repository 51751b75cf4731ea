"""Bits per weight -> inner sizes."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dbf2gguf.budget import MAX_BPW, RANK_STEP, linear_bits, plan_uniform
from runtime.errors import OptionError

BLOCK = {
    "attn_q": (576, 576), "attn_k": (192, 576), "attn_v": (192, 576), "attn_output": (576, 576),
    "ffn_gate": (1536, 576), "ffn_up": (1536, 576), "ffn_down": (576, 1536),
}  # fmt: skip
SMOLLM2 = {f"blk.{i}.{name}": shape for i in range(30) for name, shape in BLOCK.items()}

SHAPES = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=9).map(
    lambda shapes: {f"blk.{i}.x": shape for i, shape in enumerate(shapes)}
)


def step_bits(shape: tuple[int, int]) -> int:
    return linear_bits(*shape, RANK_STEP) - linear_bits(*shape, 0)


def test_linear_bits() -> None:
    """Written out: 3 x 10 weights, rank 8. Rows of A are 1 byte, rows of B 2 (10 signs, 6 filler bits)."""
    signs = 3 * 8 + 8 * 16
    scales = 16 * (3 + 8 + 10)
    assert linear_bits(3, 10, 8) == signs + scales == 488


def test_padding_is_paid_for() -> None:
    """172 columns cost what 176 do, and a model of them gets lower ranks for its bits."""
    assert linear_bits(64, 172, 80) - 16 * 172 == linear_bits(64, 176, 80) - 16 * 176
    plan = plan_uniform({"x": (64, 172)}, 3.0)
    (rank,) = plan.ranks.values()
    assert plan.bits == rank * (64 + 176) + 16 * (64 + rank + 172)
    assert plan.sign_bits == rank * (64 + 172)


@settings(deadline=None)
@given(st.floats(0.8, 3.0))
def test_smollm2(bpw: float) -> None:
    plan = plan_uniform(SMOLLM2, bpw)
    assert 0.995 * bpw <= plan.bpw <= bpw
    assert all(rank % 8 == 0 for rank in plan.ranks.values())
    for name, shape in SMOLLM2.items():  # uniform: every layer within a step of its own share
        own = linear_bits(*shape, plan.ranks[name]) / math.prod(shape)
        assert abs(own - bpw) <= 2 * step_bits(shape) / math.prod(shape)


def test_smollm2_figures() -> None:
    plan = plan_uniform(SMOLLM2, 1.2)
    assert plan.weights == 106168320
    assert plan.bpw == pytest.approx(1.2, rel=1e-4)
    assert list(plan.ranks) == list(SMOLLM2)  # the file's order
    assert plan.target == 1.2


@settings(deadline=None)
@given(SHAPES, st.floats(0.05, MAX_BPW))
def test_any_shapes(shapes: dict[str, tuple[int, int]], bpw: float) -> None:
    weights = sum(rows * cols for rows, cols in shapes.values())
    least = sum(linear_bits(*shape, RANK_STEP) for shape in shapes.values())
    assume(least <= int(bpw * weights))
    plan = plan_uniform(shapes, bpw)
    assert plan.bpw <= bpw
    assert all(rank >= 8 and rank % 8 == 0 for rank in plan.ranks.values())
    left = int(bpw * weights) - plan.bits
    assert left < min(step_bits(shape) for shape in shapes.values())  # not one more step fits
    assert plan_uniform(shapes, bpw) == plan


@settings(deadline=None)
@given(SHAPES)
def test_least_possible(shapes: dict[str, tuple[int, int]]) -> None:
    """The smallest number of bits that an error message names is one that works; below it, none does."""
    with pytest.raises(OptionError, match="out of range") as caught:
        plan_uniform(shapes, 0.001)
    least = float(str(caught.value).rpartition("have ")[2].partition(" to ")[0])
    if least <= MAX_BPW:
        assert set(plan_uniform(shapes, least).ranks.values()) >= {8}
    with pytest.raises(OptionError, match="out of range"):
        plan_uniform(shapes, least - 0.0011)


@pytest.mark.parametrize("bpw", [0.0, -1.0, 0.05, 8.001, 1e300, math.nan, math.inf, -math.inf])
def test_out_of_range(bpw: float) -> None:
    with pytest.raises(OptionError, match=r"--bpw .* is out of range: this model can have 0\.\d+ to 8"):
        plan_uniform(SMOLLM2, bpw)


def test_no_layers() -> None:
    with pytest.raises(OptionError, match="no linear layers"):
        plan_uniform({}, 1.2)
