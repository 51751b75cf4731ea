"""The C core, as cffi sees it: `lib` has the functions of dbf.h, `ffi` makes their arguments."""

from cext._ffi import ffi, lib

__all__ = ["ffi", "lib"]
