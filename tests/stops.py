"""Conversions that are stopped in the middle."""

from __future__ import annotations

from typing import Any

import pytest

from dbf2gguf.work import Work


class Stop(Exception):
    """What ends a conversion in the middle."""


class FragileWork:
    """From now on `Work.save` raises Stop the `left`-th time that it is called, and goes on then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, save = 0, Work.save

        def fragile(work: Work, name: str, part: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise Stop
            save(work, name, part)

        monkeypatch.setattr(Work, "save", fragile)
