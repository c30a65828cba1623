"""Errors that the kernels, or the choice among them, once had."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops.gpu.helpers import DEVICE, assert_exact
from widekernel.ops import reference
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.gpu.candidates import candidates
from widekernel.ops.gpu.kernel_configs import Chip, DirectNhwc, DirectNhwcGrad, Flat, FlatGrad, KernelConfig, ToeplitzGrad
from widekernel.ops.gpu.launch import PreparedWeightGrad
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM, DEPTHWISE_SUM_OF_BRANCHES, Problem

TRITON = TritonBackend()

# Enough processors for sums over images to be split among several programs.
WIDE = Chip((9, 0), 16, 227 * 1024)
SMALL_SHARED = Chip((8, 6), 84, 99 * 1024)


def check_grad(x: Tensor, grad: Tensor, config: KernelConfig, size: tuple[int, int] = (3, 3)) -> None:
    of = size, (size[0] // 2, size[1] // 2)
    prepared = PreparedWeightGrad(Problem.of_weight_grad(x, *of), config, WIDE)
    want = reference.depthwise_weight_grad(x.double(), grad.double(), *of)
    assert_exact(prepared(x, grad, *of), want)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "config",
    [
        FlatGrad(4, 2, pixels=32, images=16),
        ToeplitzGrad(4, 3, 4, 16, 16, 16),
        pytest.param(DirectNhwcGrad(4, 1, columns=4, channels=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_image_is_counted_twice_where_programs_share_the_sum(config: KernelConfig) -> None:
    layout = torch.channels_last if isinstance(config, DirectNhwcGrad) else torch.contiguous_format
    x, grad = (torch.randn(42, 4, 7, 3).to(DEVICE).contiguous(memory_format=layout) for _ in range(2))
    check_grad(x, grad, config)


@pytest.mark.interpreted
def test_pairs_of_one_product_may_span_several_images() -> None:
    x, grad = (torch.randn(12, 1, 20, 3).to(DEVICE) for _ in range(2))
    check_grad(x, grad, ToeplitzGrad(4, 3, kernel_rows=1, inputs=16, outputs=16, depth=32), (13, 3))


def test_planes_with_more_pixels_than_32_bits_can_index() -> None:
    problem = Problem(DEPTHWISE_SUM, "cuda", torch.bfloat16, (1, 1, 2**16, 2**15), ((31, 31),), ((15, 15),))
    assert not TRITON.can_run(problem)
    assert "it computes images of at most 1073741824 pixels" in TRITON.reasons_against(problem)


@pytest.mark.interpreted
def test_weight_gradient_of_images_that_are_far_apart() -> None:
    """The distance exceeds 32 bits; memory that is never touched costs nothing."""
    far = 2**31
    x = torch.empty(far + 16, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 4, 4), (far, 16, 4, 1))
    x.copy_(torch.randn(2, 1, 4, 4))
    check_grad(x, torch.randn(2, 1, 4, 4).to(x), ToeplitzGrad(4, 3, kernel_rows=2, inputs=16, outputs=16, depth=32))


@pytest.mark.parametrize("op", [DEPTHWISE_SUM, DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES])
def test_float32_matrices_that_do_not_fit_are_no_candidates(op: str) -> None:
    """Compiled for sm_86, the smallest of these with 128 pixels needs 136 KiB of the 99 that there are."""
    kernels, anchors = ((13, 13), (5, 5)), ((6, 6), (2, 2))
    problem = Problem(op, "cuda", torch.float32, (64, 256, 10, 10), kernels, anchors)
    assert not [config for config in candidates(problem, SMALL_SHARED) if isinstance(config, Flat)]
    short = replace(problem, dtype=torch.bfloat16)
    assert [config for config in candidates(short, SMALL_SHARED) if isinstance(config, Flat)]


def test_programs_of_many_taps_have_few_rows() -> None:
    """With 8 rows these take minutes to compile."""
    kernels = ((9, 9), (9, 9), (3, 3))
    problem = Problem(DEPTHWISE_SUM, "cuda", torch.float32, (64, 96, 56, 56), kernels, ((4, 4), (4, 4), (1, 1)), True)
    found = [config for config in candidates(problem, WIDE) if isinstance(config, DirectNhwc)]
    assert max(config.rows for config in found) == 2
    single = replace(problem, kernels=((7, 7),), anchors=((3, 3),))
    assert max(config.rows for config in candidates(single, WIDE) if isinstance(config, DirectNhwc)) == 8


def test_a_configuration_that_does_not_fit_gives_way_to_the_next() -> None:
    from widekernel.ops.gpu.kernels.errors import OutOfResources
    from widekernel.ops.gpu.launch import FirstThatFits

    tried = []

    def with_config(config: KernelConfig):  # type: ignore[no-untyped-def]
        def run(number: int) -> str:
            tried.append(config)
            if isinstance(config, Flat):
                raise OutOfResources(300_000, 232_448, "shared memory")
            return f"{config.method} {number}"

        return run

    fits = FirstThatFits(with_config, [Flat(4, 1, 64, 16), Flat(8, 1, 64, 16), ToeplitzGrad(4, 3, 1, 16, 16, 16)])
    with pytest.warns(RuntimeWarning, match="does not fit on this GPU"):
        assert fits(7) == "toeplitz weight gradient 7"
    assert fits(8) == "toeplitz weight gradient 8" and len(tried) == 4
    with pytest.raises(OutOfResources):
        FirstThatFits(with_config, [Flat(4, 1, 64, 16)])(1)


@pytest.mark.interpreted
def test_pairs_that_continue_in_several_images() -> None:
    """Blocks of kernel rows meet 5 to 9 output rows here, so that 16 pairs may pass the ends of three images."""
    x, grad = (torch.randn(6, 2, 9, 6).to(DEVICE) for _ in range(2))
    problem = Problem.of_weight_grad(x, (9, 3), (4, 1))
    got = PreparedWeightGrad(problem, ToeplitzGrad(4, 3, kernel_rows=2, inputs=16, outputs=16, depth=16), WIDE)(
        x, grad, (9, 3), (4, 1)
    )
    assert_exact(got, reference.depthwise_weight_grad(x.double(), grad.double(), (9, 3), (4, 1)))
