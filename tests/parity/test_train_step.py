"""One training step: loss, logits, every gradient and the running statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import widekernel
from tests.parity.reference import assert_close, create, images, manifest, official_file
from widekernel.models.layouts.registry import layouts_of

NAMES = ["slak_mini", "slak_reg_mini", "slak_pww_mini", "convnext_mini", "replknet_mini", "shiftwise_v2_mini"]
# The gates of SLaK_pww have tiny gradients: the official code itself differs by this much between float32 and float64.
RELATIVE = {"slak_pww_mini": 1e-3}


@pytest.mark.parametrize("name", NAMES)
def test_train_step(name: str, shared: Path, golden: Path, tmp_path: Path) -> None:
    cases = json.loads((golden / "train_step.json").read_text())["cases"]
    case = next(c for c in cases if c["manifest"] == name)
    expected = np.load(golden / "train_step.npz")
    model = create(manifest(shared, name))
    widekernel.load_checkpoint(model, official_file(shared, tmp_path, name, case["seed"]))
    model.train()
    x = images(shared, case["seed"], case["input_shape"]).requires_grad_()
    logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(case["labels"]))
    loss.backward()
    assert abs(loss.item() - case["loss_f64"]) <= 1e-5 * abs(case["loss_f64"])
    assert_close(logits, expected[f"{name}.logits_train"])
    assert x.grad is not None
    assert_close(x.grad, expected[f"{name}.grad_input"], relative=1e-4)
    _check_gradients(model, case["grad_norm_and_sum_f64"], RELATIVE.get(name, 1e-4))
    _check_statistics(model, name, expected)


def _check_gradients(model: torch.nn.Module, reference: dict[str, list[float]], relative: float) -> None:
    (layout, *_) = layouts_of(model)
    compared = 0
    for key, parameter in model.named_parameters():
        found = layout.to_official(key)
        assert found is not None, key
        norm, total = reference[found[0]]
        if norm < 1e-6:
            continue  # exactly zero in theory, such as a bias before a norm
        assert parameter.grad is not None, key
        ours = parameter.grad.double()
        assert abs(ours.norm().item() - norm) <= relative * norm, key
        # Terms of a sum cancel: its error is that of the norm times the square root of the number of elements.
        assert abs(ours.sum().item() - total) <= relative * norm * ours.numel() ** 0.5 + 1e-6, key
        compared += 1
    assert compared > 0.8 * len(reference)


def _check_statistics(model: torch.nn.Module, name: str, expected: np.lib.npyio.NpzFile) -> None:
    (layout, *_) = layouts_of(model)
    buffers = {layout.to_official(key)[0]: value for key, value in model.named_buffers() if layout.to_official(key)}
    for key in expected:
        if key.startswith(f"{name}.buf:"):
            assert_close(buffers[key.split(":")[1]], expected[key])
