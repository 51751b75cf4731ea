"""dbf2gguf's runtime: runs DBF models on CPUs. `load` opens one; numpy only, never torch.

model = runtime.load("OUT.gguf")
ids = model.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
print(model.tokenizer.decode(list(model.generate(ids, runtime.Sampler(seed=1), max_tokens=100))))
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtime.engine import Engine, Sampling, Stats
    from runtime.model import ModelFile
    from runtime.sampling import Sampler
    from runtime.tokenizer import Tokenizer

__all__ = ["Model", "Sampler", "load"]

DEFAULT_CTX = 4096
"""Context of `load`, if the model was trained for as much: memory for the KV cache is taken at once."""

MAX_CTX = 1 << 24
MAX_THREADS = 1024
"""What the C core takes at most: MAX_CTX and MAX_THREADS of cext/src/model.c."""


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    n_threads: int | None = None,
    n_ctx: int | None = None,
    kv_type: str = "f16",
    activations: str = "int16",
) -> Model:
    """Open a model file and make it ready to run.

    path         a GGUF file made by dbf2gguf
    backend      "auto", "c" or "numba"
    n_threads    None: the number of physical cores
    n_ctx        tokens that prompt and answer may have together; None: what the model was trained for,
                 at most 4096
    kv_type      of the KV cache: "f16", or "q8_0", which takes half the memory
    activations  of sign products: "int16" or, faster and less exact, "int8"

    Raises FormatError, UnsupportedModelError, BackendError, OptionError, OSError.
    """
    from runtime.engine import Engine
    from runtime.errors import OptionError
    from runtime.model import load_model_file

    for name, value, most in (("context", n_ctx, MAX_CTX), ("number of threads", n_threads, MAX_THREADS)):
        if value is not None and not 1 <= value <= most:
            raise OptionError(f"the {name} is {value}, wanted 1 to {most}")
    file = load_model_file(path)
    try:
        from runtime import backend as backends

        ctx = min(file.config.n_ctx_train, DEFAULT_CTX) if n_ctx is None else n_ctx
        running = backends.load(
            file.config,
            file.weights,
            backend=backend,
            n_threads=n_threads,
            n_ctx=ctx,
            kv_type=kv_type,
            activations=activations,
        )
        file.file.release()  # most of it has been copied
    except BaseException:
        file.close()
        raise
    return Model(file, running, Engine(running, file.config.n_vocab))


class Model:
    """A model that runs; made by `load`. Also a context manager.

    Attributes: file (a ModelFile: config, weights, metadata), backend, engine.
    """

    def __init__(self, file: ModelFile, backend: Any, engine: Engine) -> None:
        self.file = file
        self.backend = backend
        self.engine = engine

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, made on first use.

        Raises FormatError if the file has none.
        """
        from runtime.tokenizer import Tokenizer

        return Tokenizer.from_metadata(self.file.metadata, self.file.path)

    @property
    def n_ctx(self) -> int:
        return self.engine.n_ctx

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache that one token takes; there is room for n_ctx of them."""
        from runtime.config import kv_bytes_per_token

        return kv_bytes_per_token(self.file.config, self.backend.kv_type)

    @property
    def stats(self) -> Stats:
        """Counts and times of the last `generate`."""
        return self.engine.stats

    def generate(
        self, ids: Sequence[int], sampler: Sampling | None = None, max_tokens: int | None = None
    ) -> Iterator[int]:
        """Continue ids; yields new tokens until a stop token, which is not yielded.

        ids         the whole prompt; what it shares with the last one is not evaluated again
        sampler     a Sampler, or a callable (logits, ids) -> id; None: Sampler()
        max_tokens  None: as many as fit the context

        Raises at once: ContextError if ids do not fit the context, OptionError for other misuse.
        """
        if sampler is None:
            from runtime.sampling import Sampler

            sampler = Sampler()
        return self.engine.generate(ids, sampler, max_tokens, self.tokenizer.stop_ids)

    def logits(self, ids: Sequence[int], n_last: int | None = None) -> NDArray[np.float32]:
        """Logits of the last n_last positions of ids (all if None): (n_last, n_vocab) float32."""
        return self.engine.logits(ids, n_last)

    def close(self) -> None:
        """Free the backend and the file."""
        self.engine.close()
        self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def __getattr__(name: str) -> Any:
    if name == "Sampler":  # imported on first use: `import runtime` stays light
        from runtime.sampling import Sampler

        return Sampler
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
