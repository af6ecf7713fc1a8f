"""The beginning of a GGUF file: what it says of the model, and how many weights it holds.

The package `gguf` reads the same, with every token of the vocabulary as an array of its own, which
takes seconds.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Types of values by their number in the file, as `struct` names them."""

TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """What stands before the weights."""

    fields: Mapping[str, Any]
    """Numbers and texts by name; lists are left out."""

    num_weights: int
    """Entries of all tensors."""


def read_header(path: Path) -> Header:
    """Read the beginning of a GGUF file.

    Args:
        path: The file.

    Returns:
        Its header.

    Raises:
        ValueError: If it is damaged, or of another form than versions 2 and 3 in small-endian
            numbers.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _Reader(content).read()
        except (struct.error, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no GGUF file that can be read ({error}).") from error


class _Reader:
    """A place in a file that moves on with what is read."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.place = 0

    def read(self) -> Header:
        """Read the header from the start."""
        magic, version, num_tensors, num_fields = self.take("IIQQ")
        if magic != int.from_bytes(b"GGUF", "little") or version not in (2, 3):
            raise ValueError("it begins otherwise")
        fields = {}
        for _ in range(num_fields):
            name = self.take_text()
            value = self.take_value(*self.take("I"))
            if value is not None:
                fields[name] = value
        num_weights = 0
        for _ in range(num_tensors):
            self.take_text()
            (num_dimensions,) = self.take("I")
            num_weights += math.prod(self.take(f"{num_dimensions}Q"))
            self.take("IQ")
        return Header(fields, num_weights)

    def take(self, form: str) -> tuple[Any, ...]:
        """Read numbers."""
        values = struct.unpack_from(f"<{form}", self.content, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values

    def take_text(self) -> str:
        """Read a text."""
        (length,) = self.take("Q")
        self.place += length
        return self.content[self.place - length : self.place].decode()

    def take_value(self, kind: int) -> Any:
        """Read a number or a text; pass by a list, and give None."""
        if kind == TEXT:
            return self.take_text()
        if kind != ARRAY:
            return self.take(NUMBERS[kind])[0]
        inner, length = self.take("IQ")
        if inner in NUMBERS:
            self.place += length * struct.calcsize(f"<{NUMBERS[inner]}")
            return None
        unpack, content = struct.Struct("<Q").unpack_from, self.content
        for _ in range(length):
            if inner == TEXT:
                self.place += 8 + unpack(content, self.place)[0]
            else:
                self.take_value(inner)
        return None
