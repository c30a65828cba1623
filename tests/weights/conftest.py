"""Fixtures: a server, a cache of one's own, and checkpoints that the server has."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from tests.weights.server import Server, running
from widekernel.weights import Checkpoint, Source, catalog, find_checkpoint, http


def file_bytes(**tensors: torch.Tensor) -> bytes:
    """Return the bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(tensors or {"head.weight": torch.arange(20_000.0)}, buffer)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, no variables of the user, and pauses that take no time."""
    for name in ("WIDEKERNEL_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("WIDEKERNEL_CACHE", str(tmp_path / "cache"))
    impatient = http.Patience(pause=0.0, timeout=5.0)
    monkeypatch.setattr(http, "Patience", lambda: impatient)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def server() -> Iterator[Server]:
    with running(file_bytes()) as state:
        yield state


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpoint]:
    """Return a function that puts a checkpoint with other sources, and perhaps another name, into the catalog."""

    def add(*sources: Source, like: str = "replknet_31b.in1k_224", **changes: Any) -> Checkpoint:
        checkpoint = dataclasses.replace(find_checkpoint(like), sources=sources, **changes)
        everything = {**catalog._catalog(), checkpoint.name: checkpoint}
        monkeypatch.setattr(catalog, "_catalog", lambda: MappingProxyType(everything))
        return checkpoint

    return add


def url(server: Server, path: str = "/file.pth", **more: Any) -> Source:
    return Source("url", url=f"{server.url}{path}", **more)
