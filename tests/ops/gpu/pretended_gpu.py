"""Problems, and GPUs that PyTorch is made to find, for tests in which no kernel runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES
from widekernel.ops.backends import triton
from widekernel.ops.gpu import launch, machine
from widekernel.ops.gpu.kernel_configs import (
    Chip,
)
from widekernel.ops.problem import Problem

SUM, WEIGHT_GRAD = "depthwise_sum", "depthwise_weight_grad"
ALL = [SUM, BRANCHES, SUM_OF_BRANCHES, WEIGHT_GRAD]
CHIPS = {
    "sm_80": Chip((8, 0), 108, 163 * 1024),
    "sm_86": Chip((8, 6), 84, 99 * 1024),
    "sm_90": Chip((9, 0), 132, 227 * 1024),
    "sm_100": Chip((10, 0), 148, 227 * 1024),
    "sm_120": Chip((12, 0), 188, 99 * 1024),
}


def pretend(monkeypatch: pytest.MonkeyPatch, chip: Chip | None, name: str = "NVIDIA H200") -> None:
    """Make PyTorch find that GPU, or none."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv(triton.INTERPRETER, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: chip is not None)
    if chip is None:
        return
    properties = SimpleNamespace(
        major=chip.capability[0],
        minor=chip.capability[1],
        multi_processor_count=chip.processors,
        shared_memory_per_block_optin=chip.shared_bytes,
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: chip.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(launch, "obstacle", lambda: "")
    monkeypatch.setattr(machine, "_warned", True)


def problem(*kernels: tuple[int, int], op: str = SUM, **others: Any) -> Problem:
    anchors = tuple((kh // 2, kw // 2) for kh, kw in kernels)
    return replace(Problem(op, "cuda", torch.float32, (32, 64, 56, 56), kernels, anchors), **others)


LARGE = problem((31, 31))
