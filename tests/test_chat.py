"""runtime.chat with a backend whose answers are scripted, and runtime.load."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeModule
from make_gguf import tokenizer_json, write_model

import runtime
from runtime import chat
from runtime.errors import OptionError
from runtime.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tokenizer_json(), bos_id=1, eos_id=2)
END = [2]


def say(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special=False)


class Setup:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.path = str(tmp_path / "m.gguf")
        self.change: Any = None
        self.fake = FakeModule()

    def __call__(self, *args: str, script: list[int] | None = None, stdin: str = "") -> int:
        write_model(Path(self.path), change=self.change)
        self.fake = FakeModule(script=script or [])
        self.monkeypatch.setattr(runtime, "backend", self.fake, raising=False)
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return chat.main([self.path, "--temp", "0", "-c", "128", *args])

    @property
    def cached(self) -> str:
        """All that the backend has seen."""
        return TOKENIZER.decode(self.fake.loaded[0].cache)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(tmp_path, monkeypatch)


def test_one_prompt(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("-p", "Hi", script=say("Bonjour é€🙂") + END) == 0
    out, err = capsys.readouterr()
    assert out == "Bonjour é€🙂\n"
    assert err == ""
    assert program.cached.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert program.fake.loaded[0].closed


def test_options_reach_the_backend(program: Setup) -> None:
    options = ("-t", "3", "--backend", "numba", "--kv-type", "q8_0", "--activations", "int8")
    assert program("-p", "Hi", *options, script=END) == 0
    assert program.fake.asked == {
        "backend": "numba", "n_threads": 3, "n_ctx": 128, "kv_type": "q8_0", "activations": "int8",
    }  # fmt: skip


def test_system_and_stats(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("-p", "Hi", "--system", "Be kind.", "--stats", script=say("ok") + END) == 0
    out, err = capsys.readouterr()
    assert out == "ok\n"
    assert "load " in err
    assert "tokens/s" in err
    assert "peak memory" in err
    assert "KV cache f16, 0.1 KiB per token, " in err
    assert program.cached.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi")


def test_raw(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("-p", "the cat <|im_end|>", "--raw", "-n", "4", script=say(" sat")) == 0
    assert capsys.readouterr().out[:4] == " sat"
    assert program.cached.startswith("the cat <|im_end|>")
    assert 2 not in program.fake.loaded[0].cache  # a control token's name in raw text is text


def test_no_template_means_raw(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    program.change = lambda meta, _: meta.pop("tokenizer.chat_template")
    assert program("-p", "the", script=say(" cat") + END) == 0
    assert capsys.readouterr().err.startswith("[this model has no chat template")
    assert program("-p", "the", "--system", "x") == 1


def test_conversation(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    script = say("one") + END + say("two") + END + say("three") + END
    assert program("-n", "9", stdin="A\n\nB\n/stats\n/help\n/clear\n/foo\nC\n/exit\nD\n", script=script) == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\n"
    assert "/clear  forget" in err
    assert "unknown command /foo" in err
    assert "tokens/s" in err
    calls = program.fake.loaded[0].calls
    prompts = [c for c in calls if c[0] > 1]
    assert prompts[1][1] > 20  # the second turn re-used the first one's tokens
    assert "A<|im_end|>" not in program.cached  # forgotten
    assert "C<|im_end|>" in program.cached


def test_history_holds_the_answer(program: Setup) -> None:
    assert program(stdin="A\nB\n", script=say("one") + END + say("two") + END) == 0
    turn = (
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nB<|im_end|>\n"
    )
    assert program.cached.startswith(turn)


def test_context_full(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("-c", "40", "-p", "Hi") == 0
    assert "the context is full (40 tokens)" in capsys.readouterr().err
    assert program("-c", "40", "-p", "long " * 50) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: the prompt has ")
    assert program("-c", "40", stdin="long " * 50 + "\nHi\n", script=say("ok") + END) == 0
    out, err = capsys.readouterr()
    assert out == "ok\n"
    assert "/clear forgets the conversation" in err


def test_ctrl_c_stops_the_answer(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    class Module(FakeModule):
        def load(self, *args: Any, **options: Any) -> Any:
            backend = super().load(*args, **options)
            backend.interrupt_at = 2
            return backend

    write_model(Path(program.path))
    program.monkeypatch.setattr(runtime, "backend", Module(script=say("xyzw")), raising=False)
    program.monkeypatch.setattr(sys, "stdin", io.StringIO("A\n/exit\n"))
    assert chat.main([program.path, "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == "xy\n"
    assert "[stopped]" in err


def test_ctrl_c_before_the_answer_forgets_the_question(program: Setup) -> None:
    class Module(FakeModule):
        def load(self, *args: Any, **options: Any) -> Any:
            backend = super().load(*args, **options)
            backend.interrupt_at = 0
            return backend

    fake = Module(script=say("ok") + END)
    write_model(Path(program.path))
    program.monkeypatch.setattr(runtime, "backend", fake, raising=False)
    program.monkeypatch.setattr(sys, "stdin", io.StringIO("A\nB\n"))
    assert chat.main([program.path, "--temp", "0"]) == 0
    assert TOKENIZER.decode(fake.loaded[0].cache).startswith("<|im_start|>user\nB")
    assert chat.main([program.path, "--temp", "0", "-p", "A"]) == 130


def test_ctrl_c_at_the_prompt_leaves(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    program.monkeypatch.setattr("builtins.input", interrupted)
    assert program() == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--top-p", "7"], "top-p is 7.0"),
        (["-n", "-3"], "--max-tokens is -3"),
        (["-c", "0"], "the context is 0, wanted 1 to 16777216"),
        (["-c", "33554432"], "the context is 33554432, wanted 1 to 16777216"),
        (["-t", "0"], "the number of threads is 0, wanted 1 to 1024"),
        (["-t", "2000"], "the number of threads is 2000, wanted 1 to 1024"),
        (["--raw", "--system", "x"], "--system needs a chat template"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_bad_options(
    program: Setup, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert program("-p", "Hi", *args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(tmp_path / "none.gguf"), "-p", "x"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.gguf'}: No such file or directory\n"
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"x" * 100)
    assert chat.main([str(bad), "-p", "x"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {bad}: not a GGUF file")
    assert chat.main([str(bad), "-p", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        chat.main(["--nope"])
    assert e.value.code == 2


def test_template_refuses(program: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    program.change = lambda meta, _: meta.update({"tokenizer.chat_template": "{{ raise_exception('no') }}"})
    assert program("-p", "Hi") == 1
    assert capsys.readouterr().err == "error: the chat template refuses this conversation: no\n"


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chat.main(["--help"])
    out = capsys.readouterr().out
    for text in ("0.8", "0.95", "0.05", "physical cores", "--no-template"):
        assert text in out
    assert "None" not in out


def test_broken_pipe() -> None:
    code = (
        "import sys, argparse; from runtime import cli\n"
        "def f(args):\n    [print('x' * 1000) for _ in range(10000)]\n    return 0\n"
        "sys.exit(cli.run(f, argparse.Namespace(debug=False)))"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.read(10)
    program.stdout.close()
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait(20) == 1


def test_load(program: Setup) -> None:
    program("-p", "x", script=END)
    with runtime.load(program.path) as model:
        assert program.fake.asked == {
            "backend": "auto", "n_threads": None, "n_ctx": 128, "kv_type": "f16", "activations": "int16",
        }  # fmt: skip
        assert model.logits([3, 4, 5]).shape == (3, 300)
        ids = list(model.generate([3, 4, 5], max_tokens=5))
        assert len(ids) == 5
        assert model.stats.new_tokens == 5
        assert model.tokenizer.decode([3])
        assert runtime.Sampler(seed=1).seed == 1
    with pytest.raises(OptionError, match="the context is -1"):
        runtime.load(program.path, n_ctx=-1)
