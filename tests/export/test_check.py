"""The comparison with PyTorch, and the images for it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from widekernel.errors import DataError
from widekernel.export.base import ExportError
from widekernel.export.check import compare, outputs
from widekernel.export.images import noise_images, read_images


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (value, value, value)).save(path)


def test_differences_are_relative_to_the_largest_output() -> None:
    wanted = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    got = torch.tensor([[1.0, -4.0], [3.5, 3.0]])
    found = compare(wanted, got, classes=True, labels=torch.tensor([0, 1]))
    assert (found.images, found.max_difference, found.agreement, found.accuracy) == (2, 1.5 / 4, 0.5, (1.0, 0.5))
    assert compare(wanted, got, classes=False).agreement is None
    assert compare(torch.zeros(1, 2), torch.ones(1, 2), classes=True).max_difference == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(ExportError, match="not finite"):
        compare(torch.zeros(1, 2), torch.tensor([[0.0, value]]), classes=True)


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ExportError, match=r"\(1, 3\) instead of \(1, 2\)"):
        compare(torch.zeros(1, 2), torch.zeros(1, 3), classes=True)


def test_every_batch_is_full() -> None:
    seen = []

    def run(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.flatten(1).sum(1, keepdim=True)

    images = torch.arange(7.0).view(7, 1, 1, 1)
    assert torch.equal(outputs(run, images, 3), images.flatten(1))
    assert seen == [3, 3, 3]


def test_calibration_uses_other_images_as_far_as_there_are_enough(tmp_path: Path) -> None:
    for value in range(10):
        picture(tmp_path / ("cat" if value % 2 else "dog") / f"{value}.png", 20 * value)
    (tmp_path / "broken.png").write_bytes(b"no image")
    left_out: list[str] = []
    found = read_images(tmp_path, to_tensor, 4, 6, notify=left_out.append)
    values = [images[:, 0, 0, 0].tolist() for images in (found.check, found.calibration)]
    assert sorted(values[0] + values[1]) == [20.0 * value for value in range(10)]
    assert found.shared == 0
    assert len(left_out) == 1 and "broken.png" in left_out[0]
    labels = found.labels(("cat", "dog"))
    assert labels is not None
    assert labels.tolist() == [0 if value // 20 % 2 else 1 for value in values[0]]
    assert found.labels(("cat", "bird")) is None
    few = read_images(tmp_path, to_tensor, 8, 6)
    assert (len(few.check), len(few.calibration), few.shared) == (8, 6, 4)


def test_the_choice_depends_on_the_seed_only(tmp_path: Path) -> None:
    for value in range(10):
        picture(tmp_path / f"{value}.png", 20 * value)
    names = [read_images(tmp_path, to_tensor, 4, seed=seed).names for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert torch.equal(noise_images(2, 3, 8).check, noise_images(2, 3, 8).check)
    assert noise_images(2, 3, 8).labels(("cat",)) is None


def test_no_readable_images_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="None of the images"):
        read_images(tmp_path, to_tensor, 4)
    with pytest.raises(DataError, match="does not exist"):
        read_images(tmp_path / "nowhere", to_tensor, 4)
