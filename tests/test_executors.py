"""Independent layers factorized by threads, processes and a Dask cluster: the same bytes whoever does it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tasks
import tiny_hf
import torch

import dbf2gguf.correct
import dbf2gguf.executors
from dbf2gguf import cli
from dbf2gguf.convert import convert
from dbf2gguf.executors import Task, open_executor
from dbf2gguf.factorize import Factors, factorize
from runtime.errors import BackendError

OPTIONS = tiny_hf.QUICK | {"threads": 2, "distill_steps": 0}
SECONDS = 90  # for a process to start, or to notice


# A cluster of real processes ------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """python -m COMMAND while the context lasts."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    started = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


class Cluster:
    def __init__(self, stack: ExitStack, workers: int) -> None:
        port = free_port()
        self.address = f"tcp://127.0.0.1:{port}"
        host = ("--host", "127.0.0.1", "--no-dashboard")
        self.scheduler = stack.enter_context(process("dask", "scheduler", *host, "--port", str(port)))
        self.workers = [
            stack.enter_context(process("dask", "worker", self.address, *WORKER)) for _ in range(workers)
        ]
        self.wait_for(workers)

    def wait_for(self, workers: int) -> None:
        from distributed import Client

        end = time.monotonic() + SECONDS
        while True:
            with suppress(OSError), Client(self.address, timeout=5, set_as_default=False) as client:
                if len(client.nthreads()) == workers:
                    return
            assert time.monotonic() < end
            time.sleep(0.3)


WORKER = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    with ExitStack() as stack:
        yield Cluster(stack, 2)


@pytest.fixture
def fresh_cluster() -> Iterator[Cluster]:
    """One that a test may break."""
    pytest.importorskip("distributed")
    with ExitStack() as stack:
        yield Cluster(stack, 2)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # whatever happened, the caller has its threads back
    torch.set_num_threads(before)


def run(some: list[Task], single: bool = False, **how: Any) -> list[Any]:
    with open_executor(**how) as executor:
        return list(executor(some, single))


def same(some: list[Factors], others: list[Factors]) -> bool:
    return all(
        torch.equal(one, other)
        for a, b in zip(some, others, strict=True)
        for one, other in zip(vars(a).values(), vars(b).values(), strict=True)
    )


# Executors ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
def test_threads() -> None:
    here = os.getpid()
    assert run([tasks.threads] * 2) == [(here, 1, False)] * 2
    assert run([tasks.threads]) == [(here, 1, False)]  # the last that was left of several
    assert run([tasks.threads], single=True) == [(here, 2, False)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["jobs", "cluster"])
def test_elsewhere(kind: str, cluster: Cluster) -> None:
    """In other processes, with one thread each, in order, to the bit what threads make."""
    how = {"jobs": 2} if kind == "jobs" else {"cluster": cluster.address}
    some: list[Task] = [partial(tasks.factors, seed) for seed in range(5)]
    wanted = run(some)
    assert not same(wanted[:1], wanted[1:2])
    with open_executor(**how) as executor:
        assert same(list(executor(some, False)), wanted)
        found = list(executor([tasks.threads] * 4, False))
        assert all(rest == [1, False] for _, *rest in found)
        pids = {pid for pid, *_ in found}
        if kind == "cluster":
            assert pids == {worker.pid for worker in cluster.workers}
        else:
            assert os.getpid() not in pids
        assert list(executor([tasks.threads], True)) == [(os.getpid(), 2, False)]
        assert same(list(executor(some[1:2], False)), wanted[1:2])
        if kind == "cluster":
            with pytest.raises(BackendError, match=f"{cluster.address}: ZeroDivisionError: of no use"):
                list(executor([tasks.pid, tasks.fail, tasks.pid], False))
        else:
            with pytest.raises(ZeroDivisionError):
                list(executor([tasks.pid, tasks.fail, tasks.pid], False))
            with pytest.raises(BackendError, match="--jobs 2: a process was killed"):
                list(executor([partial(tasks.die, os.getpid())] * 2, False))


def test_a_cluster_falls_apart(
    fresh_cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dbf2gguf.executors, "POLL_SECONDS", 0.5)
    some: list[Task] = [partial(tasks.slow_factors, seed, str(tmp_path)) for seed in range(3)]
    wanted = run([partial(tasks.factors, seed) for seed in range(3)])
    address, (victim, other) = fresh_cluster.address, fresh_cluster.workers

    def kill_at_work() -> None:
        end = time.monotonic() + SECONDS
        while not list(tmp_path.glob(f"*-{victim.pid}")) and time.monotonic() < end:
            time.sleep(0.05)
        victim.kill()

    with open_executor(cluster=address) as executor, ExitStack() as stack:
        # One of two workers is killed: what it was at is made again by the other.
        killer = threading.Thread(target=kill_at_work)
        killer.start()
        assert same(list(executor(some, False)), wanted)
        killer.join()
        assert victim.wait(SECONDS) == -signal.SIGKILL
        began = [file.name.split("-") for file in tmp_path.iterdir()]
        assert len(began) > len(some)

        # Then there is none: it says so and waits; a new one may come.
        other.kill()
        other.wait()
        revive = threading.Timer(4, lambda: stack.enter_context(process("dask", "worker", address, *WORKER)))
        revive.start()
        assert same(list(executor(some, False)), wanted)
        revive.join()
        assert capsys.readouterr().err.count("has no workers left; waiting") == 1

        # And no scheduler.
        stop = threading.Timer(1, fresh_cluster.scheduler.kill)
        stop.start()
        with pytest.raises(BackendError, match=f"{address}: .*goes on"):
            list(executor(some * 20, False))
        stop.join()


def test_other_versions(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbf2gguf.executors, "_versions", lambda: {"torch": "1.0"})
    with pytest.raises(BackendError, match=r"worker on .* has .*wanted .*'1.0'.*other versions"):
        run([tasks.pid] * 2, cluster=cluster.address)


# Conversions ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf.write_folder(tmp_path_factory.mktemp("executors") / "model")


@pytest.fixture(scope="module")
def wanted(model: Path) -> bytes:
    """The file as threads make it."""
    out = model.parent / "wanted.gguf"
    convert(model, out, **OPTIONS)
    return out.read_bytes()


def test_same_bytes(model: Path, wanted: bytes, cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for how in ({"jobs": 1}, {"jobs": 2}, {"cluster": cluster.address}):
        convert(model, out, **OPTIONS, **how)
        assert out.read_bytes() == wanted, how
        out.unlink()


def test_a_worker_is_killed(
    model: Path, wanted: bytes, fresh_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a conversion: after the first layer that came back."""
    save, out = dbf2gguf.convert.Work.save, tmp_path / "out.gguf"
    killed: list[int] = []

    def save_and_kill(work: Any, name: str, part: Any) -> None:
        save(work, name, part)
        if name.endswith("blk.0.attn_q") and not killed:
            os.kill(fresh_cluster.workers[1].pid, signal.SIGKILL)
            killed.append(fresh_cluster.workers[1].wait(SECONDS))

    monkeypatch.setattr(dbf2gguf.convert.Work, "save", save_and_kill)
    convert(model, out, **OPTIONS, cluster=fresh_cluster.address)
    assert killed == [-signal.SIGKILL]
    assert out.read_bytes() == wanted


def test_the_last_of_a_group(
    model: Path, wanted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion was stopped when one layer of several was missing: that one has one thread, as before."""
    save, out = dbf2gguf.convert.Work.save, tmp_path / "out.gguf"

    def save_two(work: Any, name: str, part: Any) -> None:
        save(work, name, part)
        if sum("attn" in file.name for file in out.with_name("out.gguf.work").glob("*.pt")) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dbf2gguf.convert.Work, "save", save_two)
        with pytest.raises(KeyboardInterrupt):
            convert(model, out, **OPTIONS)
    threads: list[tuple[tuple[int, ...], int]] = []

    def watched(weight: torch.Tensor, *args: Any, **options: Any) -> Factors:
        threads.append((tuple(weight.shape[1:]), torch.get_num_threads()))
        return factorize(weight, *args, **options)

    monkeypatch.setattr(dbf2gguf.correct, "factorize", watched)
    convert(model, out, **OPTIONS)
    assert out.read_bytes() == wanted
    key_or_value, output, gate, up, down = ((16, 32), (32, 32), (48, 32), (48, 32), (32, 48))
    assert threads[:5] == [(key_or_value, 1), (output, 2), (gate, 1), (up, 1), (down, 2)]


# What goes wrong ------------------------------------------------------------------------------------------


@pytest.fixture
def fails(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def message(*options: str) -> str:
        out = tmp_path / "out.gguf"
        assert cli.main([str(model), str(out), "--bpw", "4", "--device", "cpu", "-q", *options]) == 1
        assert not list(tmp_path.iterdir())
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return message


def test_no_scheduler(fails: Any) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    start = time.monotonic()
    assert f"--cluster {address}: no Dask scheduler answers" in fails("--cluster", address)
    assert time.monotonic() - start < 30
    assert "--cluster nonsense://x: no Dask" in fails("--cluster", "nonsense://x")


def test_no_workers(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbf2gguf.executors, "WORKERS_SECONDS", 1)
    with ExitStack() as stack:
        empty = Cluster(stack, 0)
        assert f"{empty.address}: the scheduler has no workers" in fails("--cluster", empty.address)


@pytest.mark.parametrize(
    ("option", "value", "package"), [("--jobs", "2", "joblib"), ("--cluster", "tcp://x:1", "distributed")]
)
def test_packages_are_missing(
    fails: Any, monkeypatch: pytest.MonkeyPatch, option: str, value: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = fails(option, value)
    assert f"{option} needs the package {package}" in message
    assert "pip install 'dbf2gguf[scale]'" in message


def test_bad_options(fails: Any, model: Path, tmp_path: Path) -> None:
    assert "--jobs is 0" in fails("--jobs", "0")
    with pytest.raises(BaseException, match="2"):
        cli.main([str(model), str(tmp_path / "x"), "--jobs", "2", "--cluster", "tcp://x:1"])


def test_only_when_asked() -> None:
    code = "import sys, dbf2gguf.executors; print(*(m for m in ('joblib', 'dask') if m in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
