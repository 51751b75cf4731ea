"""Factorize block after block, each linear layer fitted to undo the error of those before it.

For a layer W with inputs x of the original model and x' of the model factorized so far, the factors
approximate not W but the least-squares solution of  W' x' ~ W x + r:
    W' = (W (C + l I) + R) (H + l I)^-1,   C = sum x x'^T,  H = sum x' x'^T,  R = sum r x'^T,
where r is what the residual stream already lacks when the layer's output is added to it (only for layers
that write to it; divided by what some models multiply the output by), and l a share of H's mean diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dbf2gguf.archs import INPUT, ArchSpec, Group, features
from dbf2gguf.budget import Plan
from dbf2gguf.distill import with_linears
from dbf2gguf.factorize import Factors, factorize
from dbf2gguf.parallel import map_on_cores
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe
from dbf2gguf.source import Source, decoder_layers
from dbf2gguf.work import Work

BATCH_ROWS = 8
LARGE = (
    2**24
)  # weights of a matrix that gets all cores: two at a time would take as long and twice the memory

Item = TypeVar("Item")
Keep = Callable[[Iterable[Item]], Sequence[Item]]
"""`list`, or what keeps the items elsewhere than in memory."""

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
    keep: Keep[Any] = list,
    result: MutableMapping[str, Factors] | None = None,
) -> MutableMapping[str, Factors]:
    """Factorize all linear layers of `model`, which is left as it was.

    rows            (n, tokens) int64 calibration text
    importance_out  GGUF name -> (rows of the layer,), see calibrate.output_importance
    ->              GGUF name -> factors, batch 1
    `stage` gets one step for each block, `work` the factors of every layer; those that it has are not made
    again. The rows' states are kept by `keep`, the factors in `result`, which is returned.
    """
    result = {} if result is None else result
    scale = features(model.config).residual_scale
    layers = decoder_layers(model, source.arch)
    first, arguments_of = _embed(model, layers, rows)
    states, student_states = keep(first), keep(first)
    del first
    for index, (layer, arguments) in enumerate(zip(layers, arguments_of, strict=True)):
        records = keep(_record(layer, source.arch, s, arguments) for s in states)
        student = with_linears(layer, {})
        for place, group in enumerate(source.arch.groups):
            _factorize_group(
                f"blk.{index}.",
                student,
                source,
                group,
                ((record.inputs[place], record.residuals[place]) for record in records),
                _inputs(student, source.arch, group, student_states, arguments),
                plan,
                importance_out,
                recipe,
                seed + index * len(source.arch.linears),
                scale,
                result,
                work,
            )
        student_states = keep(_call(student, s, arguments) for s in student_states)
        states = keep(record.output for record in records)
        lost = sum(float((a - b).square().sum()) for a, b in zip(states, student_states, strict=True))
        total = sum(float(a.square().sum()) for a in states)
        stage.step(note=f"relative error {lost / total:.3f}")
    return result


def _factorize_group(
    prefix: str,
    layer: nn.Module,
    source: Source,
    group: Group,
    wanted: Iterable[tuple[Tensor, Tensor | None]],
    inputs: Iterable[tuple[Tensor, Tensor | None]],
    plan: Plan,
    importance_out: dict[str, Tensor],
    recipe: Recipe,
    seed: int,
    scale: float,
    result: MutableMapping[str, Factors],
    work: Work,
) -> None:
    """Correct and factorize the layers of one group and put them in place of the originals."""
    modules = {name: layer.get_submodule(source.arch.linears[name]) for name in group.linears}
    solve, importance_in = _normal_equations(wanted, inputs, recipe.damping, scale)
    targets = {name: solve(module.weight) for name, module in modules.items()}
    del solve  # and its matrices

    def factorize_some(names: list[str]) -> Factors:
        return factorize(
            torch.stack([targets.pop(name) for name in names]),
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
    large = max(prod(plan.shapes[prefix + name]) for name in group.linears) >= LARGE
    on_device = map if importance_in.is_cuda or large else map_on_cores
    for names, factors in zip(missing, on_device(factorize_some, missing), strict=True):
        for place, name in enumerate(names):
            made = factors[place : place + 1]
            work.save(prefix + name, {k: v.clone() for k, v in vars(made).items()})
            result[prefix + name] = made
    for name, module in modules.items():
        module.weight = nn.Parameter(result[prefix + name].dense()[0], requires_grad=False)


def _equal_shapes(linears: tuple[str, ...], prefix: str, plan: Plan) -> list[list[str]]:
    """The layers of a group in batches of equal shape and rank, the largest first."""
    batches: dict[tuple[Any, ...], list[str]] = {}
    for name in linears:
        batches.setdefault((*plan.shapes[prefix + name], plan.ranks[prefix + name]), []).append(name)
    return [batches[size] for size in sorted(batches, key=prod, reverse=True)]


def _normal_equations(
    wanted: Iterable[tuple[Tensor, Tensor | None]],
    inputs: Iterable[tuple[Tensor, Tensor | None]],
    damping: float,
    scale: float,
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The solver W -> W' of the module's head, and the root of H's diagonal, mean square 1."""
    gram, cross = torch.empty(0), torch.empty(0)
    missing: Tensor | None = None
    for (x, residual), (x_now, residual_now) in zip(wanted, inputs, strict=True):
        x_now = x_now.flatten(0, 1)
        if not len(gram):
            gram, cross = x_now.new_zeros(2, x_now.shape[1], x_now.shape[1])
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
    factor = torch.linalg.cholesky(gram, out=gram)

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

    def in_place_of(layer: nn.Module) -> Callable[..., Tensor]:
        """A forward pass that notes what it is called with and computes nothing."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if layer is layers[0]:
                states.append(hidden_states)
                if arguments:
                    raise _Stop  # the first batch has told those of every layer
            arguments[layer] = args, kwargs
            if layer is layers[-1]:
                raise _Stop
            return hidden_states

        return forward

    device = next(model.parameters()).device
    try:
        for layer in layers:
            layer.forward = in_place_of(layer)
        for chunk in rows.split(_even_batch(len(rows))):
            with suppress(_Stop):
                model.get_decoder()(chunk.to(device), use_cache=False)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
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
    layer: nn.Module, arch: ArchSpec, group: Group, states: Iterable[Tensor], arguments: Arguments
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A group's inputs and residuals in the layer as it is now; each pass stops once they are known."""
    for state in states:
        seen: dict[str, Tensor] = {}

        def on_input(name: str, x: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen[name] = x
            if name == group.linears[0]:
                raise _Stop

        with _watching(layer, _watched(arch, (group,)), on_input), suppress(_Stop):
            _call(layer, state, arguments)
        yield seen[group.linears[0]], _residual(group, state, seen)


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
