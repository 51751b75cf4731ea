"""Speed of the sign product by itself, for every instruction set: signs per second and bytes per second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from runtime.backend import Core
from runtime.bench import machine
from runtime.bench.decode import progress
from runtime.bench.report import Row

SHAPES = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096), (11008, 4096))
"""rows x cols: of SmolLM2-135M, and of 1 B and 7 B models."""

BATCHES = (1, 16)
"""Vectors per product: one as when a token is generated, several as when a prompt is read."""


def bench(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    seconds: float,
    footprint: int | None = None,
) -> Iterator[Row]:
    """Rows of every instruction set, shape, batch and place of the weights, on one thread.

    seconds    of each measurement
    footprint  bytes that weights read from memory take; None: `machine.streaming_bytes()`

    gsigns_per_s counts a sign once for every vector of the batch. share_of_read_bandwidth is the rate of
    weight bytes over that of a plain read of memory in the same run: above 1, in the cache, it says that the
    kernel could take more than memory delivers. Matrices larger than the last-level cache have no row
    "cache".

    Raises BackendError if the C core is not built.
    """
    core = Core()
    footprint = footprint or machine.streaming_bytes()
    for isa in core.isas:
        bandwidth = machine.read_bandwidth(1, seconds, footprint)
        for rows, cols in shapes:
            for batch in batches:
                for where, nbytes in (("cache", 0), ("dram", footprint)):
                    if where == "cache" and rows * (-(-cols // 8)) > machine.last_level_cache():
                        continue
                    progress(f"{isa} {rows} x {cols}, batch {batch}, {where}")
                    with core.use(isa):
                        time = core.sign_gemv_seconds(rows, cols, batch, nbytes, seconds)
                    progress("")
                    yield {
                        "isa": isa,
                        "kernel": "sign_gemv",
                        "rows": rows,
                        "cols": cols,
                        "batch": batch,
                        "where": where,
                        "gsigns_per_s": round(rows * cols * batch / time / 1e9, 3),
                        "share_of_read_bandwidth": round(rows * (-(-cols // 8)) / time / bandwidth, 4),
                        "read_bandwidth": round(bandwidth),
                        "seconds": time,
                    }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "ISA": lambda r: r["isa"],
    "kernel": lambda r: r["kernel"],
    "rows x cols:": lambda r: f"{r['rows']} x {r['cols']}",
    "batch:": lambda r: str(r["batch"]),
    "weights in": lambda r: r["where"],
    "Gsigns/s:": lambda r: f"{r['gsigns_per_s']:.2f}",
    "of bandwidth:": lambda r: f"{r['share_of_read_bandwidth']:.0%} of {r['read_bandwidth'] / 1e9:.1f} GB/s",
    "µs:": lambda r: f"{r['seconds'] * 1e6:.1f}",
}
