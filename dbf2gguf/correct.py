"""Factorize block after block, each linear layer fitted to undo the error of those before it.

For a layer W with inputs x of the original model and x' of the model factorized so far, the factors
approximate not W but the least-squares solution of  W' x' ~ W x + r:
    W' = (W (C + l I) + R) (H + l I)^-1,   C = sum x x'^T,  H = sum x' x'^T,  R = sum r x'^T,
where r is what the residual stream already lacks when the layer's output is added to it (only for layers
that write to it; divided by what some models multiply the output by), and l a share of H's mean diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dbf2gguf.archs import INPUT, ArchSpec, Group, features
from dbf2gguf.budget import Plan
from dbf2gguf.factorize import Factors, factorize
from dbf2gguf.parallel import map_on_cores
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe
from dbf2gguf.source import Source, decoder_layers
from dbf2gguf.work import Work

BATCH_ROWS = 8

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with after its input: by position and by name."""


class _Stop(Exception):
    """Ends a layer's forward pass once its hook has seen what it wanted."""


@torch.no_grad()
def factorize_model(
    source: Source,
    model: nn.Module,
    plan: Plan,
    rows: Tensor,
    importance_out: dict[str, Tensor],
    recipe: Recipe,
    seed: int,
    stage: Stage,
    work: Work,
    targets: dict[str, Tensor] | None = None,
) -> dict[str, Factors]:
    """Factorize all linear layers of `model`, which is left as it was.

    rows            (n, tokens) int64 calibration text
    importance_out  GGUF name -> (rows of the layer,), see calibrate.output_importance
    ->              GGUF name -> factors, batch 1
    `stage` gets one step for each block, `work` the factors of every layer; those that it has are not made
    again.
    targets         gets what every layer's factors approximate, GGUF name -> (rows, cols)
    """
    result: dict[str, Factors] = {}
    scale = features(model.config).residual_scale
    layers = decoder_layers(model, source.arch)
    states, arguments_of = _embed(model, layers, rows)
    student_states = [s.clone() for s in states]
    for index, (layer, arguments) in enumerate(zip(layers, arguments_of, strict=True)):
        original = {n: layer.get_submodule(p).weight for n, p in source.arch.linears.items()}
        records = [_record(layer, source.arch, s, arguments) for s in states]
        try:
            for place, group in enumerate(source.arch.groups):
                inputs = _inputs(layer, source.arch, group, student_states, arguments)
                _factorize_group(
                    f"blk.{index}.",
                    layer,
                    source,
                    group,
                    [(record.inputs[place], record.residuals[place]) for record in records],
                    inputs,
                    plan,
                    importance_out,
                    recipe,
                    seed + index * len(source.arch.linears),
                    scale,
                    result,
                    work,
                    targets,
                )
            student_states = [_call(layer, s, arguments) for s in student_states]
        finally:
            for name, weight in original.items():
                layer.get_submodule(source.arch.linears[name]).weight = weight
        states = [record.output for record in records]
        lost = sum(float((a - b).square().sum()) for a, b in zip(states, student_states, strict=True))
        total = sum(float(a.square().sum()) for a in states)
        stage.step(note=f"relative error {lost / total:.3f}")
    return result


def _factorize_group(
    prefix: str,
    layer: nn.Module,
    source: Source,
    group: Group,
    wanted: list[tuple[Tensor, Tensor | None]],
    inputs: list[tuple[Tensor, Tensor | None]],
    plan: Plan,
    importance_out: dict[str, Tensor],
    recipe: Recipe,
    seed: int,
    scale: float,
    result: dict[str, Factors],
    work: Work,
    kept_targets: dict[str, Tensor] | None,
) -> None:
    """Correct and factorize the layers of one group and put them in place of the originals."""
    solve, importance_in = _normal_equations(wanted, inputs, recipe.damping, scale)
    modules = {name: layer.get_submodule(source.arch.linears[name]) for name in group.linears}
    targets = {name: solve(module.weight) for name, module in modules.items()}
    if kept_targets is not None:
        kept_targets |= {prefix + name: target for name, target in targets.items()}

    def factorize_some(names: list[str]) -> Factors:
        return factorize(
            torch.stack([targets[name] for name in names]),
            plan.ranks[prefix + names[0]],
            importance_in.expand(len(names), -1),
            torch.stack([importance_out[prefix + name] for name in names]),
            iterations=recipe.admm_iterations,
            seed=seed + source.arch.groups.index(group),
        )

    together = _equal_shapes(group.linears, prefix, plan)
    if not importance_in.is_cuda:
        together = [[name] for names in together for name in names]
    missing = []
    for names in together:  # what shares a batch is made together again, so that it comes out the same
        kept = {prefix + name: work.load(prefix + name) for name in names}
        if not all(kept.values()):
            missing.append(names)
            continue
        for name, part in kept.items():
            result[name] = Factors(**{key: value.to(importance_in.device) for key, value in part.items()})
    on_device = map if importance_in.is_cuda else map_on_cores
    for names, factors in zip(missing, on_device(factorize_some, missing), strict=True):
        for place, name in enumerate(names):
            result[prefix + name] = factors[place : place + 1]
            work.save(prefix + name, {k: v.clone() for k, v in vars(result[prefix + name]).items()})
    for name, module in modules.items():
        module.weight = nn.Parameter(result[prefix + name].dense()[0], requires_grad=False)


def _equal_shapes(linears: tuple[str, ...], prefix: str, plan: Plan) -> list[list[str]]:
    """The layers of a group in batches of equal shape and rank, the largest first."""
    batches: dict[tuple[Any, ...], list[str]] = {}
    for name in linears:
        batches.setdefault((*plan.shapes[prefix + name], plan.ranks[prefix + name]), []).append(name)
    return [batches[size] for size in sorted(batches, key=prod, reverse=True)]


def _normal_equations(
    wanted: list[tuple[Tensor, Tensor | None]],
    inputs: list[tuple[Tensor, Tensor | None]],
    damping: float,
    scale: float,
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The solver W -> W' of the module's head, and the root of H's diagonal, mean square 1."""
    width = inputs[0][0].shape[-1]
    device = inputs[0][0].device
    gram = torch.zeros(width, width, device=device)
    cross = torch.zeros(width, width, device=device)
    missing: Tensor | None = None
    for (x, residual), (x_now, residual_now) in zip(wanted, inputs, strict=True):
        x_now = x_now.flatten(0, 1)
        gram.addmm_(x_now.mT, x_now)
        cross.addmm_(x.flatten(0, 1).mT, x_now)
        if residual is not None and residual_now is not None:
            lack = (residual - residual_now).flatten(0, 1).mT @ x_now / scale
            missing = lack if missing is None else missing + lack
    diagonal = gram.diagonal()
    importance = (diagonal / diagonal.mean().clamp(min=1e-12) + 1e-6).sqrt()
    ridge = damping * diagonal.mean() + 1e-12
    diagonal += ridge
    cross.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)

    def solve(weight: Tensor) -> Tensor:
        target = weight @ cross
        if missing is not None:
            target += missing
        return torch.cholesky_solve(target.mT, factor).mT

    return solve, importance


# --------------------------------------------------------------------------------------------------
# Running one layer


@dataclass
class _Record:
    """What one batch does in the original layer: each group's input and residual, and the output."""

    inputs: list[Tensor]
    residuals: list[Tensor | None]
    output: Tensor


def _embed(model: nn.Module, layers: nn.ModuleList, rows: Tensor) -> tuple[list[Tensor], list[Arguments]]:
    """The first layer's inputs, in batches, and the other arguments that each layer is called with."""
    states: list[Tensor] = []
    arguments: dict[nn.Module, Arguments] = {}

    def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is layers[0]:
            states.append(args[0] if args else kwargs["hidden_states"])
            if arguments:
                raise _Stop  # the first batch has told those of every layer
        arguments[module] = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}

    device = next(model.parameters()).device
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(_hooked(layer.register_forward_pre_hook(on_call, with_kwargs=True)))
        for chunk in rows.split(_even_batch(len(rows))):
            with suppress(_Stop):
                model.get_decoder()(chunk.to(device), use_cache=False)
    return states, [arguments[layer] for layer in layers]


def _even_batch(rows: int) -> int:
    """The largest batch size <= BATCH_ROWS that divides `rows`: arguments are made for one size."""
    return next(size for size in range(min(BATCH_ROWS, rows), 0, -1) if rows % size == 0)


def _call(layer: nn.Module, state: Tensor, arguments: Arguments) -> Tensor:
    positional, named = arguments
    output = layer(state, *positional, **named)
    return output[0] if isinstance(output, tuple) else output


def _record(layer: nn.Module, arch: ArchSpec, state: Tensor, arguments: Arguments) -> _Record:
    seen: dict[str, Tensor] = {}
    with _watching(layer, _watched(arch, arch.groups), seen.__setitem__):
        output = _call(layer, state, arguments)
    return _Record(
        [seen[group.linears[0]] for group in arch.groups],
        [_residual(group, state, seen) for group in arch.groups],
        output,
    )


def _inputs(
    layer: nn.Module, arch: ArchSpec, group: Group, states: list[Tensor], arguments: Arguments
) -> list[tuple[Tensor, Tensor | None]]:
    """A group's inputs and residuals in the layer as it is now; each pass stops once they are known."""
    result = []
    for state in states:
        seen: dict[str, Tensor] = {}

        def on_input(name: str, x: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen[name] = x
            if name == group.linears[0]:
                raise _Stop

        with _watching(layer, _watched(arch, (group,)), on_input), suppress(_Stop):
            _call(layer, state, arguments)
        result.append((seen[group.linears[0]], _residual(group, state, seen)))
    return result


def _residual(group: Group, state: Tensor, seen: dict[str, Tensor]) -> Tensor | None:
    if group.residual is None:
        return None
    return state if group.residual == INPUT else seen[group.residual]


def _watched(arch: ArchSpec, groups: tuple[Group, ...]) -> dict[str, str]:
    """Name -> submodule whose input is wanted: each group's first linear, and the readers of residuals."""
    modules = {group.linears[0]: arch.linears[group.linears[0]] for group in groups}
    readers = {group.residual for group in groups} - {None, INPUT}
    return modules | {reader: reader for reader in readers if reader is not None}


@contextmanager
def _watching(
    layer: nn.Module, modules: dict[str, str], on_input: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Report the inputs of submodules while the context lasts."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: on_input(name, args[0])

    hooks = [layer.get_submodule(p).register_forward_pre_hook(hook_for(n)) for n, p in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _hooked(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()
