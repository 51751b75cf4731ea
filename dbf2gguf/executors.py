"""Who computes tasks that are independent of each other: threads of this process, processes of this machine,
or the workers of a Dask cluster.

The results are the same bytes whoever it is. What a product of matrices comes to depends, in its last bits,
on how many threads share it; so each of several tasks has one thread, wherever it runs, and a task that
stands alone, which would gain nothing elsewhere, has all threads of this process.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

from dbf2gguf.parallel import map_on_cores
from dbf2gguf.work import digest_of_code
from runtime.errors import BackendError

CONNECT_SECONDS = 5  # for a scheduler to answer
WORKERS_SECONDS = 20  # for its first worker to be there
POLL_SECONDS = 5  # between two looks at whether any worker is left
RETRIES = 2  # of a task that raised an error on a worker, for want of memory, say
VERSIONS = ("dbf2gguf", "torch")  # that a worker must share

Task = Callable[[], Any]
"""Has no arguments and no effects; to leave the process, it and its result must be picklable."""

Executor = Callable[[Iterable[Task], bool], Iterator[Any]]
"""(tasks, single) -> their results, in their order. `single`: the task stands alone and has all threads; else
each has one, also the last that is left of several, so that it comes out the same."""

Result = TypeVar("Result")


def on_cores(tasks: Iterable[Task], single: bool) -> Iterator[Any]:
    """Executor: the threads of this process."""
    return map_on_cores(_call if single else _call_alone, tasks)


def one_by_one(tasks: Iterable[Task], _single: bool) -> Iterator[Any]:
    """Executor: this thread, for tasks that have a GPU compute; each is taken when the last one is done."""
    return (task() for task in tasks)


@contextmanager
def open_executor(jobs: int | None = None, cluster: str | None = None) -> Iterator[Executor]:
    """An executor for as long as the context lasts.

    jobs     so many processes of this machine, through joblib
    cluster  else: the workers of the Dask scheduler at this address
    With neither: `on_cores`.

    Raises BackendError for a package that is missing, a scheduler that does not answer and one that has no
    workers; so does the executor for a process that was killed and a worker that failed.
    """
    if jobs is not None:
        with _processes(jobs) as executor:
            yield _from_two_on(executor)
    elif cluster is not None:
        with _dask(cluster) as executor:
            yield _from_two_on(executor)
    else:
        yield on_cores


def _call(task: Callable[[], Result]) -> Result:
    return task()


def _from_two_on(executor: Executor) -> Executor:
    def run(tasks: Iterable[Task], single: bool) -> Iterator[Any]:
        tasks = list(tasks)
        return (executor if len(tasks) > 1 else on_cores)(tasks, single)

    return run


def _call_alone(task: Callable[[], Result]) -> Result:
    """As map_on_cores does it: with one thread, without gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return task()
    finally:
        torch.set_num_threads(threads)


def _import(package: str, option: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{option} needs the package {error.name}; run: pip install 'dbf2gguf[scale]'"
        ) from error


@contextmanager
def _processes(jobs: int) -> Iterator[Executor]:
    joblib = _import("joblib", "--jobs")
    loky = _import("joblib.externals.loky", "--jobs")
    with joblib.Parallel(jobs, backend="loky", return_as="generator", max_nbytes=None) as parallel:

        def run(tasks: Iterable[Task], _single: bool) -> Iterator[Any]:
            try:
                yield from parallel(joblib.delayed(_call_alone)(task) for task in tasks)
            except loky.process_executor.BrokenProcessPool as error:
                raise BackendError(
                    f"--jobs {jobs}: a process was killed, for want of memory perhaps: take fewer; the same "
                    "command goes on from what is finished"
                ) from error

        try:
            yield run
        finally:
            loky.get_reusable_executor().shutdown(wait=True, kill_workers=True)


@contextmanager
def _dask(address: str) -> Iterator[Executor]:
    distributed = _import("distributed", "--cluster")
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        raise BackendError(
            f"--cluster {address}: no Dask scheduler answers there; start one with `dask scheduler` and name "
            "it as tcp://HOST:PORT"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKERS_SECONDS)
        except asyncio.TimeoutError as error:  # not the built-in one before Python 3.11
            raise BackendError(
                f"--cluster {address}: the scheduler has no workers; start some with `dask worker {address}`"
            ) from error
        yield lambda tasks, _single: _on_workers(client, address, tasks)


def _on_workers(client: Any, address: str, tasks: Iterable[Task]) -> Iterator[Any]:
    """What a task needs travels in it, so that the scheduler can give it to another worker when one dies."""
    wanted = _versions()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sending large graph")
        futures = deque(
            client.submit(_call_on_worker, task, wanted, pure=False, retries=RETRIES) for task in tasks
        )
    try:
        while futures:
            yield _wait(client, address, futures[0])
            futures.popleft()
    finally:
        client.cancel(list(futures))


def _wait(client: Any, address: str, future: Any) -> Any:
    told = False
    while True:
        try:
            return future.result(timeout=POLL_SECONDS)
        except BackendError:
            raise
        except Exception as error:  # a worker can raise anything
            if not isinstance(error, asyncio.TimeoutError) or future.status == "error":
                reason = " ".join(str(error).split()) or repr(error)
                raise BackendError(
                    f"--cluster {address}: {type(error).__name__}: {reason}; the same command goes on from "
                    "what is finished"
                ) from error
        with suppress(OSError):  # a scheduler that ends: the next look tells
            if not told and not client.nthreads():
                told = True
                print(f"note: {address} has no workers left; waiting for some", file=sys.stderr)


def _call_on_worker(task: Callable[[], Result], wanted: dict[str, str]) -> Result:
    found = _versions()
    if found != wanted:
        raise BackendError(
            f"the Dask worker on {socket.gethostname()} has {found}; wanted {wanted}, as here: other "
            "versions give other bytes"
        )
    return _call_alone(task)


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # on the path without being installed
            found[package] = "unknown"
    return found | {"code": digest_of_code()[:12]}
