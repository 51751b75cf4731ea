"""Run by test_team.py under torchrun: every process distils its part and saves what it ends with.

usage: distil_in_ranks.py FOLDER DEVICE STEPS
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import tiny_hf
import torch

import dbf2gguf.distill
from dbf2gguf.archs import ARCHS
from dbf2gguf.distill import Student, distill
from dbf2gguf.factorize import Factors, factorize
from dbf2gguf.options import find_device
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import Recipe
from dbf2gguf.source import linear_names
from dbf2gguf.team import joined
from dbf2gguf.work import Work

RECIPE = Recipe(distill_batch=5, warmup_steps=2, scale_rate=1e-2, dense_rate=3e-3)


def main(folder: Path, device: str, steps: int) -> None:
    recipe, device = replace(RECIPE, distill_steps=steps), find_device(device)
    if device != "cpu":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dbf2gguf.distill.has_bfloat16 = lambda _: False  # what is compared is not rounded to it
    model = tiny_hf.model(attention_bias=True).to(device)
    names = linear_names(model, ARCHS["llama"])
    rows = torch.randint(0, tiny_hf.N_VOCAB, (12, 32), generator=torch.Generator().manual_seed(2))
    factors = {}
    for name, path in names.items():
        weight = model.get_submodule(path).weight[None]
        ones_in, ones_out = torch.ones(1, weight.shape[2]), torch.ones(1, weight.shape[1])
        made = factorize(weight.cpu(), 24, ones_in, ones_out, iterations=4, seed=0)
        factors[name] = Factors(*(part.to(device) for part in vars(made).values()))
    with joined(device) as team:
        student = Student(model, names, factors, copy_dense=True)
        work = Work.open(folder / "work", {}, quiet=True) if team.rank == 0 else Work(None)
        stage = Stage("distil", steps, quiet=True)
        history = distill(model, student, rows, recipe, 3, stage, work, team)
        state = {"history": history, "student": {k: v.cpu() for k, v in student.state_dict().items()}}
        torch.save(state, folder / f"{team.rank}-of-{team.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
