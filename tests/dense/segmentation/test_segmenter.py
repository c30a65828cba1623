"""UPerNet on feature pyramids: shapes, training and inference forms, settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import widekernel
from widekernel.dense.backbone import build_pyramid
from widekernel.dense.segmentation import (
    Segmenter,
    SegmenterOptions,
    SegmenterOutput,
    UPerHead,
    segmentation_losses,
    whole_inference,
)
from widekernel.errors import ArgumentError, ConfigError, ShapeError
from widekernel.layers.folding import is_folded
from widekernel.transforms.compaction import compact

SMALL = SegmenterOptions(5, channels=16, auxiliary_channels=8)


def segmenter(name: str = "slak_nano", options: SegmenterOptions = SMALL, **args) -> Segmenter:
    return Segmenter(build_pyramid(name, args), options)


@pytest.mark.parametrize(
    "name", ["slak_nano", "replknet_nano", "shiftwise_nano", "unireplknet_nano", "convnext_atto", "resnet18"]
)
def test_logits(name: str) -> None:
    network, x = segmenter(name), torch.randn(2, 3, 64, 96)
    output = network(x)
    assert isinstance(output, SegmenterOutput)
    assert output.logits.shape == (2, 5, 16, 24)
    assert output.auxiliary is not None
    assert output.auxiliary.shape == (2, 5, 4, 6)
    (output.logits.mean() + output.auxiliary.mean()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    logits = network.eval()(x)
    assert logits.shape == (2, 5, 16, 24)
    assert whole_inference(network, x).shape == (2, 5, 64, 96)


def test_no_auxiliary_head() -> None:
    network = segmenter(options=SegmenterOptions(5, channels=16, auxiliary_channels=None))
    output = network(torch.randn(2, 3, 64, 64))
    assert output.auxiliary is None
    assert not any(key.startswith("auxiliary_head") for key in network.state_dict())
    assert set(segmentation_losses(output, torch.zeros(2, 64, 64, dtype=torch.long), network.options)) == {"decode"}


def test_odd_sizes() -> None:
    """RepLKNet rounds sizes up; the head follows the maps."""
    network = segmenter("replknet_nano", SegmenterOptions(5, channels=16, align_corners=True)).eval()
    x = torch.randn(1, 3, 65, 97)
    assert network(x).shape == (1, 5, 17, 25)
    assert whole_inference(network, x).shape == (1, 5, 65, 97)


def test_three_levels() -> None:
    network = Segmenter(build_pyramid("slak_nano", out_indices=(1, 2, 3)), SMALL)
    output = network(torch.randn(2, 3, 64, 64))
    assert output.logits.shape == (2, 5, 8, 8)
    assert output.auxiliary.shape == (2, 5, 4, 4)


def test_one_level_is_refused() -> None:
    with pytest.raises(ArgumentError, match="the pyramid has 1 level"):
        Segmenter(build_pyramid("slak_nano", out_indices=(3,)), SMALL)


def test_initial_weights() -> None:
    network = segmenter(options=SegmenterOptions(50, channels=64))
    for head in (network.decode_head, network.auxiliary_head):
        assert abs(head.conv_seg.weight.std().item() - 0.01) < 1e-3
        assert not head.conv_seg.bias.any()


def test_dropout_in_training_only() -> None:
    """Dropout drops whole channels."""
    head, maps = UPerHead([8, 8], 16, 5, dropout=0.5), [torch.randn(2, 8, 16, 16), torch.randn(2, 8, 8, 8)]
    seen = []
    head.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    head(maps)
    empty = (seen[0] == 0).flatten(2).all(2)
    assert 0 < empty.sum() < empty.numel()
    head.eval()
    assert torch.equal(head(maps), head(maps))


def test_single_image_in_training() -> None:
    network, x = segmenter(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ShapeError, match="the batch has 1 image"):
        network.train()(x)
    for module in network.decode_head.psp_modules[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # frozen statistics
    network(torch.randn(1, 3, 64, 96))
    segmenter(options=SegmenterOptions(5, channels=16, pool_scales=(2, 3)))(torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano"])
def test_transforms(name: str) -> None:
    network, x = segmenter(name), torch.randn(2, 3, 64, 96)
    network(x)
    network.eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():  # dead hidden units of the backbone
            if key.endswith(("mlp.fc1.weight", "mlp.fc1.bias", "pw1.conv.weight")):
                parameter[::2] = 0
        expected = network(x)
        folded, small = widekernel.fold(network), compact(network)
        assert is_folded(folded)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in folded.parameters())
        faster, _ = widekernel.accelerate(folded, pointwise=False)
        for other in (faster, small):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_export() -> None:
    network, x = segmenter().eval(), torch.randn(2, 3, 64, 96)
    exported = torch.export.export(network, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), network(x), rtol=1e-5, atol=1e-6)


def test_mixed_precision() -> None:
    network, x = segmenter(), torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 5, (2, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        losses = segmentation_losses(network(x), labels, network.options)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_gradient_checkpointing() -> None:
    network, x = segmenter(), torch.randn(2, 3, 64, 64)
    network.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in network.backbone.body.stages)
    network(x).logits.sum().backward()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"channels": 0}, "channels"),
        ({"pool_scales": ()}, "pool_scales"),
        ({"pool_scales": (0,)}, "pool_scales"),
        ({"dropout": 1.0}, "dropout"),
        ({"auxiliary_channels": 0}, "auxiliary_channels"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight"),
    ],
)
def test_wrong_settings(settings, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is"):
        SegmenterOptions(**{"num_classes": 5, **settings})
