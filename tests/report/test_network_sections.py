"""The data of the sections on weights, cost and speed, without a page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.report.conftest import QUICK
from widekernel.analysis.complexity import complexity
from widekernel.analysis.kernels import KernelLayer
from widekernel.errors import DataError
from widekernel.report.conversion import Folding, acceleration, folding
from widekernel.report.costs import Costs, costs
from widekernel.report.kernels import Kernels, _row, kernels, strip
from widekernel.report.masks import Masks, masks
from widekernel.report.parts import Missing, silent
from widekernel.report.speed import Speed, speed
from widekernel.report.subject import Subject, open_subject
from widekernel.sparsity import load_masks
from widekernel.transforms.acceleration import AccelerationReport


def test_kernels(subject: Subject, named: Subject) -> None:
    found = kernels(named)
    assert isinstance(found, Kernels)
    assert found.rows[0].parts == ("31×3", "3×31", "3×3") and found.rows[0].zeros == 0
    sparse = kernels(subject)
    assert isinstance(sparse, Kernels) and sparse.rows[0].zeros > 0.2
    assert found.shown[0].parts["folded"].shape == (12, 31, 31)
    assert list(found.shown[0].norms) == sorted(found.shown[0].norms, reverse=True)
    assert isinstance(kernels(open_subject("resnet18")), Missing)


def test_energy_outside_the_center() -> None:
    kernel = np.zeros((2, 9, 9))
    kernel[:, 4, 4], kernel[0, 0, 0] = 1, 1
    assert _row(KernelLayer("layer", {"9×9": kernel})).outside == pytest.approx(1 / 3)


def test_strip_separates_kernels() -> None:
    sheet = strip(np.stack([np.full((3, 3), 4.0), np.zeros((3, 3))]))
    assert sheet.shape == (3, 7) and np.isnan(sheet[:, 3]).all()
    assert (sheet[:, :3] == 1).all() and (sheet[:, 4:] == 0).all()


def test_masks_of_a_run(subject: Subject, run_folder: Path, named: Subject) -> None:
    found = masks(subject)
    stored = json.loads((run_folder / "sparsity.json").read_text())
    assert isinstance(found, Masks) and found.from_masks
    assert found.sparsity == pytest.approx(stored["sparsity"])
    assert len(found.layers) == sum(layer["masked"] for layer in stored["layers"])
    assert [update.step for update in found.churn] == [update["step"] for update in stored["churn"]]
    assert found.method.startswith("dynamic: sparsity")
    assert set(found.images) <= set(load_masks(run_folder / "masks.safetensors"))
    assert isinstance(masks(named), Missing)


def test_masks_without_a_report_are_the_zeros_of_the_weights(subject: Subject) -> None:
    found = masks(replace(subject, run=None))
    assert isinstance(found, Masks) and not found.from_masks and found.churn == ()
    zeros = {name: int((p == 0).sum()) for name, p in subject.model.named_parameters() if p.dim() > 1}
    assert {layer.name: layer.size - layer.active for layer in found.layers}.items() <= zeros.items()


def test_damaged_sparsity_report(run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    (copy / "sparsity.json").write_text('{"layers": [{}]}')
    with pytest.raises(DataError, match=r"sparsity\.json is damaged"):
        masks(open_subject(str(copy)))


def test_costs(subject: Subject, named: Subject) -> None:
    found = costs(subject, QUICK)
    assert isinstance(found, Costs) and found.layers
    assert found.counted == complexity(subject.model, (3, 32, 32))
    dense = costs(named, replace(QUICK, input_size=64))
    assert isinstance(dense, Costs) and dense.layers == () and dense.counted.input_size == (3, 64, 64)


@pytest.mark.usefixtures("_no_measuring")
def test_speed(subject: Subject) -> None:
    found = speed(subject, QUICK, silent)
    assert isinstance(found, Speed)
    forms = {row.form for row in found.rows}
    # Blocks can be fused only in native code.
    assert forms - {"folded, accelerated and fused"} == {
        "PyTorch convolutions", "folded, PyTorch convolutions", "training form", "folded", "folded and accelerated"
    }  # fmt: skip
    assert all(row.milliseconds >= row.fastest > 0 and row.difference < 1e-4 for row in found.rows)
    for row in found.rows:
        assert bool(row.backends) == ("PyTorch" not in row.form)
    folded = next(row for row in found.rows if row.form == "folded")
    assert sum(folded.backends.values()) == 5
    assert {backend for _, backend, _, _ in found.explanations} <= set(folded.backends)
    best = found.best(1)
    assert best is not None and best.is_ours and best.fastest == min(row.fastest for row in found.rows if row.is_ours)
    assert isinstance(speed(subject, replace(QUICK, time=False), silent), Missing)


@pytest.mark.usefixtures("_no_measuring")
def test_fold_and_accelerate(subject: Subject) -> None:
    found = folding(subject)
    assert isinstance(found, Folding)
    first = found.layers[0]
    assert first.before == ("31×3", "3×31", "3×3") and first.after == ("31×3", "3×31")
    assert (first.taps_before, first.taps_after) == (195, 186) and found.check.max_error < 1e-4
    swaps = acceleration(subject, QUICK)
    assert isinstance(swaps, AccelerationReport) and len(swaps.swapped) == len(swaps.layers) == 11
    assert isinstance(acceleration(subject, replace(QUICK, time=False)), Missing)
    folded = replace(subject, saved=replace(subject.saved, form="folded"))
    assert isinstance(folding(folded), Missing)
