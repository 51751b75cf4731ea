"""Bits per weight -> inner sizes of a whole model; `runtime.format` holds what the bits of one layer are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.format import MAX_BPW, RANK_STEP, Shape, linear_bits, uniform_ranks

__all__ = ["MAX_BPW", "RANK_STEP", "Plan", "Shape", "least_bpw", "linear_bits", "plan_uniform"]


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


def least_bpw(shapes: Mapping[str, Shape]) -> float:
    """Bits per weight where every layer has the smallest inner size."""
    return sum(linear_bits(*shape, RANK_STEP) for shape in shapes.values()) / sum(
        rows * cols for rows, cols in shapes.values()
    )


def plan_uniform(shapes: Mapping[str, Shape], bpw: float) -> Plan:
    """Give every layer the same bits per weight, as nearly as steps of 8 allow: see `uniform_ranks`.

    Raises OptionError if `bpw` cannot pay for rank 8 everywhere, or is above MAX_BPW.
    """
    return Plan(dict(shapes), uniform_ranks(shapes, bpw), bpw)
