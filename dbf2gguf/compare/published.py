"""The published algorithm (arXiv:2505.11076), computed by this project's code.

Every layer by itself, its errors weighted by the inputs and gradients that it sees in the original model; no
correction of one layer's error by the next, no distillation.
"""

from __future__ import annotations

from torch import Tensor, nn

from dbf2gguf.budget import Plan
from dbf2gguf.factorize import Factors, factorize
from dbf2gguf.parallel import map_on_cores, stop_if_unwanted
from dbf2gguf.progress import Stage


def factorize_each(
    model: nn.Module,
    names: dict[str, str],
    plan: Plan,
    importance_in: dict[str, Tensor],
    importance_out: dict[str, Tensor],
    iterations: int,
    seed: int,
    stage: Stage,
) -> dict[str, Factors]:
    """GGUF name -> factors of every linear layer, batch 1. `stage` gets one step for each."""

    def one(name: str) -> Factors:
        stop_if_unwanted()
        factors = factorize(
            model.get_submodule(names[name]).weight[None],
            plan.ranks[name],
            importance_in[name][None],
            importance_out[name][None],
            iterations=iterations,
            seed=seed,
        )
        stage.step()
        return factors

    return dict(zip(names, map_on_cores(one, names), strict=True))
