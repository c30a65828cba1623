"""Products over patches against their definition in float64: geometry, layouts, norms, instruction sets, threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.native import needs_native, thread_count
from widekernel.errors import ArgumentError
from widekernel.ops.cpu import library
from widekernel.ops.cpu.pointwise import PackedBlock
from widekernel.ops.patch import NormAfter, Patch
from widekernel.ops.pointwise_reference import ACTIVATIONS, ReferenceBlock

pytestmark = needs_native

LIMIT = 4e-6
"""Largest error as a share of the largest number."""
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some columns": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every other column": lambda x: torch.stack([x, x], 4)[..., 0],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


class Weights(NamedTuple):
    """The arguments of a `PackedBlock`."""

    first: Tensor
    first_bias: Tensor | None
    activation: str
    second: Tensor | None
    second_bias: Tensor | None
    norm_eps: float | None
    patch: Patch
    after: NormAfter | None

    @classmethod
    def random(
        cls,
        patch: Patch,
        inputs: int,
        hidden: int,
        outputs: int = 0,
        activation: str = "none",
        norm: bool = False,
        after: bool = False,
    ) -> Weights:
        """Draw weights that keep the size of numbers; `outputs` 0 leaves out the second product."""
        first = torch.randn(hidden, inputs, *patch.kernel) / (inputs * patch.kernel[0] * patch.kernel[1]) ** 0.5
        second = (torch.randn(outputs, hidden) / hidden**0.5, torch.randn(outputs)) if outputs else (None, None)
        norm_after = NormAfter(1e-3, torch.randn(hidden), torch.randn(hidden)) if after else None
        return cls(first, torch.randn(hidden), activation, *second, 1e-4 if norm else None, patch, norm_after)

    def exact(self, x: Tensor) -> Tensor:
        """Compute the definition in float64."""
        values: list[Any] = [part.double() if isinstance(part, Tensor) else part for part in self]
        if self.after is not None:
            scale, shift = (None if part is None else part.double() for part in self.after[1:])
            values[-1] = NormAfter(self.after.eps, scale, shift)
        return ReferenceBlock(*values)(x.double())


def check(weights: Weights, x: Tensor, with_residual: bool = False) -> None:
    want, before = weights.exact(x), x.clone()
    residual = torch.randn(want.shape) if with_residual else None
    packed = PackedBlock(*weights)
    y = packed(x, residual)
    assert torch.equal(y, packed(x, residual))
    assert torch.equal(x, before)
    want = want if residual is None else want + residual.double()
    assert y.shape == want.shape
    # A norm of a few numbers that happen to be nearly equal enlarges rounding errors, such as those of the input.
    rounded = x.double() * (1 + 2**-22 * torch.randn(x.shape).sign())
    enlarged = (weights.exact(rounded) - weights.exact(x)).abs().max().item()
    assert (y.double() - want).abs().max().item() <= max(LIMIT * max(1.0, want.abs().max().item()), 4 * enlarged)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("patch", "inputs", "side", "norm", "after"),
    [
        (Patch((4, 4), (4, 4)), 3, 22, False, True),  # a stem; the last rows and columns belong to no patch
        (Patch((2, 2), (2, 2)), 24, 14, True, False),  # downsampling; 24 channels are no whole number of vectors
        (Patch((3, 3), (2, 2), (1, 1)), 3, 15, False, False),
        (Patch((3, 3), (2, 2), (1, 1)), 40, 11, False, True),
    ],
)
def test_layers_of_networks_on_every_instruction_set(
    isa: str, patch: Patch, inputs: int, side: int, norm: bool, after: bool, layout: str
) -> None:
    x = LAYOUTS[layout](torch.randn(2, inputs, side, side))
    for channels_out in (5, 40):
        check(Weights.random(patch, inputs, channels_out, activation="gelu", norm=norm, after=after), x)
    y = PackedBlock(*Weights.random(patch, inputs, 8))(x)
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride, padding = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), [draw(st.integers(0, taps)) for taps in kernel]
    sides = [draw(st.integers(max(1, taps - 2 * pad), 24)) for taps, pad in zip(kernel, padding)]
    inputs = draw(st.sampled_from([1, 2, 3, 5, 12, 15, 16, 17, 33, 70]))
    hidden, outputs = draw(st.sampled_from([2, 5, 16, 33, 130, 300])), draw(st.sampled_from([0, 0, 7, 40]))
    return {
        "patch": Patch(kernel, stride, tuple(padding)),
        "sizes": (inputs, hidden, outputs),
        "shape": (draw(st.integers(1, 3)), inputs, *sides),
        "layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "norm": inputs > 1 and draw(st.booleans()),
        "after": not outputs and draw(st.booleans()),
        "residual": draw(st.booleans()),
        "threads": draw(st.integers(1, 3)),
    }


def solve(problem: dict[str, Any]) -> None:
    x = LAYOUTS[problem["layout"]](torch.randn(problem["shape"]))
    options = (problem["activation"], problem["norm"], problem["after"])
    with thread_count(problem["threads"]):
        check(Weights.random(problem["patch"], *problem["sizes"], *options), x, problem["residual"])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_random_problems(problem: dict[str, Any]) -> None:
    solve(problem)


@pytest.mark.slow
def test_thousands_of_random_problems(isa: str) -> None:
    settings(max_examples=2000, deadline=None)(given(problems())(solve))()


def test_bits_do_not_depend_on_threads_or_neighbors(threads: Callable[[int], None]) -> None:
    weights = Weights.random(Patch((3, 3), (2, 2), (1, 1)), 40, 300, activation="gelu", after=True)
    packed, x = PackedBlock(*weights), torch.randn(3, 40, 13, 13)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(packed(x))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(packed(x[1:2]), results[0][1:2])


def test_a_nan_stays_in_the_patches_that_contain_it(isa: str) -> None:
    for inputs, norm in ((3, False), (20, True)):
        packed = PackedBlock(*Weights.random(Patch((3, 3), (2, 2), (1, 1)), inputs, 9, norm=norm))
        x = torch.randn(1, inputs, 9, 9)
        clean = packed(x)
        x[0, inputs - 1, 3, 4] = float("nan")
        y = packed(x)
        # Row 3 belongs to patches 1 and 2, column 4 to patch 2.
        assert y[:, :, 1:3, 2].isnan().all()
        y[:, :, 1:3, 2] = clean[:, :, 1:3, 2]
        assert torch.equal(y, clean)


def test_a_norm_after_a_product_over_pixels() -> None:
    first, after = torch.randn(300, 20), NormAfter(1e-5, torch.randn(300))
    for shape in ((2, 20, 5, 7), (1, 20, 30, 30), (9, 20)):
        x = torch.randn(shape)
        got = PackedBlock(first, activation="relu", after=after)(x)
        want = ReferenceBlock(first, None, "relu", None, None, None, after=after)(x)
        assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_is_refused() -> None:
    patch = Patch((2, 3), (2, 2))
    weight = torch.randn(6, 4, 2, 3)
    for wrong in (torch.randn(6, 4), torch.randn(6, 4, 3, 2), torch.randn(0, 4, 2, 3)):
        with pytest.raises(ArgumentError, match=r"first has the shape .* must be \(hidden, channels, 2, 3\)"):
            PackedBlock(wrong, patch=patch)
    for wrong_patch in (patch._replace(stride=(0, 1)), patch._replace(padding=(0, -1))):
        with pytest.raises(ArgumentError, match="strides must be at least 1"):
            PackedBlock(weight, patch=wrong_patch)
    with pytest.raises(ArgumentError, match="after is given with second"):
        PackedBlock(weight, second=torch.randn(3, 6), patch=patch, after=NormAfter(1e-6))
    with pytest.raises(ArgumentError, match=r"after\.eps is -1"):
        PackedBlock(weight, patch=patch, after=NormAfter(-1.0))
    with pytest.raises(ArgumentError, match=r"after\.scale has the shape \(4,\)"):
        PackedBlock(weight, patch=patch, after=NormAfter(1e-6, torch.randn(4)))
    packed = PackedBlock(weight, patch=patch)
    for x in (torch.randn(1, 5, 4, 4), torch.randn(8, 4), torch.randn(1, 4, 1, 4), torch.randn(1, 4, 4, 2)):
        with pytest.raises(ArgumentError, match=r"needs \(N, 4, height, width\) of at least 2 rows and 3 columns"):
            packed(x)
    with pytest.raises(ArgumentError, match=r"but the result has \(1, 6, 2, 1\)"):
        packed(torch.randn(1, 4, 4, 4), torch.randn(1, 6, 4, 4))
    assert packed(torch.randn(0, 4, 4, 4)).shape == (0, 6, 2, 1)


def test_what_the_c_interface_refuses() -> None:
    calls, packed = library.load().calls, library.Address()
    matrix = torch.randn(4, 2, 3, 3)

    def pack(geometry: tuple[int, ...], **others: Any) -> int:
        weights = library.PointwiseWeights(inputs=2, hidden=4, activation=library.RELU, first=matrix.data_ptr())
        weights.patch = library.PatchGeometry(*geometry)
        for name, value in others.items():
            setattr(weights, name, value)
        return int(calls.wk_pointwise_pack(ctypes.byref(weights), ctypes.byref(packed)))

    for geometry in [(3, 0, 1, 1, 0, 0), (-3, 3, 1, 1, 0, 0), (3, 3, 0, 1, 0, 0), (3, 3, 1, 1, -1, 0), (3, 3, 1, 1, 0, -1)]:
        assert pack(geometry) == library.BAD_ARGUMENT
    assert pack((3, 3, 2, 2, 1, 1), normalize_after=1, after_eps=-1.0) == library.BAD_ARGUMENT
    assert pack((3, 3, 2, 2, 1, 1)) == library.OK
    x, y = torch.randn(1, 2, 5, 5), torch.empty(1, 4, 3, 3)
    tensors = [library.Tensor(t.data_ptr(), *t.stride()) for t in (x, y)]
    for sides in ((0, 5), (5, 0)):
        call = library.PointwiseCall(1, 1, 3, 3, tensors[0], library.Tensor(), tensors[1], *sides)
        assert calls.wk_pointwise_run(packed, ctypes.byref(call)) == library.BAD_ARGUMENT
    calls.wk_pointwise_free(packed)
