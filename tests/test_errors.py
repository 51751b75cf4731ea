"""Whatever is wrong: one line on stderr, the right exit status, and no file touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import gguf
import pytest
import tiny_hf
from make_gguf import write_model
from safetensors.torch import load_file, save_file

from dbf2gguf import cli, convert
from runtime import chat, perplexity
from runtime.cli import INTERRUPTED

PRECIOUS = b"an earlier conversion"

OPTIONS = (
    "--quiet", "-t", "1", "--bpw", "4", "--text-rows", "4", "--correct-rows", "2", "--distill-steps", "1",
    "--admm-iterations", "2", "--no-report",
)  # fmt: skip


class Place:
    """A folder with a good model in `model`, a good text in `text`, and an earlier output in `out`."""

    def __init__(self, base: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.base, self.capsys = base, capsys
        self.model = base / "model"
        shutil.copytree(model, self.model)
        self.text = tiny_hf.write_text(base / "text.txt")
        self.out = base / "outputs" / "out.gguf"
        self.out.parent.mkdir()
        self.out.write_bytes(PRECIOUS)

    def run(self, *options: str, model: Path | None = None, out: Path | None = None) -> tuple[int, str]:
        """Exit status and stderr of a conversion."""
        arguments = [str(model or self.model), str(out or self.out), *OPTIONS, *options]
        try:
            code = cli.main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        said, err = self.capsys.readouterr()
        assert said == ""
        return code, err

    def untouched(self) -> None:
        """The earlier output is as it was, and nothing lies beside it but whole parts for the same command
        to go on from."""
        assert self.out.read_bytes() == PRECIOUS
        assert {p.name for p in self.out.parent.iterdir()} - {"out.gguf.work"} == {"out.gguf"}
        kept = self.out.with_name("out.gguf.work")
        if kept.exists():
            suffixes = {path.suffix for path in kept.iterdir()}
            assert suffixes == {".json", ".pt", ".sha256"}

    def fails(self, *options: str, model: Path | None = None, out: Path | None = None) -> str:
        """The message of a conversion that must fail."""
        code, err = self.run(*options, model=model, out=out)
        assert code == 1, err
        return self.one_line(err)

    def one_line(self, err: str) -> str:
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        self.untouched()
        return err.removeprefix("error: ").rstrip("\n")

    def edit_config(self, **changes: Any) -> None:
        file = self.model / "config.json"
        config = json.loads(file.read_text())
        config.update(changes)
        file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf.write_folder(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def place(tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, good, capsys)


def test_the_place_is_good(place: Place) -> None:
    """Without a mistake, the conversion works and says nothing."""
    assert place.run() == (0, "")
    assert place.out.read_bytes()[:4] == b"GGUF"
    assert [p.name for p in place.out.parent.iterdir()] == ["out.gguf"]


# The model ------------------------------------------------------------------------------------------------


def test_missing_model(place: Place) -> None:
    assert "nowhere: no such folder or file" in place.fails(model=place.base / "nowhere")


def test_not_a_model_folder(place: Place) -> None:
    (place.base / "empty").mkdir()
    assert "no config.json" in place.fails(model=place.base / "empty")


def test_not_a_model_file(place: Place) -> None:
    assert "text.txt: not a GGUF file" in place.fails(model=place.text)


def test_no_weights(place: Place) -> None:
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    assert "pytorch_model.bin: broken, or holds more than tensors" in place.fails()
    (place.model / "pytorch_model.bin").unlink()
    assert "no .safetensors file in it, and no pytorch_model.bin" in place.fails()


QWEN_MOE: dict[str, Any] = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; wanted no more than there are experts, 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; wanted an integer in 1..64"),
        ({"num_experts": 0}, "num_experts is 0; wanted an integer in 1..4096"),
        ({"num_experts": 10**9}, "num_experts is 1000000000; wanted an integer in 1..4096"),
        ({"num_experts": "many"}, "num_experts is 'many'; wanted an integer in 1..4096"),
    ],
    ids=str,
)
def test_senseless_experts(place: Place, changes: dict[str, Any], message: str) -> None:
    place.edit_config(**QWEN_MOE | changes)
    assert message in place.fails()


def test_gguf_with_experts_of_a_family_without(place: Place) -> None:
    for arch, count, what in (("qwen3", 4, "with"), ("qwen3moe", 0, "without")):
        writer = gguf.GGUFWriter(place.base / "x.gguf", arch)
        writer.add_expert_count(count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        message = f"architecture '{arch}' {what} experts is not supported"
        assert message in place.fails(model=place.base / "x.gguf")


@pytest.mark.parametrize("name", ["mamba2", "qwen7", "gemma3n", "paligemma", None, 7, ["llama"], {}])
def test_unsupported_architecture(place: Place, name: Any) -> None:
    """Named, with those that are supported."""
    place.edit_config(model_type=name)
    message = place.fails()
    assert f"model_type {name!r} is not supported" in message
    assert "llama" in message.partition("; supported: ")[2]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "RoPE scaling 'yarn'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "RoPE scaling 'dynamic'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({**QWEN_MOE, "mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
        ({**QWEN_MOE, "decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ],
)
def test_unsupported_feature(place: Place, changes: dict[str, Any], named: str) -> None:
    place.edit_config(**changes)
    message = place.fails()
    assert named in message
    assert "supported: " in message


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "{'model_type': 'llama'}", "\x00\xff"])
def test_broken_config(place: Place, text: str) -> None:
    (place.model / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in place.fails()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "big"},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5, "head_dim": None},
        {"num_key_value_heads": 3},
        {"vocab_size": -3},
        {"intermediate_size": None},
        {"head_dim": 7},
        {"rope_parameters": 7},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": "small"},
        {"torch_dtype": "float99", "dtype": "float99"},
    ],
    ids=str,
)
def test_senseless_config(place: Place, changes: dict[str, Any]) -> None:
    place.edit_config(**changes)
    place.fails()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "shapes contradict config.json"),
        ({"intermediate_size": 56}, "shapes contradict config.json"),
        ({"vocab_size": 310}, "shapes contradict config.json"),
        ({"num_key_value_heads": 4}, "shapes contradict config.json"),
        ({"num_hidden_layers": 3}, "9 tensors are missing"),
        ({"attention_bias": True}, "8 tensors are missing"),
        ({"num_hidden_layers": 1}, "9 tensors have no place in the model"),
    ],
    ids=str,
)
def test_config_of_another_model(place: Place, changes: dict[str, Any], message: str) -> None:
    place.edit_config(**changes)
    assert message in place.fails()


@pytest.mark.parametrize("size", [0, 5, 8, 200, 20000, -1])
def test_truncated_safetensors(place: Place, size: int) -> None:
    file = place.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors: broken or truncated" in place.fails()


def test_missing_tensor(place: Place) -> None:
    file = place.model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = place.fails()
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "1 tensors are missing" in message


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": 7}}'])
def test_broken_index(place: Place, index: str) -> None:
    (place.model / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in place.fails()


def test_index_names_a_missing_file(place: Place) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in place.fails()


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer(place: Place, content: str | None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place.model / name).unlink()
    if content is not None:
        (place.model / "tokenizer.json").write_text(content)
    assert "tokenizer" in place.fails()


# GGUF input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 23, 300, 8000, -1])
def test_truncated_gguf(place: Place, size: int) -> None:
    file = tiny_hf.write_standard_gguf(place.base / "plain.gguf", place.model)
    place.capsys.readouterr()
    file.write_bytes(file.read_bytes()[:size])
    assert "plain.gguf" in place.fails(model=file)


def test_factorized_gguf(place: Place) -> None:
    file = write_model(place.base / "dbf.gguf")
    assert "dbf.gguf: already factorized" in place.fails(model=file)


def test_gguf_of_another_architecture(place: Place) -> None:
    writer = gguf.GGUFWriter(place.base / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = place.fails(model=place.base / "x.gguf")
    assert "'mamba' is not supported; supported: gemma2" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "yarn"),
        ("attention.scale", 4),
        ("expert_gating_func", 2),
        ("leading_dense_block_count", 1),
    ],
)
def test_gguf_of_a_feature_that_is_not_there(place: Place, key: str, value: Any) -> None:
    """Never dropped in silence: the converted model would be another one."""
    writer = gguf.GGUFWriter(place.base / "x.gguf", "llama")
    (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert f"llama.{key} is {value!r}" in place.fails(model=place.base / "x.gguf")


def test_gguf_of_a_window_that_is_not_computed(place: Place) -> None:
    writer = gguf.GGUFWriter(place.base / "x.gguf", "qwen2")
    writer.add_sliding_window(4096)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = "qwen2.attention.sliding_window is 4096: a sliding window is not supported in 'qwen2'"
    assert message in place.fails(model=place.base / "x.gguf")


def test_gguf_without_keys(place: Place) -> None:
    writer = gguf.GGUFWriter(place.base / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "is missing" in place.fails(model=place.base / "x.gguf")


# Options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bpw", ["0.01", "9", "0", "-1", "nan", "inf", "1e99"])
def test_bpw_out_of_range(place: Place, bpw: str) -> None:
    assert "out of range: this model can have" in place.fails(f"--bpw={bpw}")


@pytest.mark.parametrize(
    "options",
    [
        ("--bpw", "much"), ("--preset", "fastest"), ("--embed-type", "q2"), ("--seed", "x"), ("--fast",),
        ("--dtype", "int8"), ("--text-rows", "many"), ("a", "third", "argument"),
    ],
)  # fmt: skip
def test_usage(place: Place, options: tuple[str, ...]) -> None:
    code, err = place.run(*options)
    assert code == 2
    assert "error: " in err.splitlines()[-1]
    place.untouched()


def test_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["model"], ["inspect"], ["convert", "x"]):
        with pytest.raises(SystemExit) as leaving:
            cli.main(arguments)
        assert leaving.value.code == 2
        assert "error: the following arguments are required" in capsys.readouterr().err


def test_unknown_preset_in_python(place: Place) -> None:
    with pytest.raises(convert.OptionError, match="'fastest' is unknown; there are fast"):
        convert.convert(place.model, place.out, preset="fastest")
    with pytest.raises(convert.OptionError, match="--embed-type 'q2' is unknown"):
        convert.convert(place.model, place.out, embed_type="q2")
    with pytest.raises(convert.OptionError, match="--dtype 'int8' is unknown; there are auto, float32, bf"):
        convert.convert(place.model, place.out, dtype="int8")
    place.untouched()


@pytest.mark.parametrize(
    "options",
    [
        ("--text-rows", "0"), ("--text-rows", "-5"), ("--correct-rows", "0"), ("--correct-rows", "-1"),
        ("--distill-steps", "-1"), ("--admm-iterations", "0"), ("--admm-iterations", "-2"),
        ("--threads", "0"), ("--threads", "-1"), ("--seed", "-1"), ("--seed", "99999999999999999999999"),
        ("--chat-share", "1.5"), ("--chat-share", "-0.5"), ("--chat-share", "nan"),
        ("--written-share", "1.5"), ("--written-share", "nan"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_senseless_numbers(place: Place, options: tuple[str, ...]) -> None:
    assert f"{options[0]} is {options[1]}; wanted" in place.fails(*options)


def test_output_is_an_input(place: Place) -> None:
    """A GGUF source, a calibration text, or what a symbolic link leads to."""
    assert "is an input, too" in place.fails("--calib", str(place.out))
    assert "is an input, too" in place.fails(model=place.out)
    link = place.base / "link.gguf"
    link.symlink_to(place.out)
    assert "is an input, too" in place.fails(model=place.out, out=link)


def test_output_is_a_device(place: Place) -> None:
    pipe = place.base / "pipe"
    os.mkfifo(pipe)
    assert "is a device or the like" in place.fails(out=pipe)
    assert pipe.is_fifo()


def test_quantized_already(place: Place) -> None:
    place.edit_config(quantization_config={"quant_method": "gptq", "bits": 4})
    assert "the weights are quantized already" in place.fails()


def test_not_finite(place: Place) -> None:
    file = place.model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert "'model.norm.weight' holds NaN" in place.fails()


def test_converter_is_not_installed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dbf2gguf.convert", None)
    assert "pip install 'dbf2gguf[convert]'" in place.fails()


@pytest.mark.parametrize("device", ["tpu", "", "cuda:99", "cuda", "cpu:foo", "cuda:x"])
def test_device(place: Place, device: str) -> None:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "--device" in place.fails("--device", device)


# Text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--calib", "--eval-text"])
def test_missing_text(place: Place, option: str) -> None:
    assert "nowhere.txt: no such text file" in place.fails(option, str(place.base / "nowhere.txt"))
    assert "no such text file" in place.fails(option, str(place.base))


@pytest.mark.parametrize("option", ["--calib", "--eval-text"])
def test_bad_json_line(place: Place, option: str) -> None:
    file = place.base / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{"text": \n')
    assert "bad.jsonl:2: not JSON" in place.fails(option, str(file))


@pytest.mark.parametrize("text", ["", "too short"])
def test_text_too_short(place: Place, text: str) -> None:
    """For the receipt; what calibration lacks, the model writes."""
    file = place.base / "short.txt"
    file.write_text(text)
    assert "--eval-text: " in place.fails("--eval-text", str(file))


def test_text_not_utf8(place: Place) -> None:
    file = place.base / "latin.txt"
    file.write_bytes(b"caf\xe9 " * 1000)
    assert "latin.txt: cannot be read as UTF-8" in place.fails("--calib", str(file))


# The output -----------------------------------------------------------------------------------------------


def test_out_is_a_folder(place: Place) -> None:
    assert "outputs: is a folder" in place.fails(out=place.out.parent)


def test_out_in_a_missing_folder(place: Place) -> None:
    message = place.fails(out=place.base / "nowhere" / "out.gguf")
    assert "does not exist" in message
    assert not (place.base / "nowhere").exists()


def test_out_in_a_file(place: Place) -> None:
    place.fails(out=place.text / "out.gguf")


def test_out_may_not_be_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_options: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("dbf2gguf.convert.tempfile.TemporaryFile", refuse)
    message = place.fails()
    assert "out.gguf: cannot write" in message
    assert "Permission denied" in message


def test_disk_too_small(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the work: nothing is loaded."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, (1 << 30) - 999, 999))
    monkeypatch.setattr(convert, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert "the disk has 0.0 MiB free; the conversion needs" in place.fails()


@pytest.mark.parametrize("stage", ["write_kv_data_to_file", "write_tensors_to_file"])
def test_disk_full_while_writing(place: Place, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Half of the file is there when the disk is full."""

    def fill(writer: gguf.GGUFWriter, *_args: Any, **_options: Any) -> NoReturn:
        assert writer.fout is not None
        writer.fout[0].write(b"half of it")
        writer.fout[0].flush()
        assert (place.out.parent / "out.gguf.work" / "out.gguf.tmp").stat().st_size >= 10
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, stage, fill)
    assert "No space left on device" in place.fails()


def test_written_wrongly(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read back differs from what was written: the file never gets its name."""
    real = convert.write_gguf

    def write_and_change(path: Path, *args: Any) -> None:
        real(path, *args)
        data = bytearray(path.read_bytes())
        data[-40] ^= 0x10
        path.write_bytes(data)

    monkeypatch.setattr(convert, "write_gguf", write_and_change)
    assert "differ when read back" in place.fails()


# Ctrl-C ---------------------------------------------------------------------------------------------------

STAGES = (
    "find_source", "load_model", "self_written_rows", "output_importance", "factorize_model", "distill",
    "measure", "write_gguf", "verify",
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_interrupt(place: Place, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def interrupt(*_args: Any, **_options: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, stage, interrupt)
    code, err = place.run()
    assert code == INTERRUPTED == 130
    assert err == "interrupted; nothing was written\n"
    place.untouched()


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory(place: Place, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def starve(*_args: Any, **_options: Any) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(convert, stage, starve)
    assert "memory" in place.fails().lower()


def test_debug_shows_a_traceback(place: Place) -> None:
    code, err = place.run("--debug", model=place.base / "nowhere")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


# The runtime's programs -----------------------------------------------------------------------------------

PROGRAMS: dict[str, Callable[[str, str], int]] = {
    "chat": lambda model, _: chat.main([model, "-p", "Hi"]),
    "perplexity": lambda model, text: perplexity.main([model, text, "--ctx", "16"]),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("size", [0, 4, 23, 200, 3000, 20000, -40])
def test_truncated_dbf_file(place: Place, program: str, size: int) -> None:
    file = write_model(place.base / "m.gguf")
    file.write_bytes(file.read_bytes()[:size])
    assert PROGRAMS[program](str(file), str(place.text)) == 1
    out, err = place.capsys.readouterr()
    assert out == ""
    assert "m.gguf" in place.one_line(err)


@pytest.mark.parametrize("program", PROGRAMS)
def test_plain_gguf(place: Place, program: str) -> None:
    file = tiny_hf.write_standard_gguf(place.base / "plain.gguf", place.model)
    place.capsys.readouterr()
    assert PROGRAMS[program](str(file), str(place.text)) == 1
    message = place.one_line(place.capsys.readouterr().err)
    assert "a plain GGUF file" in message
    assert "convert it first: dbf2gguf" in message


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_such_model(place: Place, program: str) -> None:
    assert PROGRAMS[program](str(place.base / "nowhere.gguf"), str(place.text)) == 1
    assert "nowhere.gguf: No such file" in place.one_line(place.capsys.readouterr().err)
