"""The official detectors' numbers: rows of the index, stored and sampled arrays, generated weights, images and targets."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity.downstream.reference import filler, folder
from widekernel.dense.detection.structures import ImageSize, Targets


class Golden:
    """A case of the reference folder.

    Args:
        shared: the folder of reference numbers
        case: name of the case
    """

    def __init__(self, shared: Path, case: str) -> None:
        self.shared, self.folder = shared, folder(shared)
        rows = json.loads((self.folder / "golden" / "index.json").read_text())
        self.row: dict[str, Any] = next(row for row in rows if row["case"] == case)
        self.arrays = np.load(self.folder / "golden" / f"{case}.npz")

    def __getitem__(self, name: str) -> Tensor:
        """Return an array that is stored whole."""
        return torch.from_numpy(self.arrays[name])

    def bits(self, name: str, count: int) -> Tensor:
        """Return flags that are stored as bits."""
        return torch.from_numpy(np.unpackbits(self.arrays[name], axis=-1)[..., :count].astype(bool))

    def check(self, name: str, value: Tensor, relative: float, absolute: float = 0.0) -> None:
        """Assert |ours - theirs| <= relative * max|theirs| + absolute for a stored or sampled array."""
        error, largest = filler(self.shared).deviation(self.arrays, name, value.detach().numpy())
        assert np.isfinite(value.detach().numpy()).all(), f"{name} is not finite"
        bound = relative * largest + absolute
        assert error <= bound, f"{name} differs by {error:.3g}, allowed {bound:.3g}"

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        return filler(self.shared).load_manifest(self.folder / "manifests" / f"{self.row['manifest']}.json")

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the generated weights below a prefix, without it."""
        keys = [row for row in self.manifest["keys"] if row[0].startswith(prefix)]
        filled = filler(self.shared).fill_state(keys, self.row["seed"], self.manifest["overrides"])
        return {key.removeprefix(prefix): torch.from_numpy(np.array(value)) for key, value in filled.items()}

    def images(self) -> Tensor:
        """Return the images, which are 0 in their padding."""
        images = filler(self.shared).make_input(self.row["input_seed"], (2, 3, *self.row["pad_shape"]))
        for image, (height, width) in zip(images, self.row["img_shapes"]):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return torch.from_numpy(images)

    def sizes(self) -> list[ImageSize]:
        if "scale_factors" not in self.row:
            return [ImageSize(height, width) for height, width in self.row["img_shapes"]]
        parts = zip(self.row["img_shapes"], self.row["scale_factors"], self.row["ori_shapes"])
        return [ImageSize(h, w, scale[0], scale[1], *original) for (h, w), scale, original in parts]

    def targets(self, classes: int) -> list[Targets]:
        row = self.row
        made = filler(self.shared).make_targets(row["target_seed"], row["img_shapes"], row["pad_shape"], classes)
        return [Targets(*map(torch.from_numpy, parts)) for parts in made]
