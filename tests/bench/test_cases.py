"""Cases: the work that is counted for each, the named sets, and parsing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from widekernel.bench import Case, choose, parse_case
from widekernel.bench.cases import LARGEST_TENSOR, MOST_MACS, inside
from widekernel.errors import ArgumentError


@pytest.mark.parametrize(
    ("height", "width", "kernel"), [(7, 9, (3, 3)), (5, 6, (13, 1)), (8, 8, (5, 15)), (1, 1, (1, 7)), (7, 5, (4, 8))]
)
def test_macs_count_taps_on_pixels(height: int, width: int, kernel: tuple[int, int]) -> None:
    """The taps that lie on pixels are counted by a convolution of ones with ones."""
    padding = kernel[0] // 2, kernel[1] // 2
    ones = F.conv2d(torch.ones(1, 1, height, width), torch.ones(1, 1, *kernel), padding=padding)
    counted = ones[..., :height, :width].sum().item()
    case = Case("some", 3, 2, height, width, kernel)
    assert case.macs == 6 * counted
    assert inside(height, kernel[0]) * inside(width, kernel[1]) == counted
    padding = 2 * padding[0], 2 * padding[1]
    pixels, taps = torch.ones(1, 1, height, width), torch.ones(1, 1, *kernel)
    counted = F.conv2d(pixels, taps, padding=padding, dilation=2)[..., :height, :width].sum().item()
    assert Case("some", 3, 2, height, width, kernel, 2).macs == 6 * counted


def test_bytes_moved_are_two_images_and_a_kernel() -> None:
    case = Case("some", 2, 3, 4, 5, (3, 1))
    assert case.tensor_bytes == 480 and case.bytes_moved == 960 + 36
    assert case.intensity == 2 * case.macs / 996


def test_targets_are_the_layers_of_the_networks() -> None:
    cases, left_out = choose(["targets"])
    assert len(cases) == 16 and not left_out
    shapes = {case.name: (case.shape, case.kernel) for case in cases}
    assert shapes["replknet-1"] == ((8, 128, 56, 56), (31, 31))
    assert shapes["slak-1"] == ((8, 124, 56, 56), (51, 5)) and shapes["slak-1-wide"] == ((8, 124, 56, 56), (5, 51))
    assert shapes["detection"] == ((1, 128, 200, 320), (31, 31))


def test_names_patterns_and_batches_are_chosen() -> None:
    cases, _ = choose(["slak-*", "slak-1", "detection"], batch=2)
    assert [case.name for case in cases] == ["slak-1", "slak-1-wide", "slak-2", "slak-3-wide", "slak-4", "detection"]
    assert [case.batch for case in cases] == [2, 2, 2, 2, 2, 1]


def test_sweep_lists_what_it_leaves_out() -> None:
    cases, left_out = choose(["sweep"])
    assert {case.batch for case in cases} == {1, 8, 32}
    assert {31, 61} <= {case.kernel[0] for case in cases if case.kernel[0] == case.kernel[1]}
    assert {(51, 5), (5, 51)} <= {case.kernel for case in cases}
    assert all(case.tensor_bytes <= LARGEST_TENSOR and case.macs <= MOST_MACS for case in cases)
    assert len(left_out) == 3 and len(cases) + sum(int(line.split()[0]) for line in left_out) == 3 * 6 * 6 * (9 + 10)
    assert {case.batch for case in choose(["sweep"], batch=4)[0]} == {4}


def test_dilated_branches_of_a_network() -> None:
    cases, _ = choose(["dilated"])
    assert len(cases) == 4 * 6
    (case,) = choose(["unireplknet-2-7x7d2"])[0]
    assert (case.shape, case.kernel, case.dilation) == ((8, 160, 28, 28), (7, 7), 2)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"unknown case 'replknt-1'.* Did you mean 'replknet-1'\?.*targets"):
        choose(["replknt-1"])


def test_a_case_is_parsed() -> None:
    assert parse_case("1,2,30,40", "51x5") == Case("given", 1, 2, 30, 40, (51, 5))
    dilated = parse_case("1,2,30,40", "7x5d3")
    assert dilated == Case("given", 1, 2, 30, 40, (7, 5), 3)
    assert str(dilated) == "1x2x30x40 7x5d3"


@pytest.mark.parametrize(
    ("shape", "kernel", "message"),
    [
        ("1,2,3", "3x3", "shape is '1,2,3', but must be four numbers"),
        ("1,2,3,x", "3x3", "but must be four numbers"),
        ("1,2,3,4", "3", "kernel is '3', but must be two numbers"),
        ("1,2,3,4", "3x3dx", "kernel is '3x3dx', but must be two numbers .* a dilation as in 7x7d2"),
        ("1,2,3,4", "3x3d0", "the dilation of given is 0: .* positive whole number"),
        ("1,2,3,4", "3x4", "kernel is '3x4', but both sizes must be positive odd"),
        ("1,0,3,4", "3x3", "must be positive"),
    ],
)
def test_malformed_cases_are_refused(shape: str, kernel: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_case(shape, kernel)
