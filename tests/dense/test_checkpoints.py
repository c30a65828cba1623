"""Checkpoints of networks for dense prediction and of their backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import widekernel
from widekernel.dense.backbone import build_pyramid
from widekernel.dense.segmentation import Segmenter, SegmenterOptions
from widekernel.errors import CheckpointError
from widekernel.models.checkpoint import by_name
from widekernel.weights.catalog import find_checkpoint

NETWORKS = ("replknet_nano", "slak_nano", "shiftwise_nano", "unireplknet_nano", "convnext_atto")


def segmenter(name: str, classes: int = 5, **args) -> Segmenter:
    return Segmenter(build_pyramid(name, args), SegmenterOptions(classes, channels=16, auxiliary_channels=8))


def shuffled(network: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value of its own."""
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) if key.endswith("running_var") else 0.1 * torch.randn_like(value))
    return network


def saved(state: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / "file.pth"
    torch.save({"meta": {}, "state_dict": state}, path)
    return path


def official(network: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    path = widekernel.save_checkpoint(network, folder / "official.pth", layout="official")
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content.get("model"))


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", ["native", "official"])
def test_whole_network(name: str, layout, tmp_path: Path) -> None:
    ours, other = shuffled(segmenter(name)), segmenter(name)
    path = tmp_path / ("ours.safetensors" if layout == "native" else "ours.pth")
    report = widekernel.load_checkpoint(other, widekernel.save_checkpoint(ours, path, layout=layout))
    assert not (report.dropped or report.missing or report.ignored)
    assert_equal(ours, other)


def test_any_timm_backbone(tmp_path: Path) -> None:
    ours, other = shuffled(segmenter("resnet18")), segmenter("resnet18")
    report = widekernel.load_checkpoint(other, widekernel.save_checkpoint(ours, tmp_path / "ours.safetensors"))
    assert report.layout == "native"
    assert_equal(ours, other)


def test_wrapped_network(tmp_path: Path) -> None:
    ours, other = shuffled(segmenter("slak_nano")), segmenter("slak_nano")
    state = {f"module.{key}": value for key, value in official(ours, tmp_path).items()}
    report = widekernel.load_checkpoint(nn.DataParallel(other), saved(state, tmp_path))
    assert report.notes == ("removed the prefix 'module.'",)
    assert_equal(ours, other)


@pytest.mark.parametrize("whole", [True, False], ids=["network", "backbone"])
def test_averaged_buffers_of_openmmlab(whole: bool, tmp_path: Path) -> None:
    """Its hook adds an averaged copy of every tensor as a buffer, as in UniRepLKNet's files for detection."""
    ours = shuffled(segmenter("unireplknet_nano"))
    state = official(ours, tmp_path)
    copies = {f"ema_{key.replace('.', '_')}": torch.zeros_like(value) for key, value in state.items()}
    path = saved({**state, **copies}, tmp_path)
    other = segmenter("unireplknet_nano")
    report = widekernel.load_checkpoint(other if whole else other.backbone, path)
    assert copies.keys() <= set(report.ignored)
    assert_equal(ours if whole else ours.backbone, other if whole else other.backbone)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", ["native", "official"])
def test_classification_network_into_the_backbone(name: str, layout, tmp_path: Path) -> None:
    classifier, backbone = shuffled(timm.create_model(name)).eval(), shuffled(build_pyramid(name)).eval()
    norms = {key: value.clone() for key, value in backbone.norms.state_dict().items()}
    path = tmp_path / ("ours.safetensors" if layout == "native" else "ours.pth")
    report = widekernel.load_checkpoint(backbone, widekernel.save_checkpoint(classifier, path, layout=layout))
    used = set(report.loaded) | set(report.generated)
    assert used == {f"body.{key}" for key in backbone.body.state_dict()}
    assert set(report.missing) == {f"norms.{key}" for key in norms}
    outside = [key for key in classifier.state_dict() if key.startswith(("head.", "norm_pre."))]
    assert len(report.dropped) == len(outside)
    assert not report.ignored
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = classifier.forward_intermediates(x, intermediates_only=True)
        ours = backbone(x)
    assert all(torch.equal(value, backbone.norms.state_dict()[key]) for key, value in norms.items())
    assert all(torch.equal(a, norm(b)) for a, norm, b in zip(ours, backbone.norms, maps))


def test_norms_of_replknet_are_fresh(tmp_path: Path) -> None:
    classifier = shuffled(timm.create_model("replknet_nano"))
    backbone = build_pyramid("replknet_nano", {"norm_intermediate_features": True})
    path = widekernel.save_checkpoint(classifier, tmp_path / "file.pth", layout="official")
    report = widekernel.load_checkpoint(backbone, path)
    assert {key.split(".")[1] for key in report.missing} == {"feature_norms"}


def test_segmentation_network_into_the_backbone(tmp_path: Path) -> None:
    ours, backbone = shuffled(segmenter("slak_nano")), build_pyramid("slak_nano")
    report = widekernel.load_checkpoint(backbone, saved(official(ours, tmp_path), tmp_path))
    assert report.notes == ("removed the prefix 'backbone.'",)
    assert not (report.missing or report.dropped)
    assert {key.split(".")[0] for key in report.ignored} == {"decode_head", "auxiliary_head"}
    assert_equal(ours.backbone, backbone)


@pytest.mark.filterwarnings("ignore:.*holds no classifier")
@pytest.mark.parametrize("layout", ["native", "official"])
def test_segmentation_network_into_a_classification_network(layout, tmp_path: Path) -> None:
    ours, classifier = shuffled(segmenter("slak_nano")), timm.create_model("slak_nano")
    path = tmp_path / ("ours.safetensors" if layout == "native" else "ours.pth")
    report = widekernel.load_checkpoint(classifier, widekernel.save_checkpoint(ours, path, layout=layout))
    assert {key.split(".")[0] for key in report.missing} == {"head"}
    body, own = ours.backbone.body.state_dict(), classifier.state_dict()
    assert all(torch.equal(own[key], value) for key, value in body.items())


def test_some_levels_of_a_segmentation_network(tmp_path: Path) -> None:
    """Each map gets the norm of its stage."""
    ours, backbone = shuffled(segmenter("slak_nano")), build_pyramid("slak_nano", out_indices=(0, 2))
    report = widekernel.load_checkpoint(backbone, saved(official(ours, tmp_path), tmp_path))
    assert {key.split(".")[0] for key in report.ignored} == {
        "norm1",
        "norm3",
        "downsample_layers",
        "stages",
        "decode_head",
        "auxiliary_head",
    }
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours.backbone.eval()(x)
        found = backbone.eval()(x)
    assert all(torch.equal(found[i], expected[stage]) for i, stage in enumerate((0, 2)))


def test_segmenter_on_some_levels(tmp_path: Path) -> None:
    first, second = (
        Segmenter(build_pyramid("slak_nano", out_indices=(1, 3)), SegmenterOptions(5, channels=16)) for _ in "ab"
    )
    widekernel.load_checkpoint(second, widekernel.save_checkpoint(shuffled(first), tmp_path / "file.pth", layout="official"))
    assert_equal(first, second)


def test_missing_stage_is_refused(tmp_path: Path) -> None:
    classifier, backbone = timm.create_model("slak_nano"), shuffled(build_pyramid("slak_nano"))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = {key: value for key, value in official(classifier, tmp_path).items() if not key.startswith("stages.2.")}
    with pytest.raises(CheckpointError, match=r"body\.stages\.2\.blocks\.0.*holds no such weight"):
        widekernel.load_checkpoint(backbone, saved(state, tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_part_of_the_norms_is_refused(tmp_path: Path) -> None:
    state = official(segmenter("slak_nano"), tmp_path)
    del state["backbone.norm2.weight"]
    for network in (segmenter("slak_nano"), build_pyramid("slak_nano")):
        with pytest.raises(CheckpointError, match=r"norms\.2\.weight: the file holds no such weight"):
            widekernel.load_checkpoint(network, saved(state, tmp_path))


def test_classification_network_into_a_segmenter(tmp_path: Path) -> None:
    path = widekernel.save_checkpoint(timm.create_model("slak_nano"), tmp_path / "file.pth", layout="official")
    with pytest.raises(
        CheckpointError, match=r"no weights named backbone.*load it into the backbone alone, network\.backbone"
    ):
        widekernel.load_checkpoint(segmenter("slak_nano"), path)


def test_other_network(tmp_path: Path) -> None:
    path = widekernel.save_checkpoint(segmenter("slak_nano"), tmp_path / "file.pth", layout="official")
    with pytest.raises(CheckpointError, match=r"holds SLaK, but the model is a Segmenter"):
        widekernel.load_checkpoint(segmenter("replknet_nano"), path)
    with pytest.raises(CheckpointError, match=r"decode_head\.conv_seg\.weight has shape \(5, 16, 1, 1\)"):
        widekernel.load_checkpoint(segmenter("slak_nano", classes=7), path)


def test_head_without_a_place_is_refused(tmp_path: Path) -> None:
    state = official(segmenter("slak_nano"), tmp_path)
    for network, wrong in ((segmenter("slak_nano"), "neck.conv.weight"), (segmenter("slak_nano"), "decode_head.a.weight")):
        with pytest.raises(CheckpointError, match=f"{wrong}: the network has no such weight"):
            widekernel.load_checkpoint(network, saved({**state, wrong: torch.zeros(2)}, tmp_path))


def test_folded_network(tmp_path: Path) -> None:
    ours = shuffled(segmenter("slak_nano")).eval()
    folded, other = widekernel.fold(ours), widekernel.fold(segmenter("slak_nano").eval())
    with pytest.raises(CheckpointError, match="load the weights before folding"):
        widekernel.load_checkpoint(other, widekernel.save_checkpoint(ours, tmp_path / "file.pth", layout="official"))
    widekernel.load_checkpoint(other, widekernel.save_checkpoint(folded, tmp_path / "folded.safetensors"))
    assert_equal(folded, other)


def test_published_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's images are then prepared as those of the published one."""
    name = "replknet_xl.megdata73m_ft_ade20k_upernet_640"
    assert find_checkpoint(name).task == "segmentation"
    ours, other = shuffled(segmenter("replknet_nano")), segmenter("replknet_nano")
    path = saved(official(ours, tmp_path), tmp_path)
    monkeypatch.setattr(by_name, "fetch", lambda checkpoint: path)
    widekernel.load_checkpoint(other, name)
    assert_equal(ours, other)
    assert other.backbone.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
