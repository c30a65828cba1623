"""Official checkpoints that cannot be loaded, without reference numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from widekernel.errors import CheckpointError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.patterns import PATTERNS


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple:
        return (print, ("run",))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))


def official() -> dict[str, Tensor]:
    state = {key: value for key, value in network().state_dict().items() if key != "0.weight"}
    layer = {
        "0.choice_weights": torch.randn(72, 6),
        "0.masking_patterns": torch.tensor(PATTERNS).float(),
        "0.zero_bias": torch.zeros(8),
        "0.Ws.0": torch.randn(8, 36),
    }
    return {**layer, **state}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("container", ["", "model", "state_dict"])
def test_files_and_containers(tmp_path: Path, suffix: str, container: str) -> None:
    state, path = official(), tmp_path / f"official{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        wrapped = {f"module.{key}": value for key, value in state.items()}
        args = argparse.Namespace(lr=1.0)
        torch.save({container: wrapped, "args": args} if container else wrapped, path)
    model = network()
    masks = ss.load_official(model, path)
    assert torch.equal(model[0].weight, state["0.Ws.0"].reshape(8, 4, 3, 3)) and model[0].bias is None
    assert torch.equal(masks.choices["0.weight"], state["0.choice_weights"].argmax(1).to(torch.uint8))
    assert masks.dropped == ("0.zero_bias", "0.masking_patterns") and masks.axis == "im2col"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.Ws.0": torch.randn(8, 32)}, r"0: \(8, 32\) is too small for 1 matrices of \(8, 36\)"),
        (
            {"0.choice_weights": torch.randn(71, 6)},
            r"0\.choice_weights must be finite and of shape \(72, 6\), not \(71, 6\)",
        ),
        ({"0.choice_weights": torch.full((72, 6), torch.nan)}, r"0\.choice_weights must be finite"),
        ({"0.weight": torch.randn(8, 4, 3, 3)}, r"0\.weight: the file also holds 0\.weight in another form"),
        ({"1.weight": torch.randn(9)}, r"1\.weight has shape \(9,\), the network's 1\.weight \(8,\)"),
        ({"2.weight": torch.randn(9)}, r"2\.weight: the network has no weight 2\.weight"),
        ({"fc.W": torch.randn(9, 4)}, r"fc: the network has no such convolution or linear layer"),
        ({"0.Ws.0": None}, r"0\.weight: the file holds nothing for it"),
        ({"1.running_mean": None}, r"1\.running_mean: the file holds nothing for it"),
    ],
)
def test_state_dicts_that_do_not_fit(changes: dict[str, Tensor | None], message: str) -> None:
    """The message names the key, and nothing is loaded."""
    state = {key: value for key, value in {**official(), **changes}.items() if value is not None}
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="does not fit the Sequential; nothing was loaded") as error:
        ss.load_official(model, state)
    error.match(message)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "official.pth"
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        ss.load_official(model, path)
    torch.save({"model": official(), "hook": Code()}, path)
    with pytest.raises(CheckpointError, match="could run code; it was not opened"):
        ss.load_official(model, path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        ss.load_official(model, path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        ss.load_official(model, path)
    for damaged in (path, tmp_path / "official.safetensors"):
        damaged.write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match="damaged"):
            ss.load_official(model, damaged)
