"""Presets: what they scale with, what overrides them."""

from __future__ import annotations

import pytest

from dbf2gguf.recipe import FEW_BITS, PRESETS, find_recipe
from runtime.errors import OptionError


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    """Each trains on what it has gathered, and every stage has its rows."""
    recipe = find_recipe(preset)
    assert recipe == PRESETS[preset]
    assert max(recipe.correct_rows, recipe.gradient_rows, recipe.distill_batch) <= recipe.text_rows
    assert recipe.distill_steps > recipe.warmup_steps


def test_overrides_hold() -> None:
    recipe = find_recipe("fast", distill_steps=3, text_rows=None)
    assert recipe.distill_steps == 3
    assert recipe.text_rows == find_recipe("fast").text_rows


def test_unknown_preset() -> None:
    with pytest.raises(OptionError, match="fastest"):
        find_recipe("fastest")


def test_signs_turn_less_where_bits_are_many() -> None:
    recipe = find_recipe("best", sign_rate=0.02)
    assert recipe.at(1.0).sign_rate == 0.02
    assert recipe.at(4.0).sign_rate == pytest.approx(0.02 / 8)
    assert recipe.at(4.0).at(1.0) == recipe.at(4.0)


def test_where_bits_go_matters_where_they_are_few() -> None:
    recipe = find_recipe("balanced")
    assert recipe.at(1.0).allocation == "channels"
    assert recipe.at(FEW_BITS).allocation == "uniform"
    assert find_recipe("balanced", distill_steps=0).at(1.0).allocation == "uniform"
    assert find_recipe("balanced", allocation="sensitivity").at(1.0).allocation == "sensitivity"
    assert find_recipe("best").at(1.0).allocation == "uniform", "long distillation makes up for it"


def test_few_bits_take_more_steps() -> None:
    recipe = find_recipe("best")
    assert recipe.at(1.0).distill_steps > recipe.at(FEW_BITS).distill_steps == recipe.distill_steps
    assert recipe.at(1.0).at(4.0).distill_steps == recipe.at(1.0).distill_steps, "decided once"
    for bpw in (1.0, 4.0):
        assert find_recipe("best", distill_steps=5).at(bpw).distill_steps == 5
        assert find_recipe("best", distill_steps=0).at(bpw).distill_steps == 0
        assert find_recipe("fast").at(bpw).distill_steps == find_recipe("fast").distill_steps
