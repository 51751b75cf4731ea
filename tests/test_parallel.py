"""Tasks side by side on the cores."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dbf2gguf.parallel import AHEAD, map_on_cores, stop_if_unwanted


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # whatever happened, the caller has its threads back
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_in_order_and_side_by_side() -> None:
    together = threading.Barrier(2, timeout=30)

    def work(item: int) -> tuple[int, int, bool]:
        together.wait()  # passed only if two run at a time
        return item * item, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(map_on_cores(work, range(4))) == [(i * i, 1, False) for i in range(4)]


@pytest.mark.usefixtures("two_threads")
def test_items_are_taken_late() -> None:
    """Each may be large: so many are there at a time as two threads are to have, and one that is waiting."""
    taken: list[int] = []
    items = (taken.append(item) or item for item in range(20))  # type: ignore[func-returns-value]
    for done, result in enumerate(map_on_cores(lambda item: item, items)):
        assert result == done
        assert len(taken) <= done + AHEAD * 2
    assert len(taken) == 20


@pytest.mark.usefixtures("two_threads")
def test_one_item_gets_all_threads() -> None:
    assert list(map_on_cores(lambda _: torch.get_num_threads(), [0])) == [2]


@pytest.mark.usefixtures("two_threads")
def test_errors_reach_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_on_cores(lambda i: 1 // i, [1, 0, 1]))


@pytest.mark.usefixtures("two_threads")
def test_an_error_ends_the_other_tasks() -> None:
    waiting = threading.Event()

    def work(item: int) -> None:
        if item == 0:
            assert waiting.wait(30)
            raise RuntimeError
        for _ in range(3000):  # half a minute, unless it is stopped
            waiting.set()
            stop_if_unwanted()
            time.sleep(0.01)
        finished.append(item)

    finished: list[int] = []
    with pytest.raises(RuntimeError):
        list(map_on_cores(work, [0, 1]))
    assert not finished
    stop_if_unwanted()  # outside of a task: nothing


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_changes_nothing() -> None:
    matrices = [torch.randn(70, 70, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    together = list(map_on_cores(lambda m: m @ m.mT, matrices))
    torch.set_num_threads(1)
    alone = list(map_on_cores(lambda m: m @ m.mT, matrices))
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("items", [[0], [0, 1]])
@pytest.mark.usefixtures("two_threads")
def test_gradients_of_the_caller(items: list[int]) -> None:
    """Are recorded while he looks at a result, and after he has left the rest, whenever that is noticed."""
    left = map_on_cores(lambda _: torch.is_grad_enabled(), items)
    with torch.no_grad():
        assert next(left) is False
    assert torch.is_grad_enabled()
    left.close()
    assert torch.is_grad_enabled()
