"""Batch norms in training: `accelerate` swaps those that are faster natively, and leaves others alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from tests.native import needs_native, thread_count
from tests.transforms.acceleration import replace_measurement, state_of
from widekernel import accelerate, fold, ops
from widekernel.layers import NativeBatchNorm2d
from widekernel.layers.rebuilding import norm_like
from widekernel.ops.cpu import library
from widekernel.transforms import to_torch
from widekernel.transforms.acceleration import timing
from widekernel.transforms.acceleration.input_capture import InputSpec

CHANNELS = 64  # enough for the threads of any test machine


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.BatchNorm2d(CHANNELS))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 10, 8)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with thread_count(1):
        yield


@needs_native
def test_the_faster_ones_are_swapped_and_run_natively(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    model, x = network(), image()
    plain, state = copy.deepcopy(model), state_of(model)
    asked = replace_measurement(monkeypatch)
    accelerate(model, x)
    # Equal norms are timed once.
    assert asked == [(nn.BatchNorm2d, NativeBatchNorm2d, (2, CHANNELS, 8, 6), True)]
    assert state_of(model) == state
    with ops.trace() as trace:
        got = model(x)
    assert trace.batch_norms == [(2, CHANNELS, 8, 6)] * 2
    assert_close(got, plain(x), rtol=1e-4, atol=1e-4)
    for value, want in zip(model.buffers(), plain.buffers()):
        assert_close(value, want)
    assert [row.reason for row in accelerate(model, x)[1].layers] == ["accelerated already"] * 2


@needs_native
def test_slower_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, False)
    model = network()
    _, report = accelerate(model, image())
    row = report["1"]
    assert (row.before, row.after, row.reason, row.gain) == (f"BatchNorm2d, {CHANNELS} channels", None, "not faster", 0.5)
    assert type(model[1]) is nn.BatchNorm2d


@needs_native
def test_one_value_for_each_channel_cannot_be_timed() -> None:
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(CHANNELS)).train()
    _, report = accelerate(model, torch.randn(1, 3, 8, 8))
    assert report["2"].reason == "the example gives it one value for each channel, which has no variance"
    assert type(model[2]) is nn.BatchNorm2d


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.BatchNorm2d(CHANNELS), "weight", Doubled())


@needs_native
@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda: nn.BatchNorm2d(CHANNELS, momentum=None), "cumulative averages"),
        (lambda: nn.BatchNorm2d(CHANNELS).double(), "not plain float32"),
        (lambda: nn.BatchNorm2d(CHANNELS, device="meta"), "on the CPU"),
        (lambda: timm.layers.BatchNormAct2d(CHANNELS), "BatchNormAct2d is a subclass of nn.BatchNorm2d"),
        (parametrized, "parametrized"),
        (lambda: NativeBatchNorm2d(CHANNELS), "accelerated already"),
        (lambda: NativeBatchNorm2d(CHANNELS, momentum=None), "accelerated already; its statistics are cumulative"),
    ],
)
def test_norms_that_are_left_alone(norm: Callable[[], nn.Module], reason: str, always_faster: list[Any]) -> None:
    model = norm()
    before = type(model)
    (row,) = accelerate(model)[1].layers
    assert reason in row.reason
    assert type(model) is before
    assert always_faster == []


def test_other_norms_have_no_row(always_faster: list[Any]) -> None:
    frozen = nn.BatchNorm2d(CHANNELS).eval()
    model = nn.Sequential(frozen, nn.SyncBatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS), nn.BatchNorm3d(CHANNELS))
    assert accelerate(model)[1].layers == ()
    with torch.no_grad():
        assert accelerate(network(), image())[1].layers == ()
    assert accelerate(network().eval(), image())[1].layers == ()


@needs_native
def test_without_an_example(always_faster: list[Any]) -> None:
    model = nn.BatchNorm2d(CHANNELS)
    assert accelerate(model)[1][""].reason == "no example to measure"
    assert type(model) is nn.BatchNorm2d


@needs_native
def test_copies_and_the_way_back(always_faster: list[Any]) -> None:
    model, x = accelerate(network(), image())[0], image()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is NativeBatchNorm2d
        assert_close(other(x), copy.deepcopy(model)(x))
    back = to_torch(model)
    assert [type(back[i]) for i in (1, 3)] == [nn.BatchNorm2d] * 2
    with ops.trace() as trace:
        got = back(x)
    assert trace.batch_norms == []
    assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano", "shiftwise_nano", "unireplknet_nano", "resnet18"])
def test_networks_in_training(name: str, always_faster: list[Any], one_thread: None) -> None:
    model, x = timm.create_model(name, num_classes=10), torch.randn(2, 3, 64, 64)
    wanted = {key for key, module in model.named_modules() if type(module) is nn.BatchNorm2d}
    _, report = accelerate(model, x)
    assert {row.name for row in report.swapped if row.after == "NativeBatchNorm2d"} == wanted
    with ops.trace() as trace:
        model(x).sum().backward()
    wide = [model.get_submodule(key) for key in wanted]
    wide = [norm for norm in wide if norm.num_features >= library.load().lanes]
    # Narrower ones, too, of maps whose columns are contiguous.
    assert 0 < len(wide) <= len(trace.batch_norms) <= len(wanted)
    assert all(norm.num_batches_tracked == 1 for norm in wide)


def test_an_accelerated_network_folds_and_is_fused(always_faster: list[Any]) -> None:
    model, x = timm.create_model("replknet_nano", num_classes=10), torch.randn(1, 3, 64, 64)
    accelerate(model, x)
    model.eval()
    with torch.no_grad():
        want = model(x)
        assert_close(fold(model)(x), want, rtol=1e-3, atol=1e-4)
        fused, report = accelerate(model, x)
        assert report.fused
        assert_close(fused(x), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_measuring_changes_nothing(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    norm = nn.BatchNorm2d(CHANNELS, **kwargs)
    norm.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    before = state_of(norm)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, CHANNELS, 4, 5).contiguous(memory_format=layout)
        assert min(timing.compare(norm, NativeBatchNorm2d, InputSpec.of(x), True)) > 0
    assert state_of(norm) == before


def test_a_norm_like_another_one() -> None:
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.2).eval()
    norm.bias.requires_grad_(False)
    norm(torch.randn(2, 6, 3, 3))
    new = norm_like(norm, NativeBatchNorm2d)
    assert (type(new), new.extra_repr(), new.training) == (NativeBatchNorm2d, norm.extra_repr(), False)
    assert (new.weight.requires_grad, new.bias.requires_grad) == (True, False)
    assert new.weight.data_ptr() == norm.weight.data_ptr()
    new.train()(torch.randn(2, 6, 3, 3) + 5)
    assert norm.running_mean.abs().max() < 2 < new.running_mean.abs().max() + 3
    assert not torch.equal(new.running_mean, norm.running_mean)
