"""W ~ diag(s_out) A diag(s_mid) B diag(s_in), A and B in {-1, +1}, by ADMM. No I/O.

All functions work on a batch of equal-shaped matrices: W is (batch, rows, cols).

Source: Double Binary Factorization, arXiv:2505.11076 (its alternating ADMM with the SVID projection:
sign times the best rank-1 approximation of the magnitudes, from OneBit, arXiv:2402.11295).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dbf2gguf.graphs import Recorder

INNER_STEPS = 3  # ADMM steps on one factor before the other's turn
RIDGE = 6e-2  # of the Gram matrix' mean diagonal
POWER_ITERATIONS = 3
TINY = 1e-12
RECORDED_ITERATIONS = 10  # on a GPU: so many pay for recording one


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

    def to(self, device: str | torch.device) -> Factors:
        return Factors(*(getattr(self, f.name).to(device) for f in fields(self)))

    def __getitem__(self, index: slice) -> Factors:
        return Factors(*(getattr(self, f.name)[index] for f in fields(self)))


def signs(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1, in x's dtype. The sum makes 0 of -0; `where` is six times slower on CPUs."""
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x + 0.0)


def factorize(
    weight: Tensor,
    rank: int,
    importance_in: Tensor,
    importance_out: Tensor,
    *,
    iterations: int,
    seed: int,
    overwrite: bool = False,
) -> Factors:
    """Factorize a batch of matrices, minimizing the error weighted by the importances.

    weight          (batch, rows, cols)  float32; overwritten, if it may be, to save its memory
    importance_in   (batch, cols)  float32 > 0, weight of an input's error (root of its second moment)
    importance_out  (batch, rows)  float32 > 0, weight of an output's error (root of its gradient's)
    iterations      ADMM rounds; seed: of the random start
    """
    weighted = weight if overwrite else weight.clone()
    weighted *= importance_out[:, :, None]
    weighted *= importance_in[:, None, :]
    size = weighted.square().mean((1, 2)).sqrt().clamp(min=TINY)
    weighted /= size[:, None, None]
    factors = _refit(weighted, _admm(weighted, rank, iterations, seed))
    factors.s_out *= size[:, None] / importance_out
    factors.s_in /= importance_in
    return balance(factors)


@dataclass
class _Factor:
    """One factor's side of the ADMM: its projection, its dual, and where the next power iteration starts."""

    x: Tensor  # (batch, rank, width)
    dual: Tensor
    cols: Tensor  # (batch, width), the right singular vector of |x + dual|

    def project(self, point: Tensor) -> None:
        """x = SVID(point): its signs times the best rank-1 approximation of its magnitudes; dual = the rest.
        All in its place, as a recorded iteration wants it; no matrix is made."""
        rows, cols = _rank_one(torch.abs(point, out=self.x), self.cols, 1)
        torch.mul(rows[:, :, None], cols[:, None, :], out=self.x).copysign_(point)
        torch.sub(point, self.x, out=self.dual)
        self.cols.copy_(cols)


def _admm(weight: Tensor, rank: int, iterations: int, seed: int) -> Factors:
    batch, rows, cols = weight.shape
    generator = torch.Generator().manual_seed(seed)

    def random_factor(width: int) -> _Factor:
        """The same start for every matrix, so that none depends on what shares its batch."""
        x = torch.randn(rank, width, generator=generator).to(weight.device).repeat(batch, 1, 1)
        return _Factor(x, torch.zeros_like(x), torch.ones_like(x[:, 0]))

    # A is held transposed, (batch, rank, rows), so that both sides are the same problem.
    a, b = random_factor(rows), random_factor(cols)
    rho = torch.zeros((), device=weight.device)

    def iterate() -> None:
        _half_step(b.x / _norms(b.x), weight.mT, a, rho)
        _half_step(a.x / _norms(a.x), weight, b, rho)

    here = weight.is_cuda and weight.device.index == torch.cuda.current_device()
    if here and iterations >= RECORDED_ITERATIONS:
        iterate = Recorder("the factorization", warm_up=1, others=True)(iterate)
    for step in range(iterations):
        rho.fill_(min(1.0, step / max(1, iterations - 3)) ** 3)
        iterate()
    a_cols, a_rows = _rank_one(a.x.abs(), a.cols, POWER_ITERATIONS)
    b_rows, b_cols = _rank_one(b.x.abs(), b.cols, POWER_ITERATIONS)
    return Factors(
        a=_unit_latent(a.x + a.dual, a_cols, a_rows).mT.contiguous(),
        b=_unit_latent(b.x + b.dual, b_rows, b_cols),
        s_out=a_rows,
        s_mid=a_cols * b_rows / _norms(a.x)[:, :, 0],
        s_in=b_cols,
    )


def _norms(x: Tensor) -> Tensor:
    """Of the rows of x (batch, rank, width), (batch, rank, 1)."""
    return x.norm(dim=2, keepdim=True).clamp(min=TINY)


def _half_step(other: Tensor, weight: Tensor, factor: _Factor, rho: Tensor) -> None:
    """ADMM steps for min ||weight - other^T x||^2 subject to x = signs * rank-1 magnitudes.

    other   (batch, rank, rows)  the other factor, rows normalized
    weight  (batch, rows, cols)
    The first step uses penalty `rho`, the others 1.
    """
    gram = other @ other.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + TINY
    target = other @ weight
    del other
    first = gram.clone()
    first.diagonal(dim1=1, dim2=2).add_(rho)
    diagonal += 1.0
    _invert([*first, *gram])
    free = first @ torch.sub(factor.x, factor.dual).mul_(rho).add_(target)
    del first
    for _ in range(INNER_STEPS - 1):
        factor.project(free.add_(factor.dual))
        free = gram @ torch.sub(factor.x, factor.dual, out=free).add_(target)
    factor.project(free.add_(factor.dual))


def _invert(matrices: list[Tensor]) -> None:
    """Positive definite matrices in their place, one after the other: on GPUs, a batch of two takes several
    times as long as two. What is not finite is found by `_refit`, which asks."""
    for matrix in matrices:
        lower = torch.linalg.cholesky_ex(matrix).L
        matrix.copy_(torch.cholesky_inverse(lower).mT)  # the same, transposed as it lies: no strides to cross


def _rank_one(x: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """u, v with u v^T ~ x >= 0, v of unit length, by power iteration from v = start."""
    v = start[:, :, None]
    for _ in range(iterations):
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


def relative_error(
    wanted: Tensor, got: Tensor, importance_out: Tensor | None = None, importance_in: Tensor | None = None
) -> float:
    """Norm of (wanted - got) over that of wanted, (rows, cols) both; with importances, as `factorize` weighs
    errors: importance_out (rows,), importance_in (cols,). NaN where wanted is 0."""
    difference = wanted - got
    if importance_out is not None:
        difference, wanted = difference * importance_out[:, None], wanted * importance_out[:, None]
    if importance_in is not None:
        difference, wanted = difference * importance_in, wanted * importance_in
    return float(difference.norm() / wanted.norm())


def balance(factors: Factors) -> Factors:
    """Give the three scale vectors equal root mean squares, so that all fit float16 well."""
    vectors = [factors.s_out, factors.s_mid, factors.s_in]
    rms = [v.square().mean(1, keepdim=True).sqrt() + 1e-20 for v in vectors]
    mean = (rms[0] * rms[1] * rms[2]) ** (1 / 3)
    return Factors(factors.a, factors.b, *(v / r * mean for v, r in zip(vectors, rms, strict=True)))
