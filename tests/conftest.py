"""For all tests."""

import pytest

from dbf2gguf.cache import VARIABLE


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test makes its text itself, and leaves none in the user's cache."""
    monkeypatch.setenv(VARIABLE, "")
