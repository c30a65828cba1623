"""File names, compared after Unicode normalization and stored without a Python object per file."""

import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

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
    """Many strings in one block of memory, which forked worker processes share with their parent."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])
        self.extend("", names)

    def extend(self, start: str, names: Iterable[str]) -> None:
        """Append each of `names` with the prefix `start`; surrogate escapes for undecodable bytes are kept."""
        for name in names:
            self._text += (start + name).encode(errors="surrogateescape")
            self._ends.append(len(self._text))

    @override
    def __len__(self) -> int:
        return len(self._ends) - 1

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
        return self._text[self._ends[number] : self._ends[number + 1]].decode(errors="surrogateescape")

    @override
    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))
