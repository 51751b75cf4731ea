"""What counts in a linear layer: second moments of the gradients at its outputs and of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbf2gguf.archs import Features, features
from dbf2gguf.progress import Stage

TINY = 1e-30  # a layer whose outputs change nothing has no gradients
TINY_INPUT = 1e-12
GRADIENT_BATCH = 4  # rows that pass together for output_importance, at most
HEAD_TOKENS = 512  # whose logits are held at a time, at most
LEAST_HEAD_TOKENS = 32  # and at least: each time, the whole head is read
HEAD_BYTES = 2**24  # of these: more miss the caches, and malloc takes them from the system every time


def output_importance(
    model: nn.Module, names: dict[str, str], rows: Tensor, batch: int, stage: Stage
) -> dict[str, Tensor]:
    """Root of the second moment of the loss' gradient at every linear layer's outputs, mean 1 over its
    squares; the loss is next-token cross-entropy on `rows`.

    names   GGUF name -> module name
    rows    (n, tokens) int64
    ->      GGUF name -> (rows of the layer,) float32 > 0; all 1 for an expert that no token uses

    Source: the diagonal of the empirical Fisher matrix, as in K-FAC's output factor.
    """
    found: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    with weighing_outputs(model, names, found):
        for chunk in rows.split(batch):
            chunk = chunk.to(device)
            with torch.enable_grad():
                embedded = model.get_input_embeddings()(chunk).requires_grad_(True)
                hidden = hidden_states(model, inputs_embeds=embedded)
                hidden.backward(loss_gradient(model, hidden.detach(), chunk))
            stage.step(n=len(chunk))
    return found


@contextmanager
def weighing_outputs(model: nn.Module, names: Mapping[str, str], found: dict[str, Tensor]) -> Iterator[None]:
    """At its end, `found` gets what `output_importance` returns, by the gradients that came meanwhile."""
    sums: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def on_gradient(gradient: Tensor) -> None:
            sums[name] = sums.get(name, 0) + gradient.float().square().flatten(0, -2).sum(0)

        def on_output(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            output.register_hook(on_gradient)

        hooks.append(module.register_forward_hook(on_output))

    for name, path in names.items():
        watch(name, model.get_submodule(path))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for name, path in names.items():
        if name not in sums:
            module = model.get_submodule(path)
            sums[name] = torch.ones(module.out_features, device=next(model.parameters()).device)
        found[name] = importance_of(sums[name], TINY)


@torch.no_grad()
def input_importance(
    model: nn.Module, names: Mapping[str, str], rows: Tensor, batch: int, stage: Stage | None = None
) -> dict[str, Tensor]:
    """Root of the second moment of every linear layer's inputs, mean 1 over its squares.

    names   GGUF name -> module name
    rows    (n, tokens) int64
    ->      GGUF name -> (columns of the layer,) float32 > 0; all 1 for an expert that no token uses
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def on_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0].float().square().flatten(0, -2).sum(0)

        return module.register_forward_pre_hook(on_input)

    hooks = [watch(name, model.get_submodule(path)) for name, path in names.items()]
    device = next(model.parameters()).device
    try:
        for chunk in rows.split(batch):
            hidden_states(model, input_ids=chunk.to(device))
            if stage is not None:
                stage.step(n=len(chunk))
    finally:
        for hook in hooks:
            hook.remove()
    for name, path in names.items():
        if name not in sums:
            sums[name] = torch.ones(model.get_submodule(path).in_features, device=device)
    return {name: importance_of(sums[name]) for name in names}


def importance_of(moments: Tensor, least: float = TINY_INPUT) -> Tensor:
    """The root of second moments, mean 1 over its squares; a mean below `least` is none."""
    return (moments / moments.mean().clamp(min=least) + 1e-6).sqrt()


def hidden_states(model: nn.Module, **inputs: Tensor) -> Tensor:
    """What the head reads: the decoder's output after its last norm, (batch, tokens, d_model)."""
    decoder = model.get_decoder()
    return decoder(**inputs, use_cache=False).last_hidden_state


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """What the model makes of its decoder's output, (..., d_model) -> (..., n_vocab) float32."""
    return finished(model.get_output_embeddings()(hidden).float(), features(model.config))


def finished(raw: Tensor, f: Features) -> Tensor:
    """Logits of the head's products, which some models scale and cap."""
    raw = raw * f.logit_scale if f.logit_scale != 1 else raw
    return f.logit_softcap * torch.tanh(raw / f.logit_softcap) if f.logit_softcap else raw


def head_tokens(vocabulary: int) -> int:
    """How many tokens' logits are held at a time."""
    return max(LEAST_HEAD_TOKENS, min(HEAD_TOKENS, HEAD_BYTES // (4 * vocabulary)))


def head_parts(tokens: int, vocabulary: int) -> Iterator[slice]:
    """So many tokens, in parts whose logits are held at a time."""
    size = head_tokens(vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


def loss_gradient(model: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy of `tokens` at the head's input, (batch, tokens, d_model); a few
    logits at a time."""
    inputs = hidden[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    parts = []
    for some in head_parts(len(inputs), model.config.vocab_size):
        part = inputs[some].clone().requires_grad_(True)
        loss = functional.cross_entropy(logits(model, part), targets[some], reduction="sum")
        parts.append(torch.autograd.grad(loss, part)[0])
    gradient = torch.zeros_like(hidden)
    gradient[:, :-1] = torch.cat(parts).view(*gradient[:, :-1].shape)
    return gradient
