"""Reading of safetensors files at any path (safetensors itself takes only paths in UTF-8), and writing of weights."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from widekernel.errors import CheckpointError
from widekernel.files import replace_atomically

DESCRIPTION = "widekernel"
"""Metadata key of a safetensors file for the description of its network, as JSON."""


class _InMemory:
    """A safetensors file in memory, with the interface of an open one."""

    def __init__(self, content: bytes) -> None:
        self._tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        self._metadata = json.loads(content[8 : 8 + length]).get("__metadata__")

    def metadata(self) -> dict[str, str] | None:
        return self._metadata  # type: ignore[no-any-return]

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


@contextmanager
def tensor_file(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file on the CPU; it has `metadata()`, `keys()` and `get_tensor(name)`.

    Raises:
        OSError: if it cannot be read.
        SafetensorError: if it is damaged or not a safetensors file.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the path has bytes that are not UTF-8
        yield _InMemory(Path(path).read_bytes())
        return
    with safe_open(Path(path), framework="pt") as file:
        yield file


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, on the CPU.

    Raises:
        OSError: if it cannot be read.
        SafetensorError: if it is damaged or not a safetensors file.
    """
    with tensor_file(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def described(description: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the metadata that hold a description of JSON values; none for an empty one."""
    return {DESCRIPTION: json.dumps(dict(description), sort_keys=True)} if description else {}


def write_weights(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill the file `path`, atomically, in a folder that is created if needed; return the path.

    Raises:
        CheckpointError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, write)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError for files
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    return path
