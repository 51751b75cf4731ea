"""What the command-line programs share: options, one-line errors, exit codes.

stdout is for the answer, stderr for the rest. Exit codes: 0, 1 (an error), 2 (usage), 130 (Ctrl-C).
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any

from runtime.config import ACTIVATIONS, KV_TYPES
from runtime.errors import DbfError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any: "(default: None)" tells nobody what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help
            if action.default is None or action.default is False or action.default == []
            else super()._get_help_string(action)
        )


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """An ArgumentParser whose help shows defaults, with the option --debug."""
    p = argparse.ArgumentParser(prog=program, description=description, formatter_class=_Formatter)
    p.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return p


def add_backend_options(p: argparse.ArgumentParser) -> None:
    """--backend, --kv-type, --activations and -t."""
    add_common_options(p)
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: physical cores)")


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What add_backend_options took, as keywords of runtime.load."""
    return {
        "backend": args.backend,
        "n_threads": args.threads,
        "kv_type": args.kv_type,
        "activations": args.activations,
    }


def add_common_options(p: argparse.ArgumentParser) -> None:
    """--backend, --kv-type and --activations, which benchmarks have too."""
    p.add_argument("--backend", choices=("auto", "c", "numba"), default="auto", help="what computes")
    p.add_argument(
        "--kv-type", choices=tuple(KV_TYPES), default="f16", help="type of the keys and values held in memory"
    )
    p.add_argument(
        "--activations",
        choices=tuple(ACTIVATIONS),
        default="int16",
        help="integers that enter sign products; int8 is faster and less exact",
    )


def peak_rss() -> int:
    """The process's largest resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory() -> int | None:
    """Bytes of the machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def run(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Call command(args) and turn its exceptions into one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? and goes on
    try:
        code = command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of stdout left: no error, but nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except Exception as e:
        if not _expected(e):
            raise
        if args.debug:
            traceback.print_exc()
        print(f"error: {_line(e)}", file=sys.stderr)
        return 1


def _expected(e: Exception) -> bool:
    """Whether one line says all that the user needs: what is no bug here."""
    return isinstance(e, (DbfError, OSError, MemoryError)) or _no_memory(e)


def _no_memory(e: BaseException) -> bool:
    """Also torch's ways to say it."""
    return (
        isinstance(e, MemoryError)
        or type(e).__name__ == "OutOfMemoryError"
        or (isinstance(e, RuntimeError) and "can't allocate memory" in str(e))
    )


def _line(e: BaseException) -> str:
    if isinstance(e, OSError) and e.filename is not None:
        return f"{os.fsdecode(e.filename)}: {e.strerror}"
    if _no_memory(e):
        return "out of memory"
    return " ".join(str(e).split())
