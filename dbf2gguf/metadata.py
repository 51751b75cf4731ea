"""Metadata that pass from one GGUF file to another."""

from __future__ import annotations

from collections.abc import Callable

import gguf
from gguf import GGUFValueType

from runtime.gguf import GgufFile


def copy_metadata(writer: gguf.GGUFWriter, file: GgufFile, wanted: Callable[[str], bool]) -> None:
    """Write the wanted keys of another file, by their names, as they are there."""
    for key, value in file.metadata.items():
        kind, element = file.metadata.kind(key)
        if wanted(key) and value != []:  # an empty array says what no array says
            writer.add_key_value(
                key, value, GGUFValueType(kind), None if element is None else GGUFValueType(element)
            )
