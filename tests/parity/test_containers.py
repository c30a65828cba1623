"""Official container formats of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import widekernel
from tests.parity.reference import arguments, create, manifest, weights
from widekernel.models.checkpoint import LoadReport


def _mini(shared: Path, **overrides) -> torch.nn.Module:
    description = manifest(shared, "slak_mini")
    description["kwargs"].update(overrides)
    return create(description)


def _official(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(widekernel.save_checkpoint(model, folder / "out.pth", layout="official"), weights_only=True)["model"]


@pytest.mark.parametrize(
    ("file", "which", "seed", "container"),
    [
        ("training.pth", "model", 0, "model"),
        ("training.pth", "ema", 1, "model_ema"),
        ("raw.pth", "model", 0, ""),
        ("raw_ddp.pth", "model", 0, ""),
    ],
)
def test_weights_load_from_every_container(
    file: str, which, seed: int, container: str, shared: Path, golden: Path, tmp_path: Path
) -> None:
    model = _mini(shared)
    report = widekernel.load_checkpoint(model, golden / "containers" / file, weights=which)
    assert report.container == container
    assert report.layout == "SLaK"
    assert not (report.dropped or report.missing or report.ignored)
    expected = weights(shared, manifest(shared, "slak_mini")["keys"], seed)
    ours = _official(model, tmp_path)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_a_backbone_of_a_segmentation_network(shared: Path, golden: Path, tmp_path: Path) -> None:
    model = _mini(shared)
    head = model.head.fc.weight.clone()
    report = widekernel.load_checkpoint(model, golden / "containers" / "downstream.pth")
    assert report.container == "state_dict"
    assert "removed the prefix 'backbone.'" in report.notes
    assert set(report.missing) == {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}
    assert any(key.startswith("decode_head.") for key in report.ignored)
    assert {"norm0.weight", "norm3.bias"} <= set(report.ignored)
    assert torch.equal(model.head.fc.weight, head)
    expected = weights(shared, manifest(shared, "slak_mini")["keys"], 0)
    ours = _official(model, tmp_path)
    assert all(torch.equal(ours[key], expected[key]) for key in expected if not key.startswith(("head.", "norm.")))


def test_zeros_of_a_sparse_network_survive(shared: Path, golden: Path) -> None:
    model = _mini(shared)
    report = widekernel.load_checkpoint(model, golden / "containers" / "sparse_best.pth")
    file = torch.load(golden / "containers" / "sparse_best.pth", map_location="cpu", weights_only=False)["model"]
    zeros = sum(int((value == 0).sum()) for key, value in file.items() if value.dim() > 1)
    ours = sum(int((parameter == 0).sum()) for parameter in model.parameters() if parameter.dim() > 1)
    assert zeros > 1000
    assert ours == zeros
    assert report.layout == "SLaK"


def test_classifier_of_other_classes_is_left_out_and_named(shared: Path, golden: Path) -> None:
    model = _mini(shared)
    with pytest.warns(UserWarning, match=r"head\.weight.*21 classes, the network has 10"):
        report = widekernel.load_checkpoint(model, golden / "containers" / "other_head.pth")
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert _full_head(widekernel.load_checkpoint(_mini(shared, num_classes=21), golden / "containers" / "other_head.pth"))


def _full_head(report: LoadReport) -> bool:
    return not report.dropped and "head.fc.weight" in report.loaded


def test_arguments_are_translated() -> None:
    ours = arguments("SLaK_tiny", {"kernel_size": [7, 7, 7, 7, 100], "width_factor": 1.0, "Decom": False})
    assert ours == {"kernel_sizes": (7, 7, 7, 7), "small_kernel": 0, "width_factor": 1.0, "decomposed": False}
