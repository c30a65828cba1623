"""Inference on whole images, in windows and on several views."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.dense.backbone import build_pyramid
from widekernel.dense.segmentation import (
    InferenceOptions,
    Segmenter,
    SegmenterOptions,
    View,
    multi_view,
    probabilities,
    slide_inference,
    whole_inference,
)
from widekernel.dense.segmentation.inference import windows
from widekernel.errors import ArgumentError, ConfigError


class Pixels(nn.Module):
    """A network whose logits are the pixels of the image, at its size."""

    options = SegmenterOptions(3)

    def forward(self, images: Tensor) -> Tensor:
        return images


class Means(nn.Module):
    """A network whose logits are the mean color of what it sees."""

    options = SegmenterOptions(3)

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2)


@pytest.mark.parametrize(
    ("size", "crop", "stride", "starts"),
    [
        ((512, 2048), 512, 341, [0, 341, 682, 1023, 1364, 1536]),
        ((512, 512), 512, 341, [0]),
        ((512, 513), 512, 341, [0, 1]),
        ((512, 853), 512, 341, [0, 341]),
        ((512, 300), 512, 341, [0]),
    ],
)
def test_windows(size: tuple[int, int], crop: int, stride: int, starts: list[int]) -> None:
    found = list(windows(size, (crop, crop), (stride, stride)))
    assert [columns.start for _, columns in found] == starts
    assert all(columns.stop == min(columns.start + crop, size[1]) for _, columns in found)
    assert {(rows.start, rows.stop) for rows, _ in found} == {(0, min(512, size[0]))}


@pytest.mark.parametrize("size", [(40, 70), (33, 100), (20, 200), (101, 57)])
def test_windows_cover_the_image(size: tuple[int, int]) -> None:
    seen = torch.zeros(size)
    for rows, columns in windows(size, (32, 40), (21, 40)):
        seen[rows, columns] += 1
    assert seen.min() >= 1


def test_windows_are_averaged() -> None:
    """Where windows overlap, their logits count equally."""
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(slide_inference(Pixels(), x, (8, 5), (8, 3)), x)  # type: ignore[arg-type]
    found = slide_inference(Means(), x, (8, 8), (8, 4))  # type: ignore[arg-type]
    left, right = x[..., :8].mean((2, 3)), x[..., 4:].mean((2, 3))
    for column, expected in ((0, left), (5, (left + right) / 2), (11, right)):
        torch.testing.assert_close(found[:, :, 3, column], expected)


def test_one_window_is_the_whole_image() -> None:
    network = Segmenter(build_pyramid("slak_nano"), SegmenterOptions(5, channels=16)).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(slide_inference(network, x, (96, 64), (64, 64)), whole_inference(network, x))


def test_padding_is_cut_off_before_resizing() -> None:
    x = torch.randn(1, 3, 8, 8)
    x[:, :, 6:] = x[:, :, :, 5:] = 100.0
    found = probabilities(Pixels(), View(x, size=(6, 5)), (12, 10), InferenceOptions())  # type: ignore[arg-type]
    expected = F.interpolate(x[:, :, :6, :5], (12, 10), mode="bilinear").softmax(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("flip", "axis"), [("horizontal", 3), ("vertical", 2)])
def test_flips_are_undone(flip, axis: int) -> None:
    x = torch.randn(1, 3, 8, 8)
    views = [View(x), View(x.flip(axis), flip=flip)]
    found = multi_view(Pixels(), views, (16, 16), InferenceOptions())  # type: ignore[arg-type]
    torch.testing.assert_close(found, probabilities(Pixels(), views[0], (16, 16), InferenceOptions()))  # type: ignore[arg-type]


def test_views_average_probabilities() -> None:
    views = [View(torch.tensor([10.0, 0, 0]).view(1, 3, 1, 1)), View(torch.tensor([0.0, 1, 0]).view(1, 3, 1, 1))]
    found = multi_view(Pixels(), views, (1, 1), InferenceOptions())  # type: ignore[arg-type]
    expected = (views[0].images.softmax(1) + views[1].images.softmax(1)) / 2
    torch.testing.assert_close(found, expected)


def test_low_precision_is_averaged_in_float32() -> None:
    found = slide_inference(Pixels(), torch.randn(1, 3, 8, 12).bfloat16(), (8, 8), (8, 4))  # type: ignore[arg-type]
    assert found.dtype == torch.float32


def test_training_mode_is_refused() -> None:
    network = Segmenter(build_pyramid("slak_nano"), SegmenterOptions(5, channels=16)).train()
    with pytest.raises(ArgumentError, match=r"call model\.eval\(\)"):
        whole_inference(network, torch.randn(2, 3, 64, 64))


def test_no_views() -> None:
    with pytest.raises(ArgumentError, match="no views"):
        multi_view(Pixels(), [], (8, 8), InferenceOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "windows"}, "mode 'windows' is unknown"),
        ({"crop": (0, 8)}, "crop is 0"),
        ({"crop": (8,)}, r"crop is \(8,\)"),
        ({"crop": (8, 8), "stride": (8, 9)}, r"stride is \(8, 9\).*at most the crop"),
    ],
)
def test_wrong_settings(settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceOptions(**settings)
