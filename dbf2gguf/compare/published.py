"""The published algorithm (arXiv:2505.11076), computed by this project's code.

Every layer by itself, its errors weighted by the inputs and gradients that it sees in the original model; no
correction of one layer's error by the next, no distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dbf2gguf.budget import Plan
from dbf2gguf.calibrate import hidden_states
from dbf2gguf.factorize import Factors, factorize
from dbf2gguf.parallel import map_on_cores, stop_if_unwanted
from dbf2gguf.progress import Stage


@torch.no_grad()
def input_importance(
    model: nn.Module, names: dict[str, str], rows: Tensor, batch: int, stage: Stage
) -> dict[str, Tensor]:
    """Root of the second moment of every linear layer's inputs, mean 1 over its squares.

    names   GGUF name -> module name
    rows    (n, tokens) int64
    ->      GGUF name -> (columns of the layer,) float32 > 0
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def on_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0].float().square().sum((0, 1))

        return module.register_forward_pre_hook(on_input)

    hooks = [watch(name, model.get_submodule(path)) for name, path in names.items()]
    try:
        for chunk in rows.split(batch):
            hidden_states(model, input_ids=chunk.to(next(model.parameters()).device))
            stage.step(n=len(chunk))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / total.mean().clamp(min=1e-12) + 1e-6).sqrt() for name, total in sums.items()}


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
