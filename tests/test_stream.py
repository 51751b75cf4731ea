"""Conversions whose weights and states lie in files: the same bytes, in memory that blocks do not add to."""

from __future__ import annotations

import copy
import gc
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from safetensors.torch import load_file, save_file
from stops import FragileWork, Stop
from test_convert import MODELS

import dbf2gguf.convert
import dbf2gguf.correct
from dbf2gguf import calibrate, stream
from dbf2gguf.convert import convert
from dbf2gguf.factorize import Factors, signs
from dbf2gguf.memory_need import Need, choose_streamed
from dbf2gguf.options import Options, check_options, parse_size
from dbf2gguf.progress import Stage
from dbf2gguf.recipe import find_recipe
from dbf2gguf.source import linear_names, load_model, open_source
from dbf2gguf.stream import KeptFactors, OnDisk, Scratch, SignsOnly, stream_model
from dbf2gguf.synthetic import write_checkpoint
from dbf2gguf.work import Work
from runtime.errors import FormatError, OptionError

OPTIONS: dict[str, Any] = tiny_hf.QUICK | {"distill_steps": 0, "force": True}

NEED = Need(base=0, whole=9 << 30, streamed=2 << 30, block=1 << 20, disk=0)
HUGE = Need(base=0, whole=9 << 60, streamed=2, block=1, disk=0)  # no machine has that

FAMILIES = [
    "mha-separate-head", "biases", "odd-sizes", "qwen3", "gemma3-scales", "gemma2", "gpt2", "granite",
    "olmo2", "smollm3", "phi3-longrope", *tiny_hf.EXPERTS,
]  # fmt: skip
"""Those of MODELS between which something differs here: fused and transposed weights, ties, windows, caps,
experts."""


def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions are streamed from now on, however much memory there is."""
    monkeypatch.setattr(dbf2gguf.convert, "choose_streamed", lambda *_: True)
    monkeypatch.setattr(dbf2gguf.convert, "load_model", lambda *_: pytest.fail("all weights were loaded"))


def given(text: Path) -> Options:
    """What can be streamed."""
    recipe = find_recipe("fast", distill_steps=0)
    return Options("fast", recipe, (text,), None, "q8_0", "dbf1", seed=0, device="cpu", quiet=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny_hf.write_text(tmp_path / "text.txt")


# The result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, name: str) -> None:
    model = tiny_hf.write_folder(tmp_path / "model", **MODELS[name])
    convert(model, tmp_path / "whole.gguf", calib=[text], **OPTIONS)
    streaming(monkeypatch)
    report = convert(model, tmp_path / "streamed.gguf", calib=[text], **OPTIONS)
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "streamed.gguf.work").exists()
    assert report.quality is not None


@pytest.mark.parametrize("name", tiny_hf.EXPERTS)
def test_same_bytes_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, name: str
) -> None:
    """Some are corrected, by tokens of more than one batch. A folder that is made of a GGUF file has all
    experts of a layer in one tensor."""
    folder = tiny_hf.write_folder(tmp_path / "model", **tiny_hf.EXPERTS[name])
    model = tiny_hf.write_standard_gguf(tmp_path / "model.gguf", folder)
    monkeypatch.setattr(dbf2gguf.correct, "TOKENS_PER_INPUT", 1)
    monkeypatch.setattr(dbf2gguf.correct, "BATCH_ROWS", 4)
    options = OPTIONS | {"calib": [text], "correct_rows": 8}
    convert(model, tmp_path / "whole.gguf", **options)
    streaming(monkeypatch)
    convert(model, tmp_path / "streamed.gguf", **options)
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_bytes_from_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, dtype: torch.dtype
) -> None:
    write_checkpoint(tmp_path / "model", "tiny", dtype=dtype, num_hidden_layers=2, hidden_size=64)
    options = OPTIONS | {"calib": [text], "carrier": "i8", "correct_rows": 8}
    convert(tmp_path / "model", tmp_path / "whole.gguf", **options)
    streaming(monkeypatch)
    convert(tmp_path / "model", tmp_path / "streamed.gguf", **options)
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_what_no_index_names_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """The same weights in another layout, say, beside those of the index."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64}
    write_checkpoint(tmp_path / "model", "tiny", **sizes)
    save_file({"tok_embeddings.weight": torch.zeros(2)}, tmp_path / "model" / "consolidated.safetensors")
    options = OPTIONS | {"calib": [text], "correct_rows": 8}
    convert(tmp_path / "model", tmp_path / "whole.gguf", **options)
    streaming(monkeypatch)
    convert(tmp_path / "model", tmp_path / "streamed.gguf", **options)
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_search_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """Tries share the streamed model, which none may change."""
    model = tiny_hf.write_folder(tmp_path / "model")
    options = OPTIONS | {"bpw": None, "max_kl": 0.5, "calib": [text]}
    whole = convert(model, tmp_path / "whole.gguf", **options)
    streaming(monkeypatch)
    convert(model, tmp_path / "streamed.gguf", **options)
    assert len(whole.tries) > 1
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("large", [0, 1 << 40])
def test_with_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, large: int) -> None:
    """Large layers have all threads of this process, whoever factorizes the others."""
    pytest.importorskip("joblib")
    model = tiny_hf.write_folder(tmp_path / "model")
    monkeypatch.setattr(dbf2gguf.correct, "LARGE", large)
    options = OPTIONS | {"calib": [text], "threads": 2}
    threads = torch.get_num_threads()
    try:
        convert(model, tmp_path / "whole.gguf", **options)
        streaming(monkeypatch)
        convert(model, tmp_path / "streamed.gguf", jobs=2, **options)
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_stopped_and_gone_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """One time streamed, another time not: they share what is finished."""
    model = tiny_hf.write_folder(tmp_path / "model")
    options = OPTIONS | {"calib": [text]}
    convert(model, tmp_path / "wanted.gguf", **options)
    generator, stops, work = random.Random(0), 0, FragileWork(monkeypatch)
    out = tmp_path / "out.gguf"
    while not out.exists():
        work.left = generator.randint(2, 6)
        monkeypatch.setattr(dbf2gguf.convert, "choose_streamed", lambda *_, even=stops % 2 == 0: even)
        try:
            convert(model, out, **options)
        except Stop:
            stops += 1
            assert not (tmp_path / "out.gguf.work" / "states").exists()
    assert stops > 1
    assert out.read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
    assert not (tmp_path / "out.gguf.work").exists()


def test_leftovers_of_a_killed_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    model = tiny_hf.write_folder(tmp_path / "model")
    out, work, save = tmp_path / "out.gguf", tmp_path / "out.gguf.work", Work.save

    def fragile(self: Work, name: str, part: Any) -> None:
        if "blk" in name:
            raise Stop
        save(self, name, part)

    monkeypatch.setattr(Work, "save", fragile)
    with pytest.raises(Stop):
        convert(model, out, calib=[text], **OPTIONS)
    monkeypatch.setattr(Work, "save", save)
    (work / "states").mkdir()
    (work / "states" / "7.pt").write_bytes(b"half a st")
    convert(model, out, calib=[text], **OPTIONS)
    assert not work.exists()


# Its parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gqa-tied", "gpt2", "gemma2", "qwen2-moe"])
def test_gradients_block_after_block(tmp_path: Path, name: str) -> None:
    folder = tiny_hf.write_folder(tmp_path / "model", **MODELS[name])
    source = open_source(folder, tmp_path)
    model = load_model(source)
    names = linear_names(model, source.arch)
    rows = torch.randint(3, tiny_hf.N_VOCAB, (6, 24), generator=torch.Generator().manual_seed(1))
    wanted = calibrate.output_importance(model, names, rows, 4, Stage("", 1, quiet=True))
    with Scratch(tmp_path / "states") as scratch:
        streamed = stream_model(source, scratch)
        got = stream.output_importance(streamed, source.arch, names, rows, 4, Stage("", 1, True), scratch)
    assert set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_weights_are_read_and_set(tmp_path: Path) -> None:
    source = open_source(tiny_hf.write_folder(tmp_path / "model"), tmp_path)
    whole, path = load_model(source), "model.layers.1.mlp.down_proj"
    with Scratch(tmp_path / "states") as scratch:
        model = stream_model(source, scratch)
        module, other = model.get_submodule(path), copy.deepcopy(model).get_submodule(path)
        assert isinstance(module, torch.nn.Linear)
        assert isinstance(model.get_output_embeddings(), OnDisk)
        assert not any(p.is_meta or p.ndim > 1 for p in model.parameters())
        assert torch.equal(module.weight, whole.get_submodule(path).weight)
        changed = torch.randn(module.out_features, module.in_features)
        other.weight = torch.nn.Parameter(changed)
        assert torch.equal(other.weight, changed)
        assert torch.equal(module.weight, whole.get_submodule(path).weight)
        x = torch.randn(3, module.in_features)
        assert torch.equal(other(x), torch.nn.functional.linear(x, changed))
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize("name", ["mha-separate-head", "gpt2", *tiny_hf.EXPERTS])
def test_weights_are_read_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Large ones: what is mapped meanwhile is no more than a part. Experts may be parts themselves."""
    source = open_source(tiny_hf.write_folder(tmp_path / "model", **MODELS[name]), tmp_path)
    whole = load_model(source, "cpu")
    paths = linear_names(whole, source.arch).values()
    for most in (1, 300, stream.MAPPED):
        monkeypatch.setattr(stream, "MAPPED", most)
        with Scratch(tmp_path / "states") as scratch:
            model = stream_model(source, scratch)
            assert all(
                torch.equal(model.get_submodule(p).weight, whole.get_submodule(p).weight) for p in paths
            )
            assert torch.equal(model.get_output_embeddings().weight, whole.get_output_embeddings().weight)


def test_scratch(tmp_path: Path) -> None:
    with Scratch(tmp_path / "states") as scratch:
        first = torch.arange(6.0)
        kept = scratch.keep({"x": first * n, "none": None} for n in range(3))
        assert len(kept) == 3
        assert torch.equal(kept[-1]["x"], first * 2)
        assert [float(item["x"][1]) for item in kept] == [0, 1, 2]
        kept[1]["x"].fill_(7)
        assert float(kept[1]["x"][1]) == 1, "what is read is a copy"
        held = copy.deepcopy(scratch).store(first)
        assert len(list(scratch.folder.iterdir())) == 4
        del kept
        gc.collect()
        assert len(list(scratch.folder.iterdir())) == 1
        assert torch.equal(held(), first)


def test_kept_factors(tmp_path: Path) -> None:
    work = SignsOnly.of(Work.open(tmp_path / "work", {}, quiet=True).within("1.2-"))
    sizes = {"a": (1, 12, 8), "b": (1, 8, 21), "s_out": (1, 12), "s_mid": (1, 8), "s_in": (1, 21)}
    made = Factors(**{name: torch.randn(size) for name, size in sizes.items()})
    found = KeptFactors(work)
    with pytest.raises(KeyError):
        found["blk.0.attn_q"]
    work.save("blk.0.attn_q", vars(made))
    found["blk.0.attn_q"] = made
    for got in (found["blk.0.attn_q"], found.finished(lambda f: f[:1])["blk.0.attn_q"]):
        assert torch.equal(got.a, signs(made.a))
        assert torch.equal(got.b, signs(made.b))
        assert torch.equal(got.dense(), made.dense())
    assert (tmp_path / "work" / "1.2-blk.0.attn_q.pt").stat().st_size < 4000
    assert list(found) == ["blk.0.attn_q"]


# Errors ---------------------------------------------------------------------------------------------------


def without_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]


def too_wide(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 33)


def one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.inf


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_norm, "'model.layers.1.input_layernorm.weight' is missing"),
        (too_wide, r"'model.layers.0.mlp.up_proj.weight' is \(48, 33\); wanted \(48, 32\)"),
        (one_more, "1 tensors have no place .* 'model.layers.0.mlp.extra.weight'"),
        (not_finite, "'model.layers.1.mlp.down_proj.weight' holds NaN or infinity"),
    ],
)
def test_broken_checkpoints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    folder = tiny_hf.write_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    streaming(monkeypatch)
    with pytest.raises(FormatError, match=message):
        convert(folder, tmp_path / "out.gguf", calib=[text], **OPTIONS)


def without_expert(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]


def expert_too_wide(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"] = torch.zeros(48, 33)


def one_expert_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.block_sparse_moe.experts.4.w1.weight"] = torch.zeros(48, 32)


def too_few_in_one(tensors: dict[str, torch.Tensor]) -> None:
    for index in range(4):
        del tensors[f"model.layers.0.block_sparse_moe.experts.{index}.w2.weight"]
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(3, 32, 48)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_expert, "'model.layers.1.mlp.experts.2.up_proj.weight' is missing"),
        (expert_too_wide, r"'model.layers.0.\S+.experts.0.w1.weight' is \(48, 33\); wanted \(48, 32\)"),
        (one_expert_more, "1 tensors have no place .* 'model.layers.0.block_sparse_moe.experts.4.w1.weight'"),
        (too_few_in_one, r"experts.down_proj' is \(3, 32, 48\); wanted \(4, 32, 48\)"),
    ],
)
def test_broken_experts(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    folder = tiny_hf.write_folder(tmp_path / "model", **tiny_hf.EXPERTS["mixtral"])
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with Scratch(tmp_path / "states") as scratch, pytest.raises(FormatError, match=message):
        stream_model(open_source(folder, tmp_path), scratch)


def test_too_little_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_hf.write_folder(tmp_path / "model")
    few = tmp_path / "few.txt"
    few.write_text("the cat sat on the mat " * 12)
    streaming(monkeypatch)
    with pytest.raises(OptionError, match=r"--calib: the files hold \d+ of 10 rows of 24 tokens"):
        convert(folder, tmp_path / "out.gguf", calib=[few], **OPTIONS)


@pytest.mark.parametrize(
    ("text", "size"), [("6G", 6 << 30), ("1.5g", 3 << 29), ("800M", 800 << 20), ("64KiB", 65536), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "0", "-1G", "6 GB or so", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="--max-memory is"):
        parse_size(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_steps": 2}, r"all weights .* about 9.0G, .* 2.0G, but .* add --distill-steps 0"),
        ({"calib": ()}, "2.0G, but .* --calib"),
        ({"written_share": 0.5}, "2.0G, but .* --written-share 0"),
        ({"allocation": "sensitivity"}, "2.0G, but --allocation sensitivity needs all weights: take uniform"),
        ({"distill_steps": 2, "calib": ()}, "but .* --distill-steps 0; .* --calib"),
        ({}, "--max-memory is 1.0G; this conversion needs about 2.0G"),
    ],
)
def test_refused_up_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_hf.write_folder(tmp_path / "model")
    monkeypatch.setattr(dbf2gguf.convert, "find_need", lambda *_: NEED)
    monkeypatch.setattr(dbf2gguf.convert, "peak_rss", lambda: 0)  # of the tests before
    options = OPTIONS | {"calib": [text], "max_memory": "1G"} | changes
    with pytest.raises(OptionError, match=message):
        convert(folder, tmp_path / "out.gguf", **options)
    with pytest.raises(OptionError, match=message):
        convert(folder, tmp_path / "out.gguf", dry_run=True, **options)
    assert not (tmp_path / "out.gguf.work").exists()


def test_other_processes_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    """A limit that cannot be kept is none. Without one, --jobs does work: see test_with_jobs."""
    limited = replace(given(text), max_memory=4 << 30)
    with pytest.raises(OptionError, match="--max-memory and --jobs: its processes would take more"):
        check_options(replace(limited, jobs=2), None)
    for module in ("options", "memory_need"):
        monkeypatch.setattr(f"dbf2gguf.{module}.torchrun_size", lambda: 2)
    with pytest.raises(OptionError, match="--max-memory and torchrun: its processes would take more"):
        check_options(limited, None)
    source = open_source(tiny_hf.write_folder(tmp_path / "model"), tmp_path)
    assert not choose_streamed(HUGE, source, given(text))


def test_gpus_have_memory_of_their_own(tmp_path: Path, text: Path) -> None:
    options = replace(given(text), device="cuda:0", max_memory=1 << 30)
    with pytest.raises(
        OptionError, match="--max-memory is for CPUs, and the device is cuda:0; take --device"
    ):
        check_options(options, None)
    source = open_source(tiny_hf.write_folder(tmp_path / "model"), tmp_path)
    assert choose_streamed(HUGE, source, given(text))
    assert not choose_streamed(HUGE, source, replace(given(text), device="cuda:0"))


def test_streamed_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(dbf2gguf.convert, "choose_streamed", lambda *a: seen.append(a) or choose_streamed(*a))
    folder = tiny_hf.write_folder(tmp_path / "model")
    options = OPTIONS | {"calib": [tiny_hf.write_text(tmp_path / "text.txt")], "dry_run": True}
    convert(folder, tmp_path / "out.gguf", max_memory="100G", **options)
    convert(folder, tmp_path / "out.gguf", **options)
    (need, source, limited), (_, _, free) = seen
    assert limited.max_memory == 100 << 30
    assert free.max_memory is None
    assert need.whole > need.block > 4 * 32 * 48
    assert not choose_streamed(need, source, replace(limited, max_memory=need.whole))
    assert choose_streamed(HUGE, source, replace(limited, max_memory=2))
    assert choose_streamed(HUGE, source, free)
    assert not choose_streamed(need, source, free)


def test_files_that_may_not_suffice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then the need is that of a model that writes the rest itself."""
    needs = []
    monkeypatch.setattr(dbf2gguf.convert, "choose_streamed", lambda need, *_: needs.append(need))
    monkeypatch.setattr(dbf2gguf.convert, "resident", lambda: 1 << 20)
    folder = tiny_hf.write_folder(tmp_path / "model")
    for words in (1, 10000):
        (tmp_path / "text.txt").write_text("the cat sat on the mat " * words)
        options = OPTIONS | {"calib": [tmp_path / "text.txt"], "dry_run": True}
        convert(folder, tmp_path / "out.gguf", **options)
        convert(folder, tmp_path / "out.gguf", **options | {"written_share": 0.5})
    short, short_written, enough, enough_written = (need.whole for need in needs)
    assert short == short_written == enough_written > enough


# Memory ---------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
import dbf2gguf.convert
dbf2gguf.correct.TOKENS_PER_INPUT = 1 / 64  # experts are corrected
def memory(what):
    return int(re.search(what + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
needs = []
dbf2gguf.convert.choose_streamed = lambda need, *_: needs.append(need) or True
dbf2gguf.memory_need.Need.at_least = lambda need, peak: need  # that of the imports, which is forgotten
for model in sys.argv[1:3]:  # the first is to have everything imported
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = memory("VmRSS")
    dbf2gguf.convert.convert(
        model, sys.argv[3], bpw=1.0, calib=[sys.argv[4]], distill_steps=0, admm_iterations=1, row_tokens=64,
        text_rows=4, written_share=0, correct_rows=4, gradient_rows=4, eval_rows=1, force=True, quiet=True,
        threads=1, device="cpu", report=False,
    )
print(needs[-1].block, needs[-1].streamed - needs[-1].base, memory("VmHWM") - before)
"""


def peaks(first: Path, folders: list[Path], out: Path, text: Path) -> Iterator[list[int]]:
    """Of each conversion: the largest block, what was promised, and what it took. What MKL keeps for its next
    product, which on an Intel CPU is 4 to 6 MiB, belongs to the buffers of libraries that Need.base has."""
    env = os.environ | {"MKL_DISABLE_FAST_MM": "1"}
    for folder in folders:
        run = [sys.executable, "-c", PEAK, *map(str, (first, folder, out, text))]
        done = subprocess.run(
            run, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=True
        )
        yield [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_peak_memory(tmp_path: Path, text: Path) -> None:
    """More blocks take no more memory: twice that of one block. And no conversion takes more than it said
    that it would."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048}
    write_checkpoint(tmp_path / "first", "tiny", num_hidden_layers=1)
    folders = [tmp_path / "few", tmp_path / "many"]
    for folder, layers in zip(folders, (2, 6), strict=True):
        write_checkpoint(folder, "tiny", num_hidden_layers=layers, **sizes)
    found = list(peaks(tmp_path / "first", folders, tmp_path / "out.gguf", text))
    (block, promised, few), (_, _, many) = found
    assert block == 4 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768)
    assert max(few, many) <= promised, found
    others = 8 << 20  # what is not weights and does not grow with them
    assert max(few, many) <= 2 * block + others, found
    assert many - few < block / 4, "all weights of the others are four blocks"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_peak_memory_of_experts(tmp_path: Path) -> None:
    """The same: no more than the weights of one block, which the gradients need, and what goes with them."""
    text = tiny_hf.write_text(tmp_path / "text.txt", lines=400)
    experts = tiny_hf.EXPERTS["qwen2-moe"]

    def folder(layers: int, d_model: int, d_expert: int, d_shared: int) -> Path:
        sizes = {"hidden_size": d_model, "moe_intermediate_size": d_expert, "num_hidden_layers": layers}
        sizes["shared_expert_intermediate_size"] = d_shared
        return tiny_hf.write_folder(tmp_path / f"{layers}", **experts | sizes)

    first, *folders = folder(1, 128, 128, 128), folder(2, 512, 768, 1024), folder(6, 512, 768, 1024)
    found = list(peaks(first, folders, tmp_path / "out.gguf", text))
    (block, promised, few), (_, _, many) = found
    assert block > 4 * 3 * 512 * (6 * 768 + 1024)
    assert max(few, many) <= promised, found
    assert promised < 2 * block
    assert many - few < block / 4, "all weights of the others are four blocks"
