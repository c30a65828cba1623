"""Conversion of prepared networks to plain ones with equal outputs, and compression for hardware."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import widekernel
from tests.sparsity.nets import check_same_network
from widekernel.errors import ArgumentError
from widekernel.layers import ConvNorm
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured import hardware
from widekernel.sparsity.semi_structured.conversion import manifest_of
from widekernel.sparsity.semi_structured.hardware import HardwareSupport, hardware_support, plan_padding
from widekernel.sparsity.semi_structured.masks import check_semi_structured

METHODS = ["magnitude", "permuted", "learned"]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 24, 1),
        nn.Flatten(),
        nn.Linear(24 * 9, 8),
    )


@pytest.mark.parametrize("axis", ["channels", "im2col"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_and_outputs_stay_the_same(method: str, axis: str, channels_last: bool) -> None:
    if (method, axis) == ("permuted", "im2col"):
        return
    model, x = network(), torch.randn(2, 3, 8, 8)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    keys = list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    model[6].bias.requires_grad_(False)
    controller = ss.prepare(model, ss.SemiStructuredConfig(method, axis))
    plain = ss.convert(model.train())
    check_same_network(plain, model, x)
    assert list(plain.state_dict()) == keys and [name for name, _ in plain.named_parameters()] == names
    assert {type(module) for module in plain.modules()} == {type(module) for module in network().modules()}
    assert [p.requires_grad for p in plain.parameters()] == [name != "6.bias" for name in names]
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert ss.validate(plain) == tuple(controller.masks)
    for name, mask in controller.masks.items():
        assert not plain.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("method", METHODS)
def test_the_prepared_network_can_be_used_further(method: str) -> None:
    """Conversion makes a copy: the original computes the same, can be trained further and be converted again."""
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    controller = ss.prepare(model, ss.SemiStructuredConfig(method))
    first = ss.convert(model)
    kept = copy.deepcopy(first)
    check_same_network(first, model, x)
    check_same_network(ss.convert(first), model, x)  # a converted network converts to itself
    with torch.no_grad():
        for logits in controller.parameters():
            logits.copy_(torch.randn_like(logits))
    if method == "learned":
        with pytest.raises(AssertionError):
            check_same_network(ss.convert(model), kept, x)
        check_same_network(ss.convert(model), model, x)
    check_same_network(first, kept, x)


def test_a_converted_network_can_be_prepared_again() -> None:
    model = network()
    ss.prepare(model, ss.SemiStructuredConfig("learned"))
    plain = ss.convert(model)
    controller = ss.prepare(plain, ss.SemiStructuredConfig("learned"))
    assert torch.equal(ss.convert(plain)[3].weight, ss.convert(model)[3].weight) and controller.is_learned


def test_networks_can_be_exported() -> None:
    """Prepared networks can be exported too, in evaluation mode, where control flow does not depend on values."""
    model, x = nn.Sequential(nn.Conv2d(18, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval(), torch.randn(1, 18, 6, 6)
    ss.prepare(model, ss.SemiStructuredConfig("learned"))
    plain = ss.convert(model)
    for one in (model, plain):
        torch.testing.assert_close(torch.export.export(one, (x,)).module()(x), plain(x))


def test_recomputation_uses_the_same_masks() -> None:
    """Gradients are the same with and without gradient checkpointing."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).train(), torch.randn(4, 16, requires_grad=True)
    controller = ss.prepare(model, ss.SemiStructuredConfig("learned", prior_strength=0.0))
    plain = torch.autograd.grad(model(x).square().sum(), controller.parameters())
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), controller.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_saved_like_any_network(tmp_path: object) -> None:
    model = network()
    ss.prepare(model, ss.SemiStructuredConfig("learned"))
    plain = ss.convert(model).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pt")  # type: ignore[operator]
    fresh = network().eval()
    fresh.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))  # type: ignore[operator]
    x = torch.randn(1, 3, 8, 8)
    check_same_network(fresh, plain, x)


def test_errors() -> None:
    model = network()
    with pytest.raises(ArgumentError, match=r"the Sequential has no 2:4 masks: call prepare\(model, config\)"):
        ss.convert(model)
    with pytest.raises(ArgumentError, match="has no 2:4 masks"):
        ss.validate(model)
    ss.prepare(model)
    with pytest.raises(ArgumentError, match=r"target 'torch' is unknown: .*Did you mean 'torch_sparse'\?"):
        ss.convert(model, "torch")  # type: ignore[arg-type]
    with torch.no_grad():
        model[3].weight[4, 8:12, 1, 1] = 1
    for check in (ss.convert, ss.validate):
        with pytest.raises(ArgumentError, match=r"3\.weight is not 2:4 along axis='channels': 1 of 1152 groups .*with 4"):
            check(model)


def test_layers_parametrized_further_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    ss.prepare(model, ss.SemiStructuredConfig("learned"))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Identity())
    with pytest.raises(ArgumentError, match="parametrized again after prepare"):
        ss.convert(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["slak_tiny", "replknet_31b", "shiftwise_tiny"])
def test_folding_keeps_semi_structured_weights(method: str, name: str) -> None:
    """Folding a norm into a layer scales its rows, so the support stays inside the mask."""
    model = timm.create_model(name, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), num_classes=8).eval()
    ss.prepare(model, ss.SemiStructuredConfig(method, permutation_rounds=5, layers=("stages*",)))
    plain = ss.convert(model)
    folded = widekernel.fold(plain)
    checked = 0
    for key in manifest_of(plain).weights:
        weight = dict(folded.named_parameters())[key]
        check_semi_structured(weight, name=key)
        assert not weight[plain.get_parameter(key) == 0].any()
        checked += 1
    assert checked >= 8
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(folded(x), plain(x), atol=1e-4, rtol=1e-3)


class Block(nn.Module):
    """A network whose only foldable part is a 1x1 convolution with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.pw = ConvNorm(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(x)


class FoldingBlock(Block):
    def foldable(self) -> bool:
        return self.pw.foldable()

    def folded(self) -> nn.Module:
        self.pw = self.pw.folded()
        return self


@pytest.mark.parametrize("converted", [True, False])
def test_folding_a_pointwise_convolution(converted: bool) -> None:
    model = FoldingBlock().eval()
    with torch.no_grad():
        for value in (model.pw.bn.weight, model.pw.bn.running_var):
            value.copy_(torch.rand(32) + 0.5)
    controller = ss.prepare(model, ss.SemiStructuredConfig("learned"))
    folded = widekernel.fold(ss.convert(model) if converted else model)
    weight = folded.pw.conv.weight
    assert isinstance(folded.pw.bn, nn.Identity)
    check_semi_structured(weight)
    assert torch.equal(weight != 0, controller.masks["pw.conv.weight"])
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(folded(x), model(x))


def test_a_missing_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capability = hardware_support()
    assert not capability.available and capability.reason == "there is no CUDA device"
    assert capability.backend in hardware.MULTIPLES
    model = network()
    ss.prepare(model)
    with pytest.raises(
        ArgumentError, match=r"'torch_sparse' cannot be used here: there is no CUDA device\. Use target='dense'"
    ):
        ss.convert(model, "torch_sparse")


def test_old_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    assert hardware_support().reason == "Old GPU is older than capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert hardware_support().available


@pytest.mark.parametrize(
    ("size", "dtype", "backend", "padded"),
    [
        ((96, 384), torch.float16, "cutlass", (96, 384)),
        ((97, 385), torch.bfloat16, "cutlass", (128, 448)),
        ((10, 48), torch.int8, "cutlass", (16, 128)),
        ((97, 385), torch.float16, "cusparselt", (112, 400)),
        ((1, 1), torch.int8, "cusparselt", (32, 32)),
    ],
)
def test_padding(size: tuple[int, int], dtype: torch.dtype, backend: str, padded: tuple[int, int]) -> None:
    plan = plan_padding(*size, dtype, backend)
    assert (plan.padded_rows, plan.padded_columns) == padded and (plan.rows, plan.columns) == size and not plan.reason


def test_multiples_are_those_of_torch() -> None:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    for name, kind in {
        "cutlass": SparseSemiStructuredTensorCUTLASS,
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
    }.items():
        for dtype, size in hardware.MULTIPLES[name].items():
            limits = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert size == (limits.sparse_min_rows, limits.sparse_min_cols)


def test_types_without_hardware_support_are_refused() -> None:
    assert "must be 1:2, so values would be lost" in plan_padding(32, 64, torch.float32).reason
    assert "float64 has no kernels" in plan_padding(32, 64, torch.float64).reason
    with pytest.raises(ArgumentError, match="backend 'cublas' is unknown"):
        plan_padding(32, 64, torch.float16, "cublas")


def masked(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(ss.magnitude_mask(layer.weight))
    return layer.to(torch.bfloat16)


def compress(weight: Tensor) -> Tensor:
    """Stand-in for PyTorch's compression: check what the hardware requires and leave the weight dense."""
    assert weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0 and weight.is_contiguous()
    check_semi_structured(weight)
    return weight


@pytest.mark.parametrize("bias", [True, False])
def test_compressed_linear_layers(bias: bool) -> None:
    layer = masked(nn.Linear(70, 33, bias=bias))
    sparse = hardware.compressed(layer, "cutlass", compress)
    for shape in ((70,), (5, 70), (2, 3, 70)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        torch.testing.assert_close(sparse(x), layer(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
def test_compressed_pointwise_convolutions(stride: object) -> None:
    layer = masked(nn.Conv2d(20, 40, 1, stride=stride))  # type: ignore[arg-type]
    sparse = hardware.compressed(layer, "cutlass", compress)
    x = torch.randn(2, 20, 7, 9, dtype=torch.bfloat16)
    torch.testing.assert_close(sparse(x), layer(x), atol=0.02, rtol=0.02)


def test_compression_refuses_weights_that_are_not_semi_structured() -> None:
    with pytest.raises(ArgumentError, match="is not 2:4"):
        hardware.compressed(nn.Linear(64, 32).bfloat16(), "cutlass", compress)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "axis", "reason"),
    [
        (nn.Conv2d(16, 8, 3), "channels", "only linear layers and 1x1 convolutions can be compressed"),
        (nn.Conv2d(16, 8, 1, groups=2), "im2col", "only linear layers and 1x1 convolutions can be compressed"),
        (nn.Conv2d(16, 8, 1, padding=1), "channels", r"padding (1, 1) of a 1x1 convolution"),
        (nn.Linear(18, 8), "im2col", "groups along axis='im2col' do not lie within rows"),
        (Scaled(16, 8), "channels", "Scaled may compute something other than a plain layer"),
        (nn.Linear(64, 32).half(), "channels", "its weight is on cpu, not on a CUDA device"),
        (nn.Linear(64, 32), "channels", "must be 1:2, so values would be lost"),
        (nn.Linear(64, 16).half(), "channels", "padding it from 16 x 64 to 32 x 64 costs as much as sparsity can save"),
    ],
)
def test_layers_that_stay_dense_have_a_reason(layer: nn.Module, axis: str, reason: str) -> None:
    assert reason in hardware.reason_against(layer, axis, "cutlass")


def test_conversion_lists_layers_that_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs on the CPU, with stand-ins for the device and the compression."""
    monkeypatch.setattr(hardware, "hardware_support", lambda: HardwareSupport(True, "", "cutlass"))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", compress)
    reason = hardware.reason_against
    monkeypatch.setattr(hardware, "reason_against", lambda *a: "" if "not on a CUDA" in reason(*a) else reason(*a))
    model = nn.Sequential(
        nn.Conv2d(16, 60, 3), nn.Conv2d(60, 60, 1), nn.Flatten(), nn.Linear(960, 60), nn.Linear(60, 10)
    ).eval()
    ss.prepare(model)
    dense = ss.convert(model).bfloat16()
    sparse = ss.convert(copy.deepcopy(model).bfloat16(), "torch_sparse")
    assert set(manifest_of(sparse).dense) == {"0.weight", "4.weight"}
    assert isinstance(sparse[1], hardware.SparsePointwise) and isinstance(sparse[3], hardware.SparseLinear)
    x = torch.randn(2, 16, 6, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(sparse(x), dense(x), atol=0.05, rtol=0.05)
    assert ss.validate(sparse) == ("0.weight", "4.weight")
    with pytest.raises(ArgumentError, match=r"1\.weight, 3\.weight are not plain weights"):
        ss.save_sparse(sparse, "network.safetensors")


@pytest.mark.gpu
def test_on_a_device() -> None:
    model = nn.Sequential(nn.Linear(70, 96), nn.GELU(), nn.Linear(96, 60)).to("cuda", torch.float16).eval()
    ss.prepare(model)
    sparse = ss.convert(model, "torch_sparse")
    assert manifest_of(sparse).dense == {}
    x = torch.randn(5, 70, device="cuda", dtype=torch.float16)
    torch.testing.assert_close(sparse(x), model(x), atol=0.02, rtol=0.02)
