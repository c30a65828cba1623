"""2:4 networks in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.sparsity.semi_structured.cases import FLOATS, as_bits
from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.conversion import manifest_of


def network(width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, width, 3, groups=1), nn.Flatten(), nn.Linear(width, 10)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", ["channels", "im2col"])
@pytest.mark.parametrize("method", ["magnitude", "learned"])
def test_round_trip(tmp_path: Path, method: str, axis: str, dtype: torch.dtype) -> None:
    """It is exact bit for bit, from the prepared network, its controller, or the converted network."""
    model = network().to(dtype)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
        model[2].weight[1, 1] = -torch.inf
    controller = ss.prepare(model, ss.SemiStructuredConfig(method, axis))
    plain = ss.convert(model)
    for what in (model, controller, plain):
        path = ss.save_sparse(what, tmp_path / "network.safetensors")
        fresh = network().to(dtype)
        manifest = ss.load_sparse(fresh, path)
        for key, value in plain.state_dict().items():
            assert torch.equal(as_bits(fresh.state_dict()[key]), as_bits(value)), key
        assert {name: (known.axis, known.groups) for name, known in manifest.weights.items()} == dict.fromkeys(
            controller.choices, (axis, 1)
        )
        assert all(torch.equal(manifest.weights[name].choices, choices) for name, choices in controller.choices.items())
        again = ss.save_sparse(fresh, tmp_path / "again.safetensors")
        assert again.read_bytes() == path.read_bytes()
        assert ss.validate(ss.convert(fresh)) == tuple(controller.choices)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["again.safetensors", "network.safetensors"]


def test_contents_of_a_file(tmp_path: Path) -> None:
    model = network()
    ss.prepare(model)
    path = ss.save_sparse(model, tmp_path / "network.safetensors")
    tensors = load_file(path)
    assert tensors["2.weight.two_four.values"].shape == (32 * 9 * 4, 2)
    assert tensors["2.weight.two_four.choices"].shape == (32 * 9 * 4 // 3,)
    assert "2.weight" not in tensors and "0.weight" in tensors and "1.running_mean" in tensors
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["widekernel.two_four"])
    assert header["version"] == 1 and header["weights"]["2.weight"] == {"axis": "channels", "groups": 1}
    assert header["shapes"]["2.weight"] == [32, 16, 3, 3]


def test_a_file_is_about_half_as_large(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    dense = tmp_path / "dense.safetensors"
    save_file(model.state_dict(), dense)
    ss.prepare(model)
    sparse = ss.save_sparse(model, tmp_path / "sparse.safetensors")
    assert sparse.stat().st_size / dense.stat().st_size == pytest.approx(0.5 + 0.667 / 32, abs=0.005)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    model = network()
    ss.prepare(model)
    path = ss.save_sparse(model, tmp_path / "network.safetensors")
    other = network(40)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"a network that differs from this Sequential; nothing was loaded") as error:
        ss.load_sparse(other, path)
    assert "2.weight has shape (32, 16, 3, 3) but the network's is (40, 16, 3, 3)" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(CheckpointError) as error:
        ss.load_sparse(nn.Sequential(nn.Linear(16, 16)), path)
    assert "1.bias: the network has no such weight" in str(error.value)
    assert "0.weight has shape (16, 3, 3, 3) but the network's is (16, 16)" in str(error.value)
    with pytest.raises(CheckpointError, match=r"5\.weight: the file holds no such weight"):
        ss.load_sparse(nn.Sequential(*network(), nn.Linear(10, 10)), path)


def test_a_file_of_another_type_is_refused(tmp_path: Path) -> None:
    model = network().bfloat16()
    ss.prepare(model)
    with pytest.raises(CheckpointError, match=r"4\.weight is torch\.bfloat16 .* but the network's is torch\.float32"):
        ss.load_sparse(network(), ss.save_sparse(model, tmp_path / "network.safetensors"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(CheckpointError, match="there is no file"):
        ss.load_sparse(model, tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointError, match="damaged, cut off or not a safetensors file"):
        ss.load_sparse(model, broken)
    save_file(model.state_dict(), broken)
    with pytest.raises(CheckpointError, match="holds no 2:4 network: save one with save_sparse"):
        ss.load_sparse(model, broken)
    save_file({}, broken, metadata={"widekernel.two_four": json.dumps({"version": 9})})
    with pytest.raises(CheckpointError, match="has version 9: this widekernel reads version 1"):
        ss.load_sparse(model, broken)
    save_file({}, broken, metadata={"widekernel.two_four": "{"})
    with pytest.raises(CheckpointError, match="damaged"):
        ss.load_sparse(model, broken)


@pytest.mark.parametrize("damage", ["values", "choices", "missing", "byte", "axis"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    model = network()
    ss.prepare(model)
    path = ss.save_sparse(model, tmp_path / "network.safetensors")
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    values, choices = "2.weight.two_four.values", "2.weight.two_four.choices"
    if damage == "values":
        tensors[values] = tensors[values][:-1].clone()
    elif damage == "choices":
        tensors[choices] = tensors[choices][:-1].clone()
    elif damage == "byte":
        tensors[choices][0] = 255
    elif damage == "axis":
        metadata = {key: value.replace("channels", "chanels") for key, value in metadata.items()}
    else:
        del tensors[values]
    save_file(tensors, path, metadata=metadata)
    fresh = network()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match="damaged"):
        ss.load_sparse(fresh, path)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_errors(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(ArgumentError, match="has no 2:4 masks"):
        ss.save_sparse(model, tmp_path / "network.safetensors")
    ss.prepare(model)
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        ss.save_sparse(model, tmp_path / "network.pt")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        ss.save_sparse(model, tmp_path / "file" / "network.safetensors")
    path = ss.save_sparse(model, tmp_path / "network.safetensors")
    with pytest.raises(ArgumentError, match=r"is prepared: load into a plain network, or into convert\(model\)"):
        ss.load_sparse(model, path)
    nn.init.ones_(model[2].weight)
    with pytest.raises(ArgumentError, match=r"2\.weight is not 2:4"):
        ss.save_sparse(model, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_a_loaded_network_carries_its_record(tmp_path: Path) -> None:
    model = network()
    ss.prepare(model)
    fresh = network()
    ss.load_sparse(fresh, ss.save_sparse(model, tmp_path / "network.safetensors"))
    assert manifest_of(fresh).weights.keys() == manifest_of(model).weights.keys()
    continued = ss.prepare(fresh, choices={name: known.choices for name, known in manifest_of(fresh).weights.items()})
    assert list(continued.masks) == list(manifest_of(model).weights)
