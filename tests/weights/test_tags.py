"""Published weights as timm's tags, and by name in `load_checkpoint`: preprocessing, classes, channels and arguments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import widekernel
from tests.models.zoo import alive, assert_same_state, create, snapshot
from tests.weights.conftest import url
from tests.weights.server import Server, status
from widekernel.errors import ArgumentError, CheckpointError, FetchError
from widekernel.tasks.assembly import build_model
from widekernel.weights import find_checkpoint

NAME = "replknet_31b.in1k_224"
TINY: dict[str, Any] = {"kernel_sizes": (31, 15, 7, 5), "small_kernel": 3, "depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}
"""Arguments that make RepLKNet-31B the nano network."""


@pytest.fixture
def trained() -> nn.Module:
    return alive("replknet_nano")


@pytest.fixture
def published(server: Server, publish: Any, trained: nn.Module, tmp_path: Path) -> Server:
    """Publish the weights of a small network under the names of large ones."""
    path = widekernel.save_checkpoint(trained, tmp_path / "official.pth", layout="official")
    server.content = path.read_bytes()
    publish(url(server), arguments=TINY)
    return server


def assert_weights(model: nn.Module, trained: nn.Module) -> None:
    assert_same_state(model.state_dict(), trained.state_dict())


def test_a_tag(published: Server, trained: nn.Module) -> None:
    model = timm.create_model(NAME, pretrained=True)
    assert_weights(model, trained)
    cfg = model.pretrained_cfg
    assert (cfg["architecture"], cfg["tag"], cfg["num_classes"]) == ("replknet_31b", "in1k_224", 1000)
    assert "file" not in cfg
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["crop_mode"]) == ((3, 224, 224), 0.875, "center")
    assert model._model_args == TINY
    assert_weights(timm.create_model(NAME, pretrained=True), trained)
    assert len(published.requests) == 1


def test_the_default_tag(published: Server, trained: nn.Module) -> None:
    assert_weights(timm.create_model("replknet_31b", pretrained=True), trained)


def test_without_weights_a_tag_brings_its_arguments(published: Server) -> None:
    assert timm.create_model(NAME).cfg.dims == TINY["dims"]
    assert timm.create_model(NAME, dims=(8, 16, 24, 32)).cfg.dims == (8, 16, 24, 32)
    assert published.requests == []


def test_real_arguments() -> None:
    with torch.device("meta"):
        assert timm.create_model("replknet_31b.k13_e120_in1k_224").cfg.kernel_sizes == (13, 13, 13, 13)
        assert timm.create_model("replknet_31b.e120_in1k_224").cfg.kernel_sizes == (31, 29, 27, 13)


@pytest.mark.slow
def test_preprocessing_of_other_tags(published: Server, publish: Any, trained: nn.Module) -> None:
    for like, size, mean, crop in (
        ("replknet_31b.in22k_ft_in1k_384", 384, (0.485, 0.456, 0.406), (1.0, "squash")),
        ("replknet_xl.megdata73m_ft_in1k_320", 320, (0.5, 0.5, 0.5), (0.875, "center")),
    ):
        publish(url(published), like=like, arguments={**TINY, "dw_ratio": 1.0})
        data = timm.data.resolve_model_data_config(timm.create_model(like, pretrained=True))
        assert (data["input_size"], data["mean"]) == ((3, size, size), mean)
        assert (data["crop_pct"], data["crop_mode"]) == crop


def test_classes_of_other_tags(published: Server) -> None:
    with torch.device("meta"):
        assert timm.create_model("replknet_31b.in22k_224").num_classes == 21841
        assert timm.create_model("replknet_xl.megdata73m").num_classes == 0
        assert timm.create_model("replknet_31b.in22k_224", num_classes=7).head.fc.out_features == 7


@pytest.mark.parametrize("kwargs", [{"num_classes": 5}, {"num_classes": 0}])
def test_other_classes(kwargs: dict[str, int], published: Server, trained: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = timm.create_model(NAME, pretrained=True, **kwargs)
    assert model.num_classes == kwargs["num_classes"]
    theirs = trained.state_dict()
    assert all(
        torch.equal(value, theirs[key]) for key, value in model.state_dict().items() if not key.startswith("head.fc.")
    )


def test_other_channels(published: Server, trained: nn.Module) -> None:
    model = timm.create_model(NAME, pretrained=True, in_chans=1)
    first = "stem.0.conv.weight"
    theirs = trained.state_dict()
    torch.testing.assert_close(model.state_dict()[first], theirs[first].sum(1, keepdim=True))
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items() if key != first)


@pytest.mark.parametrize("kind", ["getter", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("list", "fx"))])
def test_feature_extractors(kind: str, published: Server, trained: nn.Module) -> None:
    extractor = timm.create_model(NAME, pretrained=True, features_only=True, feature_cls=kind, out_indices=(1, 3)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained.eval().forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        for ours, theirs in zip(extractor(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_in_training(published: Server, trained: nn.Module) -> None:
    model = build_model(NAME, 10, {"drop_path_rate": 0.1}, pretrained=True)
    assert model.num_classes == 10
    assert torch.equal(model.state_dict()["stem.0.conv.weight"], trained.state_dict()["stem.0.conv.weight"])


def test_timms_cache_folder(published: Server, trained: nn.Module, tmp_path: Path, cache: Path) -> None:
    assert_weights(timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "here"), trained)
    assert (tmp_path / "here" / f"{NAME}.pth").exists() and not cache.exists()


def test_weights_of_the_user_come_first(published: Server, tmp_path: Path) -> None:
    other = alive("replknet_nano")
    path = widekernel.save_checkpoint(other, tmp_path / "other.pth", layout="official")
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **TINY)
    assert_weights(model, other)
    assert published.requests == []


def test_what_timm_stores_builds_the_network_again(published: Server, trained: nn.Module, tmp_path: Path) -> None:
    model = timm.create_model(NAME, pretrained=True)
    timm.models.save_for_hf(model, tmp_path / "hub", model_args=model._model_args)
    assert_weights(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True), trained)
    assert len(published.requests) == 1


def test_unknown_tags() -> None:
    with pytest.raises(ArgumentError, match=r"has no weights 'in1k_225'\. Did you mean 'replknet_31b\.in1k_224'\?"):
        timm.create_model("replknet_31b.in1k_225", pretrained=True)
    with pytest.raises(ArgumentError, match="backbone of a network for segmentation: create 'replknet_31b' and call"):
        timm.create_model("replknet_31b.in1k_ft_ade20k_upernet_512", pretrained=True)


def test_networks_without_published_weights() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for replknet_nano"):
        timm.create_model("replknet_nano", pretrained=True)


def test_no_network(published: Server) -> None:
    published.always = status(404)
    with pytest.raises(FetchError, match=r"(?s)cannot be fetched:.*404 Not Found.*Fetch it by hand"):
        timm.create_model(NAME, pretrained=True)


def test_a_file_of_another_network(published: Server, tmp_path: Path) -> None:
    path = widekernel.save_checkpoint(create("slak_nano"), tmp_path / "slak.pth", layout="official")
    published.content = path.read_bytes()
    with pytest.raises(CheckpointError, match="holds SLaK, but the model is a RepLKNet"):
        timm.create_model(NAME, pretrained=True)


# ---- load_checkpoint


def test_load_checkpoint_by_name(published: Server, trained: nn.Module, cache: Path) -> None:
    model = create("replknet_nano")
    report = widekernel.load_checkpoint(model, "replknet_31b.in1k_224")
    assert_weights(model, trained)
    assert report.path == str(cache / f"{NAME}.pth")
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert model.pretrained_cfg["pool_size"] == (7, 7)


def test_load_checkpoint_sets_the_preprocessing(published: Server, publish: Any) -> None:
    publish(url(published), like="replknet_xl.megdata73m_ft_in1k_320")
    for kwargs in ({}, {"features_only": True}):
        model = create("replknet_nano", **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            widekernel.load_checkpoint(model, "replknet_xl.megdata73m_ft_in1k_320")
        data = timm.data.resolve_model_data_config(model)
        assert (data["input_size"], data["mean"], data["std"]) == ((3, 320, 320), (0.5,) * 3, (0.5,) * 3)
    assert timm.get_pretrained_cfg("replknet_nano").mean == (0.485, 0.456, 0.406)


def test_a_backbone_keeps_its_size(published: Server, publish: Any) -> None:
    publish(url(published), like="replknet_xl.megdata73m_ft_ade20k_upernet_640")
    model = create("replknet_nano")
    widekernel.load_checkpoint(model, "replknet_xl.megdata73m_ft_ade20k_upernet_640")
    assert (model.pretrained_cfg["input_size"], model.pretrained_cfg["mean"]) == ((3, 64, 64), (0.5, 0.5, 0.5))


def test_other_classes_are_left_out_with_a_warning(published: Server) -> None:
    with pytest.warns(UserWarning, match="they are for 1000 classes, the network has 5") as caught:
        widekernel.load_checkpoint(create("replknet_nano", num_classes=5), NAME)
    assert caught[0].filename == __file__


def test_a_file_of_the_name_comes_first(
    published: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: nn.Module
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).write_bytes(published.content)
    model = create("replknet_nano")
    widekernel.load_checkpoint(model, NAME)
    assert_weights(model, trained)
    assert published.requests == []
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)


def test_another_network_is_refused_before_the_download(published: Server) -> None:
    model = create("slak_nano")
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"holds RepLKNet, but the SLaK takes weights of SLaK: .* Nothing was fetched"):
        widekernel.load_checkpoint(model, NAME)
    assert_same_state(model.state_dict(), before)
    assert published.requests == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "replknet_31b.in1k_225",
            r"no published checkpoint .*\. Did you mean 'replknet_31b\.in1k_224'",
        ),
        ("weights.pth", r"there is no checkpoint at weights\.pth"),
        ("./replknet_31b.in1k_224", "there is no checkpoint at"),
    ],
)
def test_what_is_neither_a_file_nor_a_name(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        widekernel.load_checkpoint(create("replknet_nano"), path)


def test_paths_are_not_names() -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        widekernel.load_checkpoint(create("replknet_nano"), Path(NAME))
    assert find_checkpoint(NAME).name == NAME
