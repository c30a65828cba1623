"""The generated scenes themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.data import scenes


def test_scenes_are_a_function_of_the_seed() -> None:
    first, again = scenes.make_scenes(4), scenes.make_scenes(2, first=2)
    assert np.array_equal(first[2].image, again[0].image) and np.array_equal(first[3].labels, again[1].labels)
    assert not np.array_equal(first[0].image, first[1].image)


def test_scenes_hold_every_shape_whole() -> None:
    found = scenes.make_scenes(64)
    shapes = [instance.shape for scene in found for instance in scene.instances]
    assert min(np.bincount(shapes, minlength=4)) > 20
    for scene in found:
        covered = sum(instance.mask.astype(int) for instance in scene.instances)
        assert np.array_equal(covered > 0, scene.labels > 0) and np.max(covered) == 1
        assert 1 <= len(scene.instances) <= 4
        for instance in scene.instances:
            assert instance.mask.sum() > 60


def test_coco_masks_are_those_of_the_scene(tmp_path: Path) -> None:
    mask_tools = pytest.importorskip("pycocotools.mask")
    scene = scenes.make_scene(3)
    content = scenes.coco_content([scene], ["a.png"])
    height, width = scene.labels.shape
    for entry, instance in zip(content["annotations"], scene.instances, strict=True):
        form = entry["segmentation"]
        encoded = mask_tools.merge(mask_tools.frPyObjects(form, height, width)) if isinstance(form, list) else (
            mask_tools.frPyObjects(form, height, width)
        )  # fmt: skip
        drawn = mask_tools.decode(encoded).astype(bool)
        union, common = (drawn | instance.mask).sum(), (drawn & instance.mask).sum()
        assert common / union > (0.9 if isinstance(form, list) else 0.9999)
