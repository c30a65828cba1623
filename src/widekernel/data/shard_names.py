"""Names of many shards in one string: braces as in the shell, and wildcards."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from widekernel.errors import DataError

MOST_SHARDS = 100_000
"""Largest number of shards that one string may name."""

_BRACES = re.compile(r"(?<!\$)\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_WILDCARD = re.compile(r"[*?\[]")


def is_pattern(part: str) -> bool:
    """Return whether `part` has braces that expand (`{0..9}`, `{a,b}`) or wildcards (`*`, `?`, `[0-9]`)."""
    return bool(_WILDCARD.search(part)) or any(_alternatives(match.group(1)) for match in _BRACES.finditer(part))


def find_shards(root: Path, pattern: str, key: str) -> list[Path]:
    """Return the shards below `root` that `pattern` names, in its order; those of a wildcard are sorted by name.

    Args:
        root: the folder that relative names begin in
        pattern: names with braces and wildcards
        key: the setting that holds the pattern, for messages

    Raises:
        DataError: a shard that the braces name does not exist, nothing matches a wildcard, or there are too many.
    """
    shards: dict[str, None] = {}
    missing = []
    for name in _expanded(pattern, key):
        if not _WILDCARD.search(name):
            shards[name] = None
            if not (root / name).is_file():
                missing.append(name)
            continue
        found = sorted(glob.glob(name, root_dir=root))  # noqa: PTH207 - the name may be absolute
        if not found:
            raise DataError(f"{key} is {pattern!r}, but no file in {root} matches {name!r}. Check the name and data.root.")
        shards.update(dict.fromkeys(found))
    if missing:
        few = f"{missing[0]!r} and {len(missing) - 1:,} more do" if len(missing) > 1 else f"{missing[0]!r} does"
        raise DataError(
            f"{key} is {pattern!r}, which names {len(shards):,} shard(s), but {few} not exist in {root}. "
            "Correct the range, or copy the missing shards."
        )
    return [root / name for name in shards]


def _expanded(pattern: str, key: str) -> list[str]:
    names = []
    for name in _expand(pattern):
        names.append(name)
        if len(names) > MOST_SHARDS:
            raise DataError(f"{key} is {pattern!r}, which names more than {MOST_SHARDS:,} shards. Correct the range.")
    return names


def _expand(pattern: str) -> Iterator[str]:
    """Yield the names that the braces in `pattern` stand for, the last braces varying fastest."""
    for match in _BRACES.finditer(pattern):
        choices = _alternatives(match.group(1))
        if choices:
            before, after = pattern[: match.start()], pattern[match.end() :]
            for choice in choices:
                # Inner braces come first, and what is around them may still have to be expanded.
                yield from _expand(f"{before}{choice}{after}")
            return
    yield pattern


class _Range:
    """Numbers as text, with leading zeros if either end has them; not a list, since it may be very long."""

    def __init__(self, first: str, last: str, step: str | None) -> None:
        low, high, by = int(first), int(last), max(int(step or 1), 1)
        self.numbers = range(low, high + 1, by) if low <= high else range(low, high - 1, -by)
        padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-")[0] == "0" for end in (first, last))
        self.width = max(len(first), len(last)) if padded else 0

    def __iter__(self) -> Iterator[str]:
        return (f"{number:0{self.width}d}" for number in self.numbers)


def _alternatives(inside: str) -> "_Range | list[str] | None":
    """Return what the text between two braces stands for, or `None` if the braces are part of a name."""
    match = _RANGE.fullmatch(inside)
    if match:
        return _Range(*match.groups())
    return inside.split(",") if "," in inside else None
