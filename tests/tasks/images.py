"""Folders of random images, for runs on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def make_images(root: Path, seed: int = 0, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write 8 training and 3 held-out images per class."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", 8), ("val", 3)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root
