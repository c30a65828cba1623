"""Fixtures of the tests of transformations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.native import thread_count
from tests.transforms.acceleration import replace_measurement
from widekernel.ops.cpu.sequence import Sequence
from widekernel.ops.depthwise_conv_reference import depthwise_conv
from widekernel.ops.pointwise_reference import ReferenceBlock
from widekernel.transforms.acceleration import swapping, timing
from widekernel.transforms.acceleration.fusion import fused, packing
from widekernel.transforms.acceleration.fusion.weights import BlockWeights, DepthwiseWeights


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    timing.forget()
    yield
    timing.forget()


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return replace_measurement(monkeypatch)


def reference_of(weights: BlockWeights | DepthwiseWeights, precision: str = "float32") -> Callable[..., Tensor]:
    """Return the definition of what weights compute."""
    if isinstance(weights, DepthwiseWeights):
        return lambda x, residual=None: depthwise_conv(x, *weights)
    return ReferenceBlock(*weights, precision)


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Let blocks and chains of native calls compute with two threads, or more."""
    with thread_count(max(2, torch.get_num_threads())):
        yield


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch, several_threads: None) -> None:
    """Without the native library, blocks are computed by their definition."""
    if packing.missing() is not None:
        monkeypatch.setattr(fused, "missing", lambda _="": None)
        monkeypatch.setattr(fused, "pack", lambda weights, _: reference_of(weights))


@pytest.fixture
def packs_lower(monkeypatch: pytest.MonkeyPatch, several_threads: None) -> None:
    """Without native products in a lower precision, blocks are computed by their definition."""
    if packing.missing("bfloat16") is not None or packing.missing("int8") is not None:
        for module in (fused, swapping):
            monkeypatch.setattr(module, "missing", lambda _="": None)
        monkeypatch.setattr(fused, "pack", reference_of)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch, several_threads: None) -> list[int]:
    """Return a list of the number of native calls of every sequence that runs."""
    counts: list[int] = []
    original = Sequence.__call__

    def call(sequence: Sequence, x: Tensor) -> Tensor:
        counts.append(len(sequence))
        return original(sequence, x)

    monkeypatch.setattr(Sequence, "__call__", call)
    return counts
