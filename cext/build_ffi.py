"""Write the C source of the module cext._ffi: python build_ffi.py OUT.c

cffi's API mode: the declarations are dbf.h itself, less its preprocessor lines, and the C compiler
checks them against the header.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI

HEADER = Path(__file__).with_name("dbf.h")


def declarations() -> str:
    """dbf.h as cffi's parser takes it."""
    return re.sub(r"^#.*$", "", HEADER.read_text(encoding="utf-8"), flags=re.MULTILINE)


def main(out: str) -> None:
    """Write the source of cext._ffi to the file `out`."""
    ffi = FFI()
    ffi.cdef(declarations())
    ffi.set_source("cext._ffi", '#include "dbf.h"')
    ffi.emit_c_code(out)


if __name__ == "__main__":
    main(sys.argv[1])
