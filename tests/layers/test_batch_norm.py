"""Batch norm in training by our kernels: values, statistics, derivatives, and what is left to PyTorch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.testing import assert_close

from tests.native import needs_native, thread_count
from widekernel import ops
from widekernel.layers import NativeBatchNorm2d
from widekernel.layers.norms import affine_of, is_foldable
from widekernel.ops.batch_norm import batch_norm, reasons_against_batch_norm

pytestmark = needs_native
ENOUGH = 64  # channels for one thread of any instruction set
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with thread_count(1):
        yield


def norm_of(channels: int, **kwargs: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **kwargs)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return norm


def ours(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Return a copy of a norm that is ours."""
    norm = copy.deepcopy(norm)
    norm.__class__ = NativeBatchNorm2d
    return norm


def results(norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *norm.parameters()], grad), *norm.buffers()]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4), st.integers(16, 140), st.integers(1, 12), st.integers(1, 12), st.sampled_from(list(LAYOUTS)),
    st.booleans(), st.booleans(), st.floats(-100, 100), st.integers(0, 2**16),
)  # fmt: skip
def test_equals_pytorch_in_float64(
    images: int, channels: int, height: int, width: int, layout: str, affine: bool, tracked: bool, mean: float, seed: int
) -> None:
    torch.manual_seed(seed)
    if images * height * width < 3:
        images += 2  # with two pixels, derivatives are differences of nearly equal numbers
    norm = norm_of(channels, affine=affine, track_running_stats=tracked, momentum=0.3)
    x = LAYOUTS[layout](torch.randn(images, channels, height, width) + mean)
    grad = torch.randn_like(x)
    with ops.trace() as trace:
        got = results(ours(norm), x, grad)
    assert trace.batch_norms == [x.shape]
    assert got[0].stride() == copy.deepcopy(norm)(x).stride()
    # The mean is rounded like the numbers.
    tolerance = 1e-4 + 1e-5 * abs(mean)
    for value, want in zip(got, results(copy.deepcopy(norm).double(), x.double(), grad.double())):
        scale = max(1.0, want.abs().max().item())
        assert_close(value.double() / scale, want.double() / scale, rtol=0, atol=tolerance * 5)


def test_accuracy_beside_a_large_mean_and_an_outlier() -> None:
    x = torch.randn(2, ENOUGH, 20, 20) + 1000
    x[0, :, 0, 0] = 1e5
    norm = norm_of(ENOUGH)
    want = copy.deepcopy(norm).double()(x.double())
    error = (ours(norm)(x).double() - want).abs().max() / want.abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_on_any_number_of_threads(threads: int, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3 * ENOUGH, 15, 15))
    grad, norm = torch.randn_like(x), norm_of(3 * ENOUGH)
    want = results(ours(norm), x, grad)
    torch.set_num_threads(threads)
    for value, same in zip(results(ours(norm), x, grad), want):
        assert torch.equal(value, same)


def test_gradients_in_another_layout() -> None:
    x, norm = torch.randn(2, ENOUGH, 6, 5), norm_of(ENOUGH)
    grad = torch.randn(ENOUGH, 1, 1).expand(2, -1, 6, 5)
    for value, want in zip(results(ours(norm), x, grad), results(norm, x, grad)):
        assert_close(value, want, rtol=1e-4, atol=1e-4)


def test_second_derivatives() -> None:
    norm, x = norm_of(ENOUGH), torch.randn(2, ENOUGH, 3, 3, requires_grad=True)
    penalties = []
    for kind in (ours(norm), norm):
        (slope,) = torch.autograd.grad(kind(x).pow(3).sum(), [x], create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), [x, kind.weight]))
    for got, want in zip(*penalties):
        assert_close(got, want, rtol=1e-3, atol=1e-2)
    small = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(ours(norm_of(2).double()), [small])


def test_some_gradients() -> None:
    x, norm = torch.randn(2, ENOUGH, 3, 3), ours(norm_of(ENOUGH))
    norm.bias.requires_grad_(False)
    y = norm(x)
    y.square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.bias.grad is None


def changed(change: Callable[[nn.BatchNorm2d], None]) -> nn.BatchNorm2d:
    norm = norm_of(ENOUGH)
    change(norm)
    return norm


LEFT_TO_PYTORCH = {
    "evaluation": (changed(nn.Module.eval), ""),
    "a cumulative average": (nn.BatchNorm2d(ENOUGH, momentum=None), "cumulative"),
    "float64": (norm_of(ENOUGH).double(), "float32"),
    "statistics without updates": (changed(lambda norm: setattr(norm, "track_running_stats", False)), "without updates"),
    "one place": (changed(lambda norm: setattr(norm, "running_mean", torch.zeros(1).expand(ENOUGH))), "place of its own"),
    "no count": (changed(lambda norm: setattr(norm, "num_batches_tracked", None)), "only some statistics"),
}


@pytest.mark.parametrize("name", LEFT_TO_PYTORCH)
def test_norms_that_are_left_to_pytorch(name: str) -> None:
    norm, reason = LEFT_TO_PYTORCH[name]
    fast = ours(norm)
    x = torch.randn(2, ENOUGH, 4, 4, dtype=torch.float64 if name == "float64" else torch.float32)
    assert [reason in why for why in fast.reasons_against()] == ([True] if reason else [])
    with ops.trace() as trace:
        got, want = fast(x), copy.deepcopy(norm)(x)
    assert torch.equal(got, want)
    assert trace.batch_norms == []


def test_a_divisor_of_zero_is_left_to_pytorch() -> None:
    norm = ours(nn.BatchNorm2d(ENOUGH, eps=0.0))
    assert "eps is 0.0" in norm.reasons_against()[0]
    # An error in some versions of PyTorch.
    with ops.trace() as trace, contextlib.suppress(ValueError):
        norm(torch.randn(2, ENOUGH, 4, 4))
    assert trace.batch_norms == []


def test_saved_tensors_may_come_back_in_another_form() -> None:
    norm, x = norm_of(ENOUGH), torch.randn(3, ENOUGH, 4, 5)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.mT.contiguous().mT if t.dim() == 4 else t,
        lambda t: t if t.dim() == 4 else t.repeat_interleave(2)[::2],
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    ]
    want = results(norm, x, torch.ones_like(x).cumsum(0))
    for change in changes:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
            got = results(ours(norm), x, torch.ones_like(x).cumsum(0))
        for value, expected in zip(got[:4], want[:4]):
            assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_hooks_run() -> None:
    x, calls = torch.randn(2, ENOUGH, 4, 4), []
    norm = norm_of(ENOUGH)
    norm.register_forward_pre_hook(lambda module, values: (2 * values[0],))
    norm.register_forward_hook(lambda module, values, y: calls.append(y))
    with ops.trace() as trace:
        got = ours(norm)(x)
    assert trace.batch_norms == [x.shape]
    assert len(calls) == 1
    assert_close(got, norm(x), rtol=1e-4, atol=1e-5)


def test_evaluation_after_training_is_an_affine_map() -> None:
    norm, x = ours(norm_of(ENOUGH)), torch.randn(2, ENOUGH, 4, 4) + 1
    norm(x)
    scale, shift = affine_of(norm.eval(), ENOUGH)
    assert is_foldable(norm)
    assert_close(norm(x).double(), x.double() * scale[:, None, None] + shift[:, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kwargs", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=lambda kwargs: str(kwargs)
)
@pytest.mark.parametrize("training", [True, False])
def test_torchscript(kwargs: dict[str, Any], training: bool) -> None:
    plain, x = norm_of(ENOUGH, **kwargs).train(training), torch.randn(2, ENOUGH, 4, 4)
    scripted = torch.jit.script(ours(plain))
    for _ in range(2):
        assert torch.equal(scripted(x), plain(x))
    for got, want in zip(scripted.buffers(), plain.buffers()):
        assert torch.equal(got, want)


@pytest.mark.parametrize("size", [1, ENOUGH // 2])
def test_parameters_of_another_size_raise_pytorchs_error(size: int) -> None:
    norm, x = ours(norm_of(ENOUGH)), torch.randn(2, ENOUGH, 4, 4)
    norm.weight = nn.Parameter(torch.ones(size))
    with pytest.raises(RuntimeError, match="weight"):
        norm(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_border_is_not_taken_for_the_mean(layout: str) -> None:
    x = torch.randn(4, 16, 48, 48) + 50
    x[0, :, :2] = 0
    x = LAYOUTS[layout](x)
    found = batch_norm(x, None, None, 1e-5)
    want = x.double().var((0, 2, 3), unbiased=False)
    assert ((found.variance - want) / want).abs().max() <= 2e-4


def test_inputs_that_are_left_to_pytorch() -> None:
    norm = ours(norm_of(ENOUGH))
    x = torch.randn(2, ENOUGH, 4, 4)
    assert reasons_against_batch_norm(x) == []
    few = LAYOUTS["channels_last"](x[:, :2])
    for other in (x.double(), x[0], x.to("meta"), x[:, :, ::2], x[:1, :, :1, :1], few):
        assert len(reasons_against_batch_norm(other)) == 1
    with ops.trace() as trace:
        with torch.no_grad():
            norm(x)
        with torch.autocast("cpu"):
            assert "autocast" in reasons_against_batch_norm(x)[0]
            norm(x.bfloat16())
        norm(x[:, :, ::2])
        with pytest.raises(ValueError, match="more than 1 value"):
            norm(x[:1, :, :1, :1])
        with pytest.raises(RuntimeError, match="running_mean"):
            norm(x[:, 1:])
    assert trace.batch_norms == []


def test_compiled_code_has_pytorchs() -> None:
    torch._dynamo.reset()
    norm, x = ours(norm_of(ENOUGH)), torch.randn(2, ENOUGH, 4, 4)
    with ops.trace() as trace:
        got = torch.compile(norm, fullgraph=True, backend="aot_eager")(x)
    assert trace.batch_norms == []
    assert_close(got, norm(x), rtol=1e-4, atol=1e-5)
