"""What torchrun's processes but the first do: load the model, write text and distil as the first one asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dbf2gguf.distill import Student, distill
from dbf2gguf.factorize import Factors
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe
from dbf2gguf.source import linear_names, load_model, load_tokenizer, open_source
from dbf2gguf.team import GoneError, Team
from dbf2gguf.text import self_written_rows
from dbf2gguf.work import Work
from runtime.cli import INTERRUPTED


@dataclass(frozen=True)
class Load:
    """The first process has checked and loaded the model: the others may do so, too."""

    row_tokens: int


@dataclass(frozen=True)
class Write:
    """The texts that the first process is about to write: see text.self_written_rows."""

    rows: int
    row_tokens: int
    chat_share: float
    seed: int
    rounded: bool
    given: Tensor


@dataclass(frozen=True)
class Distil:
    """What the first process is about to distil."""

    factors: dict[str, Factors]  # on the CPU
    rows: Tensor
    recipe: Recipe
    seed: int


def call_to_distil(team: Team, factors: dict[str, Factors], rows: Tensor, recipe: Recipe, seed: int) -> None:
    """Have the others call `distill` as the first process does after this."""
    if team.size > 1 and recipe.distill_steps:
        team.share(Distil({name: f.to("cpu") for name, f in factors.items()}, rows, recipe, seed))


def follow(team: Team, model: str | Path, scratch: Path, device: str) -> Any:
    """Do what the first process asks for until it shares something else, its report: that is returned.

    Leaves the process without a word, status 1 or 130, when the first one has: that one has said why.
    """
    try:
        order = team.share()
        if isinstance(order, Load):
            source = open_source(model, scratch)
            loaded = load_model(source, device, order.row_tokens)
            tokenizer = load_tokenizer(source)
            names = linear_names(loaded, source.arch)
            while isinstance(order := team.share(), (Write, Distil)):
                if isinstance(order, Write):
                    _write(order, loaded, tokenizer, team)
                else:
                    _distil(order, loaded, names, team, device)
        return order
    except GoneError:
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _write(order: Write, model: nn.Module, tokenizer: Any, team: Team) -> None:
    how = order.rows, order.row_tokens, order.chat_share, order.seed, order.rounded
    stage = Stage("text", order.rows * order.row_tokens, quiet=True)
    self_written_rows(model, tokenizer, *how, stage, order.given, team)


def _distil(order: Distil, model: nn.Module, names: dict[str, str], team: Team, device: str) -> None:
    factors = {name: f.to(device) for name, f in order.factors.items()}
    student = Student(model, names, factors, copy_dense=order.recipe.dense_rate > 0)
    factors.clear()
    stage = Stage("distil", order.recipe.distill_steps, quiet=True)
    distill(model, student, order.rows, order.recipe, order.seed, stage, Work(None), team)
