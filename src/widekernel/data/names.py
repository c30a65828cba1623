"""File names, compared after Unicode normalization and stored without a Python object per file."""

import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from typing_extensions import override


def normalize_name(name: str) -> str:
    """Return `name` with composed characters (NFC), for comparisons; macOS stores decomposed characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def in_normalized_order(names: list[str]) -> list[str]:
    """Return `names` in the order of their normalized forms."""
    if "".join(names).isascii():
        return sorted(names)
    return sorted(names, key=lambda name: (normalize_name(name), name))


def sort_key(path: str) -> tuple[str, str, str]:
    """Return the sort key of a file in a split; `path` is relative to the split.

    Files are ordered by class folder, then by folder as text, then by name.
    """
    folder, _, name = path.rpartition("/")
    top, _, below = folder.partition("/")
    return normalize_name(top), normalize_name(below), normalize_name(name)


class Names(Sequence[str]):
    """Many strings in one block of memory, which forked worker processes share with their parent.

    Attributes:
        text: the encoded names, each followed by a zero byte
        ends: where each name begins, and where the last one ends, in `text`
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.text: Any = bytearray()  # or an array of uint8
        self.ends: Any = array("q", [0])  # or an array of int64
        self.extend("", names)

    @classmethod
    def from_memory(cls, text: np.ndarray, ends: np.ndarray) -> "Names":
        """Return the names in `text` (uint8) and `ends` (int64), which another object had; they cannot be extended."""
        names = cls()
        names.text, names.ends = text, ends
        return names

    def extend(self, start: str, names: Iterable[str]) -> None:
        """Append each of `names` with the prefix `start`; surrogate escapes for undecodable bytes are kept."""
        if not isinstance(self.text, bytearray) or not isinstance(self.ends, array):
            raise TypeError("These names lie in memory of fixed size.")
        for name in names:
            self.text += (start + name).encode(errors="surrogateescape")
            self.text.append(0)
            self.ends.append(len(self.text))

    def normalized_block(self, first: int, last: int) -> bytes:
        """Return the normalized names from number `first` to below `last`, encoded, each followed by a zero byte."""
        block = bytes(memoryview(self.text)[self.ends[first] : self.ends[last]])
        if block.isascii():
            return block
        return normalize_name(block.decode(errors="surrogateescape")).encode(errors="surrogateescape")

    @override
    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "list[str]": ...

    @override
    def __getitem__(self, index: int | slice) -> "str | list[str]":
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"The index is {index}, but there are {len(self)} names.")
        name = bytes(memoryview(self.text)[self.ends[number] : self.ends[number + 1] - 1])
        return name.decode(errors="surrogateescape")

    @override
    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))
