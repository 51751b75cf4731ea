"""Train the model end to end so that its next-token distribution is the original's.

The loss is KL(original || model). Scales are trained in units of their own root mean square; signs through
latents whose sign they are, with the identity as their gradient (straight-through estimator); norms,
embedding and head, whose bits are spent anyway, at rates relative to their root mean square.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbf2gguf.calibrate import hidden_states
from dbf2gguf.factorize import Factors, signs
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe

HEAD_TOKENS = 512  # tokens whose logits are held at a time
FINAL_RATE = 0.02  # of the peak learning rate, at the end of the cosine
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-10
COMPILED_STEPS = 100  # on a GPU: so many steps pay for the half minute that compiling takes


class _Weight(torch.autograd.Function):
    """W = diag(s_out) sign(a) diag(s_mid) sign(b) diag(s_in), with the identity as the gradient of sign.

    By hand, because what autograd would keep and recompute costs as much as the products.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, s_out: Tensor, s_mid: Tensor, s_in: Tensor) -> Tensor:
        dtype = (
            torch.get_autocast_dtype(a.device.type) if torch.is_autocast_enabled(a.device.type) else a.dtype
        )
        sign_a, right = signs(a).to(dtype), signs(b).to(dtype)
        left = sign_a * s_mid.to(dtype)
        product = left @ right
        ctx.save_for_backward(sign_a, left, right, product, s_out, s_mid, s_in)
        return product * s_out[:, None].to(dtype) * s_in.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        sign_a, left, right, product, s_out, s_mid, s_in = ctx.saved_tensors
        weighted = gradient * product
        grad_out = weighted @ s_in.to(gradient.dtype)
        grad_in = s_out.to(gradient.dtype) @ weighted
        inner = gradient * s_out[:, None].to(gradient.dtype) * s_in.to(gradient.dtype)
        grad_left = inner @ right.mT
        grad_b = left.mT @ inner
        grad_mid = torch.linalg.vecdot(grad_left.mT, sign_a.mT)
        grad_a = grad_left.mul_(s_mid.to(gradient.dtype))
        grads = (grad_a, grad_b, grad_out, grad_mid, grad_in)
        return tuple(g.to(s_out.dtype) for g in grads)


class DbfLinear(nn.Module):
    """A linear layer whose weight is diag(s_out) A diag(s_mid) B diag(s_in), all of it trainable."""

    def __init__(self, factors: Factors, bias: Tensor | None) -> None:
        super().__init__()
        self.a = nn.Parameter(factors.a[0].clone())
        self.b = nn.Parameter(factors.b[0].clone())
        for name in ("s_out", "s_mid", "s_in"):
            scale = getattr(factors, name)[0]
            rms = scale.square().mean().sqrt() + 1e-20
            self.register_buffer(f"{name}_rms", rms)
            setattr(self, name, nn.Parameter(scale / rms))
        self.register_buffer("bias", bias)

    def weight(self) -> Tensor:
        """The dense weight, (rows, cols)."""
        scales = (getattr(self, n) * getattr(self, f"{n}_rms") for n in ("s_out", "s_mid", "s_in"))
        return _Weight.apply(self.a, self.b, *scales)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(), self.bias)

    @torch.no_grad()
    def factors(self) -> Factors:
        """The factors as they are now, batch 1."""
        scales = [getattr(self, n) * getattr(self, f"{n}_rms") for n in ("s_out", "s_mid", "s_in")]
        return Factors(self.a.detach()[None], self.b.detach()[None], *(s[None] for s in scales))


def make_student(
    model: nn.Module, names: dict[str, str], factors: dict[str, Factors], copy_dense: bool = False
) -> nn.Module:
    """The model with its linear layers replaced by factorized ones. Norms, embedding and head are copies if
    they are to be trained, else shared with `model`, as all the rest."""
    linears = {path: model.get_submodule(path) for path in names.values()}
    kept = (linear.parameters() for linear in linears.values()) if copy_dense else (model.parameters(),)
    shared: dict[int, Any] = {id(p): p for parameters in kept for p in parameters}
    shared |= {id(b): b for b in model.buffers()}
    student = copy.deepcopy(model, shared)
    for name, path in names.items():
        parent, _, child = path.rpartition(".")
        setattr(student.get_submodule(parent), child, DbfLinear(factors[name], linears[path].bias))
    return student


def student_factors(student: nn.Module, names: dict[str, str]) -> dict[str, Factors]:
    """The factors of every linear layer as they are now."""
    return {name: student.get_submodule(path).factors() for name, path in names.items()}


def distill(
    teacher: nn.Module, student: nn.Module, rows: Tensor, recipe: Recipe, seed: int, stage: Stage
) -> list[float]:
    """Train the student in place.

    rows  (n, tokens) int64 text; every row is used before any is used again
    ->    mean KL of each step, nats a token

    `stage` gets one step for each optimizer step.
    """
    steps = recipe.distill_steps
    if steps == 0:
        return []
    device = next(teacher.parameters()).device
    modules = [m for m in student.modules() if isinstance(m, DbfLinear)]
    groups = [
        {"params": [p for m in modules for p in (m.s_out, m.s_mid, m.s_in)], "peak": recipe.scale_rate},
        {"params": [p for m in modules for p in (m.a, m.b)], "peak": recipe.sign_rate},
    ]
    if recipe.dense_rate > 0:
        factored = {id(p) for m in modules for p in m.parameters()}
        for p in student.parameters():
            if id(p) not in factored:
                rms = float(p.detach().square().mean().sqrt())
                groups.append({"params": [p.requires_grad_(True)], "peak": recipe.dense_rate * rms})
    optimizer = torch.optim.Adam(groups, lr=1.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    batches = _batches(rows, recipe.distill_batch, seed)
    history = []
    compiled = device.type == "cuda" and steps >= COMPILED_STEPS
    kl_gradient = torch.compile(_kl_gradient) if compiled else _kl_gradient
    with _compiled(teacher, student) if compiled else nullcontext():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, steps, recipe.warmup_steps)
            history.append(_train_step(teacher, student, next(batches).to(device), kl_gradient))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent = history[-8:]
            stage.step(note=f"KL {float(sum(recent)) / len(recent):.3f}")
    for p in student.parameters():
        p.requires_grad_(False)
    return [float(kl) for kl in history]


@contextmanager
def _compiled(*models: nn.Module) -> Iterator[None]:
    """The models' layers, compiled while the context lasts: one compilation serves all layers of a model."""
    layers = [layer for model in models for layer in model.get_decoder().layers]
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def _train_step(teacher: nn.Module, student: nn.Module, tokens: Tensor, kl_gradient: Any) -> Tensor:
    """Gradients of the mean KL on tokens (batch, tokens); returns it."""
    bf16 = torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda)
    with bf16:
        with torch.no_grad():
            wanted = hidden_states(teacher, input_ids=tokens).flatten(0, 1)
        hidden = hidden_states(student, input_ids=tokens)
        flat = hidden.detach().flatten(0, 1)
        wanted_head = teacher.get_output_embeddings().weight
        head = student.get_output_embeddings().weight
        head_gradient = torch.zeros_like(head) if head.requires_grad else None
        size = HEAD_TOKENS * 8 if tokens.is_cuda else HEAD_TOKENS
        total, gradient = torch.zeros((), device=tokens.device), torch.empty_like(flat)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            kl, error = kl_gradient(flat[part], wanted[part], head, wanted_head)
            gradient[part] = error @ head
            if head_gradient is not None:
                head_gradient += error.mT @ flat[part]
            total += kl
    hidden.backward(gradient.view_as(hidden) / len(flat))
    if head_gradient is not None:
        head_gradient /= len(flat)
        head.grad = head_gradient if head.grad is None else head.grad + head_gradient
    return total / len(flat)


@torch.no_grad()
def _kl_gradient(hidden: Tensor, wanted: Tensor, head: Tensor, wanted_head: Tensor) -> tuple[Tensor, Tensor]:
    """Summed KL(wanted || hidden) of the heads' distributions, and its gradient at the logits."""
    log_p = torch.log_softmax((hidden @ head.mT).float(), -1)
    log_wanted = torch.log_softmax((wanted @ wanted_head.mT).float(), -1)
    p_wanted = log_wanted.exp()
    kl = (log_wanted.sub_(log_p).mul_(p_wanted)).sum()
    return kl, log_p.exp_().sub_(p_wanted).to(hidden.dtype)


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine from 1 to FINAL_RATE."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / max(1, warmup)) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def _batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of rows in random order, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(rows))
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]
