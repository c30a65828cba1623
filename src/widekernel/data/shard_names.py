"""Names of many shards in one string: braces as in the shell, and wildcards."""

import glob
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from widekernel.errors import DataError

MOST_SHARDS = 100_000
"""Largest number of shards that one string may name."""

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_WILDCARD = re.compile(r"[*?\[]")


def is_pattern(part: str) -> bool:
    """Return whether `part` has braces that expand (`{0..9}`, `{a,b}`) or wildcards (`*`, `?`, `[0-9]`)."""
    return bool(_WILDCARD.search(part)) or next(expand(part)) != part


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
    for name in expand(pattern):
        names.append(name)
        if len(names) > MOST_SHARDS:
            raise DataError(f"{key} is {pattern!r}, which names more than {MOST_SHARDS:,} shards. Correct the range.")
    return names


def expand(pattern: str) -> Iterator[str]:
    """Yield the names that the braces in `pattern` stand for, in the order of a shell: the last braces vary fastest.

    `{08..11}` are numbers with leading zeros, `{0..9..3}` every third one, and `{a,b{0..3}}` alternatives. Other braces
    are part of a name.
    """
    for start, character in enumerate(pattern):
        end = _matching(pattern, start) if character == "{" and pattern[start - 1 : start] != "$" else None
        if end is None:
            continue
        inside = pattern[start + 1 : end]
        match, parts = _RANGE.fullmatch(inside), _alternatives(inside)
        if match or len(parts) > 1:
            for choice in _numbers(*match.groups()) if match else chain.from_iterable(map(expand, parts)):
                for rest in expand(pattern[end + 1 :]):
                    yield f"{pattern[:start]}{choice}{rest}"
            return
    yield pattern


def _matching(pattern: str, start: int) -> int | None:
    """Return the place of the brace that closes the one at `start`, or `None` if there is none."""
    depth = 0
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if not depth:
            return place
    return None


def _alternatives(inside: str) -> list[str]:
    """Split the text between two braces at its commas, except at those in inner braces."""
    parts, depth = [""], 0
    for character in inside:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _numbers(first: str, last: str, step: str | None) -> Iterator[str]:
    """Yield the numbers of a range, with leading zeros if either end has them."""
    low, high, by = int(first), int(last), max(int(step or 1), 1)
    padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-")[0] == "0" for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    numbers = range(low, high + 1, by) if low <= high else range(low, high - 1, -by)
    return (f"{number:0{width}d}" for number in numbers)
