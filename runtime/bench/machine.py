"""What the benchmark runs on: CPU, caches, memory, its read bandwidth, and what the runtime chose there."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from runtime import cli
from runtime.backend import Core
from runtime.errors import BackendError

MIB = 1 << 20
CPUS = Path("/sys/devices/system/cpu")
DEFAULT_CACHE = 32 * MIB
"""Taken for the size of the last-level caches where the system does not tell."""


@dataclass(frozen=True)
class Machine:
    """What `--info` shows. Sizes are in bytes; None where the system does not tell."""

    cpu: str
    architecture: str
    system: str
    logical_cpus: int
    usable_cpus: int  # that this process may run on
    caches: dict[str, int]  # "L1d": bytes of one, "L3 in all": bytes of all last-level caches
    memory: int | None
    default_threads: int
    backend: str  # what "auto" chooses: "c", "numba" or "none"
    isas: tuple[str, ...]  # of the C core, from slow to fast
    isa: str | None  # the active one
    demoted: str | None  # one whose self-test failed
    dbf_isa: str | None  # environment variables
    dbf_backend: str | None


def machine() -> Machine:
    """Look at this machine."""
    core = find_core()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    forced = os.environ.get("DBF_BACKEND")
    numba = "numba" if find_spec("numba") else "none"
    return Machine(
        cpu=cpu_name(),
        architecture=platform.machine(),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        logical_cpus=os.cpu_count() or 1,
        usable_cpus=usable,
        caches=caches(),
        memory=cli.machine_memory(),
        default_threads=core.default_threads if core else usable,
        backend=forced if forced in ("c", "numba") else "c" if core else numba,
        isas=core.isas if core else (),
        isa=core.active if core else None,
        demoted=core.demoted if core else None,
        dbf_isa=os.environ.get("DBF_ISA"),
        dbf_backend=forced,
    )


def describe(m: Machine) -> str:
    """A Machine as lines of text."""
    values = asdict(m)
    values["caches"] = ", ".join(f"{k} {_size(v)}" for k, v in m.caches.items()) or None
    values["memory"] = m.memory and _size(m.memory)
    values["isas"] = ", ".join(m.isas) or None
    names = {"isas": "instruction sets", "isa": "active", "dbf_isa": "DBF_ISA", "dbf_backend": "DBF_BACKEND"}
    shown = {names.get(k, k.replace("_", " ")): "-" if v is None else v for k, v in values.items()}
    width = max(map(len, shown))
    return "\n".join(f"{k:<{width}}  {v}" for k, v in shown.items())


def _size(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MiB" if nbytes >= 4 * MIB else f"{nbytes / 1024:.0f} KiB"


@cache
def find_core() -> Core | None:
    """The C core, or None where it is not built."""
    try:
        return Core()
    except BackendError:
        return None


@cache
def cpu_name() -> str:
    """The CPU's name for people, or the board's where the CPU has none."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    text = _read(Path("/proc/cpuinfo"))
    for field in ("model name", "Model", "Hardware"):
        found = re.search(rf"^{field}\s*:\s*(.+)$", text, flags=re.MULTILINE)
        if found:
            return found[1].strip()
    return _read(Path("/proc/device-tree/model")).strip("\0\n ") or platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Sizes of the first CPU's caches, and of all last-level caches together; {} if the system is silent."""
    sizes: dict[str, int] = {}
    for index in sorted((CPUS / "cpu0" / "cache").glob("index[0-9]*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        if _bytes(size):
            sizes[f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') }"] = _bytes(size)
    if sizes:
        last = f"L{max(int(k[1]) for k in sizes)}"
        if last in sizes:
            sizes[f"{last} in all"] = _all_of_level(last[1], sizes[last])
    return sizes


def _all_of_level(level: str, fallback: int) -> int:
    """Bytes of all caches of a level; each is listed by every CPU that shares it."""
    found: dict[str, int] = {}
    for index in CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        if _read(index / "level").strip() == level:
            found[_read(index / "shared_cpu_list")] = _bytes(_read(index / "size").strip())
    return sum(found.values()) or fallback


def _bytes(text: str) -> int:
    """The bytes that "36608K" stands for; 0 for anything else."""
    found = re.fullmatch(r"(\d+)([KM]?)", text)
    return int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]] if found else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# ---- measurements ------------------------------------------------------------------------------------------


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache that the first CPU has."""
    return max((v for k, v in caches().items() if not k.endswith("in all")), default=DEFAULT_CACHE)


@cache
def streaming_bytes() -> int:
    """How much to read so that the caches cannot help: 8 times the last-level caches, if memory allows it."""
    wanted = max(8 * max(caches().values(), default=DEFAULT_CACHE), 64 * MIB)
    return min(wanted, max((cli.machine_memory() or 8 * wanted) // 8, 4 * MIB))


def read_bandwidth(n_threads: int, seconds: float = 0.5, nbytes: int | None = None) -> float:
    """Bytes per second that n_threads read from memory, at best: in C, or in numpy where C is missing.

    nbytes  what is read over and over; None: `streaming_bytes()`
    """
    nbytes = nbytes or streaming_bytes()
    core = find_core()
    if core is not None:
        return nbytes / core.read_seconds(nbytes, n_threads, seconds)
    data = np.ones(nbytes // 8, np.uint64)
    parts = np.array_split(data, n_threads)
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        end = time.perf_counter() + seconds
        while best == 0.0 or time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def read_through(path: str) -> int:
    """Read a file, which leaves it in the system's page cache where that has room; returns its size.

    Raises OSError.
    """
    size, block = 0, memoryview(bytearray(MIB))
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(block):
            size += n
    return size


def reset_peak_rss() -> bool:
    """Make `peak_rss` begin anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """The largest resident memory since `reset_peak_rss`, or since the start, in bytes."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", _read(Path("/proc/self/status")), flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else cli.peak_rss()
