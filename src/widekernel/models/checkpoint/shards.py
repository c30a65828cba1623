"""Sharded checkpoints as written by Hugging Face's libraries: an index and its shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from widekernel.errors import CheckpointError
from widekernel.models.layouts.layout import State

_INDEX = ".index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")


def find_index(path: Path) -> Path | None:
    """Return the index at a path: the file itself, or the only index in the folder; None if there is none.

    Raises:
        CheckpointError: if the path is that of a single shard, which holds only a part of the network.
    """
    if path.is_dir():
        found = sorted(path.glob(f"*{_INDEX}"))
        return found[0] if len(found) == 1 else None
    if path.name.endswith(_INDEX):
        return path
    shard = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{shard[1]}{shard[2]}{_INDEX}") if shard else None
    if index and index.exists():
        raise CheckpointError(f"{path} is one shard of several: load {index}, which names them all")
    return None


def read_shards(index: Path, read: Callable[[Path], State]) -> State:
    """Return the weights of all shards that an index names.

    Args:
        index: path of the index.
        read: reads the state dict of a shard.

    Raises:
        CheckpointError: if the index is damaged, or if a shard or one of its weights is missing.
    """
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {key: str(name) for key, name in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not the index of a sharded checkpoint ({type(error).__name__}: {error})"
        ) from error
    state: State = {}
    for name in sorted(set(shards.values())):
        # An index must not name files outside its folder, nor another index.
        if Path(name).name != name or "\\" in name or name.endswith(_INDEX) or (index.parent / name).is_dir():
            raise CheckpointError(f"{index} names the shard {name!r}: shards must be files in the same folder")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index} names the shard {name}, which is missing: fetch it too")
        state.update(read(index.parent / name))
    missing = [key for key in shards if key not in state]
    if missing:
        raise CheckpointError(f"{index} names weights that its shards do not hold: {', '.join(missing)}")
    return state
