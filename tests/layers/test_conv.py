"""Convolutions: the drop-in depthwise one over the arguments of `nn.Conv2d`, and batch norms folded into them."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.layers.helpers import assert_close, image, randomized
from widekernel import accelerate, fold, ops
from widekernel.layers import ConvNorm, DepthwiseConv2d
from widekernel.layers.affine import fold_affine, fold_input_affine
from widekernel.layers.conv import reasons_against_depthwise
from widekernel.layers.norms import affine_of
from widekernel.layers.pointwise import reasons_against_pointwise
from widekernel.ops.patch import Patch
from widekernel.transforms.acceleration.fusion.graph import patch_of

C = 4
# Arguments beside channels and groups; the last entry tells whether the operator takes the layer.
ARGUMENTS: list[tuple[dict[str, Any], bool]] = [
    ({"kernel_size": 3, "padding": 1}, True),
    ({"kernel_size": 7, "padding": 3}, True),
    ({"kernel_size": 1}, True),
    ({"kernel_size": 1, "padding": "valid"}, True),
    ({"kernel_size": (3, 11), "padding": (1, 5)}, True),
    ({"kernel_size": (31, 5), "padding": (15, 2)}, True),
    ({"kernel_size": 3, "padding": "same"}, True),
    ({"kernel_size": 4, "padding": "same"}, True),
    ({"kernel_size": (2, 5), "padding": "same"}, True),
    ({"kernel_size": (4, 1), "padding": "same"}, True),
    ({"kernel_size": 3, "padding": 1, "bias": False}, True),
    ({"kernel_size": 3, "padding": "valid"}, False),
    ({"kernel_size": 3}, False),
    ({"kernel_size": 3, "padding": 2}, False),
    ({"kernel_size": 3, "padding": (1, 0)}, False),
    ({"kernel_size": 4, "padding": 2}, False),
    ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
    ({"kernel_size": 3, "padding": 1, "stride": (1, 2)}, False),
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, False),
    ({"kernel_size": 3, "padding": "same", "dilation": 2}, False),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, False),
    ({"kernel_size": 4, "padding": "same", "padding_mode": "circular"}, False),
]
SHAPES = {"depthwise": (C, C, C), "multiplied": (C, 2 * C, C), "grouped": (C, C, 2), "dense": (C, 2, 1), "single": (1, 1, 1)}


def name_of(arguments: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}".replace(" ", "") for key, value in arguments.items())


def pair(channels: tuple[int, int, int], arguments: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Conv2d, DepthwiseConv2d]:
    dim_in, dim_out, groups = channels
    theirs = nn.Conv2d(dim_in, dim_out, groups=groups, dtype=dtype, **arguments)
    ours = DepthwiseConv2d(dim_in, dim_out, groups=groups, dtype=dtype, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("arguments", "taken"), ARGUMENTS, ids=[name_of(arguments) for arguments, _ in ARGUMENTS])
def test_drop_in_for_conv2d(arguments: dict[str, Any], taken: bool, shape: str) -> None:
    theirs, ours = pair(SHAPES[shape], arguments, torch.float64)
    on_operator = taken and shape in ("depthwise", "single")
    assert (ours.reasons_against() == []) == on_operator
    for x in (image(SHAPES[shape][0], 9, 10), image(SHAPES[shape][0], 9, 10)[0]):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        with ops.trace() as trace:
            outputs = [layer(leaf) for layer, leaf in zip((theirs, ours), inputs)]
        assert len(trace.calls) == int(on_operator)
        assert_close(outputs[1], outputs[0])
        grad = torch.randn_like(outputs[0])
        want, got = (
            torch.autograd.grad(y, [leaf, *layer.parameters()], grad)
            for y, leaf, layer in zip(outputs, inputs, (theirs, ours))
        )
        for mine, truth in zip(got, want):
            assert_close(mine, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    theirs, ours = pair((C, C, C), {"kernel_size": 5, "padding": 2}, dtype)
    x = image(C).to(dtype)
    y = ours(x)
    assert y.dtype == dtype
    assert_close(y, theirs.double()(x.double()))


def test_constructor_and_state_are_those_of_conv2d() -> None:
    layer = DepthwiseConv2d(C, C, 3, 1, 1, 1, C, False, "zeros", torch.device("cpu"), torch.float64)
    assert layer.weight.dtype == torch.float64
    assert layer.bias is None
    assert layer.reasons_against() == []
    theirs, ours = pair((C, C, C), {"kernel_size": 3}, torch.float32)
    assert list(theirs.state_dict()) == list(ours.state_dict()) == ["weight", "bias"]
    assert isinstance(ours, nn.Conv2d)
    for name in inspect.signature(nn.Conv2d.__init__).parameters:
        if name not in ("self", "device", "dtype", "bias"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_initial_weights_are_those_of_conv2d() -> None:
    torch.manual_seed(3)
    theirs = nn.Conv2d(C, C, 5, padding=2, groups=C)
    torch.manual_seed(3)
    ours = DepthwiseConv2d(C, C, 5, padding=2, groups=C)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_copies_run_on_the_operator() -> None:
    layer, x = DepthwiseConv2d(C, C, 5, padding=2, groups=C).double(), image(C)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with ops.trace() as trace:
            assert torch.equal(other(x), layer(x))
        assert len(trace.calls) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", (2, 2)), ("padding", (0, 0)), ("dilation", (2, 2)), ("padding_mode", "circular")],
    ids=["stride", "padding", "dilation", "padding_mode"],
)
def test_attributes_changed_later_are_honored(name: str, value: Any) -> None:
    theirs, ours = pair((C, C, C), {"kernel_size": 3, "padding": 1}, torch.float64)
    x = image(C)
    assert_close(ours(x), theirs(x))
    for layer in (theirs, ours):
        setattr(layer, name, value)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        ({"kernel_size": 3, "padding": 1, "groups": C}, []),
        ({"kernel_size": 3, "padding": 1}, ["not depthwise: 4 -> 4 channels, 1 groups"]),
        ({"kernel_size": 3, "padding": 1, "groups": C, "stride": 2}, ["stride (2, 2) is not 1"]),
        ({"kernel_size": 3, "padding": "same", "groups": C, "dilation": 3}, ["dilation (3, 3) is not 1"]),
        (
            {"kernel_size": 3, "padding": 1, "groups": C, "padding_mode": "reflect"},
            ["padding mode 'reflect' is not 'zeros'"],
        ),
        ({"kernel_size": 3, "groups": C}, ["padding (0, 0) changes the size with a (3, 3) kernel"]),
        ({"kernel_size": 3, "padding": "valid", "groups": C}, ["padding valid changes the size with a (3, 3) kernel"]),
    ],
    ids=["none", "groups", "stride", "dilation", "mode", "padding", "valid"],
)
def test_reasons_against(arguments: dict[str, Any], reasons: list[str]) -> None:
    assert DepthwiseConv2d(C, C, **arguments).reasons_against() == reasons


def test_all_reasons_are_listed() -> None:
    assert len(DepthwiseConv2d(C, C, 4, stride=2, padding=1, dilation=2, padding_mode="reflect").reasons_against()) == 5


def test_compiles_and_exports() -> None:
    torch._dynamo.reset()
    layer, x = DepthwiseConv2d(C, C, 7, padding=3, groups=C).double(), image(C)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = image(C, batch=5)
    assert_close(program.module()(more), layer(more))


def test_autocast() -> None:
    theirs, ours = pair((C, C, C), {"kernel_size": 7, "padding": 3}, torch.float32)
    x = image(C).float()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(x), theirs(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want)


BATCH_NORMS = {
    "bn": nn.BatchNorm2d,
    "sync-bn": nn.SyncBatchNorm,
    "without-affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "large-eps": lambda channels: nn.BatchNorm2d(channels, eps=0.7),
}


@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_a_batch_norm_is_an_affine_map(norm: str) -> None:
    bn, x = randomized(BATCH_NORMS[norm](C)), image(C)
    scale, shift = affine_of(bn, C)
    assert scale.dtype == shift.dtype == torch.float64
    assert not scale.requires_grad
    assert_close(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), bn(x))


CONVS = {
    "1x1": lambda: nn.Conv2d(C, 6, 1, bias=False),
    "3x3": lambda: nn.Conv2d(C, 6, 3, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(C, 6, 3, padding="same", groups=2, dilation=2),
    "depthwise": lambda: DepthwiseConv2d(C, C, 5, padding=2, groups=C),
    "reflecting": lambda: nn.Conv2d(C, 6, 3, padding=1, padding_mode="reflect", bias=False),
}


@pytest.mark.parametrize("norm", BATCH_NORMS)
@pytest.mark.parametrize("conv", CONVS)
def test_conv_norm_folded(conv: str, norm: str) -> None:
    inner = CONVS[conv]()
    layer = randomized(ConvNorm(inner, BATCH_NORMS[norm](inner.out_channels), nn.GELU()))
    x, state = image(C), copy.deepcopy(layer.state_dict())
    want, folded = layer(x), layer.folded()
    assert layer.foldable()
    assert_close(folded(x), want)
    assert type(folded.conv) is type(inner)
    assert isinstance(folded.bn, nn.Identity)
    assert folded.conv.bias is not None
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    again = folded.folded()
    assert all(torch.equal(value, folded.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("bias", [False, True], ids=["without-bias", "with-bias"])
@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_conv_norm_folded_with_the_norm_before(norm: str, bias: bool) -> None:
    before = randomized(BATCH_NORMS[norm](C))
    layer = randomized(ConvNorm(nn.Conv2d(C, 6, 1, bias=bias), nn.BatchNorm2d(6), nn.ReLU()))
    x = image(C)
    assert_close(layer.folded(input_norm=before)(x), layer(before(x)))
    with pytest.warns(FutureWarning, match="'before' is now called 'input_norm'"):
        assert_close(layer.folded(before=before)(x), layer(before(x)))


def test_conv_norm_without_a_batch_norm() -> None:
    layer = ConvNorm(nn.Conv2d(C, 6, 1), nn.GroupNorm(1, 6))
    assert not layer.foldable()
    with pytest.raises(TypeError, match="GroupNorm is not a plain batch norm"):
        layer.folded()


def line(channels: int, dims: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    return *torch.randn(2, channels, dtype=torch.float64), (-1, *[1] * dims)


@pytest.mark.parametrize("conv", CONVS)
def test_an_affine_map_after_a_convolution(conv: str) -> None:
    layer, x = CONVS[conv]().double(), image(C)
    scale, shift, shape = line(layer.out_channels, 2)
    assert_close(fold_affine(layer, scale, shift)(x), layer(x) * scale.view(shape) + shift.view(shape))


@pytest.mark.parametrize("bias", [False, True])
def test_affine_maps_around_a_linear_layer(bias: bool) -> None:
    layer, x = nn.Linear(C, 6, bias=bias).double(), torch.randn(2, 5, C, dtype=torch.float64)
    scale, shift, _ = line(6, 0)
    assert_close(fold_affine(layer, scale, shift)(x), layer(x) * scale + shift)
    scale, shift, _ = line(C, 0)
    assert_close(fold_input_affine(layer, scale, shift)(x), layer(x * scale + shift))


UNPADDED = {
    "1x1": lambda: nn.Conv2d(C, 6, 1, bias=False),
    "strided": lambda: nn.Conv2d(C, 6, 2, stride=2),
    "valid": lambda: nn.Conv2d(C, 6, 3, padding="valid", dilation=2),
    "same-1x1": lambda: nn.Conv2d(C, 6, 1, padding="same"),
}


@pytest.mark.parametrize("conv", UNPADDED)
def test_an_affine_map_before_a_convolution(conv: str) -> None:
    layer, x = UNPADDED[conv]().double(), image(C)
    scale, shift, shape = line(C, 2)
    assert_close(fold_input_affine(layer, scale, shift)(x), layer(x * scale.view(shape) + shift.view(shape)))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(C, C, 3, padding=1),
        nn.Conv2d(C, C, (1, 3), padding=(0, 1)),
        nn.Conv2d(C, C, 3, padding="same"),
        nn.Conv2d(C, C, 1, groups=2),
        nn.Conv2d(C, C, 1, padding=1),
    ],
    ids=["padded", "padded-sideways", "same", "grouped", "padded-1x1"],
)
def test_no_affine_map_before_padding_or_groups(layer: nn.Conv2d) -> None:
    scale, shift, _ = line(C, 0)
    with pytest.raises(ValueError, match=r"a norm cannot be folded into the input of Conv2d.*ungrouped and without padding"):
        fold_input_affine(layer, scale, shift)


@pytest.mark.parametrize("fold", [fold_affine, fold_input_affine])
def test_folding_draws_no_random_numbers_and_keeps_type_and_mode(fold) -> None:
    layer = nn.Conv2d(C, C, 1, bias=False, dtype=torch.float16).eval()
    scale, shift, _ = line(C, 0)
    state = torch.get_rng_state()
    new = fold(layer, scale, shift)
    assert torch.equal(torch.get_rng_state(), state)
    assert new.weight.dtype == new.bias.dtype == torch.float16
    assert not new.training
    assert new.weight.requires_grad
    assert layer.bias is None


@pytest.mark.parametrize("setting", [2, (2,), [2, 2]], ids=str)
def test_settings_changed_after_construction(setting: Any) -> None:
    """PyTorch computes with them, so the rules for convolutions must read them, too."""
    layers = [nn.Conv2d(C, C, 3, padding=1, groups=C), nn.Conv2d(C, 2 * C, 3, padding=1), nn.Conv2d(2 * C, C, 1)]
    theirs = nn.Sequential(*layers).eval()
    for layer in layers:
        layer.stride = setting
    x = torch.randn(1, C, 24, 24)
    with torch.inference_mode():
        want = theirs(x)
        assert_close(accelerate(fold(theirs), x)[0](x), want)
    assert reasons_against_depthwise(layers[0]) == ["stride (2, 2) is not 1"]
    assert reasons_against_pointwise(layers[2]) == ["stride (2, 2) is not 1"]
    assert patch_of(layers[1]) == Patch((3, 3), (2, 2), (1, 1))
