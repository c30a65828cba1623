"""Generated scenes for segmentation and detection: colored shapes on textured ground, in every plain form on disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHAPES = ("disk", "box", "triangle", "ring")
CLASSES = ("ground", *SHAPES)
"""Names of the semantic classes by index; instances have the index of a shape, which is one less."""

PALETTE = ((90, 90, 90), (220, 60, 60), (60, 200, 80), (70, 90, 230), (230, 200, 60))
CATEGORY_IDS = (2, 3, 5, 9)
"""Identifiers of the shapes in COCO files: neither from 0 nor without gaps, as in real ones."""

LANDSCAPE, PORTRAIT = (96, 128), (128, 96)


@dataclass(frozen=True)
class Instance:
    """One shape.

    Args:
        shape: index in `SHAPES`
        polygon: corners `(k, 2)`, x and y; `None` for a ring, which no single polygon describes
        mask: its pixels `(height, width)`, boolean
    """

    shape: int
    polygon: np.ndarray | None
    mask: np.ndarray

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 around the pixels; the right and the lower border lie outside."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@dataclass(frozen=True)
class Scene:
    """One picture.

    Args:
        image: RGB `(height, width, 3)`, uint8
        labels: index in `CLASSES` of each pixel `(height, width)`, uint8
        instances: the shapes, which do not overlap
    """

    image: np.ndarray
    labels: np.ndarray
    instances: tuple[Instance, ...]


def make_scenes(count: int = 64, seed: int = 0, first: int = 0) -> list[Scene]:
    """Return scenes number `first` to below `first + count`; every third one is upright."""
    return [
        make_scene(1000 * seed + number, PORTRAIT if number % 3 == 2 else LANDSCAPE)
        for number in range(first, first + count)
    ]


def make_scene(seed: int, size: tuple[int, int] = LANDSCAPE) -> Scene:
    """Return a scene of two to four shapes, a function of the seed and the size (height, width)."""
    random = np.random.RandomState(seed)
    image, labels = _ground(random, size), np.zeros(size, np.uint8)
    instances: list[Instance] = []
    wanted = random.randint(2, 5)
    for _ in range(50):
        instance = _shape(random, size)
        free = not labels[_grown(instance.mask)].any()
        if free and instance.mask.any():
            labels[instance.mask] = instance.shape + 1
            color = np.array(PALETTE[instance.shape + 1]) + random.uniform(-25, 25, 3)
            noise = random.uniform(-12, 12, (int(instance.mask.sum()), 3))
            image[instance.mask] = np.clip(color + noise, 0, 255)
            instances.append(instance)
        if len(instances) == wanted:
            break
    return Scene(np.rint(image).astype(np.uint8), labels, tuple(instances))


def _ground(random: np.random.RandomState, size: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    wave = np.sin(x * random.uniform(0.1, 0.5) + y * random.uniform(0.1, 0.5) + random.uniform(0, 6))
    return np.clip(random.uniform(70, 130) + 15 * wave[..., None] + random.uniform(-15, 15, (*size, 3)), 0, 255)


def _shape(random: np.random.RandomState, size: tuple[int, int]) -> Instance:
    height, width = size
    kind, radius = int(random.randint(len(SHAPES))), random.uniform(11, 26)
    center = np.array([random.uniform(radius, width - radius), random.uniform(radius, height - radius)])
    turn = random.uniform(0, 2 * np.pi)
    if SHAPES[kind] == "ring":
        y, x = np.mgrid[:height, :width] + 0.5
        distance = np.hypot(x - center[0], y - center[1])
        return Instance(kind, None, (distance <= radius) & (distance > 0.55 * radius))
    corners = {"disk": 24, "box": 4, "triangle": 3}[SHAPES[kind]]
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    polygon = np.round(center + radius * np.stack([np.cos(angles), np.sin(angles)], 1), 2)
    polygon = np.clip(polygon, 0, [width, height])
    return Instance(kind, polygon, _inside(polygon, size))


def _inside(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return which pixels have their centers inside a polygon."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = np.zeros(size, bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0)):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


def _grown(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask and those at most two rows or columns away."""
    padded = np.pad(mask, 2)
    height, width = mask.shape
    return np.any([padded[dy : dy + height, dx : dx + width] for dy in range(5) for dx in range(5)], axis=0)


# -- forms on disk ---------------------------------------------------------------------------------------------------


def write_folder(root: Path, train: Sequence[Scene], val: Sequence[Scene]) -> Path:
    """Write `root/{train,val}/{images,masks}/NAME.png` and `root/classes.json`; masks hold class indices."""
    for split, scenes in (("train", train), ("val", val)):
        for name, scene in _named(scenes):
            _save(root / split / "images" / f"{name}.png", scene.image)
            _save(root / split / "masks" / f"{name}.png", scene.labels)
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES, "palette": PALETTE}))
    return root


def write_ade20k(root: Path, train: Sequence[Scene], val: Sequence[Scene]) -> Path:
    """Write the folders of ADE20K; 0 in an annotation means other (here nothing), so that classes start at 1."""
    for split, scenes in (("training", train), ("validation", val)):
        for name, scene in _named(scenes):
            _save(root / "images" / split / f"{name}.jpg", scene.image)
            _save(root / "annotations" / split / f"{name}.png", scene.labels + 1)
    return root


def write_cityscapes(root: Path, train: Sequence[Scene], val: Sequence[Scene]) -> Path:
    """Write the folders of Cityscapes, with two cities in each split."""
    for split, scenes in (("train", train), ("val", val)):
        for number, (name, scene) in enumerate(_named(scenes)):
            city = ("aachen", "bochum")[number % 2]
            _save(root / "leftImg8bit" / split / city / f"{city}_{name}_leftImg8bit.png", scene.image)
            _save(root / "gtFine" / split / city / f"{city}_{name}_gtFine_labelTrainIds.png", scene.labels)
    return root


def write_coco(root: Path, train: Sequence[Scene], val: Sequence[Scene]) -> Path:
    """Write the folders of COCO: `root/{train,val}2017/*.jpg` and `root/annotations/instances_{train,val}2017.json`."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, scenes in (("train2017", train), ("val2017", val)):
        names = [f"{coco_image_id(number):012d}.jpg" for number in range(len(scenes))]
        for name, scene in zip(names, scenes):
            _save(root / split / name, scene.image)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco_content(scenes, names)))
    return root


def write_coco_json(root: Path, train: Sequence[Scene], val: Sequence[Scene]) -> Path:
    """Write `root/{train,val}.json` with pictures in `root/pictures`."""
    for split, scenes in (("train", train), ("val", val)):
        names = [f"{split}_{name}.png" for name, _ in _named(scenes)]
        for name, scene in zip(names, scenes):
            _save(root / "pictures" / name, scene.image)
        (root / f"{split}.json").write_text(json.dumps(coco_content(scenes, names)))
    return root


def coco_image_id(number: int) -> int:
    """Return the identifier of the picture with that number in a COCO file."""
    return 10 + 7 * number


def coco_content(scenes: Sequence[Scene], names: Sequence[str]) -> dict[str, Any]:
    """Return the content of a COCO file: polygons, and run lengths for rings."""
    annotations: list[dict[str, Any]] = []
    images = []
    for number, (scene, name) in enumerate(zip(scenes, names, strict=True)):
        height, width = scene.labels.shape
        images.append({"id": coco_image_id(number), "file_name": name, "height": height, "width": width})
        for instance in scene.instances:
            x1, y1, x2, y2 = instance.box
            polygon = instance.polygon
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": coco_image_id(number),
                    "category_id": CATEGORY_IDS[instance.shape],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(instance.mask.sum()),
                    "iscrowd": 0,
                    "segmentation": run_lengths(instance.mask) if polygon is None else [polygon.flatten().tolist()],
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, SHAPES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return the uncompressed run lengths of a mask in columns, beginning with the length of the background."""
    flat = mask.flatten(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    ends = [0, *changes, len(flat)]
    return {"counts": [after - before for before, after in itertools.pairwise(ends)], "size": list(mask.shape)}


def _named(scenes: Sequence[Scene]) -> list[tuple[str, Scene]]:
    return [(f"scene_{number:04d}", scene) for number, scene in enumerate(scenes)]


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
