"""Chains compute what their fused blocks compute, in one native call, and only as long as nothing observes the blocks."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.testing import assert_close

from tests.transforms.chains import assert_right, by_blocks, chained, image
from tests.transforms.fusion import ByHand, Convolutional, calls_of, fused, randomized
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.layers import DepthwiseConv2d, LargeKernel, PartialChannels, Rectangles
from widekernel.ops import recording
from widekernel.ops.call_trace import PartialCall
from widekernel.transforms import to_torch
from widekernel.transforms.acceleration.fusion import FusedChain, packing, unfused

needs_library = pytest.mark.skipif(packing.missing() is not None, reason="the native library cannot run")
pytestmark = pytest.mark.usefixtures("always_faster", "packs")


@needs_library
def test_one_native_call(replayed: list[int]) -> None:
    model = chained()
    # Two depthwise layers, and three products.
    for x in (image(), image(), image(1)):
        assert_right(model, x)
    assert replayed == [5, 5]
    assert_right(model, image(1))
    assert replayed == [5, 5, 5]


class Partial(ByHand):
    """A block whose spatial layer convolves 9 of 12 channels and reorders them."""

    def __init__(self) -> None:
        super().__init__()
        partial = PartialChannels(LargeKernel(Rectangles(9, [(5, 3), (3, 5)])), [0, 1, 2, 4, 5, 7, 8, 9, 11], 12)
        self.mixer = partial.folded(*torch.rand(2, 12) + 0.5)  # type: ignore[assignment]


@needs_library
def test_partial_channels_are_part_of_the_call(replayed: list[int]) -> None:
    model = chained(Partial, Convolutional, Partial)
    with ops.trace() as traced:
        for x in (image(), image(1), image(1)):
            assert_right(model, x)
    assert replayed == [5, 5]
    # Those of the chain, and those of the code of its blocks.
    assert traced.partial == [PartialCall(shape, 9) for shape in [(2, 12, 9, 12)] * 4 + [(1, 12, 9, 12)] * 8]


def _hook_inside(model: Any) -> None:
    model[0].mixer.layer.register_forward_hook(lambda _layer, _inputs, y: y + 1)


def _reordered(model: Any) -> None:
    model[0].mixer.selected.copy_(model[0].mixer.selected.flip(0))


def _other_table(model: Any) -> None:
    model[0].mixer.selected = model[0].mixer.selected.flip(0)


def _long_table(model: Any) -> None:
    model[0].mixer.selected = model[0].mixer.selected.flip(0).long()


def _swapped_data(model: Any) -> None:
    model[0].mixer.ghosts.data = model[0].mixer.ghosts.data.flip(0)


def _grow_others(model: Any) -> None:
    with torch.no_grad():
        model[0].mixer.scale.mul_(2)


def _other_layer(model: Any) -> None:
    model[0].mixer.layer = nn.Identity()


def _grow_inside(model: Any) -> None:
    with torch.no_grad():
        model[2].mixer.layer.kernels[0].mul_(2)


PARTIAL = (_hook_inside, _reordered, _other_table, _long_table, _swapped_data, _grow_others, _other_layer, _grow_inside)


@pytest.mark.parametrize("change", PARTIAL)
def test_changes_of_partial_channels_are_noticed(change: Callable[[Any], None]) -> None:
    model, x = chained(Partial, Convolutional, Partial), image()
    before, _ = calls_of(model, x)
    change(model)
    for _ in range(2):
        # PyTorch's operators, which compute calls that are not covered, may change the layout.
        want = by_blocks(model, x)
        assert_close(calls_of(model, x)[0], want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    assert not torch.equal(before, calls_of(model, x)[0])


@needs_library
def test_a_channel_outside_the_image_is_an_error() -> None:
    model, x = chained(Partial, Partial), image()
    model[0].mixer.selected[0] = 12
    with torch.no_grad(), pytest.raises(ArgumentError, match="do not fit together"):
        model(x)


@needs_library
def test_traces_have_every_call() -> None:
    model = chained()
    with torch.no_grad(), ops.trace() as traced:
        model(image())
    assert [call.activation for call in traced.fused] == ["gelu", "gelu_tanh", "gelu"]
    assert traced.backends("depthwise_sum") == ["native", "native"]


@needs_library
@pytest.mark.parametrize("part", ["", "0", "1", "0.mixer", "0.mlp", "2.norm"])
def test_hooks_are_called(part: str, replayed: list[int]) -> None:
    model, seen = chained(), []
    handle = model.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    assert_right(model, image())
    # Once in the chain, and once by the own code of its blocks, which does not call the container.
    assert seen == ([part] if part == "" else [part, part])
    assert 5 not in replayed
    handle.remove()
    assert_right(model, image())
    assert replayed[-1] == 5


def _grow_kernel(model: Any) -> None:
    with torch.no_grad():
        model[0].mixer.weight.mul_(2)


def _new_data(model: Any) -> None:
    model[0].mixer.weight.data = model[0].mixer.weight.data.flip(2).clone()


def _turned_data(model: Any) -> None:
    model[0].mixer.weight.data = model[0].mixer.weight.data.transpose(2, 3)


def _new_parameter(model: Any) -> None:
    model[2].mixer.bias = nn.Parameter(torch.ones(12))


def _no_bias(model: Any) -> None:
    model[2].mixer.bias = None


def _dilated(model: Any) -> None:
    model[0].mixer.dilation, model[0].mixer.padding = (2, 2), (2, 2)


def _grow_weight(model: Any) -> None:
    with torch.no_grad():
        model[1].first.weight.mul_(2)


def _other_block(model: Any) -> None:
    model[1] = ByHand().eval()


def _own_class(model: Any) -> None:
    model[0].mixer.__class__ = nn.Conv2d


def _forward_of_instance(model: Any) -> None:
    model[0].mixer.forward = lambda x: x + 1


def _shorter(model: Any) -> None:
    del model[2]


def _smaller_data(model: Any) -> None:
    model[0].mixer.weight.data = model[0].mixer.weight.data[:, :, :, :1].expand(-1, -1, -1, 3)


def _turned_and_grown(model: Any) -> None:
    _turned_data(model)
    calls_of(model, image())
    _grow_kernel(model)


def _strided_bias_and_shrunk(model: Any) -> None:
    model[2].mixer.bias = nn.Parameter(torch.randn(24)[::2])
    calls_of(model, image())
    with torch.no_grad():
        model[2].mixer.bias.mul_(-5)


def _negative_kernel(model: Any) -> None:
    model[0].mixer.weight.data = torch._neg_view(model[0].mixer.weight.data)


def _training(model: Any) -> None:
    model[1].train()


CHANGES = (_grow_kernel, _new_data, _turned_data, _new_parameter, _no_bias, _dilated, _grow_weight, _other_block)
CHANGES += (_smaller_data, _turned_and_grown, _strided_bias_and_shrunk, _negative_kernel)
# Not those that leave nothing for another one to change, or no place to write to.
IN_ANY_ORDER = (*CHANGES[:7], *CHANGES[9:], None)
CHANGES += (_own_class, _forward_of_instance, _shorter)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    model, x = chained(), image()
    before, _ = calls_of(model, x)
    change(model)
    for _ in range(2):
        assert_right(model, x)
    if change is not _own_class:
        assert not torch.equal(before, calls_of(model, x)[0])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(IN_ANY_ORDER), max_size=4), st.sampled_from([(1, 9), (2, 9), (3, 4)]))
def test_any_changes_in_turn(changes: list[Any], size: tuple[int, int]) -> None:
    model = chained()
    for change in changes:
        if change is not None:
            change(model)
        assert_right(model, image(*size))


def test_training_runs_the_code_of_the_block() -> None:
    model = chained()
    _training(model)
    statistics = model[1].before.running_mean.clone()
    calls_of(model, image())
    assert not torch.equal(statistics, model[1].before.running_mean)


@needs_library
def test_what_prevents_one_call(replayed: list[int]) -> None:
    model, x = chained(), image()
    model(x).sum().backward()
    assert model[0].mixer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        with torch.profiler.profile() as profiled:
            model(x)
        model.double()(x.double())
    assert "widekernel::depthwise_sum" in {event.name for event in profiled.events() or ()}
    assert 5 not in replayed


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[Any], Any]) -> None:
    model, x = chained(), image()
    twin = copied(model)
    assert type(twin) is FusedChain
    with torch.no_grad():
        model[0].mixer.weight.zero_()
    for each in (twin, model, twin):
        assert_right(each, x)
    assert not torch.equal(calls_of(twin, x)[0], calls_of(model, x)[0])
    assert_right(model[:2], x)


def test_unfused_networks_have_plain_containers() -> None:
    model = chained()
    for plain in (unfused(model), to_torch(model)):
        assert type(plain) is nn.Sequential
    assert type(model) is FusedChain


def test_the_report_names_chains() -> None:
    report = fused(randomized(nn.Sequential(ByHand(), ByHand())), image())[1]
    assert report.chains == ("",)
    assert "each chain for one native call: (itself)." in str(report)
    assert report.to_dict()["chains"] == [""]


def test_state_dict_is_the_same() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(ByHand(), Convolutional())
    assert list(chained(ByHand, Convolutional).state_dict()) == list(plain.state_dict())


@needs_library
def test_a_recording_sees_only_its_own_thread() -> None:
    layer, x = DepthwiseConv2d(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 5, 5)
    in_other: list[int] = []

    def other() -> None:
        with torch.no_grad(), recording.recording() as made:
            layer(x)
        in_other.append(len(made.calls))

    with torch.no_grad(), recording.recording() as outer:
        layer(x)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        layer(x)
    assert (len(outer.calls), in_other) == (2, [1])
