"""W ~ diag(s_out) A diag(s_mid) B diag(s_in), A and B in {-1, +1}, by ADMM. No I/O.

All functions work on a batch of equal-shaped matrices: W is (batch, rows, cols).

Source: Double Binary Factorization, arXiv:2505.11076 (its alternating ADMM with the SVID projection:
sign times the best rank-1 approximation of the magnitudes, from OneBit, arXiv:2402.11295).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

INNER_STEPS = 3  # ADMM steps on one factor before the other's turn
RIDGE = 3e-2  # of the Gram matrix' mean diagonal
POWER_ITERATIONS = 3
TINY = 1e-12


@dataclass
class Factors:
    """A batch of factorized matrices, as latents whose signs are A and B, and three scale vectors.

    a      (batch, rows, rank)  float32, sign(a) is A (0 counts as +1), mean magnitude 1
    b      (batch, rank, cols)  float32, likewise B
    s_out  (batch, rows), s_mid (batch, rank), s_in (batch, cols)  float32
    """

    a: Tensor
    b: Tensor
    s_out: Tensor
    s_mid: Tensor
    s_in: Tensor

    def dense(self) -> Tensor:
        """The matrix that the factors stand for, (batch, rows, cols)."""
        left = signs(self.a) * self.s_out[:, :, None]
        right = signs(self.b) * (self.s_mid[:, :, None] * self.s_in[:, None, :])
        return left @ right

    def __getitem__(self, index: slice) -> Factors:
        return Factors(*(getattr(self, f.name)[index] for f in fields(self)))


def signs(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1, in x's dtype."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def factorize(
    weight: Tensor, rank: int, importance_in: Tensor, importance_out: Tensor, *, iterations: int, seed: int
) -> Factors:
    """Factorize a batch of matrices, minimizing the error weighted by the importances.

    weight          (batch, rows, cols)  float32
    importance_in   (batch, cols)  float32 > 0, weight of an input's error (root of its second moment)
    importance_out  (batch, rows)  float32 > 0, weight of an output's error (root of its gradient's)
    iterations      ADMM rounds; seed: of the random start
    """
    weighted = weight * importance_out[:, :, None] * importance_in[:, None, :]
    size = weighted.square().mean((1, 2)).sqrt().clamp(min=TINY)
    weighted /= size[:, None, None]
    factors = _refit(weighted, _admm(weighted, rank, iterations, seed))
    factors.s_out *= size[:, None] / importance_out
    factors.s_in /= importance_in
    return balance(factors)


def relative_error(weight: Tensor, approximation: Tensor) -> Tensor:
    """||W - W'||^2 / ||W||^2 of each matrix, (batch,)."""
    return (weight - approximation).square().sum((1, 2)) / weight.square().sum((1, 2)).clamp(min=TINY)


def _admm(weight: Tensor, rank: int, iterations: int, seed: int) -> Factors:
    batch, rows, cols = weight.shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device)

    a, b = normal(batch, rows, rank), normal(batch, rank, cols)
    dual_a, dual_b = torch.zeros_like(a), torch.zeros_like(b)
    raw_a, raw_b = a, b
    for step in range(iterations):
        rho = min(1.0, step / max(1, iterations - 3)) ** 3
        norm = b.norm(dim=2).clamp(min=TINY)
        left = (b / norm[:, :, None]).mT
        a_t, dual_t, raw_t = _half_step(left, weight.mT, a.mT, dual_a.mT, rho)
        a, dual_a, raw_a = a_t.mT, dual_t.mT, raw_t.mT
        norm = a.norm(dim=1).clamp(min=TINY)
        b, dual_b, raw_b = _half_step(a / norm[:, None, :], weight, b, dual_b, rho)
    a_rows, a_cols = _rank_one(a.abs())
    b_rows, b_cols = _rank_one(b.abs())
    return Factors(
        a=_unit_latent(raw_a, a_rows, a_cols),
        b=_unit_latent(raw_b, b_rows, b_cols),
        s_out=a_rows,
        s_mid=a_cols * b_rows / norm,
        s_in=b_cols,
    )


def _half_step(
    left: Tensor, weight: Tensor, x: Tensor, dual: Tensor, rho: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ADMM steps for min ||weight - left x||^2 subject to x = signs * rank-1 magnitudes.

    Returns the projected x, the new dual and the point that was projected. The first step uses penalty
    `rho`, the others 1.
    """
    gram = left.mT @ left
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True)
    target = left.mT @ weight
    free = torch.cholesky_solve(target + rho * (x - dual), _cholesky(gram, rho))
    inverse = torch.cholesky_inverse(_cholesky(gram, 1.0))
    for _ in range(INNER_STEPS - 1):
        point = free + dual
        x = _project(point)
        dual = point - x
        free = inverse @ (target + x - dual)
    point = free + dual
    x = _project(point)
    return x, point - x, point


def _cholesky(gram: Tensor, rho: float) -> Tensor:
    """The lower Cholesky factor of gram + rho I."""
    shifted = gram.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(rho)
    return torch.linalg.cholesky(shifted)


def _project(x: Tensor) -> Tensor:
    """SVID: sign(x) times the best rank-1 approximation of |x|."""
    rows, cols = _rank_one(x.abs())
    return torch.copysign(rows[:, :, None] * cols[:, None, :], x)


def _rank_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """u, v with u v^T ~ x >= 0, v of unit length, by power iteration."""
    v = torch.ones(x.shape[0], x.shape[2], 1, device=x.device)
    for _ in range(POWER_ITERATIONS):
        u = x @ v
        v = x.mT @ (u / u.norm(dim=1, keepdim=True).clamp(min=TINY))
        v = v / v.norm(dim=1, keepdim=True).clamp(min=TINY)
    return (x @ v)[:, :, 0], v[:, :, 0]


def _unit_latent(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """x over its rank-1 envelope, scaled to mean magnitude 1: distillation starts from it."""
    latent = x / (rows[:, :, None] * cols[:, None, :] + TINY)
    return latent / latent.abs().mean((1, 2), keepdim=True).clamp(min=TINY)


def _refit(weight: Tensor, factors: Factors) -> Factors:
    """One round of least squares for s_mid, s_out and s_in, signs fixed."""
    sign_a, sign_b = signs(factors.a), signs(factors.b)
    left, right = sign_a * factors.s_out[:, :, None], sign_b * factors.s_in[:, None, :]
    gram = (left.mT @ left) * (right @ right.mT)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += 1e-4 * diagonal.mean(1, keepdim=True) + 1e-20
    target = ((left.mT @ weight) * right).sum(2)
    s_mid = torch.cholesky_solve(target[:, :, None], torch.linalg.cholesky(gram))[:, :, 0]
    basis = (sign_a * s_mid[:, None, :]) @ right
    s_out = (weight * basis).sum(2) / (basis.square().sum(2) + 1e-20)
    basis = (sign_a * s_out[:, :, None] * s_mid[:, None, :]) @ sign_b
    s_in = (weight * basis).sum(1) / (basis.square().sum(1) + 1e-20)
    return Factors(factors.a, factors.b, s_out, s_mid, s_in)


def balance(factors: Factors) -> Factors:
    """Give the three scale vectors equal root mean squares, so that all fit float16 well."""
    vectors = [factors.s_out, factors.s_mid, factors.s_in]
    rms = [v.square().mean(1, keepdim=True).sqrt() + 1e-20 for v in vectors]
    mean = (rms[0] * rms[1] * rms[2]) ** (1 / 3)
    return Factors(factors.a, factors.b, *(v / r * mean for v, r in zip(vectors, rms, strict=True)))
