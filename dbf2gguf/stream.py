"""Models larger than memory: weights and states lie in files and are in memory only while they are used.

A streamed model is one of transformers like any other, but the weights of its linear layers, its embedding
and its head are read from the checkpoint, tensor by tensor, whenever they are asked for; a weight that is set
goes to a file of its own. What is computed is the same, bit for bit, as with all weights in memory.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dbf2gguf.archs import ArchSpec, features
from dbf2gguf.calibrate import loss_gradient, weighing_outputs
from dbf2gguf.correct import Arguments, call_layer, embed_rows
from dbf2gguf.factorize import Factors
from dbf2gguf.progress import Stage
from dbf2gguf.source import (
    Source,
    attention_of,
    check_finite,
    check_no_others,
    check_shape,
    decoder_layers,
    linear_names,
    model_config,
    open_safetensors,
    split_experts,
    split_fused,
    stored_tensors,
)
from dbf2gguf.work import Work
from runtime.errors import FormatError
from runtime.format import pack, unpack

MAPPED = 2**24
"""Weights of a file that are mapped at a time while they are copied."""

Item = TypeVar("Item")
Read = Callable[[], Any]
"""Reads something from a file, again and again."""


# --------------------------------------------------------------------------------------------------
# What is spilled to files


class Scratch:
    """A folder for what does not stay in memory; a context manager that makes and removes it.

    It holds files of torch.save, which are mapped when they are read: only what is used is in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    def __enter__(self) -> Scratch:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a conversion that was killed
        self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return self  # copies of a module store where it does

    def store(self, part: Any) -> Read:
        """Write tensors, or what holds some, to a file; returns what reads it. The file goes with that."""
        path = self.folder / f"{next(self._numbers)}.pt"
        torch.save(part, path)

        def read() -> Any:
            return torch.load(path, mmap=True, weights_only=False)  # our own file

        weakref.finalize(read, path.unlink, missing_ok=True)
        return read

    def keep(self, items: Iterable[Item]) -> Sequence[Item]:
        """What `list(items)` would be; one item is in memory at a time."""
        return _Kept([self.store(item) for item in items])


class _Kept(Sequence[Any]):
    def __init__(self, reads: list[Read]) -> None:
        self._reads = reads

    def __len__(self) -> int:
        return len(self._reads)

    def __getitem__(self, index: Any) -> Any:
        return self._reads[index]()


class SignsOnly(Work):
    """Keeps factors without their latents, one bit a sign: all that is needed without distillation."""

    @classmethod
    def of(cls, work: Work) -> SignsOnly:
        return cls(work.folder, work.prefix)

    def save(self, name: str, part: Any) -> None:
        signs = {key: torch.from_numpy(pack(part[key][0].cpu().numpy())) for key in ("a", "b")}
        super().save(name, part | signs)

    def load(self, name: str) -> Any | None:
        part = super().load(name)
        if part is None:
            return None
        for key, cols in (("a", part["s_mid"].shape[1]), ("b", part["s_in"].shape[1])):
            part[key] = torch.from_numpy(unpack(part[key].numpy(), cols)).float()[None]
        return part


class KeptFactors(MutableMapping[str, Factors]):
    """GGUF name -> factors that `work` has, read when they are asked for; what is set must be there already
    or soon."""

    def __init__(
        self, work: Work, device: str = "cpu", finish: Callable[[Factors], Factors] = lambda factors: factors
    ) -> None:
        """
        device  where they are read to
        finish  what is made of the factors that are read
        """
        self._work, self._device, self._finish = work, device, finish
        self._names: dict[str, None] = {}

    def finished(self, finish: Callable[[Factors], Factors]) -> KeptFactors:
        """The same factors, each as `finish` makes it."""
        other = KeptFactors(self._work, self._device, finish)
        other._names = self._names
        return other

    def __getitem__(self, name: str) -> Factors:
        if name not in self._names:
            raise KeyError(name)
        return self._finish(Factors(**self._work.load(name)).to(self._device))

    def __setitem__(self, name: str, factors: Factors) -> None:
        self._names[name] = None

    def __delitem__(self, name: str) -> None:
        del self._names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# --------------------------------------------------------------------------------------------------
# The model


class OnDisk(nn.Module):
    """A module whose weight is read whenever it is asked for, and written to a file when it is set."""

    read: Callable[[], Tensor]
    store: Callable[[Tensor], Callable[[], Tensor]]

    @property
    def weight(self) -> Tensor:
        return self.read()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.__dict__["read"] = self.store(value.detach())
        else:
            super().__setattr__(name, value)


@cache
def _on_disk(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"OnDisk{kind.__name__}", (OnDisk, kind), {})


def put_on_disk(module: nn.Module, read: Callable[[], Tensor], scratch: Scratch) -> None:
    """Turn a module into one whose weight is what `read` returns, until another one is set."""
    del module.weight
    module.__dict__ |= {"read": read, "store": scratch.store}
    module.__class__ = _on_disk(type(module))


def is_streamed(model: nn.Module) -> bool:
    """Whether the model is one of `stream_model`."""
    return isinstance(model.get_input_embeddings(), OnDisk)


def stream_model(source: Source, scratch: Scratch) -> nn.Module:
    """The model of `source.load_model` on a CPU, streamed. Raises FormatError for tensors that are missing,
    too many, of a wrong shape, or, when they are read, not finite."""
    from transformers import AutoModelForCausalLM

    config = model_config(source)
    with _without_weights():
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention_of(config), dtype=torch.float32
        )
    model.eval().requires_grad_(False)
    arch = source.arch
    split_experts(model, arch)
    checkpoint = _Checkpoint(source, model)
    layers = decoder_layers(model, arch)
    as_in_file = copy.deepcopy(layers)
    split_fused(model, arch)

    def part_of(index: int, name: str) -> Tensor:
        """A parameter of a layer that has to be split for it."""
        part = checkpoint.layer(as_in_file[index], index).get_parameter(name)
        return checkpoint.checked(f"{arch.layers}.{index}.{name}", part.to(torch.float32, copy=True))

    streamed = {f"{path}.weight" for path in linear_names(model, arch).values()}
    for index, layer in enumerate(layers):
        for name, _ in list(layer.named_parameters()):
            module, _, kind = name.rpartition(".")
            path = f"{arch.layers}.{index}.{name}"
            read = partial(part_of, index, name) if arch.fused else partial(checkpoint.read, path)
            if path in streamed:
                put_on_disk(layer.get_submodule(module), read, scratch)
            else:
                setattr(layer.get_submodule(module), kind, nn.Parameter(read(), requires_grad=False))
    head = arch.embed if config.tie_word_embeddings else arch.head
    for path, module in (arch.embed, model.get_input_embeddings()), (head, model.get_output_embeddings()):
        if not isinstance(module, OnDisk):
            put_on_disk(module, partial(checkpoint.read, f"{path}.weight"), scratch)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, kind = name.rpartition(".")
            value = nn.Parameter(checkpoint.read(name), requires_grad=False)
            setattr(model.get_submodule(module), kind, value)
    return model


@dataclass(frozen=True)
class _Place:
    """Where a parameter is: a tensor of a file, or a part of it."""

    file: Path
    tensor: str
    part: Any = ...  # an index

    def mapped(self) -> Tensor:
        with open_safetensors(self.file) as tensors:
            return tensors.get_tensor(self.tensor)[self.part]

    def float32(self) -> Tensor:
        """A copy. What is mapped stays in memory until it is let go, so it is a part at a time."""
        value = torch.empty(self.mapped().shape)
        rows = max(1, MAPPED * len(value) // max(1, value.numel()))
        for start in range(0, len(value), rows):
            value[start : start + rows] = self.mapped()[start : start + rows]
        return value


class _Checkpoint:
    """The tensors of a folder, by the names of the model's parameters. What is read is mapped and let go."""

    def __init__(self, source: Source, model: nn.Module) -> None:
        """
        model  as the file has it, its experts split; shapes are compared with it
        """
        self._source, self._config = source, model.config
        self._finite: set[str] = set()
        self._places: dict[str, _Place] = {}
        found = stored_tensors(source)
        used = set()
        for name, parameter in model.named_parameters():
            ways = _stored_as(source.arch, model, name, parameter.shape)
            way = next((way for way in ways if way[0] in found), None)
            if way is None:
                raise FormatError(
                    f"{source.path}: tensor {name!r} is missing; only families whose files have the names "
                    "of transformers' parameters can be streamed"
                )
            known_as, part, wanted = way
            stored = found[known_as]
            check_shape(source, stored.name, stored.shape, wanted)
            self._places[name] = _Place(stored.file, stored.name, part)
            used.add(known_as)
        check_no_others(source, model.config, found.keys() - used)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Checkpoint:
        return self  # copies of a module read what it does

    def mapped(self, name: str) -> Tensor:
        """A parameter as it is in the file."""
        return self._places[name].mapped()

    def read(self, name: str) -> Tensor:
        return self.checked(name, self._places[name].float32())

    def checked(self, name: str, value: Tensor) -> Tensor:
        """Raises FormatError if it is not finite."""
        if name not in self._finite:
            check_finite(self._source, name, value)
            self._finite.add(name)
        return value

    def layer(self, as_in_file: nn.Module, index: int) -> nn.Module:
        """A decoder layer whose parameters are the file's, mapped, and then split as all are."""
        layer = copy.deepcopy(as_in_file)
        for name, _ in list(layer.named_parameters()):
            module, _, kind = name.rpartition(".")
            value = self.mapped(f"{self._source.arch.layers}.{index}.{name}")
            setattr(layer.get_submodule(module), kind, nn.Parameter(value, requires_grad=False))
        return decoder_layers(split_fused(self._model_of(layer), self._source.arch), self._source.arch)[0]

    def _model_of(self, layer: nn.Module) -> nn.Module:
        """A model of nothing but one layer."""
        model: nn.Module = nn.ModuleList([layer])
        for name in reversed(self._source.arch.layers.split(".")):
            outer = nn.Module()
            outer.add_module(name, model)
            model = outer
        model.config = self._config
        return model


def _stored_as(
    arch: ArchSpec, model: nn.Module, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """As what a file may have a parameter: the name of a tensor, the index in it, and its shape."""
    yield name, ..., shape
    yield name.removeprefix(model.base_model_prefix + "."), ..., shape  # old ones may be of the decoder alone
    if arch.experts is None:
        return
    renamed = name
    for ours, theirs in arch.experts.in_files.items():
        renamed = renamed.replace(ours, theirs)
    yield renamed, ..., shape
    before, among_experts, linear = name.partition(f".{arch.experts.module}.")
    if among_experts:  # one tensor may hold those of all experts, and gate and up
        number, which, _ = linear.split(".")
        rows, cols = shape
        start, fused, height = {
            "gate_proj": (0, "gate_up_proj", 2 * rows),
            "up_proj": (rows, "gate_up_proj", 2 * rows),
            "down_proj": (0, "down_proj", rows),
        }[which]
        part = int(number), slice(start, start + rows)
        yield f"{before}{among_experts}{fused}", part, (features(model.config).n_experts, height, cols)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Modules that are made have their buffers, but parameters on the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------
# Output gradients, block after block


def output_importance(
    model: nn.Module,
    arch: ArchSpec,
    names: dict[str, str],
    rows: Tensor,
    batch: int,
    stage: Stage,
    scratch: Scratch,
) -> dict[str, Tensor]:
    """What `calibrate.output_importance` returns. The states before each block are kept in the pass forward;
    the pass back computes each block again and needs the weights of that alone.

    `stage` gets two steps for each block.
    """
    layers = decoder_layers(model, arch)
    chunks = rows.split(batch)
    states: list[Sequence[Tensor]] = []
    arguments: dict[int, list[Arguments]] = {}  # by the rows of a chunk

    def embedded() -> Iterator[Tensor]:
        for chunk in chunks:
            states_of, arguments[len(chunk)] = embed_rows(model, layers, [chunk])
            yield from states_of

    def arguments_of(index: int) -> list[Arguments]:
        return [arguments[len(chunk)][index] for chunk in chunks]

    with torch.no_grad():
        states.append(scratch.keep(embedded()))
        for index, layer in enumerate(layers):
            pairs = zip(states[-1], arguments_of(index), strict=True)
            states.append(scratch.keep(call_layer(layer, state, a) for state, a in pairs))
            stage.step()

    def from_head(state: Tensor, chunk: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            normed: Tensor = model.get_submodule(arch.out_norm)(x)
            return normed

        return _back(run, state, lambda hidden: loss_gradient(model, hidden, chunk))

    gradients = scratch.keep(map(from_head, states.pop(), chunks))
    found: dict[str, Tensor] = {}
    for index in reversed(range(len(layers))):
        here = {name: path for name, path in names.items() if path.startswith(f"{arch.layers}.{index}.")}
        with weighing_outputs(model, here, found):
            gradients = scratch.keep(
                _back(partial(call_layer, layers[index], arguments=a), state, lambda _, g=gradient: g)
                for state, a, gradient in zip(states.pop(), arguments_of(index), gradients, strict=True)
            )
        stage.step()
    return {name: found[name] for name in names}


def _back(run: Callable[[Tensor], Tensor], x: Tensor, gradient_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient at x, given what makes the gradient at run(x) of run(x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        output = run(x)
        output.backward(gradient_of(output.detach()))
    assert x.grad is not None
    return x.grad
