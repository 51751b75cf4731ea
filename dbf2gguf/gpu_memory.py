"""What finds no room in a GPU's memory waits in the host's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """Of a GPU: what no program has, and what this one holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class OnHost(Sequence[Any]):
    """Items that are on `device` whenever one is asked for, and in the host's memory otherwise.

    Tensors, None, and lists, tuples and dataclasses of them. A tensor that an item holds twice is moved once.
    """

    def __init__(self, items: Iterable[Any], device: torch.device) -> None:
        self._items = [_moved(item, torch.device("cpu"), {}) for item in items]
        self._device = device

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return _moved(self._items[index], self._device, {})


def _moved(part: Any, device: torch.device, known: dict[int, Tensor]) -> Any:
    if isinstance(part, Tensor):
        if id(part) not in known:
            known[id(part)] = part.to(device)
        return known[id(part)]
    if isinstance(part, (list, tuple)):
        return type(part)(_moved(each, device, known) for each in part)
    if is_dataclass(part):
        return replace(part, **{f.name: _moved(getattr(part, f.name), device, known) for f in fields(part)})
    return part
