"""Training makes the host wait for the device nowhere in FCOS and in the region proposal network.

Tensors on the meta device have no values, so that whatever reads one fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dense.detection.shapes import CLASSES, batch
from tests.dense.detection.test_fcos import build
from widekernel.dense.detection.fcos import Fcos
from widekernel.dense.detection.rpn import RpnHead
from widekernel.dense.detection.structures import Targets


def on(device: str) -> tuple[Fcos, RpnHead, tuple[Any, ...]]:
    """Return FCOS, a head for proposals, and a batch, on a device."""
    images, sizes, targets, seeds = batch()
    moved = [Targets(target.boxes.to(device), target.labels.to(device)) for target in targets]
    return build().train().to(device), RpnHead(8).to(device), (images.to(device), sizes, moved, seeds)


def train_fcos(fcos: Fcos, _: RpnHead, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    return fcos(*arguments)


def train_proposals(_: Fcos, head: RpnHead, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    images, sizes, targets, seeds = arguments
    maps = [torch.ones(len(images), 8, 96 // stride, 160 // stride, device=images.device) for stride in (4, 8, 16, 32, 64)]
    return head.losses(head(maps), sizes, targets, seeds)


@pytest.mark.parametrize("losses", [train_fcos, train_proposals])
def test_no_value_is_read(losses: Callable[..., dict[str, Tensor]]) -> None:
    fcos, head, arguments = on("meta")
    found = losses(fcos, head, arguments)
    assert all(loss.shape == () and loss.device.type == "meta" for loss in found.values())
    sum(found.values()).backward()


def test_reading_a_value_would_fail() -> None:
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta").sum().item()
    with pytest.raises(NotImplementedError):
        torch.ones(3, device="meta").nonzero()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("losses", [train_fcos, train_proposals])
def test_a_cuda_device_is_not_waited_for(losses: Callable[..., dict[str, Tensor]]) -> None:
    fcos, head, arguments = on("cuda")
    losses(fcos, head, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(losses(fcos, head, arguments).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_malformed_targets_make_the_losses_of_a_cuda_device_nan() -> None:
    fcos, _, (images, sizes, targets, seeds) = on("cuda")
    wrong = Targets(targets[0].boxes, targets[0].labels + CLASSES)
    assert all(loss.isnan() for loss in fcos(images, sizes, [wrong, targets[1]], seeds).values())
