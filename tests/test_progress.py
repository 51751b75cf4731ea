"""Lines of progress where there is no terminal."""

from __future__ import annotations

import pytest

from dbf2gguf import progress
from dbf2gguf.progress import Stage


def test_steps_of_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They say nothing of the time that is left; the next step does."""
    clock = iter([0.0, 30.0, 40.0, 60.0, 61.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Stage("text", 4) as stage:
        stage.step(n=0)
        stage.step(n=1)
        stage.step(n=3)
    assert capsys.readouterr().err.splitlines() == [
        "text: started",
        "text: 1/4, 2 min 0 s left",
        "text: done in 1 min 1 s",
    ]
