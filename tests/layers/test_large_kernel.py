"""The large-kernel layer, its folded form, and the layer for some of the channels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.layers.helpers import assert_close, image, randomized
from widekernel import ops
from widekernel.layers import (
    FoldedLargeKernel,
    KernelSource,
    LargeKernel,
    PartialChannels,
    Rect,
    Rectangles,
    SharedStrips,
    ShiftTiles,
    ShuffledStrips,
    SourceGroup,
    SplitStrips,
    TruncatedTiles,
)
from widekernel.layers.sources import dilate

C = 3
SOURCES: dict[str, Callable[[], KernelSource]] = {
    "31+5": lambda: Rectangles(C, [(31, 31), (5, 5)]),
    "crossed": lambda: Rectangles(C, [(13, 3), (3, 13), (3, 3)]),
    "single": lambda: Rectangles(C, [(7, 7)]),
    "dilated": lambda: Rectangles(C, [(13, 13), (5, 5), (7, 7), (3, 3)], [1, 1, 2, 4]),
    "dilated-twice": lambda: dilate(Rectangles(C, [(5, 5), (3, 3), (3, 3)], [1, 2, 3]), 2),
    "split": lambda: SplitStrips(C, 13, 5),
    "shared": lambda: SourceGroup([SharedStrips(C, 13, 5), Rectangles(C, [(5, 5)])]),
    "shift": lambda: ShiftTiles(C, 11, 3, 2, 4, gated=True),
    "shuffled": lambda: ShuffledStrips(C, 11, 3, 2),
}
RECTS_LEFT = {"31+5": 1, "crossed": 2, "single": 1, "dilated": 1, "dilated-twice": 1}
RECTS_LEFT |= {"split": 2, "shared": 2, "shift": 2, "shuffled": 2}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "bn": lambda: nn.BatchNorm2d(C),
    "sync-bn": lambda: nn.SyncBatchNorm(C),
    "bn-without-affine": lambda: nn.BatchNorm2d(C, affine=False),
    "bn-with-large-eps": lambda: nn.BatchNorm2d(C, eps=0.5),
    "nothing": nn.Identity,
}
EACH = pytest.mark.parametrize("name", SOURCES)


def layer(name: str, norm: str | None = "bn", identity: bool = False) -> LargeKernel:
    source = SOURCES[name]()
    norms = None if norm is None else [NORMS[norm]() for _ in range(source.num_branches)]
    return randomized(LargeKernel(source, norms, identity))


@pytest.mark.parametrize("identity", [False, True], ids=["plain", "identity"])
@EACH
def test_the_layer_is_the_sum_of_its_normalized_branches(name: str, identity: bool) -> None:
    module, x = layer(name, identity=identity), image(C)
    want = sum(norm(response) for norm, response in zip(module.norms, module.source.responses(x)))
    assert_close(module(x), want + x if identity else want)


@pytest.mark.parametrize("identity", [False, True], ids=["plain", "identity"])
@EACH
def test_without_norms_one_call_computes_all_branches(name: str, identity: bool) -> None:
    module, x = layer(name, norm=None, identity=identity), image(C)
    want = sum(module.source.responses(x))
    with ops.trace() as trace:
        y = module(x)
    assert_close(y, want + x if identity else want)
    assert len(trace.calls) == 1
    assert len(trace.calls[0][1].kernels) == module.source.num_branches


@EACH
def test_with_norms_every_branch_is_one_call(name: str) -> None:
    module = layer(name)
    with ops.trace() as trace:
        module(image(C))
    assert len(trace.calls) == module.source.num_branches


@EACH
def test_training_statistics_are_those_of_each_branch(name: str) -> None:
    module = layer(name).train()
    x = image(C)
    responses = module.source.responses(x)
    expected = [copy.deepcopy(norm) for norm in module.norms]
    want = sum(norm(response) for norm, response in zip(expected, responses))
    assert_close(module(x), want)
    for norm, other in zip(module.norms, expected):
        assert_close(norm.running_var, other.running_var)


@pytest.mark.parametrize("identity", [False, True], ids=["plain", "identity"])
@pytest.mark.parametrize("norm", [*NORMS, None], ids=str)
@EACH
def test_folding(name: str, norm: str | None, identity: bool) -> None:
    module, x = layer(name, norm, identity), image(C)
    state = copy.deepcopy(module.state_dict())
    folded = module.folded()
    assert module.foldable()
    assert isinstance(folded, FoldedLargeKernel)
    assert len(folded.rects()) == RECTS_LEFT[name]
    want = module(x)
    with ops.trace() as trace:
        y = folded(x)
    assert_close(y, want)
    assert len(trace.calls) == 1
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


@EACH
def test_folding_a_following_affine_map(name: str) -> None:
    module, x = layer(name, identity=True), image(C)
    scale, shift = torch.randn(2, C, dtype=torch.float64)
    want = module(x) * scale.view(-1, 1, 1)
    assert_close(module.folded(scale)(x), want)
    assert_close(module.folded(scale, shift)(x), want + shift.view(-1, 1, 1))
    assert_close(module.folded(shift=shift)(x), module(x) + shift.view(-1, 1, 1))


@pytest.mark.parametrize("name", ["31+5", "crossed", "single", "split"])
def test_folding_in_float32_rounds_once(name: str) -> None:
    """Folding computes in float64 whatever the type of the layer, so the result is the rounded float64 fold."""
    module = layer(name).float()
    folded, exact = module.folded(), copy.deepcopy(module).double().folded()
    for mine, truth in zip(folded.parameters(), exact.parameters()):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, truth.float())


def test_the_identity_is_absorbed() -> None:
    module = LargeKernel(Rectangles(C, [(5, 5)]), identity=True).double()
    folded = module.folded()
    difference = folded.kernels[0] - module.source.kernels[0]
    assert difference.nonzero()[:, 1:].tolist() == [[0, 2, 2]] * C
    assert_close(difference[:, 0, 2, 2], torch.ones(C))


def test_the_folded_layer_owns_its_memory() -> None:
    module = LargeKernel(Rectangles(C, [(5, 5)])).double()
    folded = module.folded()
    before = folded.kernels[0].clone()
    with torch.no_grad():
        module.source.kernels[0].zero_()
    assert torch.equal(folded.kernels[0], before)
    kernel, bias = torch.randn(C, 1, 3, 3), torch.randn(C)
    copied = FoldedLargeKernel([Rect.centered(kernel)], bias)
    kernel.zero_()
    assert copied.kernels[0].count_nonzero() == kernel.numel()


def test_the_folded_layer_describes_itself() -> None:
    assert "rects=[(13, 3), (3, 13)], anchors=[(6, 1), (1, 6)]" in repr(layer("crossed").folded())
    assert {key: tuple(value.shape) for key, value in layer("crossed").folded().state_dict().items()} == {
        "anchor_table": (2, 2),
        "bias": (C,),
        "kernels.0": (C, 1, 13, 3),
        "kernels.1": (C, 1, 3, 13),
    }


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.BatchNorm2d(C, track_running_stats=False), lambda: nn.GroupNorm(1, C), lambda: nn.InstanceNorm2d(C)],
    ids=["bn-without-statistics", "group-norm", "instance-norm"],
)
def test_norms_that_depend_on_their_input_are_refused(norm: Callable[[], nn.Module]) -> None:
    module = LargeKernel(Rectangles(C, [(5, 5), (3, 3)]), [nn.BatchNorm2d(C), norm()]).eval()
    assert not module.foldable()
    with pytest.raises(TypeError, match="and cannot be folded: only batch norm"):
        module.folded()


def test_truncated_tiles_are_refused() -> None:
    module = LargeKernel(TruncatedTiles(ShuffledStrips(C, 9, 3))).double()
    assert not module.foldable()
    with pytest.raises(TypeError, match="a TruncatedTiles layer equals no single kernel near the borders"):
        module.folded()
    x = image(C)
    assert_close(module(x), sum(module.source.responses(x)))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_numbers_of_norms_and_branches_must_agree(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} norms for 2 branches: every branch needs one"):
        LargeKernel(Rectangles(C, [(5, 5), (3, 3)]), [nn.BatchNorm2d(C) for _ in range(count)])


@EACH
def test_training_reaches_every_parameter(name: str) -> None:
    module = layer(name).train()
    module(image(C)).sin().sum().backward()
    assert all(parameter.grad.count_nonzero() for parameter in module.parameters())


def partial(identity: bool = True) -> PartialChannels:
    inner = LargeKernel(ShiftTiles(3, 9, 3, 2, 2), [nn.BatchNorm2d(3) for _ in range(3)], identity)
    return randomized(PartialChannels(inner, [0, 2, 3], 5))


def test_partial_channels_come_first_and_the_others_unchanged() -> None:
    module, x = partial(), image(5)
    y = module(x)
    assert_close(y[:, :3], module.layer(x[:, [0, 2, 3]]))
    assert torch.equal(y[:, 3:], x[:, [1, 4]])


def test_partial_channels_folded() -> None:
    module, x = partial(), image(5)
    scale, shift = torch.randn(2, 5, dtype=torch.float64)
    for arguments in [(), (scale,), (scale, shift), (None, shift)]:
        by, plus = [*arguments, None, None][:2]
        want = module(x)
        want = want if by is None else want * by.view(-1, 1, 1)
        want = want if plus is None else want + plus.view(-1, 1, 1)
        folded = module.folded(*arguments)
        with ops.trace() as trace:
            assert_close(folded(x), want)
        assert len(trace.calls) == 1


def test_partial_channels_without_others() -> None:
    module = randomized(PartialChannels(LargeKernel(Rectangles(2, [(5, 5)])), [0, 1], 2))
    x = image(2)
    assert_close(module(x), module.layer(x))
    assert_close(module.folded()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial_channels_under_autocast(dtype: torch.dtype) -> None:
    """Folding does not change the dtype that the next layer gets."""
    module, x = partial().float(), image(5).to(dtype)
    folded = module.folded()
    with torch.autocast("cpu", torch.bfloat16):
        assert folded(x).dtype == module(x).dtype


def test_the_selected_channels_are_part_of_the_state() -> None:
    state = partial().state_dict()
    assert state["selected"].tolist() == [0, 2, 3]
    assert state["ghosts"].tolist() == [1, 4]
    folded = partial().folded().state_dict()
    assert folded["ghosts"].tolist() == [1, 4]
    assert folded["scale"].shape == folded["shift"].shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        ([0, 1], "2 selected channels for a layer of 3: give that many, all different"),
        ([0, 1, 1], "3 selected channels for a layer of 3: give that many, all different"),
        ([0, 1, 5], "selected channels 0..5 must lie in 0..4"),
        ([-1, 0, 1], "selected channels -1..1 must lie in 0..4"),
    ],
    ids=["too-few", "repeated", "too-large", "negative"],
)
def test_wrong_selections(selected: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        PartialChannels(LargeKernel(Rectangles(3, [(5, 5)])), selected, 5)


# What the others compile has been seen in these, or in whole networks: crossed kernels, and tiles that are shifted.
COMPILED = ("dilated", "shared")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in COMPILED else [pytest.mark.slow]) for name in SOURCES]
)
def test_large_kernels_compile(name: str) -> None:
    torch._dynamo.reset()
    module, x = layer(name), image(C)
    for form in (module, module.folded()):
        assert_close(torch.compile(form, fullgraph=True, backend="aot_eager")(x), form(x))


def test_layers_take_channels_last_and_keep_it() -> None:
    x: Tensor = image(C).contiguous(memory_format=torch.channels_last)
    for form in (layer("crossed"), layer("crossed").folded()):
        assert form(x).is_contiguous(memory_format=torch.channels_last)
