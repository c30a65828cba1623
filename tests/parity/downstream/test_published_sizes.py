"""Parameters and multiply-accumulates of all published segmentation and detection networks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import shared_folder
from tests.parity.downstream.networks import network
from tests.parity.downstream.reference import folder, manifest, manifest_names
from widekernel.analysis.complexity import complexity

# Blocks of the third stage, and width of the first stage before a factor.
SIZES = {"tiny": (9, 96), "small": (27, 96), "base": (27, 128), "large": (27, 192), "xlarge": (27, 256)}


def rows() -> list[Any]:
    shared = shared_folder()
    if shared is None:
        return []
    content = json.loads((folder(shared) / "golden" / "params_flops.json").read_text())
    return [pytest.param(row, id=row["name"]) for row in content["rows"]]


def config(shared: Path, name: str) -> dict[str, Any]:
    """Return the configuration of a published network; some differ from a stored one in the backbone's size only."""
    stored = name.removesuffix("640")
    if stored in manifest_names():
        return manifest(shared, stored)["config"]
    size = next(size for size in SIZES if f"_{size}" in stored)
    made = copy.deepcopy(manifest(shared, stored.replace(size, "tiny"))["config"])
    depth, width = SIZES[size]
    made["backbone"] |= {"depths": [3, 3, depth, 3], "dims": [width, 2 * width, 4 * width, 8 * width]}
    return made


@pytest.mark.slow
@pytest.mark.parametrize("row", rows())
def test_parameters_and_operations(row: dict[str, Any], shared: Path) -> None:
    with torch.device("meta"):
        ours = network(config(shared, row["name"]))
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in ours.named_children()}
    assert counts == row["parts"]
    counted = complexity(ours, (3, *row["input_hw"]))
    assert counted.training.params == row["params"]
    assert counted.training.macs / 1e9 == pytest.approx(row["macs_G"], abs=0.01)
    assert counted.folded.params <= counted.training.params
