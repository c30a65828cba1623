"""Official weights in official files give the official outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import widekernel
from tests.conftest import shared_folder
from tests.parity.reference import assert_close, create, images, manifest, official_file

FAMILIES = (
    "replknet",
    "slak",
    "slak_reg",
    "slak_pww",
    "shiftwise_v1",
    "shiftwise_v2",
    "convnext",
    "convnext_isotropic",
    "unireplknet",
)
# These convert weights of another network first, or are of a backbone with norms, and have tests of their own.
CONVERTED = (
    "replknet31b_merged_s0_224",
    "slak_to_slak_reg_s0",
    "unireplknet_mini_feats_s0_64x96",
    "unireplknet_t_feats_s0_128x96",
)


def _rows() -> list[Any]:
    folder = shared_folder()
    if folder is None:
        return []
    rows = json.loads((folder / "parity" / "golden" / "index.json").read_text())
    wanted = [row for row in rows if row["family"] in FAMILIES and row["case"] not in CONVERTED]
    return [pytest.param(row, id=row["case"], marks=[] if "mini" in row["case"] else pytest.mark.full) for row in wanted]


def _loaded(shared: Path, folder: Path, row: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    description = manifest(shared, row["manifest"])
    model = create(description).eval()
    return model, widekernel.load_checkpoint(model, official_file(shared, folder, row["manifest"], row["seed"]))


@pytest.mark.parametrize("row", _rows())
def test_official_outputs(row: dict[str, Any], shared: Path, golden: Path, tmp_path: Path) -> None:
    model, report = _loaded(shared, tmp_path, row)
    assert not report.dropped
    assert not report.ignored
    expected = np.load(golden / row["file"])
    x = images(shared, row["input_seed"], row["input_shape"])
    with torch.no_grad():
        if "logits" in expected:
            assert_close(model(x), expected["logits"])
            folded = widekernel.fold(model)(x)
            assert_close(folded, expected["logits"])
        else:
            maps = model.forward_intermediates(x, intermediates_only=True)
            for i, feature in enumerate(maps):
                assert list(feature.shape) == expected[f"feat{i}_shape"].tolist()
                at = torch.from_numpy(expected[f"feat{i}_idx"])
                assert_close(feature.flatten()[at], expected[f"feat{i}_val"])
        if "logits_f64" in expected and "mini" in row["case"] and not row["kwargs"].get("deploy"):
            assert_close(model.double()(x.double()), expected["logits_f64"], relative=1e-10, absolute=1e-12)


@pytest.mark.full
def test_merged_replknet(shared: Path, golden: Path, tmp_path: Path) -> None:
    """Folding a RepLKNet-31B gives the kernels and logits of the official merge."""
    row = {"manifest": "replknet31b", "seed": 0}
    model, _ = _loaded(shared, tmp_path, row)
    expected = np.load(golden / "replknet31b_merged_s0_224.npz")
    folded = widekernel.fold(model)
    for key in ("stages.0.blocks.0", "stages.2.blocks.16", "stages.3.blocks.2"):
        layer = folded.get_submodule(key).large_kernel
        (kernel,) = layer.kernels
        assert_close(kernel[:2].detach(), expected[f"{key}.weight[:2]"])
        assert_close(layer.bias.detach(), expected[f"{key}.bias"])
    with torch.no_grad():
        assert_close(folded(images(shared, 0, [2, 3, 224, 224])), expected["logits"])


def test_merged_mini_replknet(shared: Path, golden: Path, tmp_path: Path) -> None:
    """Merged and deeply fused files give the official logits; our fold gives the official merged kernels."""
    model, _ = _loaded(shared, tmp_path, {"manifest": "replknet_mini", "seed": 0})
    expected = np.load(golden / "replknet_mini_merged_s0.npz")
    folded = widekernel.fold(model)
    x = images(shared, 0, [2, 3, 64, 64])
    with torch.no_grad():
        assert_close(folded(x), expected["logits_merged"])
        assert_close(folded(x), expected["logits_deep_fused"])
    merged = [key for key in expected if key.startswith("merged:") and key.endswith("weight")]
    assert len(merged) == 5
    for key in merged:
        layer = folded.get_submodule(key[len("merged:") : -len(".lkb_reparam.weight")])
        assert_close(layer.kernels[0].detach(), expected[key])
        assert_close(layer.bias.detach(), expected[key.replace("weight", "bias")])


@pytest.mark.full
def test_strips_cut_into_tiles(shared: Path, golden: Path, tmp_path: Path) -> None:
    """A SLaK checkpoint loads into SLaK_reg and gives the same logits there."""
    expected = np.load(golden / "slak_to_slak_reg_s0.npz")
    file = official_file(shared, tmp_path, "slak_tiny", 0)
    x = images(shared, 0, [2, 3, 128, 128])
    for name, key in (("slak_tiny", "logits_slak"), ("slak_reg_tiny", "logits_slak_reg")):
        model = create(manifest(shared, name)).eval()
        report = widekernel.load_checkpoint(model, file)
        assert not report.missing
        with torch.no_grad():
            assert_close(model(x), expected[key])
    assert "cut 36 strips" in report.notes[0]
