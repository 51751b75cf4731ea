"""Spend bits where the loss cares: inner sizes by what the error of every linear layer costs.

To second order the KL of a factorized model is a quadratic form of its layers' errors, and each layer's share
of it falls with its own bits alone: what the layer is (`Sensitivities.kl`) times how fast its error falls
(`relative_error`, nearly the same for all). So every step of 8 goes to the layer that loses most KL a bit.

There are three ways to find the shares:
- `sensitivities`, from the original model: each layer alone, factorized quickly; `measure_kl` puts one after
  the other in place, `estimate_kl` needs one backward pass for all of them;
- `attribute_kl`, from a model that is factorized and corrected: one backward pass of the KL itself;
- `plan_by_channels`, the criterion of the DBF paper, from the same model: channels in place of layers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import gguf
import torch
from torch import Tensor, nn

from dbf2gguf.archs import features
from dbf2gguf.budget import MAX_BPW, RANK_STEP, Plan, Shape, linear_bits, plan_uniform
from dbf2gguf.calibrate import head_parts, hidden_states, input_importance, loss_gradient
from dbf2gguf.correct import batches_of, call_layer, embed_rows, factorize_model
from dbf2gguf.distill import kl_and_gradient, with_linears
from dbf2gguf.factorize import Factors, factorize, signs
from dbf2gguf.parallel import map_on_cores
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import ALLOCATIONS, FEW_BITS, Recipe
from dbf2gguf.source import Source, as_linear, decoder_layers
from dbf2gguf.work import Work
from dbf2gguf.write import dequantized, ggml_type, head_is_tied
from runtime.errors import OptionError
from runtime.format import kind_of

LOG_ERROR = (-1.22, 0.11)
"""Logarithm of the relative squared error, weighted by the importances, against bits per weight b:
-1.22 b + 0.11 b^2 + what the layer is. Fitted to 21 layers of SmolLM2-135M, 0.5 to 3.2 bits, 10 ADMM
iterations: it holds within 0.2 for all kinds of layers, also where the rank exceeds rows or columns."""

LEAST_SHARE, MOST_SHARE = 0.4, 2.5
"""Bits per weight of a layer, relative to the model's: the second-order estimate is not believed beyond."""

CLOSE_SHARES = 0.7, 1.75
"""The same for channels from FEW_BITS bits on; farther from uniform did worse: docs/ABLATIONS.md."""

CHANNELS_MORE = 1.5
"""Bits per weight of the model whose channels are pruned, relative to those wanted."""

LEVELS = 8
"""Steps that the rank of a uniform plan is made of: with few different ranks, distillation still multiplies
out many layers at a time."""

STRENGTH = 0.5
"""How far `allocate` believes the sensitivities, see plan_by_sensitivity: half, which is predicted to save
nearly as much as all of it, at half the distance from a uniform plan."""

PROBE_ITERATIONS = 8
PROBE_SHARE = 1 / 3  # of the ADMM iterations, where the whole model is factorized once more
PROBE_BATCH = 4  # rows that pass at a time
BATCH_WEIGHTS = 2**26  # that are factorized together on a GPU
TINY = 1e-30


@dataclass(frozen=True)
class Sensitivities:
    """What the errors of linear layers cost."""

    kl: dict[str, float]  # GGUF name -> nats a token that the layer costs with `ranks`
    ranks: dict[str, int]  # GGUF name -> the rank it was found with
    decay: dict[str, float] = field(default_factory=dict)  # kind -> its error falls so much faster, else 1

    def at(self, name: str, shape: Shape, rank: int) -> float:
        """KL that the layer costs with another rank."""
        decay = self.decay.get(kind_of(name), 1.0)
        change = _log_error(_bpw(shape, rank)) - _log_error(_bpw(shape, self.ranks[name]))
        return max(self.kl[name], TINY) * math.exp(decay * change)


def allocate(
    source: Source,
    model: nn.Module,
    names: Mapping[str, str],
    plan: Plan,
    rows: Tensor,
    importance_out: Mapping[str, Tensor],
    recipe: Recipe,
    seed: int,
    stage: Stage,
    work: Work,
) -> Plan:
    """The ranks that `recipe.allocation` gives for the bits of `plan`, which is uniform.

    uniform      `plan` as it is
    sensitivity  plan_by_sensitivity by what each layer's error alone costs the original model
    attribution  plan_by_sensitivity by the shares of the KL in the model factorized with `plan`
    channels     plan_by_channels of the model factorized with CHANNELS_MORE times the bits; nearer to uniform
                 from FEW_BITS bits per weight on

    The last two factorize the model once more, with PROBE_SHARE of the ADMM iterations. `stage` gets one step
    for each block, `work` the plan. Raises OptionError for another allocation; `Recipe.at` says what auto is.
    """
    shapes, kind = plan.shapes, recipe.allocation

    def factorized(plan: Plan, targets: dict[str, Tensor] | None = None) -> dict[str, Factors]:
        some, parts = rows[: recipe.correct_rows], work.within("probe-")
        quick = replace(recipe, admm_iterations=max(1, round(recipe.admm_iterations * PROBE_SHARE)))
        return factorize_model(
            source, model, plan, some, dict(importance_out), quick, seed, stage, parts, targets=targets
        )

    def ranks() -> dict[str, int]:
        probe = rows[: recipe.gradient_rows]
        if kind == "sensitivity":
            found = sensitivities(source, model, names, plan, probe, importance_out, seed=seed)
            stage.step(n=stage.total)
            return plan_by_sensitivity(shapes, plan.target, found, strength=STRENGTH).ranks
        if kind == "attribution":
            targets: dict[str, Tensor] = {}
            factors = factorized(plan, targets)
            weights = {name: f.dense()[0] for name, f in factors.items()}
            shares = attribute_kl(model, names, weights, targets, probe)
            found = Sensitivities(shrunk(shares), plan.ranks)
            return plan_by_sensitivity(shapes, plan.target, found, strength=STRENGTH).ranks
        more = plan_uniform(shapes, min(CHANNELS_MORE * plan.target, MAX_BPW))
        scores = channel_scores(model, names, factorized(more), probe)
        least, most = (LEAST_SHARE, MOST_SHARE) if plan.target < FEW_BITS else CLOSE_SHARES
        return plan_by_channels(shapes, plan.target, scores, least=least, most=most).ranks

    if kind == "uniform":
        return plan
    if kind not in ALLOCATIONS[1:]:
        raise OptionError(f"allocation {kind!r} is unknown; there are {', '.join(ALLOCATIONS[1:])}")
    found = work.keep("ranks", ranks)
    work.within("probe-").forget()
    return Plan(shapes, found, plan.target)


def plan_by_sensitivity(
    shapes: Mapping[str, Shape],
    bpw: float,
    sensitivities: Sensitivities,
    *,
    strength: float = 1.0,
    least: float = LEAST_SHARE,
    most: float = MOST_SHARE,
) -> Plan:
    """Ranks that cost the least KL at equal total bits: from `least` of the bits per weight everywhere, step
    after step to the layer that loses most KL a bit, none beyond `most` of them.

    strength  exponent of the sensitivities: 1 believes them, 0 gives every layer nearly the same

    Raises OptionError if `bpw` is out of range, as plan_uniform does.
    """
    uniform = plan_uniform(shapes, bpw)
    budget = int(bpw * uniform.weights)
    tempered = Sensitivities(
        {name: max(sensitivities.kl[name], TINY) for name in shapes}, sensitivities.ranks, sensitivities.decay
    )
    if strength != 1:
        # per weight, at the same bits per weight: the scale on which strength 0 means uniform
        kl = {}
        for name, shape in shapes.items():
            weights = shape[0] * shape[1]
            here = tempered.at(name, shape, uniform.ranks[name])
            kl[name] = weights * (here / weights) ** strength
        tempered = Sensitivities(kl, uniform.ranks, sensitivities.decay)
    ranks = {n: _rank_of(shape, least * bpw) for n, shape in shapes.items()}
    tops = {n: max(ranks[n], _rank_of(shape, most * bpw)) for n, shape in shapes.items()}
    spent = sum(linear_bits(*shapes[n], rank) for n, rank in ranks.items())
    if spent > budget:  # tiny layers: not even that share fits steps of 8
        return uniform
    for steps in _steps(uniform):
        spent = _spend(shapes, tempered, ranks, tops, steps, budget, spent)
    return Plan(dict(shapes), ranks, bpw)


def _steps(uniform: Plan) -> Iterator[dict[str, int]]:
    """By how much ranks are raised at a time: first by LEVELS, then, for what is left over, by steps of 8."""
    for levels in (LEVELS, math.inf):
        yield {n: RANK_STEP * max(1, int(r // (levels * RANK_STEP))) for n, r in uniform.ranks.items()}


def _spend(
    shapes: Mapping[str, Shape],
    sensitivities: Sensitivities,
    ranks: dict[str, int],
    tops: Mapping[str, int],
    steps: Mapping[str, int],
    budget: int,
    spent: int,
) -> int:
    """Raise the ranks, step after step where that saves most KL a bit, while the bits last; returns the bits
    spent."""
    bits = {n: linear_bits(*shape, steps[n]) - linear_bits(*shape, 0) for n, shape in shapes.items()}

    def entry(name: str) -> tuple[float, str]:
        now, then = (sensitivities.at(name, shapes[name], ranks[name] + more) for more in (0, steps[name]))
        return (then - now) / bits[name], name

    queue = [entry(name) for name in shapes]
    heapq.heapify(queue)
    while queue:
        gain, name = heapq.heappop(queue)
        if gain >= 0 or spent + bits[name] > budget or ranks[name] + steps[name] > tops[name]:
            continue
        spent += bits[name]
        ranks[name] += steps[name]
        heapq.heappush(queue, entry(name))
    return spent


def plan_by_channels(
    shapes: Mapping[str, Shape],
    bpw: float,
    scores: Mapping[str, Tensor],
    *,
    least: float = LEAST_SHARE,
    most: float = MOST_SHARE,
) -> Plan:
    """Ranks by pruning channels: of all middle channels of all layers, those that matter least a bit are
    dropped until the rest fits; a layer's rank is how many it has left.

    scores  GGUF name -> (rank,) of a plan with more bits, see channel_scores

    Channels are dropped by LEVELS, what is then left over by steps of 8; no layer gets less than `least` or
    more than `most` of the bits per weight. Raises OptionError if `bpw` is out of range, as plan_uniform
    does.

    Source: Double Binary Factorization, arXiv:2505.11076, takes its ratios from a criterion of channel
    pruning, (gradient times weight)^2 of each channel's scale (Molchanov et al., arXiv:1906.10771), with the
    middle dimension as channels. The score here is summed over rows of text, each with a gradient of its own.
    """
    uniform = plan_uniform(shapes, bpw)
    budget = int(bpw * uniform.weights)
    ranks = {n: _rank_of(shape, least * bpw) for n, shape in shapes.items()}
    spent = sum(linear_bits(*shapes[n], rank) for n, rank in ranks.items())
    if spent > budget:
        return uniform
    ordered = {name: scores[name].double().sort(descending=True).values for name in shapes}
    for steps in _steps(uniform):
        queue = []
        for name, shape in shapes.items():
            step = steps[name]
            bits = linear_bits(*shape, step) - linear_bits(*shape, 0)
            top = min(len(ordered[name]), _rank_of(shape, most * bpw))
            for start in range(ranks[name], top - step + 1, step):
                queue.append((-float(ordered[name][start : start + step].sum()) / bits, name, start, bits))
        for _, name, start, bits in sorted(queue):
            if spent + bits <= budget and ranks[name] == start:
                spent += bits
                ranks[name] += steps[name]
    return Plan(dict(shapes), ranks, bpw)


def _rank_of(shape: Shape, bpw: float) -> int:
    """The largest multiple of RANK_STEP, at least one, within `bpw`."""
    fixed = linear_bits(*shape, 0)
    step = linear_bits(*shape, RANK_STEP) - fixed
    return max(1, int((bpw * shape[0] * shape[1] - fixed) / step)) * RANK_STEP


def _bpw(shape: Shape, rank: int) -> float:
    return linear_bits(*shape, rank) / (shape[0] * shape[1])


def _log_error(bpw: float) -> float:
    linear, square = LOG_ERROR
    bpw = min(bpw, -linear / (2 * square))  # beyond, the parabola rises
    return linear * bpw + square * bpw * bpw


# --------------------------------------------------------------------------------------------------
# From the original model


@torch.no_grad()
def sensitivities(
    source: Source,
    model: nn.Module,
    names: Mapping[str, str],
    plan: Plan,
    rows: Tensor,
    importance_out: Mapping[str, Tensor],
    *,
    seed: int = 0,
    measured: bool = False,
    iterations: int = PROBE_ITERATIONS,
) -> Sensitivities:
    """What each linear layer costs alone, factorized with its rank of `plan` by a few ADMM iterations.

    names           GGUF name -> module name
    rows            (n, tokens) int64; a few thousand tokens are plenty
    importance_out  GGUF name -> (rows of the layer,), see calibrate.output_importance
    measured        measure_kl instead of estimate_kl: a pass through the rest of the model for every layer

    `model` is left as it was.
    """
    importance_in = input_importance(model, names, rows, PROBE_BATCH)
    errors = probe_errors(model, names, plan, importance_in, importance_out, iterations, seed)
    if measured:
        kl = measure_kl(source, model, names, errors, rows)
    else:
        kl = estimate_kl(model, names, errors, rows)
    return Sensitivities(kl, dict(plan.ranks))


@torch.no_grad()
def probe_errors(
    model: nn.Module,
    names: Mapping[str, str],
    plan: Plan,
    importance_in: Mapping[str, Tensor],
    importance_out: Mapping[str, Tensor],
    iterations: int = PROBE_ITERATIONS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """GGUF name -> factorized minus original weight, (rows, cols)."""

    def errors_of(some: list[str]) -> Tensor:
        weight = torch.stack([model.get_submodule(names[name]).weight for name in some])
        inputs, outputs = (
            torch.stack([of[name] for name in some]).to(weight.device)
            for of in (importance_in, importance_out)
        )
        found = factorize(weight, plan.ranks[some[0]], inputs, outputs, iterations=iterations, seed=seed)
        return found.dense() - weight

    alike: dict[tuple[int, ...], list[str]] = {}
    for name, path in names.items():
        alike.setdefault((*model.get_submodule(path).weight.shape, plan.ranks[name]), []).append(name)
    on_gpu = next(model.parameters()).is_cuda
    batches = []
    for (rows, cols, _), some in alike.items():
        size = max(1, BATCH_WEIGHTS // (rows * cols)) if on_gpu else 1
        batches += [some[start : start + size] for start in range(0, len(some), size)]
    errors: dict[str, Tensor] = {}
    for some, found in zip(batches, (map if on_gpu else map_on_cores)(errors_of, batches), strict=True):
        errors |= zip(some, found, strict=True)
    return errors


def estimate_kl(
    model: nn.Module, names: Mapping[str, str], errors: Mapping[str, Tensor], rows: Tensor
) -> dict[str, float]:
    """KL, nats a token, that each error costs alone, to second order: half of the mean of (g . E x)^2, with g
    the gradient of the next-token cross-entropy at the layer's output and x its input, token by token.

    That is exact for the Fisher matrix but for products of different tokens' gradients.
    """
    found = dict.fromkeys(names, 0.0)
    inputs: dict[str, Tensor] = {}

    def on_gradient(name: str, gradient: Tensor) -> None:
        change = ((gradient @ errors[name]) * inputs.pop(name)).sum(-1)
        found[name] += float(change.square().sum())

    _backward(model, names, rows, inputs, on_gradient, lambda row, hidden: loss_gradient(model, hidden, row))
    return {name: 0.5 * total / rows[:, 1:].numel() for name, total in found.items()}


def _backward(
    model: nn.Module,
    names: Mapping[str, str],
    rows: Tensor,
    inputs: dict[str, Tensor],
    on_gradient: Callable[[str, Tensor], None],
    gradient_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Call on_gradient(name, gradient at the layer's output), while `inputs` holds the layer's input, for one
    row of text after the other.

    gradient_of  (tokens of the row, what the head reads) -> the loss' gradient at what the head reads
    """
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def on_output(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(lambda gradient: on_gradient(name, gradient))

        hooks.append(module.register_forward_hook(on_output))

    for name, path in names.items():
        watch(name, model.get_submodule(path))
    device = next(model.parameters()).device
    try:
        for row in rows.split(1):
            row = row.to(device)
            with torch.enable_grad():
                embedded = model.get_input_embeddings()(row).requires_grad_(True)
                hidden = hidden_states(model, inputs_embeds=embedded)
                hidden.backward(gradient_of(row, hidden.detach()))
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure_kl(
    source: Source,
    model: nn.Module,
    names: Mapping[str, str],
    errors: Mapping[str, Tensor],
    rows: Tensor,
) -> dict[str, float]:
    """KL, nats a token, that each error costs alone: added to its layer, the rest of the model is run again
    from that block on. Holds the states between blocks."""
    layers = decoder_layers(model, source.arch)
    states, arguments = embed_rows(model, layers, batches_of(rows, model.config))
    between = [list(states)]
    for layer, its in zip(layers, arguments, strict=True):
        between.append([call_layer(layer, state, its) for state in between[-1]])
    norm = model.get_submodule(source.arch.out_norm)
    f, head = features(model.config), model.get_output_embeddings().weight
    wanted = [norm(state).flatten(0, 1) for state in between[-1]]

    def kl_from(index: int) -> float:
        total = 0.0
        for place, state in enumerate(between[index]):
            for layer, its in zip(layers[index:], arguments[index:], strict=True):
                state = call_layer(layer, state, its)
            hidden = norm(state).flatten(0, 1)
            for part in head_parts(len(hidden), len(head)):
                total += float(kl_and_gradient(hidden[part], wanted[place][part], head, head, f)[0])
        return total / rows.numel()

    found = {}
    for name, path in names.items():
        module = model.get_submodule(path)
        weight = module.weight
        module.weight = nn.Parameter(weight + errors[name], requires_grad=False)
        try:
            found[name] = kl_from(int(name.split(".")[1]))
        finally:
            module.weight = weight
    return found


@torch.no_grad()
def embedding_costs(model: nn.Module, rows: Tensor, types: Sequence[str]) -> dict[str, tuple[int, float]]:
    """What storing embedding and head as each of `types` costs alone: bits of both, and KL, nats a token, on
    rows (n, tokens) int64. Beside the KL that a step of the linear layers' bits saves, it tells where a bit
    of the file does most. Types whose blocks do not divide a row are left out.

    -> type, of recipe.EMBED_TYPES -> (bits, KL)
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    f, device = features(model.config), embedding.device
    wanted = [hidden_states(model, input_ids=row.to(device))[0] for row in rows.split(1)]
    found: dict[str, tuple[int, float]] = {}
    for kind in types:
        block, nbytes = gguf.GGML_QUANT_SIZES[ggml_type(kind)]
        if embedding.shape[1] % block:
            continue
        other = with_linears(model, {})
        stored = nn.Parameter(dequantized(embedding, kind), requires_grad=False)
        stored_head = stored
        if not head_is_tied(model):
            stored_head = nn.Parameter(dequantized(head, kind), requires_grad=False)
        other.get_input_embeddings().weight = stored
        total = 0.0
        for row, reference in zip(rows.split(1), wanted, strict=True):
            hidden = hidden_states(other, input_ids=row.to(device))[0]
            for part in head_parts(len(hidden), len(head)):
                total += float(kl_and_gradient(hidden[part], reference[part], stored_head, head, f)[0])
        weights = embedding.numel() + (0 if head_is_tied(model) else head.numel())
        found[kind] = (weights // block * nbytes * 8, total / rows.numel())
    return found


# --------------------------------------------------------------------------------------------------
# From a factorized model


def attribute_kl(
    model: nn.Module,
    names: Mapping[str, str],
    weights: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    rows: Tensor,
) -> dict[str, Tensor]:
    """Each layer's share of the KL of a factorized model, nats a token: half of its gradient times the
    layer's error, which sums up to the KL as far as that is quadratic in the errors. Negative where the error
    makes up for others'.

    weights  GGUF name -> (rows, cols), of the factorized model
    targets  GGUF name -> (rows, cols), what they approximate: see factorize_model
    ->       GGUF name -> (n,) float64, the share in every row of text
    """
    found: dict[str, list[float]] = {name: [0.0] * len(rows) for name in names}
    inputs: dict[str, Tensor] = {}
    row = -1

    def on_row() -> None:
        nonlocal row
        row += 1

    def on_gradient(name: str, gradient: Tensor) -> None:
        error = weights[name] - targets[name].to(gradient.device)
        found[name][row] = 0.5 * float(((gradient @ error) * inputs.pop(name)).sum()) / rows.shape[1]

    _kl_backward(model, names, weights, rows, inputs, on_gradient, on_row)
    return {name: torch.tensor(shares, dtype=torch.float64) for name, shares in found.items()}


def shrunk(shares: Mapping[str, Tensor]) -> dict[str, float]:
    """The means of shares that are known by few rows of text, moved towards that of their kind the more, the
    less the layers of that kind differ beyond what rows do (empirical Bayes).

    shares  GGUF name -> (n,), see attribute_kl; of a single row, they stay as they are
    """
    kinds: dict[str, list[str]] = {}
    for name in shares:
        kinds.setdefault(kind_of(name), []).append(name)
    found = {}
    for names in kinds.values():
        rows = torch.stack([shares[name].double() for name in names])
        means, count = rows.mean(1), rows.shape[1]
        errors = rows.var(1, correction=min(1, count - 1)) / count
        spread = (means.var(correction=0) - errors.mean()).clamp(min=0)
        trust = spread / (spread + errors + TINY)
        found |= dict(zip(names, (means.mean() + trust * (means - means.mean())).tolist(), strict=True))
    return {name: found[name] for name in shares}


def channel_scores(
    model: nn.Module, names: Mapping[str, str], factors: Mapping[str, Factors], rows: Tensor
) -> dict[str, Tensor]:
    """How much each middle channel matters: the sum over rows of (gradient times value of its scale)^2, the
    loss being the KL of the factorized model on one row.

    -> GGUF name -> (rank,) float32
    """
    weights = {name: factors[name].dense()[0] for name in names}
    found = {name: torch.zeros_like(factors[name].s_mid[0]) for name in names}
    inputs: dict[str, Tensor] = {}

    def on_gradient(name: str, gradient: Tensor) -> None:
        f = factors[name]
        before = (inputs.pop(name) * f.s_in) @ signs(f.b[0]).mT
        after = (gradient * f.s_out) @ signs(f.a[0])
        found[name] += (before * after * f.s_mid).flatten(0, -2).sum(0).square()

    _kl_backward(model, names, weights, rows, inputs, on_gradient)
    return found


def _kl_backward(
    model: nn.Module,
    names: Mapping[str, str],
    weights: Mapping[str, Tensor],
    rows: Tensor,
    inputs: dict[str, Tensor],
    on_gradient: Callable[[str, Tensor], None],
    on_row: Callable[[], None] = lambda: None,
) -> None:
    """As _backward, in the model with other weights, the loss being the summed KL from the original.
    Calls on_row() before the gradients of every row."""
    linears = {path: as_linear(weights[name], model.get_submodule(path).bias) for name, path in names.items()}
    student = with_linears(model, linears)
    f, head = features(model.config), model.get_output_embeddings().weight

    def gradient_of(row: Tensor, hidden: Tensor) -> Tensor:
        on_row()
        with torch.no_grad():
            wanted = hidden_states(model, input_ids=row).flatten(0, 1)
        flat = hidden.flatten(0, 1)
        parts = []
        for part in head_parts(len(flat), len(head)):
            parts.append(kl_and_gradient(flat[part], wanted[part], head, head, f)[1] @ head)
        return torch.cat(parts).view_as(hidden)

    _backward(student, names, rows, inputs, on_gradient, gradient_of)
