"""Bits per weight -> inner sizes: the only home of that arithmetic.

A linear layer of `rows` x `cols` weights with inner size `rank` costs
    rank * rows             signs of A (rank is a multiple of 8: rows of A are whole bytes)
  + rank * pad8(cols)       signs of B, filler bits included
  + 16 * (rows + rank + cols)   three float16 scale vectors
bits. Bits per weight (bpw) is the sum of these over all factorized layers, divided by the number of
weights that they replace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import OptionError
from runtime.format import pad8

RANK_STEP = 8
SCALE_BITS = 16
MAX_BPW = 8.0

Shape = tuple[int, int]


def linear_bits(rows: int, cols: int, rank: int) -> int:
    """Bits of one factorized linear layer: signs, filler, scales."""
    return rank * (rows + pad8(cols)) + SCALE_BITS * (rows + rank + cols)


@dataclass(frozen=True)
class Plan:
    """The inner size of every linear layer and what they cost together."""

    shapes: dict[str, Shape]  # name -> (rows, cols), in file order
    ranks: dict[str, int]  # name -> rank
    target: float  # bpw asked for

    @property
    def weights(self) -> int:
        """Weights that the factors replace."""
        return sum(rows * cols for rows, cols in self.shapes.values())

    @property
    def bits(self) -> int:
        """Bits of all factors: signs, filler, scales."""
        return sum(linear_bits(*self.shapes[name], rank) for name, rank in self.ranks.items())

    @property
    def sign_bits(self) -> int:
        """Bits of the sign matrices alone, without filler."""
        return sum(rank * sum(self.shapes[name]) for name, rank in self.ranks.items())

    @property
    def bpw(self) -> float:
        """Bits per weight over all factorized layers."""
        return self.bits / self.weights


def plan_uniform(shapes: Mapping[str, Shape], bpw: float) -> Plan:
    """Give every layer the same bits per weight, as nearly as steps of 8 allow.

    Each layer gets the largest rank that stays within `bpw`; what is left over buys further steps, first
    for the layers that fell shortest, until nothing more fits. The average is never above `bpw`, and within
    one step of the cheapest layer below it.

    Raises OptionError if `bpw` cannot pay for rank 8 everywhere, or is above MAX_BPW.
    """
    if not shapes:
        raise OptionError("the model has no linear layers to factorize")
    weights = sum(rows * cols for rows, cols in shapes.values())
    floor = sum(linear_bits(rows, cols, RANK_STEP) for rows, cols in shapes.values())
    budget = int(bpw * weights) if math.isfinite(bpw) else -1
    if not (floor <= budget and bpw <= MAX_BPW):
        least = math.ceil(floor / weights * 1000) / 1000
        raise OptionError(f"--bpw {bpw:g} is out of range: this model can have {least:.3f} to {MAX_BPW:g}")
    ranks: dict[str, int] = {}
    for name, (rows, cols) in shapes.items():
        free = bpw * rows * cols - SCALE_BITS * (rows + cols)
        steps = int(free / (linear_bits(rows, cols, 1) - linear_bits(rows, cols, 0)) / RANK_STEP)
        ranks[name] = max(1, steps) * RANK_STEP
    spent = sum(linear_bits(*shapes[name], rank) for name, rank in ranks.items())
    # Layers too small for their share took rank 8 all the same: take that back where it costs least.
    while spent > budget:
        name = max((n for n in ranks if ranks[n] > RANK_STEP), key=lambda n: _share(shapes[n], ranks[n]))
        spent -= _step_bits(shapes[name])
        ranks[name] -= RANK_STEP
    before = -1
    while before != spent:
        before = spent
        for name in sorted(ranks, key=lambda n: _share(shapes[n], ranks[n])):
            if spent + _step_bits(shapes[name]) <= budget:
                spent += _step_bits(shapes[name])
                ranks[name] += RANK_STEP
    return Plan(dict(shapes), ranks, bpw)


def _share(shape: Shape, rank: int) -> float:
    return linear_bits(*shape, rank) / (shape[0] * shape[1])


def _step_bits(shape: Shape) -> int:
    return linear_bits(*shape, RANK_STEP) - linear_bits(*shape, 0)
