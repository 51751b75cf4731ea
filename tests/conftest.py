"""For all tests."""

from collections.abc import Iterator

import pytest

from dbf2gguf.cache import VARIABLE


@pytest.fixture(autouse=True, scope="session")
def _no_cache() -> Iterator[None]:
    """Whatever tests convert makes its text itself, and leaves none in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "")
        yield
