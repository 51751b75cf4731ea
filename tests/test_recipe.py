"""Presets: what they scale with, what overrides them."""

from __future__ import annotations

import math

import pytest

from dbf2gguf.recipe import PRESETS, find_recipe
from runtime.errors import OptionError


@pytest.mark.parametrize("preset", PRESETS)
def test_fewer_bits_more_steps(preset: str) -> None:
    at = {bpw: find_recipe(preset, bpw) for bpw in (1.0, 1.2, 2.0, 3.0)}
    assert at[2.0] == PRESETS[preset]
    for less, more in ((1.0, 1.2), (1.2, 2.0), (2.0, 3.0)):
        assert at[less].distill_steps > at[more].distill_steps
        assert at[less].text_rows > at[more].text_rows
    assert at[1.2].distill_steps == round(PRESETS[preset].distill_steps * math.sqrt(2 / 1.2))


@pytest.mark.parametrize("bpw", [0.0, -1.0, math.nan, math.inf, 1e99])
def test_senseless_bpw_is_left_to_the_plan(bpw: float) -> None:
    assert find_recipe("fast", bpw).distill_steps > 0


def test_overrides_hold() -> None:
    recipe = find_recipe("fast", 1.2, distill_steps=3, text_rows=None)
    assert recipe.distill_steps == 3
    assert recipe.text_rows == find_recipe("fast", 1.2).text_rows


def test_unknown_preset() -> None:
    with pytest.raises(OptionError, match="fastest"):
        find_recipe("fastest", 1.2)
