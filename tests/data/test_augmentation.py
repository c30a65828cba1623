"""Crops, policies and repeated augmentation of training images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.tiny import array_source
from timm.data import create_transform

from widekernel.data import (
    AugmentConfig,
    BatchPlan,
    DataConfig,
    LabeledImages,
    LoaderOptions,
    OnImage,
    Preprocessing,
    TrainingLoader,
    TrainingSamples,
)
from widekernel.data.samples import EpochBatches
from widekernel.data.seeding import scoped_seed
from widekernel.errors import ConfigError

STATISTICS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def plain(**changes: object) -> AugmentConfig:
    return AugmentConfig(**{"hflip": 0.0, "color_jitter": 0.0, "auto_augment": None, "erase_prob": 0.0, **changes})


def gradient(width: int, height: int) -> Image.Image:
    """Return an image whose red and green tell the place: 0 to 255 from left to right, and from top to bottom."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    values = np.stack([np.tile(x, (height, 1)), np.tile(y[:, None], (1, width)), np.zeros((height, width))], axis=-1)
    return Image.fromarray(values.round().astype(np.uint8))


def transformed(augment: AugmentConfig, image: Image.Image, seed: int = 0, **preprocessing: object) -> torch.Tensor:
    config = DataConfig(input_size=32, **STATISTICS, **preprocessing)
    with scoped_seed(1, seed):
        return Preprocessing.resolve(config, {}).train_transform(augment)(image)


def test_default_is_that_of_timm() -> None:
    augment, image = AugmentConfig(), gradient(80, 60)
    timms = create_transform(
        32, is_training=True, scale=augment.crop_scale, ratio=augment.crop_ratio, hflip=augment.hflip,
        color_jitter=augment.color_jitter, auto_augment=augment.auto_augment, interpolation=augment.interpolation,
        re_prob=augment.erase_prob, re_mode="pixel", **STATISTICS,
    )  # fmt: skip
    for seed in range(5):
        with scoped_seed(1, seed):
            expected = timms(image)
        assert torch.equal(transformed(augment, image, seed), expected)


def test_center_crop_is_that_of_evaluation() -> None:
    image = gradient(90, 60)
    config = DataConfig(input_size=32, **STATISTICS)
    expected = Preprocessing.resolve(config, {}).eval_transform()(image)
    found = [transformed(plain(train_crop="center"), image, seed) for seed in range(3)]
    assert all(torch.equal(each, found[0]) for each in found)
    assert (found[0] - expected).abs().max() <= 0.02  # timm rounds the long side, evaluation cuts it off
    flipped = transformed(plain(train_crop="center", hflip=1.0), image)
    assert torch.equal(flipped, found[0].flip(2))


def test_random_crop_has_the_scale_of_evaluation_and_a_random_place() -> None:
    image = gradient(120, 60)
    crops = [transformed(plain(train_crop="random"), image, seed) for seed in range(20)]
    lefts = {round(crop[0, 0, 0].item(), 2) for crop in crops}
    assert len(lefts) > 5
    for crop in crops:
        width = (crop[0, 0, -1] - crop[0, 0, 0]).item()
        assert width == pytest.approx(32 / 72, abs=0.03)  # the short side becomes 36 pixels, the long one 72
    assert len({transformed(plain(), image, seed)[0, 0].std().item() for seed in range(5)}) == 5


def test_very_long_images_are_cut_before_they_are_resized() -> None:
    for kind in ("center", "random"):
        assert transformed(plain(train_crop=kind), Image.new("RGB", (20_000, 4))).shape == (3, 32, 32)


@pytest.mark.parametrize("policy", ["ta_wide", "augmix-m5-w4-d2", "original", "rand-m9-mstd0.5-inc1"])
def test_policies_change_images_at_random(policy: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    augment = plain(auto_augment=policy, train_crop="center", color_jitter=0.4)
    results = [transformed(augment, image, seed) for seed in range(6)]
    assert len({result.sum().item() for result in results}) > 3
    assert torch.equal(transformed(augment, image, 2), results[2])


def test_trivial_augment_is_used_without_color_jitter() -> None:
    steps = Preprocessing.resolve(DataConfig(), {}).train_transform(AugmentConfig(auto_augment="ta_wide")).transforms
    names = [type(step).__name__ for step in steps]
    assert "TrivialAugmentWide" in names
    assert "ColorJitter" not in names
    assert names.index("TrivialAugmentWide") < names.index("MaybeToTensor")


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"augment.repeats is 0, but must be 1 or more"):
        AugmentConfig(repeats=0)
    with pytest.raises(ConfigError, match=r"augment.train_crop 'middle' is unknown"):
        AugmentConfig(train_crop="middle")
    with pytest.raises(ConfigError, match=r"'warp' crops nothing"):
        DataConfig(test_crop="warp", crop_pct=0.9)


# -- crop in evaluation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "crop_pct", "warp"),
    [
        ({"input_size": 320}, 0.875, False),
        ({"input_size": 384}, 1.0, True),
        ({"input_size": 384, "crop_pct": 0.9}, 0.9, False),
        ({"input_size": 384, "test_crop": "center"}, 0.875, False),
        ({"input_size": 384, "test_crop": "center", "crop_pct": 1.0}, 1.0, False),
        ({"input_size": 224, "test_crop": "warp"}, 1.0, True),
    ],
)
def test_crop_rule(settings: dict, crop_pct: float, warp: bool) -> None:
    found = Preprocessing.resolve(DataConfig(**settings, **STATISTICS), {})
    assert (found.crop_pct, found.warp) == (crop_pct, warp)
    image = gradient(2 * found.input_size, found.input_size)
    row = found.eval_transform()(image)[0, 0]
    seen = (row[-1] - row[0]).item()
    assert seen == pytest.approx(1.0 if warp else crop_pct / 2, abs=0.01)


def test_model_files_of_earlier_versions_keep_their_crop() -> None:
    old = {"input_size": 384, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    assert Preprocessing.from_dict(old).warp
    assert not Preprocessing.from_dict({**old, "input_size": 224}).warp
    assert Preprocessing.from_dict(old).overridden_by(DataConfig(interpolation="bilinear")).warp
    assert not Preprocessing.from_dict(old).overridden_by(DataConfig(input_size=224)).warp


# -- repeated augmentation -------------------------------------------------------------------------------------------


def repeated_loader(rank: int = 0, repeats: int = 3, **division: int) -> TrainingLoader:
    augment = AugmentConfig(crop_scale=(0.3, 1.0), auto_augment=None, erase_prob=0.0)
    preprocessing = Preprocessing.resolve(DataConfig(input_size=8, **STATISTICS), {})
    transform = OnImage(preprocessing.train_transform(augment))
    samples = TrainingSamples(array_source(50), transform, 7, LabeledImages.collate)
    return TrainingLoader(samples, LoaderOptions(0), BatchPlan(12, **division), rank, repeats)


def test_each_image_occurs_several_times_in_different_versions() -> None:
    batches = EpochBatches(50, BatchPlan(12), seed=7, repeats=3)
    plain_order = [index for batch in EpochBatches(50, BatchPlan(12), seed=7) for _, index in batch]
    keys = [key for batch in batches for key in batch]
    assert len(keys) == len(plain_order) == len(set(keys)) == 48  # an epoch has the usual length
    assert sorted(keys) == sorted((0, index, version) for index in plain_order[:16] for version in range(3))
    for batch in batches:
        indices = [index for _, index, _ in batch]
        assert indices == indices[:4] * 3  # all first versions, all second ones, all third ones
        assert len(set(indices[:4])) == 4


def test_repeats_that_do_not_divide_the_batch() -> None:
    keys = [key for batch in EpochBatches(50, BatchPlan(10), seed=1, repeats=4) for key in batch]
    assert len(set(keys)) == 50
    assert len({index for _, index, _ in keys}) == 13  # 50 / 4, rounded up
    for batch in EpochBatches(50, BatchPlan(10), seed=1, repeats=4):
        assert [version for *_, version in batch] == sorted(version for *_, version in batch)


def test_versions_of_an_image_differ_and_can_be_made_again() -> None:
    first = next(repeated_loader().epoch(0)).content.images
    assert not torch.equal(first[0], first[4])
    assert torch.equal(next(repeated_loader().epoch(0)).content.images, first)
    resumed = list(repeated_loader().epoch(0, skip_steps=2))
    whole = list(repeated_loader().epoch(0))
    assert [torch.equal(a.content.images, b.content.images) for a, b in zip(whole[2:], resumed, strict=True)] == [True] * 2


@pytest.mark.parametrize("division", [{"world_size": 2}, {"world_size": 3, "micro_batch": 2}])
def test_repeated_batches_do_not_depend_on_the_division(division: dict[str, int]) -> None:
    whole = [batch.content.images for batch in repeated_loader().epoch(1)]
    ranks = [list(repeated_loader(rank, **division).epoch(1)) for rank in range(division["world_size"])]
    accumulate = len(ranks[0]) // len(whole)
    for step, images in enumerate(whole):
        parts = [batch.content.images for rank in ranks for batch in rank[step * accumulate : (step + 1) * accumulate]]
        assert torch.equal(torch.cat(parts), images)
