"""Small pictures of bright rectangles on noise, with their boxes: class 0 is red, 1 is green, 2 is blue."""

from __future__ import annotations

import torch
from torch import Tensor

from widekernel.dense.detection.structures import ImageSize, Targets

CLASSES = 3


def picture(seed: int, side: int = 64, objects: int = 2) -> tuple[Tensor, Targets]:
    """Return an image (3, side, side) and its objects."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, side, side, generator=generator) * 0.1
    boxes, labels = [], []
    for number in range(objects):
        width, height = torch.randint(side // 4, side // 2, (2,), generator=generator).tolist()
        left = int(torch.randint(0, side - width, (1,), generator=generator))
        top = int(torch.randint(0, side - height, (1,), generator=generator))
        label = (seed + number) % CLASSES
        image[:, top : top + height, left : left + width] = -1.0
        image[label, top : top + height, left : left + width] = 2.0
        boxes.append([left, top, left + width, top + height])
        labels.append(label)
    return image, Targets(torch.tensor(boxes).float().view(-1, 4), torch.tensor(labels, dtype=torch.int64))


def batch(count: int, side: int = 64, objects: int = 2) -> tuple[Tensor, list[ImageSize], list[Targets], list[int]]:
    """Return images, sizes, targets and seeds."""
    images, targets = zip(*(picture(seed, side, objects) for seed in range(count)))
    return torch.stack(images), [ImageSize(side, side)] * count, list(targets), list(range(count))
