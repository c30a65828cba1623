"""`to_torch`: the same network without our operator, under the same names."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import widekernel
from tests.layers.helpers import randomized
from widekernel import ops
from widekernel.bench.variants import with_visible_blocks
from widekernel.errors import ArgumentError
from widekernel.layers import (
    ConvNorm,
    DepthwiseConv2d,
    FoldedLargeKernel,
    LargeKernel,
    PartialChannels,
    PointwiseConv2d,
    PointwiseLinear,
    Rectangles,
    ShiftTiles,
    ShuffledStrips,
    SourceGroup,
    TruncatedTiles,
)
from widekernel.models import list_models
from widekernel.transforms import to_torch
from widekernel.transforms.to_torch import TorchFoldedLargeKernel, TorchLargeKernel, operator_layers

NANO = [name for name in list_models() if name.endswith("_nano")]
LAYERS = {
    "no norms": lambda: LargeKernel(Rectangles(6, [(13, 3), (5, 5)])),
    "tiles": lambda: LargeKernel(ShiftTiles(6, 17, 3), [nn.BatchNorm2d(6) for _ in range(3)], identity=True),
    "no rectangles": lambda: LargeKernel(TruncatedTiles(ShuffledStrips(6, 13, 3)), [nn.BatchNorm2d(6) for _ in range(2)]),
    "some channels": lambda: PartialChannels(LargeKernel(Rectangles(4, [(7, 7)]), identity=True), [0, 2, 3, 5], 6),
}


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", NANO)
def test_the_torch_baseline_is_the_same_network_without_our_operator(name: str) -> None:
    model = with_visible_blocks(timm.create_model(name)).eval()
    baseline, changed = to_torch(model), operator_layers(model)
    x = images()
    with ops.trace() as ran:
        got = baseline(x)
    assert changed and not ran.calls
    with ops.trace() as ran:
        want = model(x)
    assert len(ran.calls) >= len(changed)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert [p.shape for p in baseline.parameters()] == [p.shape for p in model.parameters()]
    got.square().sum().backward()
    want.square().sum().backward()
    for theirs, ours in zip(baseline.parameters(), model.parameters()):
        largest = ours.grad.abs().max().item()
        torch.testing.assert_close(theirs.grad, ours.grad, atol=1e-3 * largest + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", NANO)
def test_values_and_gradients_in_double_precision(name: str, folded: bool) -> None:
    model = randomized(timm.create_model(name, num_classes=10))
    model = widekernel.fold(model) if folded else model
    baseline, x = to_torch(model), images(64).double()
    with ops.trace() as ran:
        got = baseline(x)
        got.square().sum().backward()
    assert not ran.calls
    want = model(x)
    want.square().sum().backward()
    pairs = [(got, want), *((theirs.grad, ours.grad) for theirs, ours in zip(baseline.parameters(), model.parameters()))]
    for theirs, ours in pairs:
        torch.testing.assert_close(theirs, ours, atol=1e-10 * (1 + ours.detach().abs().max().item()), rtol=1e-9)


@pytest.mark.parametrize("name", ["slak_nano", "shiftwise_nano"])
def test_names_state_and_flags_stay(name: str) -> None:
    model = timm.create_model(name)
    model.stem.requires_grad_(False)
    model.stages[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    baseline = to_torch(model)
    assert {type(module) for module in model.modules()}.isdisjoint({TorchLargeKernel, TorchFoldedLargeKernel})
    assert operator_layers(model) and not operator_layers(baseline)
    for names in ("named_modules", "named_parameters"):
        assert [key for key, _ in getattr(baseline, names)()] == [key for key, _ in getattr(model, names)()]
    assert [module.training for module in baseline.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in baseline.parameters()] == [p.requires_grad for p in model.parameters()]
    model.load_state_dict(baseline.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {p.data_ptr() for p in baseline.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("folded", [False, True])
def test_single_layers(layer, folded: bool) -> None:
    layer = layer().eval()
    if folded and "TruncatedTiles" not in repr(layer):
        layer = widekernel.fold(layer)
    baseline = to_torch(layer)
    x = torch.randn(2, 6, 10, 12)
    assert len(operator_layers(layer)) == 1
    with ops.trace() as ran:
        got = baseline(x)
    assert not ran.calls
    torch.testing.assert_close(got, layer(x), atol=1e-5, rtol=1e-5)


def test_sources_that_are_only_partly_rectangles() -> None:
    source = SourceGroup([TruncatedTiles(ShuffledStrips(4, 9, 3)), Rectangles(4, [(3, 3)])])
    for norms in (None, [nn.BatchNorm2d(4) for _ in range(3)]):
        layer = LargeKernel(source, norms).double().eval()
        x = torch.randn(2, 4, 10, 12, dtype=torch.float64)
        with ops.trace() as ran:
            got = to_torch(layer)(x)
        assert not ran.calls
        torch.testing.assert_close(got, layer(x), atol=1e-12, rtol=1e-12)


def test_dilated_kernels() -> None:
    model = timm.create_model("replknet_nano", output_stride=16).double().eval()
    with torch.no_grad():
        x = images(64).double()
        torch.testing.assert_close(to_torch(model)(x), model(x), atol=1e-10, rtol=1e-10)


def test_accelerated_layers_are_pytorchs_again() -> None:
    layers = (DepthwiseConv2d(4, 4, 5, padding=2, groups=4), PointwiseConv2d(4, 6, 1), nn.Flatten(2), PointwiseLinear(30, 2))
    model = nn.Sequential(*layers).double()
    baseline, x = to_torch(model), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert [type(layer) for layer in baseline] == [nn.Conv2d, nn.Conv2d, nn.Flatten, nn.Linear]
    assert operator_layers(model) == ["0", "1", "3"]
    torch.testing.assert_close(baseline(x), model(x), atol=1e-12, rtol=1e-12)


def test_layers_of_pytorch_stay_and_shared_layers_stay_shared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Linear(4, 4))
    assert not operator_layers(model) and str(to_torch(model)) == str(model)
    shared = LargeKernel(Rectangles(3, [(5, 5)]))
    baseline = to_torch(nn.Sequential(shared, nn.ReLU(), shared))
    assert baseline[0] is baseline[2] and isinstance(baseline[0], TorchLargeKernel)


def test_hooks_stay() -> None:
    layer, calls = LargeKernel(Rectangles(3, [(5, 5)])), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    to_torch(layer)(images())
    assert calls == [1]


def test_twice_and_copied_and_pickled() -> None:
    baseline = to_torch(widekernel.fold(timm.create_model("slak_nano")))
    file = io.BytesIO()
    torch.save(baseline, file)
    file.seek(0)
    x = images(64)
    for other in (to_torch(baseline), copy.deepcopy(baseline), torch.load(file, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in baseline.modules()]
        with torch.no_grad(), ops.trace() as ran:
            assert torch.equal(other(x), baseline(x))
        assert not ran.calls


def test_folding_the_baseline_gives_a_baseline() -> None:
    model = randomized(timm.create_model("slak_nano"))
    folded, x = widekernel.fold(to_torch(model)), images(64).double()
    assert any(isinstance(module, TorchFoldedLargeKernel) for module in folded.modules())
    with torch.no_grad(), ops.trace() as ran:
        got = folded(x)
    # Depthwise convolutions outside of large kernels do not occur in this network.
    assert not ran.calls
    torch.testing.assert_close(got, model(x), atol=1e-10, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")
@pytest.mark.parametrize("folded", [False, True])
def test_scripted(folded: bool) -> None:
    layer = (
        LargeKernel(Rectangles(3, [(5, 3), (3, 5)]), [nn.BatchNorm2d(3) for _ in range(2)], identity=True).double().eval()
    )
    baseline, x = to_torch(widekernel.fold(layer) if folded else layer), images(16).double()
    torch.testing.assert_close(torch.jit.script(baseline)(x), layer(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("relu", [False, True])
def test_the_rectifier_of_a_folded_layer(relu: bool) -> None:
    layer = widekernel.fold(LargeKernel(Rectangles(3, [(5, 5)])).double())
    assert isinstance(layer, FoldedLargeKernel)
    x = images(16).double()
    torch.testing.assert_close(to_torch(layer)(x, relu=relu), layer(x, relu=relu), atol=1e-12, rtol=1e-12)


class Louder(LargeKernel):
    """Custom layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: Louder(Rectangles(3, [(5, 5)])), "Louder"),
        (lambda: parametrizations.weight_norm(DepthwiseConv2d(3, 3, 3, padding=1, groups=3)), "ParametrizedDepthwiseConv2d"),
    ],
    ids=["subclass", "parametrized"],
)
def test_subclasses_are_refused(layer, name: str) -> None:
    with pytest.raises(ArgumentError, match=f"1.1 is a {name}, a subclass of a layer of widekernel or a parametrized one"):
        to_torch(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), layer())))


def test_convolutions_with_a_norm_keep_working() -> None:
    layer = randomized(ConvNorm(DepthwiseConv2d(3, 3, 3, padding=1, groups=3), nn.BatchNorm2d(3), nn.ReLU()))
    x = images(16).double()
    torch.testing.assert_close(to_torch(layer)(x), layer(x), atol=1e-12, rtol=1e-12)
