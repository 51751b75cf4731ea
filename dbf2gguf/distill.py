"""Train the model end to end so that its next-token distribution is the original's.

The loss is KL(original || model). Scales are trained in units of their own root mean square; signs through
latents whose sign they are, with the identity as their gradient (straight-through estimator); norms,
embedding and head, whose bits are spent anyway, at rates relative to their root mean square.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbf2gguf.activations import SLACK, Passes, checkpointed, in_bfloat16, plan_passes, token_bytes
from dbf2gguf.archs import ARCHS, Features, features
from dbf2gguf.calibrate import finished, head_tokens, hidden_states
from dbf2gguf.factorize import Factors, signs
from dbf2gguf.gpu_memory import free_bytes
from dbf2gguf.graphs import Later, Recorder, can_compile, compiled
from dbf2gguf.malloc import keeping_freed
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe
from dbf2gguf.source import decoder_layers
from dbf2gguf.team import ALONE, Team
from dbf2gguf.work import Work
from runtime.errors import QualityError

SCALES = ("s_out", "s_mid", "s_in")
PART_WEIGHTS = 2**22  # that are multiplied out at a time on a CPU
GPU_PART_WEIGHTS = 2**26  # and on a GPU
PASS_TOKENS = 1024  # that pass through the model at a time on a CPU: bounds the activations held
GPU_HEAD_TOKENS = 4096  # whose logits are held at a time on a GPU, at most
GPU_HEAD_LOGITS = 2**28  # of these
FINAL_RATE = 0.02  # of the peak learning rate, at the end of the cosine
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-10
COMPILED_STEPS = 100  # on a GPU: so many steps pay for the half minute that compiling takes
WARM_UP_STEPS = 3  # before one is recorded
SAVE_SECONDS = 300  # between two states of the training that are kept


class FactorStack(nn.Module):
    """The factors of linear layers of one size, all of them trainable: see `factorize.Factors`.

    Several products at a time take a fraction of the time of many small ones. Gradients are made by hand,
    with the identity as the gradient of sign: what autograd would keep and recompute costs as much as the
    products.
    """

    def __init__(self, names: list[str], factors: list[Factors]) -> None:
        super().__init__()
        self.names = names
        self.a = nn.Parameter(torch.cat([f.a for f in factors]))
        self.b = nn.Parameter(torch.cat([f.b for f in factors]))
        for name in SCALES:
            scale = torch.cat([getattr(f, name) for f in factors])
            rms = scale.square().mean(1, keepdim=True).sqrt() + 1e-20
            self.register_buffer(f"{name}_rms", rms)
            setattr(self, name, nn.Parameter(scale / rms))
        self._weights: list[Tensor] = []

    def _scales(self) -> list[Tensor]:
        return [getattr(self, n) * getattr(self, f"{n}_rms") for n in SCALES]

    def _parts(self) -> Iterator[slice]:
        """Layers that are multiplied together: few on a CPU, whose caches then hold them, many on a GPU."""
        n, rows, cols = len(self.names), self.a.shape[1], self.b.shape[2]
        size = max(1, (GPU_PART_WEIGHTS if self.a.is_cuda else PART_WEIGHTS) // (rows * cols))
        return (slice(start, start + size) for start in range(0, n, size))

    @torch.no_grad()
    def multiply_out(self) -> dict[str, Tensor]:
        """Name -> weight (rows, cols), diag(s_out) sign(a) diag(s_mid) sign(b) diag(s_in), in the dtype of an
        autocast if there is one. Gradients that reach the weights go on to the factors with `backward`."""
        kind = self.a.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.a.dtype
        s_out, s_mid, s_in = self._scales()
        self._weights = []
        for part in self._parts():
            left = signs(self.a[part]).to(dtype).mul_(s_mid[part, None].to(dtype))
            product = left @ signs(self.b[part]).to(dtype)
            product *= s_out[part, :, None].to(dtype)
            product *= s_in[part, None].to(dtype)
            self._weights += [weight.requires_grad_() for weight in product.unbind()]
        return dict(zip(self.names, self._weights, strict=True))

    @torch.no_grad()
    def backward(self) -> None:
        """The factors' gradients from those of the weights, which are let go."""
        s_out, s_mid, s_in = self._scales()
        gradients = {name: torch.empty_like(p) for name, p in self.named_parameters()}
        for part in self._parts():
            gradient = torch.stack([_gradient_of(weight) for weight in self._weights[part]])
            for weight in self._weights[part]:
                weight.grad = None
            dtype = gradient.dtype
            a, b = signs(self.a[part]), signs(self.b[part])
            from_left = ((gradient * s_in[part, None].to(dtype)) @ b.to(dtype).mT).to(a.dtype)
            gradient *= s_out[part, :, None].to(dtype)
            left = a.to(dtype) * s_mid[part, None].to(dtype)
            from_right = (left.mT @ gradient).to(b.dtype)
            at_signs = torch.mul(from_left, a, out=a)
            gradients["s_mid"][part] = (s_out[part, None] @ at_signs)[:, 0]
            gradients["s_out"][part] = at_signs.mul_(s_mid[part, None]).sum(2)
            from_left *= s_out[part, :, None]
            torch.mul(from_left, s_mid[part, None], out=gradients["a"][part])
            gradients["s_in"][part] = torch.mul(from_right, b, out=b).sum(1)
            torch.mul(from_right, s_in[part, None], out=gradients["b"][part])
        for name in SCALES:
            gradients[name] *= getattr(self, f"{name}_rms")
        for name, p in self.named_parameters():
            p.grad = gradients[name]
        self._weights = []

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """Name -> the factors as they are now, batch 1."""
        every = Factors(self.a.detach(), self.b.detach(), *self._scales())
        return {name: every[i : i + 1] for i, name in enumerate(self.names)}


def _gradient_of(weight: Tensor) -> Tensor:
    """Zero for an expert that no token used."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


class DbfLinear(nn.Module):
    """A linear layer of a student, whose weight is multiplied out anew for every step."""

    weight: Tensor | None

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Student(nn.Module):
    """A model whose linear layers are factorized and trainable.

    Norms, embedding and head are copies if `copy_dense`, in order to be trained; else shared with `model`, as
    all the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        names: dict[str, str],
        factors: dict[str, Factors],
        copy_dense: bool = False,
    ) -> None:
        super().__init__()
        linears = {path: DbfLinear(model.get_submodule(path).bias) for path in names.values()}
        self.model = with_linears(model, linears, copy_dense)
        sizes: dict[tuple[torch.Size, ...], list[str]] = {}
        for name in names:
            sizes.setdefault((factors[name].a.shape, factors[name].b.shape), []).append(name)
        self.stacks = nn.ModuleList(
            FactorStack(some, [factors[name] for name in some]) for some in sizes.values()
        )
        self._linears = {name: linears[path] for name, path in names.items()}

    def multiply_out(self) -> None:
        """Give the linear layers the weights that the factors stand for now."""
        for stack in self.stacks:
            for name, weight in stack.multiply_out().items():
                self._linears[name].weight = weight

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """What the head reads, (batch, tokens, d_model), for tokens (batch, tokens) int64; by the weights of
        the last `multiply_out`."""
        return hidden_states(self.model, input_ids=tokens)

    def backward(self) -> None:
        """The factors' gradients, once those of the weights are complete; lets the weights go."""
        for linear in self._linears.values():
            linear.weight = None
        for stack in self.stacks:
            stack.backward()

    def factors(self) -> dict[str, Factors]:
        """GGUF name -> the factors as they are now, batch 1."""
        found: dict[str, Factors] = {}
        for stack in self.stacks:
            found |= stack.factors()
        return {name: found[name] for name in self._linears}


def with_linears(model: nn.Module, linears: Mapping[str, nn.Module], copy_dense: bool = False) -> nn.Module:
    """A copy of the model with other linear layers, module name -> module. It shares all other modules'
    buffers with `model`, and their parameters, unless `copy_dense`."""
    memo: dict[int, Any] = {id(model.get_submodule(path)): linear for path, linear in linears.items()}
    memo |= {id(b): b for b in model.buffers()}
    if not copy_dense:
        memo |= {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


def distill(
    teacher: nn.Module,
    student: Student,
    rows: Tensor,
    recipe: Recipe,
    seed: int,
    stage: Stage,
    work: Work,
    team: Team = ALONE,
) -> list[float]:
    """Train the student in place.

    rows  (n, tokens) int64 text; every row is used before any is used again
    ->    mean KL of each step, nats a token

    `stage` gets one step for each optimizer step, `work` the state of the training now and then and at the
    end; where it has one, the training goes on from there. A team shares each batch; all of it call this with
    the same arguments but `stage` and `work`, of which the first process's counts, and get the same student.
    """
    steps = recipe.distill_steps
    if steps == 0:
        return []
    device = next(teacher.parameters()).device
    dtype = dtype_on(device, recipe.dtype)
    stacks = student.stacks
    groups = [
        {"params": [p for s in stacks for p in (s.s_out, s.s_mid, s.s_in)], "peak": recipe.scale_rate},
        {"params": [p for s in stacks for p in (s.a, s.b)], "peak": recipe.sign_rate},
    ]
    if recipe.dense_rate > 0:
        for p in student.model.parameters():
            rms = float(p.detach().square().mean().sqrt())
            groups.append({"params": [p.requires_grad_(True)], "peak": recipe.dense_rate * rms})
    routed = features(teacher.config).n_experts > 0  # what an expert sees has another size in every step
    compiles = device.type == "cuda" and steps >= COMPILED_STEPS and not routed and can_compile(device)
    for group in groups:
        group["lr"] = torch.zeros((), device=device) if compiles else 0.0
    optimizer = torch.optim.Adam(groups, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True, capturable=compiles)
    trained = [p for group in groups for p in group["params"]]
    history: list[float] = []
    if saved := team.share(work.load("distilled")):
        history = saved["history"]
        for p, value in zip(trained, saved["parameters"], strict=True):
            p.data.copy_(value)
        if len(history) < steps:
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved["optimizer"])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate  # where a recorded step reads it: what was saved lies on the CPU
        stage.step(n=len(history))
    size = min(recipe.distill_batch, len(rows))
    part = team.part(size)
    tokens = torch.empty(part.stop - part.start, rows.shape[1], dtype=rows.dtype, device=device)
    batches = itertools.islice(_batches(rows, size, seed), len(history), steps)
    kl_gradient = torch.compile(kl_and_gradient) if compiles else kl_and_gradient

    def find_gradients() -> Tensor:
        """Those that `tokens` have in the whole batch's; the KL likewise."""
        optimizer.zero_grad(set_to_none=True)
        return _gradients(
            teacher, student, tokens, kl_gradient, size * rows.shape[1], rows=passes.rows, dtype=dtype
        )

    def update() -> None:
        optimizer.step()

    def train() -> Tensor:
        """One step of the batch of which `tokens` are this process' part; the KL before it."""
        kl = find_gradients()
        team.sum([kl, *(p.grad for p in trained if p.grad is not None)])
        update()
        return kl

    with ExitStack() as modes:
        if device.type == "cpu":
            modes.enter_context(keeping_freed())
        if device.type == "cuda" and dtype == torch.bfloat16:
            modes.enter_context(in_bfloat16(_linears_of(teacher, student.model)))
        passes = _passes(student, tokens, trained, recipe.checkpointing, dtype)
        if compiles:
            modes.enter_context(compiled([*_layers_of(teacher), *_layers_of(student.model)]))
        if passes.checkpointed:
            modes.enter_context(checkpointed(_layers_of(student.model)))
        if compiles and team.size == 1:
            train = Recorder("the distillation", WARM_UP_STEPS)(train)
        elif compiles:  # the sum over processes stays outside
            record = Recorder("the distillation", 2 * WARM_UP_STEPS, others=True)
            find_gradients, update = record(find_gradients), record(update)
        last_saved = time.monotonic()
        running: deque[Later] = deque()  # the KL of steps that the GPU may still be working on
        for step, batch in enumerate(batches, len(history)):
            own = batch[part]
            if device.type == "cuda":
                own = own.pin_memory()  # else copying it waits for the step before
            tokens.copy_(own, non_blocking=True)
            for group in optimizer.param_groups:
                rate = group["peak"] * _schedule(step, steps, recipe.warmup_steps)
                group["lr"] = group["lr"].fill_(rate) if compiles else rate
            running.append(Later(train()))
            done = step + 1 == steps
            saves = done or time.monotonic() - last_saved >= SAVE_SECONDS
            while len(running) > (0 if saves or device.type == "cpu" else 1):
                history.append(float(running.popleft()))
                if not math.isfinite(history[-1]):
                    raise QualityError(
                        f"distillation: the KL of step {len(history)} of {steps} is {history[-1]}; try "
                        "another --seed, or --dtype float32"
                    )
                recent = history[-8:]
                stage.step(note=f"KL {sum(recent) / len(recent):.3f}")
            if saves:
                state = {} if done else optimizer.state_dict()
                parameters = [p.detach() for p in trained]
                work.save("distilled", {"history": history, "parameters": parameters, "optimizer": state})
                last_saved = time.monotonic()
    student.requires_grad_(False)
    return history


def dtype_on(device: torch.device, kind: str) -> torch.dtype:
    """What one of recipe.DTYPES stands for on a device."""
    rounded = has_bfloat16(device) if kind == "auto" else kind == "bfloat16"
    return torch.bfloat16 if rounded else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 take less time than those of float32: on GPUs from Ampere on, and on CPUs
    that have instructions for them (AVX512-BF16, AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _layers_of(model: nn.Module) -> list[nn.Module]:
    return list(decoder_layers(model, ARCHS[model.config.model_type]))


def _linears_of(teacher: nn.Module, student: nn.Module) -> list[nn.Module]:
    """The linear layers that the student does not share, but for the head, which may be the embedding."""
    shared = {id(p) for p in student.parameters()} | {id(teacher.get_output_embeddings().weight)}
    return [m for m in teacher.modules() if isinstance(m, nn.Linear) and id(m.weight) not in shared]


def _passes(
    student: Student, batch: Tensor, trained: list[Tensor], checkpointing: str, dtype: torch.dtype
) -> Passes:
    """How a batch (rows, tokens) goes through the student; on a GPU, by its free memory."""
    rows, tokens = batch.shape
    if not batch.is_cuda:
        return Passes(max(1, PASS_TOKENS // tokens), checkpointing == "on")
    signs_of = {id(p) for stack in student.stacks for p in (stack.a, stack.b)}
    weights = sum(len(s.names) * s.a.shape[1] * s.b.shape[2] for s in student.stacks)
    later = 8 * sum(p.numel() for p in trained)  # Adam
    later += 2 * dtype.itemsize * weights  # with gradients
    later += 4 * sum(p.numel() for p in trained if id(p) not in signs_of)  # the others' gradients
    later += 5 * 4 * GPU_HEAD_LOGITS
    config = student.model.config
    plain, kept = tokens * token_bytes(config, dtype), 4 * tokens * config.hidden_size
    layers = config.num_hidden_layers
    free = SLACK * free_bytes(batch.device) - later
    return plan_passes(rows, tokens, layers, plain, kept, free, checkpointing)


def _gradients(
    teacher: nn.Module,
    student: Student,
    tokens: Tensor,
    kl_gradient: Any,
    count: int | None = None,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gradients of the KL summed over tokens (batch, tokens), `rows` or all at a time, over `count`: their
    number, unless they are a part of a batch; products are of `dtype`. Returns it, on the model's device."""
    f = features(teacher.config)
    count = count or tokens.numel()
    head, wanted_head = (m.get_output_embeddings().weight for m in (student.model, teacher))
    head_gradient = torch.zeros_like(head) if head.requires_grad else None
    wanted_rounded = wanted_head.detach().to(dtype)
    rounded = wanted_rounded if head is wanted_head else head.detach().to(dtype)
    size = head_tokens(len(head))
    if tokens.is_cuda:
        size = min(GPU_HEAD_TOKENS, GPU_HEAD_LOGITS // len(head))
    total = torch.zeros((), device=tokens.device)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        student.multiply_out()
        for some in tokens.split(rows or len(tokens)):
            with torch.no_grad():
                wanted = hidden_states(teacher, input_ids=some).flatten(0, 1)
            hidden = student.hidden_states(some)
            flat = hidden.detach().flatten(0, 1)
            gradient = torch.empty_like(flat)
            for start in range(0, len(flat), size):
                part = slice(start, start + size)
                kl, error = kl_gradient(flat[part], wanted[part], rounded, wanted_rounded, f)
                gradient[part] = error @ rounded
                if head_gradient is not None:
                    head_gradient += error.mT @ flat[part]
                total += kl
            hidden.backward(gradient.view_as(hidden) / count)
    student.backward()
    if head_gradient is not None:
        head_gradient /= count
        head.grad = head_gradient if head.grad is None else head.grad + head_gradient
    return total / count


@torch.no_grad()
def kl_and_gradient(
    hidden: Tensor, wanted: Tensor, head: Tensor, wanted_head: Tensor, f: Features
) -> tuple[Tensor, Tensor]:
    """Summed KL(wanted || hidden) of the heads' distributions, and its gradient at the head's products."""
    logits = finished((hidden @ head.mT).float(), f)
    log_p = torch.log_softmax(logits, -1)
    log_wanted = torch.log_softmax(finished((wanted @ wanted_head.mT).float(), f), -1)
    p_wanted = log_wanted.exp()
    kl = (log_wanted.sub_(log_p).mul_(p_wanted)).sum()
    error = log_p.exp_().sub_(p_wanted)
    if f.logit_scale != 1:
        error *= f.logit_scale
    if f.logit_softcap:
        error *= 1 - (logits / f.logit_softcap).square()
    return kl, error.to(hidden.dtype)


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine from 1 to FINAL_RATE."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / max(1, warmup)) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def _batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of rows in random order, epoch after epoch; one may hold the end of an epoch and the start of
    the next."""
    generator = torch.Generator().manual_seed(seed)
    size, order = min(size, len(rows)), torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        yield rows[order[:size]]
        order = order[size:]
