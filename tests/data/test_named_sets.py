"""Data sets by name: what is accepted, how splits are chosen, and what happens without a network."""

import urllib.error

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as sets

from widekernel.data import DataConfig, open_split
from widekernel.data.torchvision_sets import known_names
from widekernel.errors import DataError


def fake(monkeypatch, name, **attributes):
    """Make torchvision's data set `name` record its arguments instead of reading files."""
    calls = []

    def start(self, root, **options):
        calls.append({"root": root, **options})
        vars(self).update(attributes)

    original = getattr(sets, name)
    start.__signature__ = __import__("inspect").signature(original.__init__)
    members = {"__init__": start, "__len__": lambda _: 1, "__getitem__": lambda *_: (Image.new("L", (2, 2)), 1)}
    monkeypatch.setattr(sets, name, type(name, (), members))
    return calls


def test_accepted_names():
    names = known_names()
    assert {"torch/qmnist", "torch/inaturalist", "torch/cifar10", "torch/flowers102", "torch/food101", "torch/svhn"} < set(
        names
    )
    assert not {"torch/celeba", "torch/cocodetection", "torch/kinetics", "torch/fakedata"} & set(names)
    assert len(names) == len(set(names))


def test_sets_with_named_splits(monkeypatch):
    calls = fake(monkeypatch, "Flowers102", classes=["rose", "lily"])
    source = open_split(DataConfig(name="torch/flowers102", root="there", train_split="test", download=True), "train")
    assert calls == [{"root": "there", "split": "test", "download": True}]
    assert source.class_names == ("rose", "lily")
    assert source.load(0)[1] == 1


def test_sets_with_a_training_flag(monkeypatch):
    calls = fake(monkeypatch, "USPS", targets=np.array([3, 1]))
    for split in ("train", "val"):
        assert open_split(DataConfig(name="torch/usps", root="there"), split).class_names == ("0", "1", "2", "3")
    assert [call["train"] for call in calls] == [True, False]


def test_sets_without_download(monkeypatch):
    fake(monkeypatch, "FER2013")
    with pytest.raises(DataError, match="cannot be downloaded automatically"):
        open_split(DataConfig(name="torch/fer2013", root=".", download=True), "train")


def test_sets_without_class_names(monkeypatch):
    fake(monkeypatch, "PCAM")
    with pytest.raises(DataError, match="does not say which classes"):
        open_split(DataConfig(name="torch/pcam", root="."), "train")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("torch/flower102", "train", "Did you mean 'torch/flowers102'"),
        ("torch/qmnit", "train", "Did you mean 'torch/qmnist'"),
        ("torch/flowers102", "holdout", "Valid values are .*'test'"),
        ("torch/flowers102", "train", r"data\.download true"),
    ],
)
def test_errors_in_opening_a_set(name, split, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_split(DataConfig(name=name, root=str(tmp_path), train_split=split), "train")


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/flowers102"])
def test_download_without_a_network(name, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(DataError, match=f"{name} cannot be downloaded .Name or service not known"):
        open_split(DataConfig(name=name, root=str(tmp_path), download=True), "train")
