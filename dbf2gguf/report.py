"""What a conversion says: the plan, the tries, the summary, and why nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from dbf2gguf.budget import Plan, linear_bits
from dbf2gguf.evaluate import Quality
from dbf2gguf.options import Options
from dbf2gguf.search import COLLAPSED_KL
from runtime.format import kind_of


@dataclass(frozen=True)
class Errors:
    """Relative errors of the linear layers: GGUF name -> norm of the difference over that of the wanted.

    factorized  from the weight as corrected for the layers before it, weighted by the importances
    weights     of what is stored, from the original weight
    """

    factorized: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a conversion did. Sizes in bytes, times in seconds."""

    plan: Plan
    file: Path | None  # None after a dry run
    file_bytes: int
    model_weights: int  # all parameters, embedding and norms included, tied ones once
    quality: Quality | None
    seconds: dict[str, float]  # of each stage
    peak_rss: int
    tries: tuple[tuple[float, float], ...] = ()  # bits per weight asked for and mean KL, one after the other
    memory: dict[str, int] = field(default_factory=dict)  # stage -> most resident memory
    errors: Errors = field(default_factory=Errors)
    elapsed: float = 0.0  # from the start of the conversion to its end
    command: str = ""  # that gives the same file
    page: Path | None = None  # the report as HTML

    @property
    def file_bpw(self) -> float:
        """Bits of the whole file per weight of the whole model."""
        return self.file_bytes * 8 / self.model_weights

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "bpw": self.plan.bpw,
            "sign_bpw": self.plan.sign_bits / self.plan.weights,
            "file_bpw": self.file_bpw,
            "file_bytes": self.file_bytes,
            "quality": self.quality.describe() if self.quality else None,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "elapsed_seconds": round(self.elapsed, 2),
            "peak_rss_bytes": self.peak_rss,
            "tries": [list(one) for one in self.tries],
        }


def describe_plan(plan: Plan, size: int) -> str:
    """The plan as a table: one line for each kind of layer."""
    lines = [f"{'layers':<24}{'rows':>7}{'cols':>7}{'rank':>10}{'bpw':>8}"]
    kinds: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for name, shape in plan.shapes.items():
        kinds.setdefault((kind_of(name), shape), []).append(plan.ranks[name])
    for (kind, (rows, cols)), ranks in kinds.items():
        low, high = min(ranks), max(ranks)
        bits = sum(linear_bits(rows, cols, r) for r in ranks) / (len(ranks) * rows * cols)
        rank = f"{low}" if low == high else f"{low}-{high}"
        lines.append(f"{len(ranks):>4} x {kind:<17}{rows:>7}{cols:>7}{rank:>10}{bits:>8.3f}")
    lines.append(
        f"linear layers: {plan.bpw:.4f} bits per weight (asked for {plan.target:g}; signs alone "
        f"{plan.sign_bits / plan.weights:.4f}); tensors: {size / 2**20:.1f} MiB"
    )
    return "\n".join(lines)


def describe_try(tries: list[tuple[float, float]], limit: float) -> str:
    bpw, kl = tries[-1]
    enough = "good enough" if kl <= limit else "not good enough"
    return f"try {len(tries)}: {bpw:g} bits per weight: mean KL {kl:.4f}, {enough} for --max-kl {limit:g}"


def describe_refusal(out: Path, tries: list[tuple[float, float]], options: Options) -> str:
    """Why nothing is written, and what to do."""
    remedy = "more text (--calib, --text-rows) or a better --preset"
    bpw, kl = tries[-1]
    if options.max_kl is None:
        return (
            f"{out}: not written: the model has collapsed: the mean KL from the original is {kl:.3f} on "
            f"held-out text, the limit {COLLAPSED_KL:g}; take more bits (--bpw, now {bpw:g}), {remedy}, or "
            "--force to write it all the same"
        )
    bpw, kl = min(tries, key=lambda one: (not isfinite(one[1]), one[1]))
    return (
        f"{out}: not written: of {len(tries)} tries up to {max(tries)[0]:g} bits per weight, none has a mean "
        f"KL of {options.max_kl:g} or less on held-out text; the least was {kl:.4f}, with {bpw:g}; take a "
        f"larger --max-kl, {remedy}"
    )


def describe_report(report: Report) -> str:
    """The summary at the end."""
    times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    lines = [
        f"{report.file}: {report.file_bytes / 2**20:.1f} MiB, {report.plan.bpw:.4f} bpw in the linear "
        f"layers, {report.file_bpw:.3f} bpw over the whole file",
    ]
    if report.quality is not None:
        q = report.quality
        lines.append(
            f"held-out text ({q.tokens} tokens): perplexity {q.ppl:.2f} (original {q.ppl_reference:.2f}), "
            f"KL {q.kl_mean:.3f} mean, {q.kl_p99:.2f} p99, same top token {q.same_top1:.1%}"
        )
        if not q.kl_mean <= COLLAPSED_KL:
            lines.append(f"warning: KL above {COLLAPSED_KL:g}, written with --force: the model has collapsed")
    if report.page is not None:
        lines.append(f"report: {report.page}")
    lines.append(f"{report.elapsed:.0f} s in all: {times}; peak memory {report.peak_rss / 2**20:.0f} MiB")
    return "\n".join(lines)
