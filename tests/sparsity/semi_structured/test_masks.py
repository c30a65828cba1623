"""Groupings, choices and masks, over weights of every shape and type."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

from tests.sparsity.semi_structured.cases import FLOATS, Case, as_bits, weights
from widekernel.errors import ArgumentError, ShapeError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.encoding import decode, encode, unpack_choices
from widekernel.sparsity.semi_structured.grouping import group_count, group_view, ungroup, valid_slots
from widekernel.sparsity.semi_structured.learned import kept_share
from widekernel.sparsity.semi_structured.masks import (
    check_semi_structured,
    choices_to_mask,
    magnitude_choices,
    mask_to_choices,
)
from widekernel.sparsity.semi_structured.patterns import PATTERNS

MANY = 10_000


def check_grouping(case: Case) -> None:
    weight, axis, groups = case
    values, valid = group_view(weight, axis, groups)
    assert values.shape == valid.shape == (group_count(weight.shape, axis, groups), 4)
    assert int(valid.sum()) == weight.numel() and not values[~valid].any()
    assert torch.equal(as_bits(ungroup(values, weight.shape, axis, groups)), as_bits(weight))
    assert torch.equal(valid, valid_slots(weight.shape, axis, groups))


def check_masks(case: Case) -> None:
    weight, axis, groups = case
    choices = magnitude_choices(weight, axis, groups)
    mask = choices_to_mask(choices, weight.shape, axis, groups)
    assert choices.dtype == torch.uint8 and int(choices.max()) < 6 and mask.shape == weight.shape
    kept, valid = group_view(mask, axis, groups)
    # As many real weights are kept as a group of four allows: padding adds no non-zeros and takes no place.
    assert torch.equal(kept.sum(1), valid.sum(1).clamp(max=2))
    magnitudes, _ = group_view(weight.double().abs(), axis, groups)
    assert torch.equal((magnitudes * kept).sum(1), magnitudes.topk(2, 1).values.sum(1))
    assert torch.equal(choices_to_mask(mask_to_choices(mask, axis, groups), weight.shape, axis, groups), mask)
    check_semi_structured(weight * mask, axis, groups)
    assert torch.equal(choices, magnitude_choices(weight.clone(), axis, groups))


def check_storage(case: Case) -> None:
    weight, axis, groups = case
    choices = magnitude_choices(weight, axis, groups)
    mask = choices_to_mask(choices, weight.shape, axis, groups)
    sparse = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
    values, packed = encode(sparse, choices, axis, groups)
    assert values.shape == (choices.numel(), 2) and packed.numel() == -(-choices.numel() // 3)
    assert torch.equal(as_bits(decode(values, packed, weight.shape, axis, groups)), as_bits(sparse))
    assert torch.equal(unpack_choices(packed, choices.numel()), choices)


CHECKS = [check_grouping, check_masks, check_storage]


@pytest.mark.parametrize("check", CHECKS)
def test_properties(check: object) -> None:
    settings(max_examples=100, deadline=None)(given(weights())(lambda case: check(case)))()  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_properties_over_many_cases(check: object) -> None:
    settings(max_examples=MANY, deadline=None)(given(weights())(lambda case: check(case)))()  # type: ignore[operator]


def test_patterns_are_in_lexicographic_order() -> None:
    assert ["".join(map(str, row)) for row in PATTERNS] == ["0011", "0101", "0110", "1001", "1010", "1100"]


def test_groups_run_along_input_channels_within_one_tap() -> None:
    """Group (o, i, j, c // 4) of a convolution: four channels of one tap, channels fastest as in channels-last storage."""
    weight = torch.arange(2 * 8 * 3 * 2).reshape(2, 8, 3, 2).float()
    values, _ = group_view(weight)
    for index, (o, i, j, c) in enumerate(itertools.product(range(2), range(3), range(2), range(0, 8, 4))):
        assert torch.equal(values[index], weight[o, c : c + 4, i, j])
    flat = weight.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten()
    assert torch.equal(values.flatten(), flat)


def test_convolution_is_a_product_with_the_grouped_matrix() -> None:
    weight, x = torch.randn(8, 12, 3, 3), torch.randn(2, 12, 6, 6)
    weight *= ss.magnitude_mask(weight)
    matrix = group_view(weight)[0].reshape(8, -1)
    patches = F.unfold(x, 3, padding=1).reshape(2, 12, 9, 36).transpose(1, 2).reshape(2, -1, 36)
    torch.testing.assert_close((matrix @ patches).reshape(2, 8, 6, 6), F.conv2d(x, weight, padding=1), atol=3e-5, rtol=0)


def test_paper_groups_straddle_taps_and_rows() -> None:
    weight = torch.arange(2.0 * 3 * 2).reshape(2, 3, 2, 1)
    assert torch.equal(group_view(weight, "im2col")[0], torch.arange(12.0).reshape(3, 4))
    weight = torch.arange(27.0 * 8).reshape(8, 3, 3, 3)
    assert group_view(weight, "im2col")[0][6].tolist() == [24, 25, 26, 27], "elements of two rows"


@pytest.mark.parametrize(("values", "kept"), [([1, 1, 1, 1], 0), ([2, 1, 1, 1], 3), ([1, 1, 0, 0], 5), ([0, 0, 0, 0], 0)])
def test_of_equal_weights_the_later_is_kept(values: list[float], kept: int) -> None:
    for sign in (1, -1):
        assert magnitude_choices(torch.tensor([values]).float() * sign).tolist() == [kept]


def test_pattern_sums_that_rounding_makes_equal() -> None:
    """The sums of all patterns with the first weight are equal in float32, but the two largest are kept."""
    assert ss.magnitude_mask(torch.tensor([[1e8, 1.0, 3.0, 2.0]])).tolist() == [[True, False, True, False]]


def test_extreme_values() -> None:
    assert ss.magnitude_mask(torch.tensor([[-128, 127, 1, 2]], dtype=torch.int8)).tolist() == [[True, True, False, False]]
    assert ss.magnitude_mask(torch.tensor([[1.0, torch.nan, 9.0, -torch.inf]])).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6])
def test_padding_takes_no_place_of_a_weight(channels: int) -> None:
    """This is so even if the real weights are zero, like padding."""
    mask = ss.magnitude_mask(torch.zeros(3, channels, 2, 2))
    rest = channels % 4
    expected = channels // 4 * 2 + min(rest, 2)
    assert torch.equal(mask.sum(1), torch.full((3, 2, 2), expected))


def test_both_remaining_channels_of_six_are_kept() -> None:
    mask = ss.magnitude_mask(torch.randn(5, 6))
    assert mask[:, 4:].all() and torch.equal(mask[:, :4].sum(1), torch.full((5,), 2))


def test_gaussian_share() -> None:
    weight = torch.randn(256, 256)
    assert kept_share(weight, magnitude_choices(weight), "channels") == pytest.approx(0.743, abs=0.004)
    assert kept_share(torch.zeros(4, 4), torch.zeros(4, dtype=torch.uint8), "channels") == 1.0


def test_a_weight_that_is_not_semi_structured_is_located() -> None:
    weight = torch.zeros(8, 8, 3, 3)
    weight[2, 4:7, 1, 2] = 1
    weight[5, :4, 0, 0] = torch.nan
    with pytest.raises(
        ArgumentError,
        match=r"a\.b is not 2:4 .* 2 of 144 groups .* \(output 2, tap \(1, 2\), input channels 4\.\.7\) with 3",
    ):
        check_semi_structured(weight, name="a.b")
    with pytest.raises(ArgumentError, match=r"elements 4\.\.7 of the matrix of convolution group 1"):
        check_semi_structured(torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]), "im2col", 2)
    with pytest.raises(ArgumentError, match=r"output 1, input channel 0, taps 0\.\.3"):
        check_semi_structured(
            torch.tensor([0.0, 1, 1, 1]).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1) * torch.tensor([0, 1]).view(2, 1, 1, 1),
            "taps",
        )


def test_unstructured_sparsity_is_not_enough() -> None:
    """Half of the weights are zero here, but not two of every four."""
    weight = torch.randn(64, 64)
    weight[weight.abs() < weight.abs().median()] = 0
    with pytest.raises(ArgumentError, match="more than two non-zeros"):
        ss.validate(weight)
    with pytest.raises(ArgumentError, match="the mask is not 2:4"):
        mask_to_choices(weight)


def test_errors() -> None:
    weight = torch.randn(8, 8)
    with pytest.raises(ArgumentError, match=r"axis 'chanels' is unknown.*Did you mean 'channels'\?"):
        ss.magnitude_mask(weight, "chanels")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"shape \(2, 3, 4\) has no groups of four"):
        ss.magnitude_mask(torch.randn(2, 3, 4))
    with pytest.raises(ShapeError, match="and not empty"):
        ss.magnitude_mask(torch.randn(0, 4))
    with pytest.raises(ShapeError, match="has no taps: use axis='channels'"):
        ss.magnitude_mask(weight, "taps")
    with pytest.raises(ArgumentError, match="groups=3 must divide the 8 outputs"):
        group_view(weight, "im2col", 3)
    with pytest.raises(ArgumentError, match="has 16 groups along axis='channels'; give one uint8 for each"):
        choices_to_mask(torch.zeros(15, dtype=torch.uint8), (8, 8))
    with pytest.raises(ArgumentError, match="hold the value 6: patterns are numbered"):
        choices_to_mask(torch.full((16,), 6, dtype=torch.uint8), (8, 8))
    with pytest.raises(ShapeError, match="give what group_view returned for it"):
        ungroup(torch.zeros(3, 4), (8, 8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_masks_do_not_depend_on_the_type(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 32).to(torch.bfloat16)
    assert torch.equal(magnitude_choices(weight), magnitude_choices(weight.to(dtype)))


def test_parameters_can_be_given() -> None:
    layer = nn.Conv2d(16, 8, 3)
    assert not ss.magnitude_mask(layer.weight).requires_grad
