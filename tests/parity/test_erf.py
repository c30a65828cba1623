"""Contribution scores and area ratios against those of the official scripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import widekernel
from tests.parity.reference import create, images, manifest, official_file
from widekernel.analysis.erf import Area, area_ratio, contribution


def test_scores_and_areas_of_a_network(shared: Path, golden: Path, tmp_path: Path) -> None:
    case, data = json.loads((golden / "erf_contrib.json").read_text()), np.load(golden / "erf_contrib.npz")
    model = create(manifest(shared, case["manifest"]))
    widekernel.load_checkpoint(model, official_file(shared, tmp_path, case["manifest"], case["seed"]))
    inputs = [images(shared, case["seed"] + i, [1, 3, 96, 96]) for i in range(3)]
    for image, reference in zip(inputs, data["per_image"]):
        _assert_relative(contribution(model, image).matrix, reference)
    average = contribution(model, inputs).matrix
    _assert_relative(average, data["average"])
    for threshold, expected in case["rectangles"].items():
        _assert_equal(area_ratio(average, float(threshold)), expected)


def test_areas_of_matrices(shared: Path) -> None:
    folder = shared / "parity" / "erf"
    matrices = np.load(folder / "matrices.npz")
    expected = json.loads((folder / "expected_ratios.json").read_text())
    assert expected.keys() == set(matrices)
    for name, by_threshold in expected.items():
        for threshold, area in by_threshold.items():
            _assert_equal(area_ratio(matrices[name], float(threshold)), None if area is None else list(area.values()))


def _assert_equal(found: Area | None, expected: list[float] | None) -> None:
    """The sides are equal; the ratios may differ in the last bit, as the reference multiplies in two different orders."""
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.side == expected[0]
    assert abs(found.ratio - expected[1]) <= np.spacing(expected[1])


def _assert_relative(ours: np.ndarray, reference: np.ndarray) -> None:
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    assert error <= 1e-6, f"largest difference {error:.3g} of the largest score"
