"""Networks of one, three and four channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tasks.test_classification_runs import images, make  # noqa: F401 - fixtures
from torch import nn

from widekernel.data import Preprocessing
from widekernel.errors import ConfigError
from widekernel.tasks.assembly import build_model
from widekernel.tasks.classification.config import ModelConfig
from widekernel.tasks.classification.run import train
from widekernel.tasks.folding import fold_and_check
from widekernel.tasks.image_channels import input_channels, match_channels
from widekernel.tasks.loading import load
from widekernel.tasks.model_source import ModelSource

SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("name", "args"), [("slak_nano", SMALL), ("test_resnet", {})])
def test_folding(name: str, args: dict, channels: int) -> None:
    """Our networks state their channels; for timm's networks, the first convolution determines them."""
    model = build_model(name, 3, {**args, "in_chans": channels})
    assert input_channels(model) == channels
    folded, check = fold_and_check(model, 32, images=2)
    assert check.max_output > 0 and folded(torch.zeros(1, channels, 32, 32)).shape == (1, 3)


def test_networks_take_three_channels_by_default() -> None:
    assert input_channels(nn.Identity()) == 3


def test_gray() -> None:
    preprocessing = Preprocessing(8, (0.2, 0.2, 0.2), (0.5, 0.5, 0.5), "bilinear", 1.0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    transform = preprocessing.eval_transform()
    assert match_channels(transform, 3) is transform
    expected = (np.asarray(image.convert("L"), dtype=np.float32) / 255 - 0.2) / 0.5
    np.testing.assert_allclose(match_channels(transform, 1)(image)[0].numpy(), expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"images of 4 channels \(in_chans\), but images are read with 3, or 1 when gray"):
        match_channels(transform, 4)


def test_training_and_evaluation_on_gray_images(make, tmp_path) -> None:  # noqa: F811
    result = train(make(model=ModelConfig("test_resnet", args={"in_chans": 1})))
    model, saved = load(ModelSource(result.folder.path))
    assert input_channels(model) == 1 and saved.model_args == {"in_chans": 1}
    with pytest.raises(ConfigError, match="images of 4 channels"):
        train(replace(make(model=ModelConfig("test_resnet", args={"in_chans": 4})), output=str(tmp_path / "other")))
