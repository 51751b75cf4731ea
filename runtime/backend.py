"""Chooses what computes: the C core, or its Numba mirror.

This is the only module that calls `cext.lib`. Both backends give bit-identical logits; Numba is a readable
and slow stand-in for platforms where the C core could not be built.
"""

from __future__ import annotations

import mmap
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime import config as cfg
from runtime.config import Config, Dense, Expert, Layer, Linear, Weights, kv_row_bytes, norm_size
from runtime.errors import BackendError, OptionError

NAMES = ("auto", "c", "numba")
"""Values of `backend` in `load`, and of the environment variable DBF_BACKEND."""


class Backend(ABC):
    """A model that is ready to run, with the KV cache of one conversation.

    Attributes
        name         "c" or "numba"
        description  one line for people: "C, avx2, 2 threads"
        n_ctx        positions that the KV cache has room for
        n_threads    threads that compute
        kv_type      type of the KV cache: "f16" or "q8_0"
        activations  "int16" or "int8": what enters sign products
    """

    name: str
    description: str
    n_ctx: int
    n_threads: int
    kv_type: str
    activations: str

    @abstractmethod
    def eval(self, tokens: NDArray[np.int32], pos: int, n_logits: int) -> NDArray[np.float32]:
        """Run tokens at positions pos .. pos+len(tokens)-1, overwriting the KV cache from pos on.

        tokens  (n,)                int32, 0 <= token < n_vocab;  pos <= positions held, pos + n <= n_ctx
        ->      (n_logits, n_vocab) float32, of the last n_logits tokens;  0 <= n_logits <= n

        Raises BackendError if an argument is out of range.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the memory and the threads; safe to call twice."""

    def start_stages(self) -> None:
        """Begin to measure where the time of `eval` goes.

        Raises BackendError if this backend cannot.
        """
        raise BackendError(f"the {self.name} backend does not measure its stages; take --backend c")

    def stop_stages(self) -> dict[str, float]:
        """Stop measuring. -> stage -> seconds since `start_stages`, on the first thread

        Raises BackendError if nothing was started.
        """
        raise BackendError(f"the {self.name} backend does not measure its stages; take --backend c")


def load(
    config: Config,
    weights: Weights,
    *,
    backend: str = "auto",
    n_threads: int | None = None,
    n_ctx: int,
    kv_type: str = "f16",
    activations: str = "int16",
) -> Backend:
    """Make a model ready to run.

    backend      "c", "numba", or "auto": DBF_BACKEND if set, else C, else, with a warning on stderr, Numba
    n_threads    None: one per physical core
    n_ctx        positions to make room for
    kv_type      of the KV cache: "f16" or "q8_0"
    activations  of sign products: "int16" or, faster and less exact, "int8"

    Raises BackendError if the backend is missing, or config and weights do not fit together, OptionError if
    kv_type or activations is unknown, or kv_type does not fit the model.
    """
    if backend == "auto":
        backend = os.environ.get("DBF_BACKEND", "auto")
    if backend not in NAMES:
        raise BackendError(f"unknown backend {backend!r}, wanted one of {', '.join(NAMES)}")
    if n_ctx < 1 or (n_threads is not None and n_threads < 1):
        raise BackendError(f"n_ctx is {n_ctx}, n_threads is {n_threads}: both must be 1 or more")
    check(config, weights)
    if config.n_positions and n_ctx > config.n_positions:
        raise OptionError(f"a context of {n_ctx} tokens, but the model knows {config.n_positions} positions")
    kv_row_bytes(config, kv_type)
    if activations not in cfg.ACTIVATIONS:
        raise OptionError(f"activations {activations!r} are unknown; there are {', '.join(cfg.ACTIVATIONS)}")
    if backend == "numba":
        return _load_numba(config, weights, n_threads, n_ctx, kv_type, activations)
    try:
        import cext
    except ImportError as e:
        if backend == "c":
            raise BackendError(f"the C core is not built ({e}); run: pip install -e .") from e
        print(
            f"warning: the C core is not built ({e}); Numba runs instead, many times slower. "
            "To build it: pip install -e .",
            file=sys.stderr,
        )
        return _load_numba(config, weights, n_threads, n_ctx, kv_type, activations)
    return CBackend(cext, config, weights, n_threads, n_ctx, kv_type, activations)


def _load_numba(
    config: Config, weights: Weights, n_threads: int | None, n_ctx: int, kv_type: str, activations: str
) -> Backend:
    try:
        from runtime.forward import NumbaBackend
    except ImportError as e:
        raise BackendError(
            f"no backend: Numba is missing ({e}); run: pip install -e . (C core) or pip install numba"
        ) from e
    return NumbaBackend(config, weights, n_threads, n_ctx, kv_type, activations)


def describe(activations: str) -> str:
    """What a backend's description says of them."""
    return "" if activations == "int16" else f", {activations} activations"


# ---- checks ------------------------------------------------------------------------------------------------


def dense_row_bytes(kind: int, cols: int) -> int:
    """Bytes of one row of a dense matrix. Raises BackendError if there is no such row."""
    block, nbytes = cfg.BLOCKS.get(kind, (0, 0))
    if not block or cols % block:
        raise BackendError(f"dense matrix: type {kind} with {cols} columns is not supported")
    return cols // block * nbytes


def _expect(name: str, array: NDArray[Any], shape: tuple[int, ...], dtype: type) -> None:
    if array.shape != shape or array.dtype != dtype:
        wanted = f"{np.dtype(dtype)} {shape}"
        raise BackendError(f"{name}: got {array.dtype} {array.shape}, wanted {wanted}")


def _check_linear(name: str, w: Linear, rows: int, cols: int) -> None:
    rank = w.rank
    if rank < 8 or rank % 8:
        raise BackendError(f"{name}: rank is {rank}, wanted a multiple of 8")
    _expect(f"{name}.a", w.a, (rows, rank // 8), np.uint8)
    _expect(f"{name}.b", w.b, (rank, (cols + 7) // 8), np.uint8)
    _expect(f"{name}.s_out", w.s_out, (rows,), np.float16)
    _expect(f"{name}.s_mid", w.s_mid, (rank,), np.float16)
    _expect(f"{name}.s_in", w.s_in, (cols,), np.float16)
    if w.bias is not None:
        _expect(f"{name}.bias", w.bias, (rows,), np.float32)


def _check_dense(name: str, w: Dense, config: Config) -> None:
    if (w.rows, w.cols) != (config.n_vocab, config.d_model):
        wanted = (config.n_vocab, config.d_model)
        raise BackendError(f"{name}: is {w.rows} x {w.cols}, wanted {wanted[0]} x {wanted[1]}")
    _expect(f"{name}.data", w.data, (w.rows, dense_row_bytes(w.type, w.cols)), np.uint8)


def _check_experts(name: str, layer: Layer, c: Config) -> None:
    if len(layer.experts) != c.n_experts or (layer.router is None) != (c.n_experts == 0):
        got = f"{len(layer.experts)} experts"
        raise BackendError(f"{name}: {got}, wanted {c.n_experts} and, for any, a router")
    if layer.shared_gate is not None:
        if not c.n_experts or layer.up is None:
            raise BackendError(f"{name}: shared_gate without a shared expert")
        _expect(f"{name}: shared_gate", layer.shared_gate, (c.d_model,), np.float32)
    if layer.router is None:
        return
    if not 1 <= c.n_experts_used <= min(c.n_experts, cfg.MAX_EXPERTS_USED):
        most = min(c.n_experts, cfg.MAX_EXPERTS_USED)
        raise BackendError(f"model: {c.n_experts_used} experts used, wanted 1 to {most}")
    _expect(f"{name}: router", layer.router, (c.n_experts, c.d_model), np.float32)
    for i, expert in enumerate(layer.experts):
        _check_linear(f"{name}: gate of expert {i}", expert.gate, c.d_expert, c.d_model)
        _check_linear(f"{name}: up of expert {i}", expert.up, c.d_expert, c.d_model)
        _check_linear(f"{name}: down of expert {i}", expert.down, c.d_model, c.d_expert)


def check(config: Config, weights: Weights) -> None:
    """Check that every array has the shape and type that config says, so that C reads no byte beyond.

    Raises BackendError naming the first that has not.
    """
    c = config
    if len(weights.layers) != c.n_layers:
        raise BackendError(f"model: {len(weights.layers)} layers, wanted {c.n_layers}")
    _check_dense("embed", weights.embed, c)
    _check_dense("head", weights.head, c)
    _expect("out_norm", weights.out_norm, (c.d_model,), np.float32)
    if weights.out_norm_bias is not None:
        _expect("out_norm_bias", weights.out_norm_bias, (c.d_model,), np.float32)
    if (weights.positions is None) != (c.n_positions == 0):
        raise BackendError(f"positions: n_positions is {c.n_positions}")
    if weights.positions is not None:
        _expect("positions", weights.positions, (c.n_positions, c.d_model), np.float32)
    for name in ("rope_freqs", "rope_freqs_long"):
        if getattr(weights, name) is not None:
            _expect(name, getattr(weights, name), (c.rope_dims // 2,), np.float32)
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    for i, layer in enumerate(weights.layers):
        if (layer.q_norm is None) != (layer.k_norm is None):
            raise BackendError(f"layer {i}: q_norm without k_norm, or the other way round")
        for name, norm in layer.norms.items():
            size = norm_size(c, name)
            _expect(f"layer {i}: {name}", norm, (size,), np.float32)
        if layer.window < 0 or layer.rope not in (cfg.NO_ROPE, cfg.ROPE, cfg.LOCAL_ROPE):
            raise BackendError(f"layer {i}: window is {layer.window}, rope is {layer.rope}")
        _check_linear(f"layer {i}: q", layer.q, heads, c.d_model)
        _check_linear(f"layer {i}: k", layer.k, kv, c.d_model)
        _check_linear(f"layer {i}: v", layer.v, kv, c.d_model)
        _check_linear(f"layer {i}: o", layer.o, c.d_model, heads)
        if (layer.up is None) != (layer.down is None) or (layer.up is None and not c.n_experts):
            raise BackendError(f"layer {i}: no feed-forward, or half of one")
        if layer.gate is not None:
            _check_linear(f"layer {i}: gate", layer.gate, c.d_ff, c.d_model)
        elif layer.up is not None and c.activation != cfg.GELU:
            raise BackendError(f"layer {i}: no gate, which only GELU does without")
        if layer.up is not None and layer.down is not None:
            _check_linear(f"layer {i}: up", layer.up, c.d_ff, c.d_model)
            _check_linear(f"layer {i}: down", layer.down, c.d_model, c.d_ff)
        _check_experts(f"layer {i}", layer, c)


def check_tokens(
    tokens: ArrayLike, pos: int, n_logits: int, held: int, config: Config, n_ctx: int
) -> NDArray[np.int32]:
    """The arguments of `Backend.eval`, checked; tokens as a contiguous int32 array."""
    ids = np.ascontiguousarray(tokens, dtype=np.int32)
    n = ids.size
    if ids.ndim != 1 or n < 1:
        raise BackendError(f"eval: tokens have the shape {ids.shape}, wanted (n,), n >= 1")
    if not 0 <= pos <= held:
        raise BackendError(f"eval: position {pos}, but the cache holds {held} positions")
    if pos + n > n_ctx:
        raise BackendError(f"eval: {n} tokens from position {pos} exceed the context of {n_ctx}")
    if not 0 <= n_logits <= n:
        raise BackendError(f"eval: {n_logits} logits wanted of {n} tokens")
    if ids.min() < 0 or ids.max() >= config.n_vocab:
        bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise BackendError(f"eval: token {bad}, wanted 0 .. {config.n_vocab - 1}")
    return ids


def _mapping(array: NDArray[Any]) -> object:
    """The read-only mapped file that the array is a view of; None if it is none."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    owner = base.obj if isinstance(base, memoryview) else base
    return owner if isinstance(owner, mmap.mmap) and memoryview(owner).readonly else None


def in_one_file(layer: Layer) -> bool:
    """Whether all sign matrices are contiguous views of one mapped file, whose pages can be read again."""
    signs = [array for w in layer.gguf_linears.values() for array in (w.a, w.b)]
    owner = _mapping(signs[0])
    return owner is not None and all(_mapping(a) is owner and a.flags.c_contiguous for a in signs)


# ---- C -----------------------------------------------------------------------------------------------------


class CBackend(Backend):
    """The C core. C borrows some arrays of `weights`: `_keep` holds all of them until `close`."""

    name = "c"

    def __init__(
        self,
        cext: Any,
        config: Config,
        weights: Weights,
        n_threads: int | None,
        n_ctx: int,
        kv_type: str,
        activations: str,
    ) -> None:
        self._ffi, self._lib = cext.ffi, cext.lib
        self._config = config
        self._keep: list[Any] = []
        self._model = self._session = self._ffi.NULL
        self._held = 0
        self.n_ctx, self.kv_type, self.activations = n_ctx, kv_type, activations
        self.n_threads = n_threads or int(self._lib.dbf_default_threads())
        demoted = self._lib.dbf_isa_demoted()
        if demoted:
            print(
                f"warning: the {self._string(demoted)} kernels failed their self-test on this CPU "
                "and are not used; please report this",
                file=sys.stderr,
            )
        try:
            self._open(config, weights)
        except BaseException:
            self.close()
            raise
        threads = f"{self.n_threads} thread{'s' if self.n_threads > 1 else ''}"
        self.description = f"C, {self._string(self._lib.dbf_isa_active())}, {threads}{describe(activations)}"

    def _open(self, config: Config, weights: Weights) -> None:
        ffi, lib = self._ffi, self._lib
        names = [name for name, _ in ffi.typeof("dbf_config").fields]
        c_config = ffi.new("dbf_config *", {name: getattr(config, name) for name in names})
        layers = ffi.new("dbf_layer[]", config.n_layers)
        for to, layer in zip(layers, weights.layers, strict=True):
            to.window, to.rope = layer.window, layer.rope
            for name, norm in layer.norms.items():
                setattr(to, name, self._borrow("float[]", norm))
            for name, linear in layer.linears.items():
                self._linear(getattr(to, name), linear)
            for name in ("router", "shared_gate"):
                if getattr(layer, name) is not None:
                    setattr(to, name, self._borrow("float[]", getattr(layer, name)))
            if layer.experts:
                to.experts = self._expert_linears(layer.experts)
        w = ffi.new("dbf_weights *")
        self._dense(w.embed, weights.embed)
        self._dense(w.head, weights.head)
        w.layers = layers
        w.out_norm = self._borrow("float[]", weights.out_norm)
        if weights.out_norm_bias is not None:
            w.out_norm_bias = self._borrow("float[]", weights.out_norm_bias)
        if weights.positions is not None:
            w.positions = self._borrow("float[]", weights.positions)
        w.mapped = all(in_one_file(layer) for layer in weights.layers)

        model, session = ffi.new("dbf_model **"), ffi.new("dbf_session **")
        self._ensure(lib.dbf_model_new(model, c_config, w, self.n_threads), "dbf_model_new")
        self._model = model[0]
        rope = cfg.rope_tables(config, weights, self.n_ctx)
        c_rope = ffi.from_buffer("float[]", rope) if rope.size else ffi.NULL
        kv_type, bits = cfg.KV_TYPES[self.kv_type], cfg.ACTIVATIONS[self.activations]
        self._ensure(
            lib.dbf_session_new(session, self._model, self.n_ctx, c_rope, kv_type, bits), "dbf_session_new"
        )
        self._session = session[0]

    def _borrow(self, ctype: str, array: NDArray[Any]) -> Any:
        """A C pointer to the array's memory, or to an aligned and contiguous copy of it; both are kept."""
        pointer = self._ffi.from_buffer(ctype, np.require(array, requirements=["C", "A"]))
        self._keep.append(pointer)
        return pointer

    def _expert_linears(self, experts: tuple[Expert, ...]) -> Any:
        array = self._ffi.new("dbf_linear[]", 3 * len(experts))
        self._keep.append(array)
        for i, expert in enumerate(experts):
            for j, linear in enumerate((expert.gate, expert.up, expert.down)):
                self._linear(array[3 * i + j], linear)
        return array

    def _linear(self, to: Any, w: Linear) -> None:
        to.rows, to.rank, to.cols = w.rows, w.rank, w.cols
        to.a, to.b = self._borrow("uint8_t[]", w.a), self._borrow("uint8_t[]", w.b)
        for name in ("s_out", "s_mid", "s_in"):
            setattr(to, name, self._borrow("uint16_t[]", getattr(w, name)))
        to.bias = self._ffi.NULL if w.bias is None else self._borrow("float[]", w.bias)

    def _dense(self, to: Any, w: Dense) -> None:
        data = w.data
        if w.type in (cfg.F32, cfg.F16) and data.ctypes.data % 4:  # C reads these as floats
            data = data.copy()
        to.type, to.rows, to.cols = w.type, w.rows, w.cols
        to.data = self._borrow("uint8_t[]", data)

    def _string(self, text: Any) -> str:
        return str(self._ffi.string(text).decode())

    def _ensure(self, code: int, what: str) -> None:
        if code == self._lib.DBF_EISA:
            have = ", ".join(
                self._string(self._lib.dbf_isa_name(i)) for i in range(self._lib.dbf_isa_count())
            )
            raise BackendError(f"DBF_ISA={os.environ.get('DBF_ISA', '')}: this machine has {have}")
        if code != self._lib.DBF_OK:
            raise BackendError(f"{what}: {self._string(self._lib.dbf_strerror(code))}")

    def eval(self, tokens: NDArray[np.int32], pos: int, n_logits: int) -> NDArray[np.float32]:
        if not self._session:
            raise BackendError("eval: the backend is closed")
        ids = check_tokens(tokens, pos, n_logits, self._held, self._config, self.n_ctx)
        logits = np.empty((n_logits, self._config.n_vocab), np.float32)
        ffi = self._ffi
        out = ffi.from_buffer("float[]", logits) if n_logits else ffi.NULL
        self._held = pos  # should the call fail, what lies beyond is lost
        code = self._lib.dbf_eval(
            self._session, ffi.from_buffer("int32_t[]", ids), ids.size, pos, out, n_logits
        )
        self._ensure(code, "dbf_eval")
        self._held = pos + ids.size
        return logits

    def start_stages(self) -> None:
        self._ensure(self._lib.dbf_stages_start(self._session), "start_stages")

    def stop_stages(self) -> dict[str, float]:
        n = self._lib.DBF_STAGES
        seconds = self._ffi.new("double[]", n)
        self._ensure(self._lib.dbf_stages_stop(self._session, seconds), "stop_stages")
        return {self._string(self._lib.dbf_stage_name(i)): seconds[i] for i in range(n)}

    def close(self) -> None:
        session, model = self._session, self._model
        self._session = self._model = self._ffi.NULL
        self._lib.dbf_session_free(session)
        self._lib.dbf_model_free(model)
        self._keep.clear()

    def __del__(self) -> None:
        if getattr(self, "_lib", None) is not None and getattr(self, "_model", None) is not None:
            self.close()


class Core:
    """The C core's instruction sets and timings, for `runtime.bench`.

    Attributes: isas (the usable ones, from slow to fast), active (the one in use, or None if DBF_ISA names an
    unusable one), demoted (one that this CPU has, but whose self-test failed, or None), default_threads, few
    (vectors that linear layers multiply one by one; more are multiplied side by side).

    Raises BackendError if the C core is not built.
    """

    def __init__(self) -> None:
        try:
            import cext
        except ImportError as e:
            raise BackendError(f"the C core is not built ({e}); run: pip install -e .") from e
        self._ffi, self._lib = cext.ffi, cext.lib
        names = (self._string(self._lib.dbf_isa_name(i)) for i in range(self._lib.dbf_isa_count()))
        self.isas: tuple[str, ...] = tuple(name for name in names if name is not None)
        self.demoted = self._string(self._lib.dbf_isa_demoted())
        self.default_threads = int(self._lib.dbf_default_threads())
        self.few = int(self._lib.DBF_FEW)

    @property
    def active(self) -> str | None:
        return self._string(self._lib.dbf_isa_active())

    @contextmanager
    def use(self, isa: str) -> Iterator[None]:
        """Within the body, `isa` is active."""
        before = self._lib.dbf_isa_active()
        self._ensure(self._lib.dbf_isa_use(isa.encode()), f"instruction set {isa!r}")
        try:
            yield
        finally:
            self._lib.dbf_isa_use(before)

    def sign_product_seconds(
        self, rows: int, cols: int, batch: int, bits: int, footprint: int, duration: float
    ) -> float:
        """Least time of a sign product of the active instruction set: dbf_bench_sign_product of dbf.h."""
        out = self._ffi.new("double *")
        code = self._lib.dbf_bench_sign_product(out, rows, cols, batch, bits, footprint, duration)
        self._ensure(code, f"sign product {rows} x {cols} x {batch}")
        return float(out[0])

    def dense_gemv_seconds(
        self, kind: int, rows: int, cols: int, batch: int, footprint: int, duration: float
    ) -> float:
        """Least time of a product with a dense matrix: dbf_bench_dense_gemv of dbf.h."""
        out = self._ffi.new("double *")
        code = self._lib.dbf_bench_dense_gemv(out, kind, rows, cols, batch, footprint, duration)
        self._ensure(code, f"product {rows} x {cols} x {batch} of type {kind}")
        return float(out[0])

    def read_seconds(self, nbytes: int, n_threads: int, duration: float) -> float:
        """Least time in which n_threads read nbytes of memory: dbf_bench_read of dbf.h."""
        out = self._ffi.new("double *")
        self._ensure(self._lib.dbf_bench_read(out, nbytes, n_threads, duration), f"reading {nbytes} bytes")
        return float(out[0])

    def _string(self, text: Any) -> str | None:
        return str(self._ffi.string(text).decode()) if text else None

    def _ensure(self, code: int, what: str) -> None:
        if code != self._lib.DBF_OK:
            raise BackendError(f"{what}: {self._string(self._lib.dbf_strerror(code))}")
