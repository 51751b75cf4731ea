"""The factorization of single matrices."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from dbf2gguf.factorize import Factors, balance, factorize, signs


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: Tensor, approximation: Tensor) -> Tensor:
    """||W - W'||^2 / ||W||^2 of each matrix, (batch,)."""
    return (weight - approximation).square().sum((1, 2)) / weight.square().sum((1, 2))


def plain(weight: Tensor, rank: int, iterations: int = 25, seed: int = 0) -> Factors:
    batch, rows, cols = weight.shape
    ones_in, ones_out = torch.ones(batch, cols), torch.ones(batch, rows)
    return factorize(weight, rank, ones_in, ones_out, iterations=iterations, seed=seed)


def error(weight: Tensor, rank: int, iterations: int = 25) -> float:
    return float(relative_error(weight, plain(weight, rank, iterations).dense()).mean())


def test_dense_is_the_formula() -> None:
    """W'[n, d] = s_out[n] * sum_k A[n, k] s_mid[k] B[k, d] * s_in[d], sum by sum; sign(0) is +1."""
    a, b = gaussian(2, 5, 8), gaussian(2, 8, 3, seed=1)
    a[0, 0, 0] = 0.0
    s_out, s_mid, s_in = gaussian(2, 5, seed=2), gaussian(2, 8, seed=3), gaussian(2, 3, seed=4)
    dense = Factors(a, b, s_out, s_mid, s_in).dense()
    assert dense.shape == (2, 5, 3)
    for i in range(2):
        for n in range(5):
            for d in range(3):
                total = sum(
                    (1 if a[i, n, k] >= 0 else -1) * float(s_mid[i, k]) * (1 if b[i, k, d] >= 0 else -1)
                    for k in range(8)
                )
                wanted = float(s_out[i, n]) * total * float(s_in[i, d])
                assert float(dense[i, n, d]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_signs() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    assert signs(x).tolist() == [-1, 1, 1, 1]
    assert signs(x.bfloat16()).dtype == torch.bfloat16


BOUNDS = {8: 0.79, 16: 0.58, 32: 0.31, 64: 0.11, 128: 0.027}
"""rank -> relative error of Gaussian 64 x 48 matrices after 25 iterations: what was measured, and a tenth.
With their scales, these ranks are 0.92, 1.25, 1.92, 3.25 and 5.92 bits per weight."""


def test_error_falls_with_rank() -> None:
    """Gaussian matrices have no structure: only bits help."""
    weight = gaussian(4, 64, 48)
    errors = {rank: error(weight, rank) for rank in (8, 16, 32, 64, 128)}
    values = list(errors.values())
    assert values == sorted(values, reverse=True)
    for rank, bound in BOUNDS.items():
        assert errors[rank] < bound


def test_error_falls_with_iterations() -> None:
    weight = gaussian(4, 64, 48)
    errors = [error(weight, 40, iterations) for iterations in (2, 5, 15, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_structure_helps() -> None:
    """A matrix that is a product of sign matrices and scales is approximated far better than noise."""
    made = Factors(
        gaussian(1, 64, 8), gaussian(1, 8, 48, seed=1), *(gaussian(1, n, seed=n).exp() for n in (64, 8, 48))
    ).dense()
    assert error(made, 32) < 0.5 * error(gaussian(1, 64, 48), 32)


def test_importance_moves_the_error() -> None:
    """Where an input or output weighs ten times as much, its columns or rows come out better."""
    weight = gaussian(1, 64, 48)
    heavy_in, heavy_out = torch.ones(1, 48), torch.ones(1, 64)
    heavy_in[0, :12] = 10.0
    heavy_out[0, :16] = 10.0
    light_in, light_out = torch.ones(1, 48), torch.ones(1, 64)

    def miss(importance_in: Tensor, importance_out: Tensor) -> Tensor:
        options = {"iterations": 25, "seed": 0}
        dense = factorize(weight, 40, importance_in, importance_out, **options).dense()
        return (weight - dense)[0].square()

    even, columns, rows = miss(light_in, light_out), miss(heavy_in, light_out), miss(light_in, heavy_out)
    assert columns[:, :12].mean() < 0.5 * even[:, :12].mean()
    assert rows[:16].mean() < 0.5 * even[:16].mean()
    assert columns[:, 12:].mean() > even[:, 12:].mean()


def test_importance_of_any_size_is_the_same() -> None:
    """Only ratios of importances matter, and the weight's own size is no matter either."""
    weight = gaussian(1, 40, 24)
    one_in, one_out = gaussian(1, 24, seed=1).exp(), gaussian(1, 40, seed=2).exp()
    first = factorize(weight, 16, one_in, one_out, iterations=10, seed=0).dense()
    second = factorize(weight * 1e-3, 16, one_in * 64, one_out / 64, iterations=10, seed=0).dense()
    assert torch.allclose(first, second * 1e3, rtol=1e-3, atol=1e-4)


def test_seeds() -> None:
    weight = gaussian(2, 40, 24)
    one, again, other = (plain(weight, 16, seed=seed) for seed in (7, 7, 8))
    for f in fields(Factors):
        assert torch.equal(getattr(one, f.name), getattr(again, f.name))
    assert not torch.equal(signs(one.a), signs(other.a))
    assert float(relative_error(weight, other.dense()).mean()) == pytest.approx(
        float(relative_error(weight, one.dense()).mean()), rel=0.15
    )


def test_the_weight_is_overwritten_only_if_it_may_be() -> None:
    weight, ones_in, ones_out = gaussian(2, 24, 40), torch.ones(2, 40), torch.ones(2, 24)
    before = weight.clone()
    one = factorize(weight, 16, ones_in, ones_out, iterations=3, seed=0)
    assert torch.equal(weight, before)
    other = factorize(weight, 16, ones_in, ones_out, iterations=3, seed=0, overwrite=True)
    assert not torch.equal(weight, before), "it is what takes the memory of the weighted one"
    assert all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def test_seeding_leaves_torch_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    plain(gaussian(1, 16, 16), 8, 2)
    assert torch.equal(torch.rand(2), expected)


def test_matrices_of_a_batch_do_not_touch() -> None:
    weight, other = gaussian(3, 40, 24), gaussian(3, 40, 24)
    other[1:] = 100 * gaussian(2, 40, 24, seed=9)
    one, two = plain(weight, 16), plain(other, 16)
    assert torch.equal(signs(one.a[0]), signs(two.a[0]))
    assert torch.equal(signs(one.b[0]), signs(two.b[0]))
    assert torch.allclose(one.dense()[0], two.dense()[0], rtol=1e-4, atol=1e-5)


def test_shapes_and_balance() -> None:
    factors = plain(gaussian(2, 40, 24), 16, 5)
    shapes = [tuple(getattr(factors, f.name).shape) for f in fields(Factors)]
    assert shapes == [(2, 40, 16), (2, 16, 24), (2, 40), (2, 16), (2, 24)]
    for latent in (factors.a, factors.b):
        assert latent.abs().mean((1, 2)).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)
    rms = [v.square().mean(1).sqrt() for v in (factors.s_out, factors.s_mid, factors.s_in)]
    assert torch.allclose(rms[0], rms[1], rtol=1e-4)
    assert torch.allclose(rms[0], rms[2], rtol=1e-4)
    odd = Factors(factors.a, factors.b, factors.s_out * 1e4, factors.s_mid / 10, factors.s_in)
    assert torch.allclose(balance(odd).dense(), odd.dense(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (8, 3), (13, 29)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    """Ranks above both sides, single rows and columns: finite, and no worse than nothing."""
    weight = gaussian(2, *shape)
    dense = plain(weight, 64, 8).dense()
    assert torch.isfinite(dense).all()
    assert (relative_error(weight, dense) < 1).all()


def test_zeros_stay_finite() -> None:
    """A matrix of zeros, and one with zero rows and columns."""
    weight = gaussian(2, 24, 16)
    weight[0] = 0
    weight[1, :5] = 0
    weight[1, :, 3:9] = 0
    dense = plain(weight, 16, 8).dense()
    assert torch.isfinite(dense).all()
    assert dense[0].abs().max() < 1e-6
