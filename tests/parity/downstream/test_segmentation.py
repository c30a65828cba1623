"""Official segmentation files give the official maps, losses, gradients and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import widekernel
from tests.parity.downstream.reference import Golden, filler, images, manifest, official_file, rows, segmenter
from widekernel.dense.segmentation import (
    InferenceOptions,
    Segmenter,
    View,
    multi_view,
    pixel_accuracy,
    segmentation_losses,
    whole_inference,
)
from widekernel.models.layouts.registry import layouts_of

DENSE, SCORES, LOSSES, GRADIENTS = 2e-5, 1e-5, 1e-5, 1e-3


def cases(kind: str) -> list[Any]:
    return [pytest.param(row, id=row["case"]) for row in rows(kind)]


def load(shared: Path, target: Path, row: dict[str, Any], **changes: Any) -> Segmenter:
    config = manifest(shared, row["manifest"])["config"]
    # The small RepLKNet has one list of keys for both ways of resizing.
    align = "_align_" in row["case"] if "_mini_" in row["case"] else config["decode_head"]["align_corners"]
    assert align == row.get("align_corners", align)
    network = segmenter(config, align_corners=align, **changes)
    report = widekernel.load_checkpoint(network, official_file(shared, target, row["manifest"], row["seed"]))
    assert report.container == "state_dict"
    assert not (report.dropped or report.missing or report.ignored)
    return network


def watch(network: Segmenter) -> dict[str, Tensor]:
    """Return a mapping that the next forward pass fills with the outputs of the parts that the reference stores."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            seen.update({f"{name}{i}": x for i, x in enumerate(output)} if name == "feat" else {name: output})

        return hook

    head = network.decode_head
    parts = {"feat": network.backbone, "psp_bottleneck": head.bottleneck, "fpn_bottleneck": head.fpn_bottleneck}
    for name, modules in (("ppm", head.psp_modules), ("lateral", head.lateral_convs), ("fpn", head.fpn_convs)):
        parts |= {f"{name}{i}": module for i, module in enumerate(modules)}
    for name, module in parts.items():
        module.register_forward_hook(keep(name))
    return seen


@pytest.mark.parametrize("row", cases("seg_eval"))
def test_maps_and_logits(row: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    network, golden = load(shared, tmp_path, row).eval(), Golden(shared, row["case"])
    x = images(shared, row["input_seed"], row["input_shape"])
    folded_network, seen = widekernel.fold(network), watch(network)
    with torch.no_grad():
        seen["logits"] = network(x)
        seen["logits_full"] = whole_inference(network, x)
        seen["aux_logits"] = network.auxiliary_head(seen["feat2"])
        folded = whole_inference(folded_network, x)
    assert set(golden.names()) == {*seen, "argmax"}
    for name, value in seen.items():
        golden.assert_close(name, value, DENSE)
    golden.assert_close("logits_full", folded, DENSE)
    assert np.array_equal(seen["logits_full"].argmax(1).numpy(), golden["argmax"])


def official_names(network: Segmenter) -> dict[str, str]:
    layout = layouts_of(network)[0]
    return {key: layout.to_official(key)[0] for key in network.state_dict()}


@pytest.mark.parametrize("row", cases("seg_train"))
def test_training_step(row: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    network, golden = load(shared, tmp_path, row, dropout=0.0).train(), Golden(shared, row["case"])
    x = images(shared, row["input_seed"], row["input_shape"])
    n, _, height, width = row["input_shape"]
    labels = torch.from_numpy(filler(shared).make_labels(row["label_seed"], (n, height, width), 7))
    assert np.array_equal(labels.numpy(), golden["labels"])
    output = network(x)
    losses = segmentation_losses(output, labels, network.options)
    total = losses["decode"] + losses["auxiliary"]
    total.backward()

    align = network.options.align_corners
    found = {
        "decode.loss_ce": losses["decode"],
        "decode.acc_seg": 100 * pixel_accuracy(output.logits, labels, align),
        "aux.loss_ce": losses["auxiliary"],
        "aux.acc_seg": 100 * pixel_accuracy(output.auxiliary, labels, align),
        "loss": total,
    }
    expected = dict(zip(golden["loss_names"].tolist(), golden["loss_values"].tolist()))
    assert expected.keys() == found.keys()
    for name, value in found.items():
        assert abs(value.item() - expected[name]) <= LOSSES * max(1, expected[name]), name

    names = official_names(network)
    gradients = {names[key]: parameter.grad for key, parameter in network.named_parameters()}
    norms = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"].tolist()))
    assert gradients.keys() == norms.keys()
    largest = max(norms.values())
    for name, norm in norms.items():
        scale = max(norm, 1e-3 * largest)
        assert abs(gradients[name].norm().item() - norm) <= GRADIENTS * scale, name
        if f"grad:{name}" in golden.names():
            difference, _ = golden.filler.deviation(golden.arrays, f"grad:{name}", gradients[name].numpy())
            assert difference <= GRADIENTS * scale, name
    buffers = {f"buffer:{names[key]}": value for key, value in network.named_buffers()}
    stored = [name for name in golden.names() if name.startswith("buffer:")]
    assert len(stored) > 20
    for name in stored:
        golden.assert_close(name, buffers[name], DENSE)


def predict(network: Segmenter, shared: Path, case: dict[str, Any]) -> Tensor:
    """Return the probabilities of a stored case: one or several views of an image, whole or in windows."""
    cfg = case["test_cfg"]
    options = InferenceOptions()
    if cfg["mode"] == "slide":
        options = InferenceOptions("slide", tuple(cfg["crop_size"]), tuple(cfg["stride"]))
    size = tuple(case["img_shape"]) if "img_shape" in case else None
    views = [
        View(images(shared, case["input_seed"] + i, [1, 3, height, width]), size, flip)
        for i, (height, width, flip) in enumerate(case["inputs"])
    ]
    return multi_view(network, views, tuple(case["ori_shape"]), options)


@pytest.mark.parametrize("row", cases("seg_infer"))
def test_predictions(row: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    network, golden = load(shared, tmp_path, row).eval(), Golden(shared, row["case"])
    for case in row["cases"]:
        found = predict(network, shared, case)
        golden.assert_close(f"{case['name']}:prob", found, SCORES)
        assert np.array_equal(found.argmax(1)[0].numpy(), golden[f"{case['name']}:pred"]), case["name"]


@pytest.mark.full
@pytest.mark.parametrize("row", [case for case in cases("full_size") if "upernet" in case.id])
def test_published_sizes(row: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    network, golden = load(shared, tmp_path, row).eval(), Golden(shared, row["case"])
    x = images(shared, row["input_seed"], row["input_shape"])
    with torch.no_grad():
        maps = network.backbone(x)
        found = {f"feat{i}": value for i, value in enumerate(maps)}
        found |= {"logits": network.decode_head(maps), "aux_logits": network.auxiliary_head(maps[2])}
    assert set(golden.names()) - {"rois"} == found.keys()
    for name, value in found.items():
        golden.assert_close(name, value, DENSE)
