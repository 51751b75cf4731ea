"""How few bits per weight are enough: a search in which every try is a conversion, so it tries little."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

COLLAPSED_KL = 3.0  # nats a token: beyond it a model says nothing sensible
STEP = 20  # tries are 1/20 bit per weight apart
FALL = 0.5  # of log KL with a bit per weight, until two tries tell; docs/RECIPE.md has 0.5 to 0.75
REACH = 1.0  # bits per weight, at least, that one goes beyond what was tried
MOST_KL = 20.0  # what does not count as more: a KL that is not finite, for one


def bpw_grid(least: float, most: float) -> list[float]:
    """Multiples of 1/STEP from least to most bits per weight, both included, rounded to what one types."""
    return [
        round(k / STEP, 4) for k in range(math.ceil(least * STEP - 1e-9), math.floor(most * STEP + 1e-9) + 1)
    ]


def smallest(kl: Callable[[float], float], grid: Sequence[float], limit: float, start: float) -> float | None:
    """The least bpw of the grid with kl(bpw) <= limit, if kl falls on the way up; None if there is none.

    kl     tries a bpw, each at most once; after one within the limit, only lower ones are tried
    grid   ascending
    start  where to begin; from there on, log kl is taken for a straight line, until that twice fails to halve
           what is left
    """
    tried: dict[int, float] = {}  # place in the grid -> log kl
    low, high = -1, len(grid)  # kl(grid[low]) > limit >= kl(grid[high])
    wanted, misled = bisect.bisect_left(grid, start), 0
    while high - low > 1:
        width, bracketed = high - low, low >= 0 and high < len(grid)
        place = min(max(wanted, low + 1), high - 1)
        value = kl(grid[place])
        tried[place] = math.log(min(max(value, 1e-9), MOST_KL) if math.isfinite(value) else MOST_KL)
        if value <= limit:
            high = place
        else:
            low = place
        misled = misled + 1 if bracketed and high - low > width / 2 else 0
        wanted = (low + high) // 2 if misled > 1 else _crossing(grid, tried, math.log(limit), low, high)
    return grid[high] if high < len(grid) else None


def _crossing(grid: Sequence[float], tried: dict[int, float], target: float, low: int, high: int) -> int:
    """Where a line through the two tries next to low and high reaches `target`: the first place beyond."""
    near = sorted(tried, key=lambda place: min(abs(place - low), abs(place - high)))[:2]
    bpw, value = grid[near[0]], tried[near[0]]
    slope = -FALL
    if len(near) == 2:
        slope = (tried[near[1]] - value) / (grid[near[1]] - bpw)
    away = (target - value) / min(slope, -1e-9)
    reach = max(REACH, grid[max(tried)] - grid[min(tried)])  # as far as what was tried lets one guess
    return bisect.bisect_left(grid, bpw + min(max(away, -reach), reach) - 1e-9)
