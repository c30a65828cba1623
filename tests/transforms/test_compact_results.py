"""Use of compacted networks: saving, copying, compiling and exporting."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.models.zoo import alive, assert_near, images
from tests.sparsity.nets import check_same_network
from tests.transforms.compaction import FREE, grouped, mask
from widekernel.layers import (
    Rect,
)
from widekernel.layers.grouped import ChannelGroup, GroupedKernels
from widekernel.transforms.compaction import compact, compact_report


@pytest.fixture
def small() -> nn.Module:
    return compact(mask(alive("slak_nano"), "branch", 0.5), FREE)


def test_state_dicts(small: nn.Module) -> None:
    other = compact(mask(alive("slak_nano"), "branch", 0.5), FREE)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        other.head.fc.weight.add_(1)
        other.load_state_dict(torch.load(file))
    check_same_network(other, small, images())


def test_a_state_of_other_groups_is_refused() -> None:
    kernel = torch.randn(2, 1, 3, 3)
    ours, theirs = (
        GroupedKernels([ChannelGroup([Rect.centered(kernel)], torch.zeros(2), put, put)], torch.zeros(4), torch.zeros(4))
        for put in ([0, 2], [1, 3])
    )
    with pytest.raises(RuntimeError, match="take_0 names other channels in the file: compact the same masked network"):
        ours.load_state_dict(theirs.state_dict())


def test_copies_and_pickles(small: nn.Module) -> None:
    assert len(grouped(small))
    check_same_network(copy.deepcopy(small), small, images())
    check_same_network(pickle.loads(pickle.dumps(small)), small, images())
    assert compact_report(copy.deepcopy(small)) == small.compaction


def test_other_types(small: nn.Module) -> None:
    with torch.no_grad():
        double = copy.deepcopy(small).double()(images().double())
        assert_near(small(images()).double(), double, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_near(small(images()).float(), double.float(), 0.1)


@pytest.mark.parametrize("name", ["slak_nano", pytest.param("shiftwise_nano", marks=pytest.mark.slow)])
def test_compiled_and_exported(name: str) -> None:
    torch._dynamo.reset()
    share = 0.5 if name == "slak_nano" else 1.0
    small = compact(mask(alive(name).double(), "branch", share), FREE)
    assert grouped(small)
    x = images(batch=3).double()
    with torch.no_grad():
        want = small(x)
        assert_near(torch.compile(small, fullgraph=True, backend="aot_eager")(x), want, 1e-12)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(small, (images().double(),), dynamic_shapes=({0: batch},))
        assert_near(program.module()(x), want, 1e-12)


@pytest.mark.gpu
def test_on_a_gpu(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    # By default the convolutions of PyTorch, with which ours are compared, round to TF32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        want = small(images())
        assert_near(copy.deepcopy(small).cuda()(images().cuda()).cpu(), want, 1e-3)
