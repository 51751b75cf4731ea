"""How much work a conversion does: the presets and what they stand for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from runtime.errors import OptionError

EMBED_TYPES = ("f16", "q8_0", "q6_k", "q4_0")
"""Types of the embedding and the head, as `--embed-type` names them."""

CARRIERS = ("dbf1", "i8")
"""Tensor types of sign matrices: our own, or I8, which readers that know no DBF1 can list."""

SIGN_RATE_POWER = -1.5


ALLOCATIONS = ("auto", "uniform", "sensitivity", "attribution", "channels")
"""How bits are spread over linear layers: see `allocate.allocate`, and for auto `Recipe.at`."""

FEW_BITS = 1.6
"""Bits per weight below which `channels` was measured to do better than `uniform`, before and after a short
distillation, and `best` gains by more steps: docs/ABLATIONS.md."""


CHECKPOINTING = ("auto", "on", "off")
"""Whether distillation holds each layer's input alone and runs the layer again in the backward pass."""


DTYPES = ("auto", "float32", "bfloat16")
"""Arithmetic of products while the model writes text and in the distillation; auto: bfloat16 where the
device has instructions for it."""


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of every stage. Rows are sequences of `row_tokens` tokens."""

    row_tokens: int = 512
    text_rows: int = 64  # distinct rows of calibration text; distillation runs over them in turn
    written_share: float = 0.0  # of the rows that the model writes, however many the files hold
    chat_share: float = 0.5  # of the prompts that the model writes from, as far as it knows chat
    correct_rows: int = 64  # rows that the sequential correction sees
    gradient_rows: int = 8  # rows for the output importances
    eval_rows: int = 8  # held-out rows of the receipt; no other stage sees them
    admm_iterations: int = 22
    damping: float = 0.1  # of the second moments' mean diagonal, in the sequential correction
    distill_steps: int = 16
    few_bits_steps: int = 0  # instead of them below FEW_BITS bits per weight; 0: as many
    distill_batch: int = 4  # rows a step
    scale_rate: float = 7e-3  # Adam's peak learning rate for scales of unit rms
    sign_rate: float = 4.2e-2  # and for the latents of mean magnitude 1, at 1 bit per weight: see `at`
    dense_rate: float = 0.0  # and for norms, embedding and head, relative to their rms; 0 leaves them alone
    warmup_steps: int = 5
    dtype: str = "auto"  # of products in the model's own text and the distillation, one of DTYPES
    checkpointing: str = "auto"  # whether layers run twice to save memory, one of CHECKPOINTING
    allocation: str = "uniform"  # of the bits over the linear layers, one of ALLOCATIONS

    def at(self, bpw: float) -> Recipe:
        """The recipe for so many bits per weight. The more there are, the closer is the start of the
        distillation, the smaller the rate at which signs may turn, the sooner it is done, and the less does
        it matter where the bits go. Without distillation, which holds all weights, auto asks for no more:
        uniform."""
        few = bpw < FEW_BITS
        steps = self.few_bits_steps if few and self.few_bits_steps else self.distill_steps
        allocation = self.allocation
        if allocation == "auto":
            allocation = "channels" if few and steps else "uniform"
        sign_rate = self.sign_rate * bpw**SIGN_RATE_POWER
        return replace(
            self, distill_steps=steps, few_bits_steps=0, sign_rate=sign_rate, allocation=allocation
        )

    def describe(self) -> dict[str, Any]:
        """All settings that `at` leaves, for the receipt."""
        return {name: value for name, value in asdict(self).items() if name != "few_bits_steps"}


PRESETS = {
    "fast": Recipe(),
    "balanced": Recipe(
        text_rows=1024,
        written_share=0.75,
        chat_share=0.25,
        correct_rows=128,
        gradient_rows=16,
        eval_rows=16,
        admm_iterations=80,
        distill_steps=256,
        scale_rate=5e-3,
        sign_rate=2e-2,
        warmup_steps=10,
        allocation="auto",
    ),
    "best": Recipe(
        text_rows=90112,
        written_share=0.5,
        chat_share=0.2,
        correct_rows=768,
        gradient_rows=128,
        eval_rows=40,
        admm_iterations=120,
        distill_steps=4500,
        few_bits_steps=6500,
        distill_batch=32,
        scale_rate=1.5e-2,
        sign_rate=2.5e-2,
        dense_rate=3e-3,
        warmup_steps=20,
    ),
}
DEFAULT_PRESET = "balanced"


def find_recipe(preset: str, **overrides: Any) -> Recipe:
    """The preset's recipe, with every override that is not None in place; distill_steps holds for any number
    of bits then. Raises OptionError."""
    if preset not in PRESETS:
        raise OptionError(f"--preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
    given = {k: v for k, v in overrides.items() if v is not None}
    if "distill_steps" in given:
        given["few_bits_steps"] = 0
    return replace(PRESETS[preset], **given)
