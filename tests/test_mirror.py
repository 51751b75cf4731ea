"""C and Python say the same: names, parameters, formulas, constants."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from pycparser import c_ast, c_parser

import runtime
from runtime import config as cfg

ROOT = Path(__file__).parents[1]
KERNELS_H = (ROOT / "cext/src/kernels.h").read_text(encoding="utf-8")
LAYOUT_ONLY = {
    "sign_pack_bytes", "sign_table_bytes", "sign_pack", "sign_table", "sign_table8", "sign_gemv8",
    "to_columns", "to_rows",
}  # fmt: skip
"""Kernels that only lay out memory, or differ in that alone: kernels_numba.py has none of them, see there."""


def parse(text):
    """The C source as pycparser sees it, without comments and preprocessor lines."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    types = "".join(
        f"typedef int {t};" for t in ("size_t", "uint8_t", "uint16_t", "uint32_t", "int16_t", "int32_t")
    )
    return c_parser.CParser().parse(types + text)


def struct(text, name):
    for node in parse(text).ext:
        if isinstance(node, c_ast.Typedef) and node.name == name:
            return node.type.type.decls
    raise AssertionError(name)


def kernels():
    """name -> parameter names of every function pointer of kernels_t."""
    members = [d for d in struct(KERNELS_H, "kernels_t") if isinstance(d.type.type, c_ast.FuncDecl)]
    return {d.name: [p.name for p in d.type.type.args.params] for d in members}


def test_kernels_have_the_same_parameters():
    mirror = pytest.importorskip("runtime.kernels_numba")
    for name, parameters in kernels().items():
        if name not in LAYOUT_ONLY:
            assert list(inspect.signature(getattr(mirror, name).py_func).parameters) == parameters, name


def test_kernels_are_in_the_same_order():
    pytest.importorskip("numba")
    python = (ROOT / "runtime/kernels_numba.py").read_text(encoding="utf-8")
    c = (ROOT / "cext/src/kernels_ref.c").read_text(encoding="utf-8")
    names = [n for n in kernels() if n not in LAYOUT_ONLY]
    assert [n for n in re.findall(r"^def (\w+)\(", python, flags=re.MULTILINE) if n in names] == names
    assert [n for n in re.findall(r"^static \w+ (\w+)\(", c, flags=re.MULTILINE) if n in names] == names


def test_docstrings_open_with_the_formula_of_the_header():
    mirror = pytest.importorskip("runtime.kernels_numba")
    comments = re.sub(r"\s*\n\s*\*?\s*", " ", KERNELS_H)
    for name in kernels().keys() - LAYOUT_ONLY:
        formula = getattr(mirror, name).py_func.__doc__.split("\n\n")[0]
        assert re.sub(r"\s*\n\s*", " ", formula) in comments, name


def test_constants():
    mirror = pytest.importorskip("runtime.kernels_numba")
    scalar_h = (ROOT / "cext/src/scalar.h").read_text(encoding="utf-8")
    c = dict(re.findall(r"^#define (\w+) (-?[\d.e+-]+)f?\b", KERNELS_H + scalar_h, flags=re.MULTILINE))
    blocks = [f"{kind}_{what}" for kind in ("Q4_0", "Q8_0", "Q6_K") for what in ("BLOCK", "BYTES")]
    for name in ("LANES", "QMAX", "QMAX8", "STRIP", "Q6_K_GROUP", *blocks):
        assert getattr(mirror, name) == int(c[f"DBF_{name}"])
    for name in ("Q6_K_HIGH", "Q6_K_SCALES", "Q6_K_D"):
        assert getattr(mirror, name) == int(c[name])
    numbers = [name for name in c if name.startswith(("EXP_", "GELU_"))]
    assert len(numbers) == 13
    for name in numbers:
        assert getattr(mirror, name) == mirror.f32(c[name]), name


def test_header_constants_are_those_of_config():
    lib = pytest.importorskip("cext").lib
    for name in ("F32", "F16", "Q4_0", "Q8_0", "Q6_K"):
        assert getattr(lib, f"DBF_{name}") == getattr(cfg, name), name
    assert len(cfg.BLOCKS) == 5
    assert (lib.DBF_RMS, lib.DBF_LAYER) == (cfg.RMS_NORM, cfg.LAYER_NORM)
    for name in ("ADJACENT", "HALVES", "SILU", "GELU"):
        assert getattr(lib, f"DBF_{name}") == getattr(cfg, name), name


def test_structs_are_those_of_config():
    text = (ROOT / "cext/dbf.h").read_text(encoding="utf-8")
    for name, cls in [("dbf_config", cfg.Config), ("dbf_layer", cfg.Layer), ("dbf_dense", cfg.Dense)]:
        fields = {f.name for f in dataclasses.fields(cls)}
        assert {d.name for d in struct(text, name)} <= fields, name
    linear = {d.name for d in struct(text, "dbf_linear")} - {"rows", "rank", "cols"}
    assert linear == {f.name for f in dataclasses.fields(cfg.Linear)}


def test_limits_of_load():
    text = (ROOT / "cext/src/model.c").read_text(encoding="utf-8")
    assert f"#define MAX_CTX (1 << {runtime.MAX_CTX.bit_length() - 1})\n" in text
    assert runtime.MAX_CTX.bit_count() == 1
    assert f"#define MAX_THREADS {runtime.MAX_THREADS}\n" in text
