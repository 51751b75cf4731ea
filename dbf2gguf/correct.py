"""Factorize block after block, each linear layer fitted to undo the error of those before it.

For a layer W with inputs x of the original model and x' of the model factorized so far, the factors
approximate not W but the least-squares solution of  W' x' ~ W x + r:
    W' = (W (C + l I) + R) (H + l I)^-1,   C = sum x x'^T,  H = sum x' x'^T,  R = sum r x'^T,
where r is what the residual stream already lacks when the layer's output is added to it (only for layers
that write to it; divided by what some models multiply the output by), and l a share of H's mean diagonal.

An expert sees the tokens that the router of the model factorized so far gives it, and each weighs by the
share with which its output enters the sum: x and x' are multiplied by it. What the stream lacks is divided
among the experts of a token in proportion to their shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dbf2gguf.activations import SLACK, record_bytes, rows_together
from dbf2gguf.archs import EXPERT_GROUPS, EXPERT_LINEARS, INPUT, ArchSpec, Experts, Group, features
from dbf2gguf.budget import Plan
from dbf2gguf.calibrate import importance_of
from dbf2gguf.distill import with_linears
from dbf2gguf.executors import Executor, on_cores, one_by_one
from dbf2gguf.factorize import Factors, factorize, relative_error
from dbf2gguf.gpu_memory import OnHost, free_bytes
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe
from dbf2gguf.source import Source, as_linear, decoder_layers
from dbf2gguf.work import Work
from runtime.errors import QualityError

BATCH_ROWS = 8  # that pass together, at most
PRODUCT_ROWS = 1024  # of a weight that are multiplied out at a time
BATCH_MATRICES = 32  # that are factorized together on a GPU, at most
TOKENS_PER_INPUT = 4  # an expert that sees fewer is not corrected: on random models, 2 were worse, 8 better
LARGE = 2**24
"""Weights of a layer that has all cores to itself: side by side with the one or two that read the same vector
it would take as long and several times the memory."""

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
    executor: Executor = on_cores,
    errors: dict[str, float] | None = None,
    targets: dict[str, Tensor] | None = None,
    keep: Keep[Any] | None = None,
    result: MutableMapping[str, Factors] | None = None,
) -> MutableMapping[str, Factors]:
    """Factorize all linear layers of `model`, which is left as it was.

    rows            (n, tokens) int64 calibration text
    importance_out  GGUF name -> (rows of the layer,), see calibrate.output_importance
    errors          gets GGUF name -> relative error of what the factors stand for, from W' as factorized
    targets         gets GGUF name -> (rows, cols), these W'
    ->              GGUF name -> factors, batch 1
    `stage` gets one step for each block, `work` the factors of every layer; those that it has are not made
    again. `executor` factorizes the layers of a group, which are independent; on a GPU, that does. `keep`
    keeps the rows' states: without it, they stay on the device, or, where a GPU has no room, in the host's
    memory. `result` keeps the factors; it is returned.
    """
    result = {} if result is None else result
    keep = _keep_for(model, plan, rows, stage) if keep is None else keep
    scale = features(model.config).residual_scale
    walk = _Walk(plan, importance_out, recipe, scale, executor, work, keep, result, errors, targets)
    layers = decoder_layers(model, source.arch)
    first, arguments_of = embed_rows(model, layers, batches_of(rows, model.config))
    states = student_states = keep(first)
    for index, (layer, arguments) in enumerate(zip(layers, arguments_of, strict=True)):
        records = keep(_record(layer, source.arch, s, arguments) for s in states)
        student = with_linears(layer, {})
        for place, group in enumerate(source.arch.groups):
            _factorize_group(
                walk,
                f"blk.{index}.",
                student,
                source.arch,
                group,
                ((record.inputs[place], record.residuals[place]) for record in records),
                _inputs(student, _place_of(source.arch, group), student_states, arguments),
                seed + index * len(source.arch.linears),
            )
        if source.arch.experts is not None:
            block = _Place(source.arch.experts.block, source.arch.experts.residual)
            now = keep(_inputs(student, block, student_states, arguments))
            few = _factorize_experts(
                walk,
                f"blk.{index}.",
                layer,
                student,
                source.arch.experts,
                _Tokens(len(records), partial(_last_place, records)),
                _Tokens(len(now), now.__getitem__),
                seed + index * len(source.arch.linears) + len(source.arch.groups),
            )
            del now
            if few:
                stage.say(
                    f"blk.{index}: {len(few)} of {features(model.config).n_experts} experts saw too few "
                    f"tokens to be corrected (number {few[0]} first); more text helps"
                )
        student_states = keep(call_layer(student, s, arguments) for s in student_states)
        states = keep(record.output for record in records)
        del records  # before those of the next block come
        lost = sum(float((a - b).square().sum()) for a, b in zip(states, student_states, strict=True))
        total = sum(float(a.square().sum()) for a in states)
        stage.step(note=f"relative error {lost / total:.3f}")
        torch.cuda.empty_cache()  # on a GPU: what recorded iterations took, which nothing else can use
    return walk.result


def _keep_for(model: nn.Module, plan: Plan, rows: Tensor, stage: Stage) -> Keep[Any]:
    """`list`, unless the states of all rows leave a GPU no room for the factors."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return list
    states = len(rows) * record_bytes(model.config, rows.shape[1])
    factors = 4 * plan.sign_bits  # latents, float32
    free = free_bytes(device)
    if states + factors <= SLACK * free:
        return list
    stage.say(
        f"{states / 2**30:.1f} GiB of states wait in the host's memory: the GPU has {free / 2**30:.1f} free, "
        f"and the factors take {factors / 2**30:.1f}; --correct-rows makes it less"
    )
    return partial(OnHost, device=device)


@dataclass(frozen=True)
class _Walk:
    """What all layers of a model are factorized with, and what is found: see factorize_model."""

    plan: Plan
    importance_out: dict[str, Tensor]
    recipe: Recipe
    scale: float  # that the residual stream gives to outputs
    executor: Executor
    work: Work
    keep: Keep[Any]
    result: MutableMapping[str, Factors]
    errors: dict[str, float] | None
    targets: dict[str, Tensor] | None


def _factorize_group(
    walk: _Walk,
    prefix: str,
    layer: nn.Module,
    arch: ArchSpec,
    group: Group,
    wanted: Iterable[tuple[Tensor, Tensor | None]],
    inputs: Iterable[tuple[Tensor, Tensor | None]],
    seed: int,
) -> None:
    """Correct and factorize the layers of one group and put them in place of the originals."""
    modules = {prefix + name: layer.get_submodule(arch.linears[name]) for name in group.linears}
    weights = (module.weight for module in modules.values())
    found = _corrected(next(iter(modules)), weights, wanted, inputs, walk.recipe.damping, walk.scale)
    corrected, importance_in = found
    targets = walk.keep((weight, importance_in) for weight in corrected)
    large = max(prod(walk.plan.shapes[name]) for name in modules) >= LARGE
    executor = one_by_one if large else walk.executor
    _factorize_targets(walk, targets, modules, seed + arch.groups.index(group), executor)


def _factorize_targets(
    walk: _Walk,
    targets: Sequence[tuple[Tensor, Tensor]],
    modules: dict[str, nn.Module],
    seed: int,
    executor: Executor,
) -> None:
    """Factorize matrices that do not depend on each other, and put what the factors give into the modules.

    targets   of each module: the matrix (rows, cols) that they are to give, importances of its inputs (cols,)
    modules   GGUF name -> module
    executor  who does it on a CPU
    """
    target_of = dict(zip(modules, range(len(targets)), strict=True))

    def task(names: list[str]) -> Callable[[], Factors]:
        weights, importances_in = zip(*(targets[target_of[name]] for name in names), strict=True)
        return partial(
            factorize,
            torch.stack(weights),
            walk.plan.ranks[names[0]],
            torch.stack(importances_in),
            torch.stack([walk.importance_out[name] for name in names]),
            iterations=walk.recipe.admm_iterations,
            seed=seed,
            overwrite=True,
        )

    device = walk.importance_out[next(iter(modules))].device
    if device.type != "cpu":
        executor = one_by_one
    together = _equal_shapes(list(modules), walk.plan, 1 if device.type == "cpu" else BATCH_MATRICES)
    missing = []
    for names in together:  # what shares a batch is made together again, so that it comes out the same
        kept = {name: walk.work.load(name) for name in names}
        if not all(kept.values()):
            missing.append(names)
            continue
        for name, part in kept.items():
            walk.result[name] = Factors(**part).to(device)
    whose = iter(missing)
    for factors in executor(map(task, missing), len(together) == 1):
        for place, name in enumerate(next(whose)):
            made = factors[place : place + 1]
            walk.work.save(name, {k: v.clone() for k, v in vars(made).items()})
            walk.result[name] = made
        del factors, made  # before the next are made
    for name, (target, importance_in) in zip(modules, targets, strict=True):
        weight = walk.result[name].dense()[0]
        if walk.errors is not None:
            walk.errors[name] = relative_error(target, weight, walk.importance_out[name], importance_in)
        if walk.targets is not None:
            walk.targets[name] = target
        modules[name].weight = nn.Parameter(weight, requires_grad=False)


def _equal_shapes(linears: list[str], plan: Plan, most: int) -> list[list[str]]:
    """Layers in batches of equal shape and rank, the largest first; at most so many in one."""
    batches: dict[tuple[Any, ...], list[str]] = {}
    for name in linears:
        batches.setdefault((*plan.shapes[name], plan.ranks[name]), []).append(name)
    sizes = sorted(batches, key=prod, reverse=True)
    return [batches[size][i : i + most] for size in sizes for i in range(0, len(batches[size]), most)]


class _Tokens:
    """What the block of experts reads, x (n, d_model), and the stream that its output is added to, of tokens
    by their numbers: those of all batches, one after the other."""

    def __init__(self, count: int, batch: Callable[[int], tuple[Tensor, Tensor | None]]) -> None:
        self._count, self._batch = count, batch
        self.size = prod(batch(0)[0].shape[:2])  # tokens of a batch

    def inputs(self) -> Iterator[Tensor]:
        """x of each batch."""
        return (self._batch(index)[0].flatten(0, 1) for index in range(self._count))

    def take(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x and stream of tokens in ascending order."""
        parts = []
        for index in (tokens // self.size).unique().tolist():
            here = tokens[tokens // self.size == index] - index * self.size
            parts.append([part.flatten(0, 1)[here] for part in self._batch(index) if part is not None])
        x, stream = (torch.cat(some) for some in zip(*parts, strict=True))
        return x, stream


@dataclass
class _Branch:
    """An expert, and the tokens that the model factorized so far gives it."""

    module: nn.Module
    tokens: Tensor  # (n,) numbers of the tokens, ascending
    shares: Tensor  # (n, 1) with which its outputs enter the sum
    corrected: bool  # whether these are enough


def _factorize_experts(
    walk: _Walk,
    prefix: str,
    original: nn.Module,
    layer: nn.Module,
    experts: Experts,
    wanted: _Tokens,
    inputs: _Tokens,
    seed: int,
) -> list[int]:
    """The same as _factorize_group for the experts of a layer, the shared one among them, gate and up first.

    original, wanted  the layer, and what its block of experts reads, in the original
    layer, inputs     in the model factorized so far
    ->                the experts that saw too few tokens to be corrected: their own weights are factorized,
                      with importances of the inputs that all tokens give
    """
    branches, total = _branches(layer, experts, inputs.inputs())
    paths = experts.branches(len(layer.get_submodule(experts.module)))
    few = [int(end[1:]) for end, branch in branches.items() if not branch.corrected]

    def seen(
        branch: _Branch, tokens: _Tokens, expert: nn.Module | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What gate and up read of a branch's tokens, so many at a time; of an expert, what its down reads,
        and its part of the stream."""
        activations = None if expert is None else _activations(expert)
        for some, shares in zip(
            branch.tokens.split(tokens.size), branch.shares.split(tokens.size), strict=True
        ):
            x, stream = tokens.take(some)
            if activations is None:
                yield (x * shares)[None], None
            else:
                yield (activations(x) * shares)[None], (stream * (shares / total[some, None]))[None]

    of_all = _importance(inputs.inputs()) if few else None  # what gate and up of these read

    def target(end: str, name: str) -> tuple[Tensor, Tensor]:
        """What the factors of a linear are to give, and the importances of its inputs."""
        branch, down = branches[end], name == "ffn_down"
        linear = branch.module.get_submodule(EXPERT_LINEARS[name])
        if branch.corrected:
            then, now = (original.get_submodule(paths[end]), branch.module) if down else (None, None)
            corrected, importance = _corrected(
                f"{prefix}{name}{end}",
                (module.weight for module in [linear]),  # read when it is needed
                seen(branch, wanted, then),
                seen(branch, inputs, now),
                walk.recipe.damping,
                walk.scale,
            )
            return next(corrected), importance
        if down:
            return linear.weight, _importance(map(_activations(branch.module), inputs.inputs()))
        assert of_all is not None
        return linear.weight, of_all

    for place, names in enumerate(EXPERT_GROUPS):
        which = [(end, name) for end in branches for name in names]
        modules = {
            prefix + name + end: branches[end].module.get_submodule(EXPERT_LINEARS[name])
            for end, name in which
        }
        targets = walk.keep(target(end, name) for end, name in which)
        _factorize_targets(walk, targets, modules, seed + place, walk.executor)
    return few


def _activations(expert: nn.Module) -> Callable[[Tensor], Tensor]:
    """What an expert's down reads, of x; the weights that it takes are in memory."""
    gate, up = (
        as_linear(module.weight, module.bias)
        for module in (expert.get_submodule(EXPERT_LINEARS[name]) for name in ("ffn_gate", "ffn_up"))
    )
    return lambda x: expert.act_fn(gate(x)) * up(x)


def _importance(inputs: Iterable[Tensor]) -> Tensor:
    """Of inputs (n, cols) each, as _corrected gives it."""
    return importance_of(torch.stack([x.square().sum(0) for x in inputs]).sum(0))


def _branches(
    layer: nn.Module, experts: Experts, inputs: Iterable[Tensor]
) -> tuple[dict[str, _Branch], Tensor]:
    """End of the GGUF names -> expert, for inputs (n, d_model) each; and the sum of every token's shares,
    (tokens,)."""
    routed, shared = [], []
    for x in inputs:
        routed.append(layer.get_submodule(experts.router)(x)[1:])
        share = torch.ones(len(x), 1, device=x.device)
        if experts.shared_gate is not None:
            share = torch.sigmoid(layer.get_submodule(experts.shared_gate)(x))
        shared.append(share)
    shares, used = (torch.cat(parts) for parts in zip(*routed, strict=True))
    total = shares.sum(1)
    branches = {}
    modules = layer.get_submodule(experts.module)
    for end, path in experts.branches(len(modules)).items():
        module = layer.get_submodule(path)
        if path == experts.shared:
            share = torch.cat(shared)
            tokens = torch.arange(len(share), device=share.device)
            total = total + share[:, 0]
        else:
            tokens, place = torch.where(used == int(end[1:]))
            share = shares[tokens, place, None]
        enough = path == experts.shared or len(tokens) >= TOKENS_PER_INPUT * x.shape[1]
        branches[end] = _Branch(module, tokens, share, enough)
    return branches, total


def _corrected(
    name: str,
    weights: Iterable[Tensor],
    wanted: Iterable[tuple[Tensor, Tensor | None]],
    inputs: Iterable[tuple[Tensor, Tensor | None]],
    damping: float,
    scale: float,
) -> tuple[Iterator[Tensor], Tensor]:
    """The W' of the module's head for each W, and the root of H's diagonal, mean square 1. Each W' is solved
    when it is asked for; if anything is lacking, there is one.

    name  of the first, for messages

    Raises QualityError for inputs that are not finite.
    """
    gram, cross, missing = _moments(wanted, inputs, scale)
    diagonal = gram.diagonal()
    if not diagonal.isfinite().all():
        raise QualityError(
            f"{name}: what the model computes for it is too large or no number; do its answers make sense in "
            "transformers, in float32?"
        )
    importance = importance_of(diagonal)
    ridge = damping * diagonal.mean() + 1e-12
    diagonal += ridge
    cross.diagonal().add_(ridge)
    if missing is None:
        products = [weight @ cross for weight in weights]
    else:
        (weight,) = weights
        for start in range(0, len(weight), PRODUCT_ROWS):
            part = slice(start, start + PRODUCT_ROWS)
            missing[part] += weight[part] @ cross
        products = [missing]
        del weight
    del cross
    factor = torch.linalg.cholesky(gram.mT, out=gram.mT)  # transposed, as LAPACK has it: makes no copies
    return (_solved(product.mT, factor).mT for product in products), importance


def _solved(product: Tensor, factor: Tensor) -> Tensor:
    """cholesky_solve in place, which copies both."""
    torch.linalg.solve_triangular(factor, product, upper=False, out=product)
    return torch.linalg.solve_triangular(factor.mT, product, upper=True, out=product)


def _moments(
    wanted: Iterable[tuple[Tensor, Tensor | None]],
    inputs: Iterable[tuple[Tensor, Tensor | None]],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """H, C and R."""
    gram, cross = torch.empty(0), torch.empty(0)
    missing: Tensor | None = None
    present = iter(inputs)
    for x, residual in wanted:
        x_now, residual_now = next(present)
        x_now = x_now.flatten(0, 1)
        if not len(gram):
            gram, cross = x_now.new_zeros(2, x_now.shape[1], x_now.shape[1])
        gram.addmm_(x_now.mT, x_now)
        cross.addmm_(x.flatten(0, 1).mT, x_now)
        if residual is not None and residual_now is not None:
            lack = ((residual - residual_now).flatten(0, 1).mT @ x_now).div_(scale)
            missing = lack if missing is None else missing.add_(lack)
            del lack
        del x, residual, x_now, residual_now  # before the next are made
    assert next(present, None) is None
    return gram, cross, missing


# --------------------------------------------------------------------------------------------------
# Running one layer


@dataclass(frozen=True)
class _Place:
    """A submodule whose input is wanted, and what its output is added to: see Group.residual."""

    module: str
    residual: str | None


def _place_of(arch: ArchSpec, group: Group) -> _Place:
    return _Place(arch.linears[group.linears[0]], group.residual)


def _places(arch: ArchSpec) -> list[_Place]:
    """Of all groups, and last of the experts, if there are any."""
    places = [_place_of(arch, group) for group in arch.groups]
    return places + ([] if arch.experts is None else [_Place(arch.experts.block, arch.experts.residual)])


@dataclass
class _Record:
    """What one batch does in the original layer: each place's input and residual, and the output."""

    inputs: list[Tensor]
    residuals: list[Tensor | None]
    output: Tensor


def _last_place(records: Sequence[_Record], index: int) -> tuple[Tensor, Tensor | None]:
    return records[index].inputs[-1], records[index].residuals[-1]


def batches_of(rows: Tensor, config: Any) -> Sequence[Tensor]:
    """Rows of text that pass through a model of this config together: as many in each, because what layers
    are called with beside their input is made for one size."""
    most = rows_together(config, rows.shape[1], BATCH_ROWS)
    return rows.split(next(n for n in range(min(most, len(rows)), 0, -1) if len(rows) % n == 0))


def embed_rows(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor]
) -> tuple[Iterator[Tensor], list[Arguments]]:
    """The first layer's inputs, each made when it is asked for, and the other arguments that each layer is
    called with.

    batches  (n, tokens) int64, of one size
    """
    arguments: dict[nn.Module, Arguments] = {}
    device = next(model.parameters()).device

    def embedded(batch: Tensor) -> Tensor:
        states: list[Tensor] = []

        def in_place_of(layer: nn.Module) -> Callable[..., Tensor]:
            """A forward pass that notes what it is called with and computes nothing."""

            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                states.append(hidden_states)
                if layer in arguments:
                    raise _Stop  # the first batch has told those of every layer
                arguments[layer] = args, kwargs
                if layer is layers[-1]:
                    raise _Stop
                return hidden_states

            return forward

        try:
            for layer in layers:
                layer.forward = in_place_of(layer)
            with suppress(_Stop):
                model.get_decoder()(batch.to(device), use_cache=False)
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)
        return states[0]

    first = embedded(batches[0])
    return chain([first], map(embedded, batches[1:])), [arguments[layer] for layer in layers]


def call_layer(layer: nn.Module, state: Tensor, arguments: Arguments) -> Tensor:
    positional, named = arguments
    output = layer(state, *positional, **named)
    return output[0] if isinstance(output, tuple) else output


def _record(layer: nn.Module, arch: ArchSpec, state: Tensor, arguments: Arguments) -> _Record:
    seen: dict[str, Tensor] = {}
    places = _places(arch)
    with _watching(layer, _watched(places), seen.__setitem__):
        output = call_layer(layer, state, arguments)
    return _Record(
        [seen[place.module] for place in places],
        [_residual(place, state, seen) for place in places],
        output,
    )


def _inputs(
    layer: nn.Module, place: _Place, states: Iterable[Tensor], arguments: Arguments
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A place's inputs and residuals in the layer as it is now; each pass stops once they are known."""
    for state in states:
        seen: dict[str, Tensor] = {}

        def on_input(name: str, x: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen[name] = x
            if name == place.module:
                raise _Stop

        with _watching(layer, _watched([place]), on_input), suppress(_Stop):
            call_layer(layer, state, arguments)
        yield seen[place.module], _residual(place, state, seen)


def _residual(place: _Place, state: Tensor, seen: dict[str, Tensor]) -> Tensor | None:
    if place.residual is None:
        return None
    return state if place.residual == INPUT else seen[place.residual]


def _watched(places: list[_Place]) -> set[str]:
    """Submodules whose input is wanted: those of the places, and the readers of residuals."""
    readers = {place.residual for place in places if place.residual not in (None, INPUT)}
    return {place.module for place in places} | {reader for reader in readers if reader is not None}


@contextmanager
def _watching(layer: nn.Module, modules: set[str], on_input: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Report the inputs of submodules while the context lasts."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: on_input(name, args[0])

    hooks = [layer.get_submodule(p).register_forward_pre_hook(hook_for(p)) for p in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
