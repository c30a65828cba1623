"""Our pointwise layers, which equal PyTorch's in values, gradients, layouts and errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from widekernel.layers import ConvNorm, PointwiseConv2d, PointwiseLinear
from widekernel.layers.affine import fold_affine, fold_input_affine
from widekernel.layers.rebuilding import is_plain

IN, OUT = 5, 7
ROWS = {"vector": (), "matrix": (6,), "tokens": (2, 3), "image": (2, 4, 3), "one": (1,), "deep": (1, 2, 3, 2)}
MAPS = {
    "contiguous": lambda: torch.randn(3, IN, 4, 6),
    "channels_last": lambda: torch.randn(3, IN, 4, 6).contiguous(memory_format=torch.channels_last),
    "pooled": lambda: torch.randn(3, IN, 1, 1),
    "unbatched": lambda: torch.randn(IN, 4, 6),
    "unbatched channels last": lambda: torch.randn(4, 6, IN).permute(2, 0, 1),
    "row": lambda: torch.randn(3, IN, 1, 6),
    "column": lambda: torch.randn(3, IN, 4, 1),
    "single": lambda: torch.randn(1, IN, 4, 6),
    "some channels": lambda: torch.randn(3, 2 * IN, 4, 6)[:, :IN],
    "some channels last": lambda: torch.randn(3, 4, 6, 2 * IN)[..., :IN].permute(0, 3, 1, 2),
    "transposed": lambda: torch.randn(3, IN, 6, 4).transpose(2, 3),
    "expanded": lambda: torch.randn(1, IN, 4, 6).expand(3, -1, -1, -1),
    "constant over pixels": lambda: torch.randn(3, IN, 1, 1).expand(-1, -1, 4, 6),
}


def linears(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, PointwiseLinear]:
    theirs, ours = nn.Linear(IN, OUT, bias, dtype=dtype), PointwiseLinear(IN, OUT, bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def convolutions(dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[nn.Conv2d, PointwiseConv2d]:
    kwargs = {"kernel_size": 1} | kwargs
    theirs, ours = nn.Conv2d(IN, OUT, dtype=dtype, **kwargs), PointwiseConv2d(IN, OUT, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """Compare values, and gradients of input and parameters."""
    results = []
    for layer in (theirs, ours):
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        results.append(
            [y, *torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), [leaf, *layer.parameters()])]
        )
    for want, got in zip(*results):
        assert got.shape == want.shape
        assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_linear_equals_pytorch(rows: tuple[int, ...], bias: bool) -> None:
    assert_same(*linears(bias), torch.randn(*rows, IN, dtype=torch.float64))


def test_linear_on_views() -> None:
    theirs, ours = linears()
    assert_same(theirs, ours, torch.randn(2, IN, 3, 4, dtype=torch.float64).permute(0, 2, 3, 1))
    assert_same(theirs, ours, torch.randn(6, 2 * IN, dtype=torch.float64)[:, ::2])
    assert_same(theirs, ours, torch.randn(1, IN, dtype=torch.float64).expand(4, -1))
    assert ours(torch.randn(2, 3, IN, dtype=torch.float64)).is_contiguous()


def test_linear_copies_nothing() -> None:
    layer, x = linears(dtype=torch.float32)[1], torch.randn(2, 3, 4, IN)
    seen: list[str] = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Names(), torch.no_grad():
        layer(x)
    assert "convolution" in seen
    assert not {"clone", "copy_", "_to_copy", "contiguous", "_unsafe_view"} & set(seen)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MAPS)
def test_convolution_equals_pytorch(name: str, bias: bool) -> None:
    theirs, ours = convolutions(bias=bias)
    x = MAPS[name]().double()
    assert_same(theirs, ours, x)
    if "channels" not in name and name not in ("expanded", "transposed", "constant over pixels"):
        assert ours(x).is_contiguous()
    if name == "channels_last":
        assert ours(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "kwargs",
    [{"stride": 2}, {"padding": 1}, {"kernel_size": 3}, {"kernel_size": 3, "padding": "same"}, {"stride": (1, 2)}],
    ids=str,
)
def test_convolutions_that_are_not_matrix_products_are_left_to_pytorch(kwargs: dict[str, Any]) -> None:
    theirs, ours = convolutions(**kwargs)
    assert ours.reasons_against()
    assert_same(theirs, ours, MAPS["contiguous"]().double())


@pytest.mark.parametrize(
    "kwargs", [{"padding": "same"}, {"padding": "valid"}, {"dilation": 3}, {"padding_mode": "circular"}]
)
def test_settings_that_do_not_matter_for_1x1_kernels(kwargs: dict[str, Any]) -> None:
    theirs, ours = convolutions(**kwargs)
    assert ours.reasons_against() == []
    assert_same(theirs, ours, MAPS["contiguous"]().double())


def test_arguments_may_change_later() -> None:
    theirs, ours = convolutions()
    for layer in (theirs, ours):
        layer.stride = (2, 2)
    assert_same(theirs, ours, MAPS["contiguous"]().double())


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN), (0, 3, 3, IN)], ids=str)
def test_linear_on_empty_inputs(shape: tuple[int, ...]) -> None:
    theirs, ours = linears()
    assert_same(theirs, ours, torch.randn(shape, dtype=torch.float64))


def test_convolution_on_empty_inputs() -> None:
    theirs, ours = convolutions()
    x = torch.randn(0, IN, 4, 4, dtype=torch.float64)
    assert ours(x).shape == theirs(x).shape


def assert_same_error(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    with pytest.raises(Exception) as want:
        theirs(x)
    with pytest.raises(type(want.value)) as got:
        ours(x)
    assert str(got.value) == str(want.value)


@pytest.mark.parametrize("shape", [(4, IN + 1), (4, 2 * IN), (2, IN, 4), ()], ids=str)
def test_errors_of_the_linear_layer_are_pytorchs(shape: tuple[int, ...]) -> None:
    assert_same_error(*linears(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, IN + 1, 4, 4), (IN, 4), (1, 1, IN, 4, 4), (4, 4, IN)], ids=str)
def test_errors_of_the_convolution_are_pytorchs(shape: tuple[int, ...]) -> None:
    assert_same_error(*convolutions(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "pooled"])
def test_derivatives_of_the_convolution(name: str) -> None:
    ours = convolutions()[1]
    x = MAPS[name]().double()[:2, :, :2, :2].requires_grad_()

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))

    arguments = (x, ours.weight.detach().requires_grad_(), ours.bias.detach().requires_grad_())
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)


def test_derivatives_of_the_linear_layer() -> None:
    ours = linears()[1]

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))

    x = torch.randn(2, 2, IN, dtype=torch.float64, requires_grad=True)
    arguments = (x, ours.weight.detach().requires_grad_(), ours.bias.detach().requires_grad_())
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "pooled"])
def test_function_transforms(name: str) -> None:
    theirs, ours = convolutions()
    x = torch.stack([MAPS[name]().double() for _ in range(2)])
    assert_close(torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x))
    theirs_too, ours_too = linears()
    tokens = torch.randn(3, 2, IN, dtype=torch.float64)
    assert_close(torch.func.vmap(ours_too)(tokens), theirs_too(tokens))
    assert_close(torch.func.jacrev(ours_too)(tokens[0]), torch.func.jacrev(theirs_too)(tokens[0]))
    assert_close(torch.func.jacfwd(ours)(x[0, :1]), torch.func.jacfwd(theirs)(x[0, :1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    for (theirs, ours), x in (
        (linears(dtype=torch.float32), torch.randn(2, 4, 4, IN)),
        (convolutions(dtype=torch.float32), MAPS["contiguous"]()),
        (convolutions(dtype=torch.float32, bias=False), MAPS["contiguous"]()),
        (convolutions(dtype=torch.float32), MAPS["channels_last"]()),
    ):
        with torch.autocast("cpu", dtype):
            want, got = theirs(x), ours(x)
        assert got.dtype == want.dtype == dtype
        assert_close(got, want, rtol=2e-2, atol=2e-2)
        got.sum().backward()
        assert ours.weight.grad is not None
        want, got = copy.deepcopy(theirs).to(dtype)(x.to(dtype)), copy.deepcopy(ours).to(dtype)(x.to(dtype))
        assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "pooled"])
def test_compiles_and_exports(name: str) -> None:
    torch._dynamo.reset()
    convolution, linear = convolutions()[1], linears()[1]
    for layer, x in ((convolution, MAPS[name]().double()), (linear, torch.randn(3, 2, IN, dtype=torch.float64))):
        assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        more = torch.cat([x, x])
        if name == "channels_last" and more.dim() == 4:
            more = more.contiguous(memory_format=torch.channels_last)
        assert_close(program.module()(more), layer(more))


def test_exports_with_images_of_any_size() -> None:
    layer, x = convolutions()[1], MAPS["contiguous"]().double()
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(2, IN, 7, 5, dtype=torch.float64)
    assert_close(program.module()(other), layer(other))


def test_other_devices_compute_as_pytorch_does() -> None:
    layers = PointwiseConv2d(IN, OUT, 1, device="meta"), PointwiseLinear(IN, OUT, device="meta")
    assert layers[0](torch.empty(2, IN, 3, 3, device="meta")).shape == (2, OUT, 3, 3)
    assert layers[1](torch.empty(2, 3, IN, device="meta")).shape == (2, 3, OUT)


def test_copies() -> None:
    for theirs, ours in (linears(), convolutions()):
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(other) is type(ours)
            other.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


def test_folding_keeps_the_kind() -> None:
    scale, shift = torch.rand(OUT).double() + 0.5, torch.randn(OUT).double()
    before = torch.rand(IN).double() + 0.5, torch.randn(IN).double()
    for (_, layer), x in ((linears(), torch.randn(4, IN).double()), (convolutions(), MAPS["channels_last"]().double())):
        assert is_plain(layer)
        shape = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
        folded = fold_affine(layer, scale, shift)
        assert type(folded) is type(layer)
        assert_close(folded(x), layer(x) * scale.view(shape) + shift.view(shape))
        folded = fold_input_affine(layer, *before)
        assert type(folded) is type(layer)
        assert_close(folded(x), layer(x * before[0].view(shape) + before[1].view(shape)))
    assert ConvNorm(convolutions()[1], nn.BatchNorm2d(OUT)).foldable()
