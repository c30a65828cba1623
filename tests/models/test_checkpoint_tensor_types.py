"""Checkpoints whose tensors are of another type or form than the network's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import widekernel
from tests.models.checkpoints import (
    assert_content_refused,
    both_layouts,
    load_content,
    logits,
    state_of,
)
from tests.models.zoo import alive, assert_same_state, create
from widekernel.errors import CheckpointError


@both_layouts
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda t: t.to_sparse(), r"is stored as torch\.sparse_coo, the network's is dense"),
        (lambda t: t.to(torch.int64), r"has type torch\.int64 but the network's is torch\.float32"),
        (lambda t: t > 0, r"has type torch\.bool but the network's is torch\.float32"),
        (lambda t: t.to(torch.complex64), r"has type torch\.complex64 but the network's is torch\.float32"),
        (lambda t: t.to("meta"), "has a shape but no data in the file"),
    ],
    ids=["sparse", "integer", "bool", "complex", "meta"],
)
def test_weights_of_another_type_are_refused(kind: Any, message: str, layout: str, tmp_path: Path) -> None:
    state = state_of(alive("slak_nano"), tmp_path, layout)
    keys = [key for key in state if key.endswith(("gamma", "head.weight", "fc.weight"))]
    assert len(keys) == 6
    found = assert_content_refused(
        alive("slak_nano"),
        tmp_path,
        {**state, **{key: kind(state[key]) for key in keys}},
        f"nothing was loaded:\n.* {message}",
    )
    assert [line.split()[0] for line in found.splitlines()[1:]] == keys


def test_sparse_weights_are_refused_before_conversion(tmp_path: Path) -> None:
    state = state_of(alive("slak_nano"), tmp_path, "official")
    key = "stages.0.0.large_kernel.LoRA1.conv.weight"
    assert_content_refused(
        alive("slak_reg_nano"), tmp_path, {**state, key: state[key].to_sparse()}, f"{key} is stored as torch.sparse_coo"
    )


@both_layouts
def test_network_on_the_meta_device_is_refused(layout: str, tmp_path: Path) -> None:
    state = state_of(create("shiftwise_nano"), tmp_path, layout)
    with torch.device("meta"):
        model = create("shiftwise_nano")
    with pytest.raises(
        CheckpointError, match=r"head.*weight cannot be loaded: .*call model\.to_empty\(device=\.\.\.\) first"
    ):
        load_content(model, tmp_path, state)
    assert all(value.is_meta for value in model.state_dict().values())
    load_content(model.to_empty(device="cpu"), tmp_path, state)
    assert_same_state(state_of(model, tmp_path, layout), state)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_conversions_of_type_are_noted(dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = state_of(model, tmp_path, layout)
    report = load_content(
        other, tmp_path, {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    )
    assert report.notes == (f"converted {str(dtype).removeprefix('torch.')} to float32",)
    assert other.head.fc.weight.dtype is torch.float32
    assert torch.equal(other.head.fc.weight, model.head.fc.weight.to(dtype).float())


def test_half_precision_file_loads_into_a_single_precision_network(tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    load_content(other, tmp_path, half)
    assert other.head.fc.weight.dtype is torch.float32
    assert torch.equal(other.head.fc.weight, half["head.fc.weight"].float())


def test_nan_and_infinite_weights_are_kept(tmp_path: Path) -> None:
    """A diverged network loads as it was saved, and its evaluation shows what happened."""
    model, other = alive("slak_nano"), create("slak_nano")
    with torch.no_grad():
        model.head.fc.weight[0, 0] = float("nan")
        model.head.fc.weight[1, 0] = float("inf")
    for path, layout in ((tmp_path / "a.safetensors", "native"), (tmp_path / "a.pth", "official")):
        widekernel.load_checkpoint(other, widekernel.save_checkpoint(model, path, layout=layout))
        assert_same_state(other.state_dict(), model.state_dict())
        assert not logits(other).isfinite().all()
