"""Reading safetensors files wherever they lie: its own reader takes no path that is not UTF-8."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor


class _InMemory:
    """The part of safetensors' open file that is used here, of a file that was read whole."""

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
    """Open a safetensors file, with ``metadata()``, ``keys()`` and ``get_tensor(name)``, on the CPU.

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is damaged or no such file.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # bytes of the path that are no text
        yield _InMemory(Path(path).read_bytes())
        return
    with safe_open(Path(path), framework="pt") as file:
        yield file


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is damaged or no such file.
    """
    with tensor_file(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
