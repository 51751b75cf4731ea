"""Run by test_team.py under torchrun: a conversion with options that the command line does not have.

usage: convert_in_ranks.py MODEL OUT OPTIONS [FAULT [RANK STEP]]

OPTIONS is JSON for `convert`. At distillation step STEP the process RANK fails: `error` raises an error of
the kind a user sees, `kill` kills the process, `wait` prints "waiting" and goes on when told to leave.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import dbf2gguf.distill
import dbf2gguf.text
from dbf2gguf.convert import convert
from runtime.cli import run
from runtime.errors import OptionError

BATCH_TOKENS = 72  # of text that are written side by side: few, so that there is something to share


def fault(kind: str, rank: int, at: int) -> None:
    """Wait for the step, then fail."""
    schedule = dbf2gguf.distill._schedule

    def failing(step: int, steps: int, warmup: int) -> float:
        if step == at and int(os.environ["RANK"]) == rank:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "error":
                raise OptionError("the fault that was asked for")
            print("waiting", flush=True)
            time.sleep(600)
        return schedule(step, steps, warmup)

    dbf2gguf.distill._schedule = failing


def main() -> int:
    model, out, options, *rest = sys.argv[1:]
    dbf2gguf.text.BATCH_TOKENS = BATCH_TOKENS
    if rest:
        fault(rest[0], int(rest[1]), int(rest[2]))
    report = convert(model, out, **json.loads(options))
    print(f"report {report.quality.tokens}", flush=True)
    return 0


if __name__ == "__main__":
    import argparse

    sys.exit(run(lambda _: main(), argparse.Namespace(debug=False)))
