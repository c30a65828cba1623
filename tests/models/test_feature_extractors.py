"""Feature extractors that return only some maps: which image sizes and parameters they still need."""

from __future__ import annotations

import pytest
import torch
from timm.models import FeatureListNet
from torch import nn

from tests.models.zoo import NANO, alive, create, images
from widekernel.errors import ShapeError

# The networks whose stride grows from stage to stage.
STAGED = [name for name in NANO if name != "convnext_isotropic_nano"]


@pytest.mark.parametrize("name", STAGED)
def test_shortened_extractors_take_smaller_images(name: str) -> None:
    extractor = create(name, features_only=True, out_indices=(0, 1)).eval()
    with torch.no_grad():
        assert [tuple(feature.shape[2:]) for feature in extractor(images(16))] == [(4, 4), (2, 2)]
        assert [tuple(feature.shape[2:]) for feature in extractor(images(8))] == [(2, 2), (1, 1)]
    with pytest.raises(ShapeError, match="image is 7x7 but the network's stride is 8"):
        extractor(images(7))
    with pytest.raises(ShapeError, match="image is 16x16 but the network's stride is 32"):
        create(name, features_only=True, out_indices=(0, 3))(images(16))


@pytest.mark.parametrize("name", STAGED)
def test_maps_of_small_images_are_those_of_the_whole_network(name: str) -> None:
    model = alive(name)
    extractor = create(name, features_only=True, out_indices=(0, 1)).eval()
    extractor.model.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        x = model.stem(images(16))
        for stage, feature in zip(model.stages, extractor(images(16))):
            x = stage(x)
            assert torch.equal(feature, x)


@pytest.mark.parametrize("indices", [(0, 1), (1, 3), (0, 2), (3,), (0, 1, 2, 3)], ids=str)
def test_norms_of_maps_are_all_used(indices: tuple[int, ...]) -> None:
    extractor = create("replknet_nano_feature_norms", features_only=True, out_indices=indices)
    maps = extractor(images(32))
    assert len(maps) == len(indices)
    norms = extractor.model.feature_norms
    assert [i for i, norm in enumerate(norms) if isinstance(norm, nn.BatchNorm2d)] == list(indices)
    sum(feature.sin().sum() for feature in maps).backward()
    assert not [key for key, parameter in extractor.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("indices", [None, (1, 3), (0,)], ids=str)
@pytest.mark.parametrize("name", STAGED)
def test_extractors_as_lists_of_layers(name: str, indices: tuple[int, ...] | None) -> None:
    chosen = {} if indices is None else {"out_indices": indices}
    maps, widths = [], []
    for kind in ("getter", "list"):
        torch.manual_seed(5)
        extractor = create(name, features_only=True, feature_cls=kind, **chosen).eval()
        widths.append(extractor.feature_info.channels())
        with torch.no_grad():
            maps.append(extractor(images(32)))
    assert isinstance(extractor, FeatureListNet)
    assert widths[0] == widths[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*maps, strict=True))
