"""In a training step, the second stage makes the host wait once per stage: for the numbers of chosen RoIs.

Tensors on the meta device have no values, so that whatever reads one fails.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.dense.detection.shapes import KINDS, batch, small_detector
from widekernel.dense.detection import roi_targets
from widekernel.dense.detection.structures import Targets


def losses_of(kind: str) -> dict[str, Tensor]:
    _, sizes, targets, seeds = batch()
    on_meta = [Targets(*(part.to("meta") for part in target)) for target in targets]
    maps = [torch.ones(2, 32, 96 // stride, 160 // stride, device="meta") for stride in (4, 8, 16, 32)]
    head = small_detector(kind).roi_head.train().to("meta")
    return head.losses(maps, sizes, on_meta, [torch.ones(30, 4, device="meta")] * 2, seeds)


@pytest.mark.parametrize("kind", KINDS)
def test_only_counts_are_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counts(chosen: list[roi_targets.Sample]) -> list[tuple[int, int]]:
        read.append(chosen)
        return [(3, 10)] * len(chosen)

    monkeypatch.setattr(roi_targets, "_counts", counts)
    losses = losses_of(kind)
    assert len(read) == (3 if kind == "cascade" else 1)
    assert all(loss.shape == () and loss.device.type == "meta" for loss in losses.values())
    sum(losses.values()).backward()


def test_counts_are_read() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        losses_of("mask")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_agrees_with_the_cpu(kind: str) -> None:
    detector = small_detector(kind).train()
    images, sizes, targets, seeds = batch()
    expected = detector(images, sizes, targets, seeds)
    moved = [Targets(*(part.cuda() for part in target)) for target in targets]
    losses = detector.cuda()(images.cuda(), sizes, moved, seeds)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.cpu(), expected[name], rtol=1e-2, atol=1e-3, msg=name)
    (found, _) = detector.eval()(images.cuda(), sizes)
    assert found.masks.device.type == "cuda"
