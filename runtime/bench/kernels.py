"""Speed of single kernels, for every instruction set: the sign product, and the head's product by type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from runtime.backend import Core
from runtime.bench import machine
from runtime.bench.decode import progress
from runtime.bench.report import Row
from runtime.config import BLOCKS, F16, Q4_0, Q6_K, Q8_0

SHAPES = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096), (11008, 4096))
"""rows x cols: of SmolLM2-135M, and of 1 B and 7 B models."""

HEADS = ((49152, 576), (32000, 2048))
"""rows x cols of heads: of SmolLM2-135M and of a 1 B model."""

HEAD_TYPES = {"head f16": F16, "head q8_0": Q8_0, "head q6_k": Q6_K, "head q4_0": Q4_0}
"""Kernel -> type. A head has no row where its rows are no whole blocks."""

BATCHES = (1, 64)
"""Vectors per product: one as when a token is generated, several as when a prompt is read."""

BITS = {"sign_gemv": 16, "sign_gemv8": 8, "sign_gemm": 16}
"""Sign product -> bits of activations. sign_gemm takes either kind, equally fast."""


def bench(
    shapes: Sequence[tuple[int, int]],
    heads: Sequence[tuple[int, int]],
    batches: Sequence[int],
    seconds: float,
    footprint: int | None = None,
) -> Iterator[Row]:
    """Rows of every instruction set, kernel, shape, batch and place of the weights, on one thread.

    Sign products are done as in linear layers: with few vectors one by one (sign_gemv, sign_gemv8), with many
    side by side (sign_gemm). What is timed includes their tables, but no quantization.

    shapes     of sign products
    heads      of heads
    seconds    of each measurement
    footprint  bytes that weights read from memory take; None: `machine.streaming_bytes()`

    gsigns_per_s counts a sign, or a weight of a head, once for every vector of the batch.
    share_of_read_bandwidth is the rate of weight bytes over that of a plain read of memory in the same run:
    above 1, in the cache, it says that the kernel could take more than memory delivers. Matrices larger than
    the last-level cache have no row "cache".

    Raises BackendError if the C core is not built.
    """
    core = Core()
    footprint = footprint or machine.streaming_bytes()
    few, many = (tuple(n for n in batches if (n <= core.few) == is_few) for is_few in (True, False))
    work = [
        (kernel, shape, shape[0] * -(-shape[1] // 8), some)
        for shape in shapes
        for kernel, some in (("sign_gemv", few), ("sign_gemv8", few), ("sign_gemm", many))
    ]
    for kernel, kind in HEAD_TYPES.items():
        block, nbytes = BLOCKS[kind]
        work += [
            (kernel, (r, c), r * (c // block) * nbytes, tuple(batches)) for r, c in heads if c % block == 0
        ]
    for isa in core.isas:
        for kernel, shape, nbytes, some in work:
            bandwidth = machine.read_bandwidth(1, seconds, footprint)  # again and again: machines are noisy
            for batch in some:
                for where, copies in (("cache", 0), ("dram", footprint)):
                    if where == "cache" and nbytes > machine.last_level_cache():
                        continue
                    progress(f"{isa} {kernel} {shape[0]} x {shape[1]}, batch {batch}, {where}")
                    with core.use(isa):
                        time = _seconds(core, kernel, shape, batch, copies, seconds)
                    progress("")
                    yield {
                        "isa": isa,
                        "kernel": kernel,
                        "rows": shape[0],
                        "cols": shape[1],
                        "batch": batch,
                        "where": where,
                        "gsigns_per_s": round(shape[0] * shape[1] * batch / time / 1e9, 3),
                        "share_of_read_bandwidth": round(nbytes / time / bandwidth, 4),
                        "read_bandwidth": round(bandwidth),
                        "seconds": time,
                    }


def _seconds(
    core: Core, kernel: str, shape: tuple[int, int], batch: int, footprint: int, seconds: float
) -> float:
    if kernel in HEAD_TYPES:
        return core.dense_gemv_seconds(HEAD_TYPES[kernel], *shape, batch, footprint, seconds)
    return core.sign_product_seconds(*shape, batch, BITS[kernel], footprint, seconds)


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
