"""Official segmentation files give the official maps, losses, gradients and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import widekernel
from tests.parity.downstream.arrays import Golden
from tests.parity.downstream.gradients import check_gradients, official_gradients
from tests.parity.downstream.reference import filler, images, manifest, official_file, rows, segmenter
from widekernel.dense.segmentation import (
    InferenceOptions,
    Segmenter,
    View,
    multi_view,
    pixel_accuracy,
    segmentation_losses,
    whole_inference,
)
from widekernel.models.layouts.conversion import to_official

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


def names_of(golden: Golden) -> set[str]:
    return set(filler(golden.shared).entries(golden.arrays))


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
    assert names_of(golden) == {*seen, "argmax"}
    for name, value in seen.items():
        golden.check(name, value, DENSE)
    golden.check("logits_full", folded, DENSE)
    assert torch.equal(seen["logits_full"].argmax(1), golden["argmax"].long())


@pytest.mark.parametrize("row", cases("seg_train"))
def test_training_step(row: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    network, golden = load(shared, tmp_path, row, dropout=0.0).train(), Golden(shared, row["case"])
    x = images(shared, row["input_seed"], row["input_shape"])
    n, _, height, width = row["input_shape"]
    labels = torch.from_numpy(filler(shared).make_labels(row["label_seed"], (n, height, width), 7))
    assert torch.equal(labels, golden["labels"].long())
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
    expected = dict(zip(golden.arrays["loss_names"].tolist(), golden.arrays["loss_values"].tolist()))
    assert expected.keys() == found.keys()
    for name, value in found.items():
        # An accuracy is a count: pixels whose best two classes are equal but for rounding may go to either.
        close_calls = 100 * 2 / labels.numel() if name.endswith("acc_seg") else 0
        assert abs(value.item() - expected[name]) <= LOSSES * max(1, expected[name]) + close_calls, name
    gradients = official_gradients(network)
    assert gradients.keys() >= set(golden.arrays["grad_names"].tolist())
    check_gradients(golden, gradients, GRADIENTS, smallest=1e-3)
    buffers = to_official(network)
    stored = [name for name in names_of(golden) if name.startswith("buffer:")]
    assert len(stored) > 20
    for name in stored:
        golden.check(name, buffers[name.removeprefix("buffer:")], DENSE)


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
        golden.check(f"{case['name']}:prob", found, SCORES)
        assert torch.equal(found.argmax(1)[0], golden[f"{case['name']}:pred"].long()), case["name"]


@pytest.mark.full
@pytest.mark.parametrize("row", [case for case in cases("full_size") if "upernet" in case.id])
def test_published_sizes(row: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    network, golden = load(shared, tmp_path, row).eval(), Golden(shared, row["case"])
    x = images(shared, row["input_seed"], row["input_shape"])
    with torch.no_grad():
        maps = network.backbone(x)
        found = {f"feat{i}": value for i, value in enumerate(maps)}
        found |= {"logits": network.decode_head(maps), "aux_logits": network.auxiliary_head(maps[2])}
    assert names_of(golden) - {"rois"} == found.keys()
    for name, value in found.items():
        golden.check(name, value, DENSE)
