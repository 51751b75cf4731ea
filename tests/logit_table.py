"""The table of docs/MODELS.md: how far the runtime's logits are from transformers', family by family.

python tests/logit_table.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from test_convert import IDS, MODELS, NUMBA, ROUTED, Case, largest_difference

import runtime

EMBED_TYPES = ("f16", "q8_0")


def differences(case: Case, routed: bool) -> tuple[float, float]:
    """Largest difference of a logit, and that over the logits' standard deviation; see
    test_convert.largest_difference."""
    with runtime.load(case.out, backend="c", n_threads=1, n_ctx=32) as model:
        got, wanted = model.logits(IDS), case.twin_logits(IDS)
    most = largest_difference(got, wanted, routed)
    return most, most / float(wanted.std())


def main() -> None:
    print("| model | " + " | ".join(f"{kind.upper()} | of the deviation" for kind in EMBED_TYPES) + " |")
    print("|---|" + "---|---|" * len(EMBED_TYPES))
    for name in NUMBA:
        cells = []
        for kind in EMBED_TYPES:
            width = MODELS[name].get("hidden_size", 32)
            if kind == "q8_0" and width % 32:
                cells += ["", ""]
                continue
            with tempfile.TemporaryDirectory() as folder:
                most, share = differences(Case(Path(folder), MODELS[name], kind), name in ROUTED)
            cells += [f"{most:.1e}", f"{share:.1e}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
