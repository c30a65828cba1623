"""Packed choices, bit-exact weights, and PyTorch's own converters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from tests.sparsity.semi_structured.cases import DTYPES, as_bits
from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.encoding import decode, encode, pack_choices, unpack_choices
from widekernel.sparsity.semi_structured.masks import check_semi_structured, magnitude_choices, mask_to_choices

SIZES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int8}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_three_choices_per_byte(choices: list[int]) -> None:
    tensor = torch.tensor(choices, dtype=torch.uint8)
    packed = pack_choices(tensor)
    assert packed.numel() == -(-len(choices) // 3) and packed.dtype == torch.uint8
    assert torch.equal(unpack_choices(packed, len(choices)), tensor)


def test_packing_is_base_six_first_choice_lowest() -> None:
    assert pack_choices(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).tolist() == [1 + 2 * 6 + 3 * 36, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8])
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    """These include all NaNs (even signaling ones), infinities, denormals and negative zeros."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty((), dtype=dtype).element_size()]
    limits = torch.iinfo(size)
    bits = torch.randint(limits.min, limits.max, (64, 32, 2), dtype=size)
    if dtype == torch.float32:
        bits[0, :, 0] = 0x7F800001 + torch.arange(32)  # signaling NaNs
        bits[1, :, 0] = -0x80000000  # -0
    values = bits.view(dtype).reshape(-1, 2)
    choices = torch.randint(0, 6, (values.shape[0],), dtype=torch.uint8)
    dense = decode(values, pack_choices(choices), (64, 64 * 2))
    again, packed = encode(dense, choices)
    assert torch.equal(as_bits(again), as_bits(values))
    assert torch.equal(unpack_choices(packed, choices.numel()), choices)


def test_encoded_sizes() -> None:
    weight = torch.randn(768, 768)
    weight *= ss.magnitude_mask(weight)
    values, packed = encode(weight, mask_to_choices(weight))
    assert values.numel() * 2 == weight.numel()
    assert packed.numel() * 8 / weight.numel() == pytest.approx(2 / 3, rel=1e-3), "bits a weight"


def test_weights_outside_the_choices_must_be_zero() -> None:
    weight = torch.randn(4, 8)
    with pytest.raises(ArgumentError, match="16 weights that the choices do not keep are not zero"):
        encode(weight, magnitude_choices(weight))


def test_negative_zeros_that_are_not_kept() -> None:
    weight = torch.tensor([[-0.0, -0.0, 1.0, -0.0]])
    choices = torch.tensor([0], dtype=torch.uint8)  # keeps the last two
    decoded = decode(*encode(weight, choices), (1, 4))
    assert torch.signbit(decoded).tolist() == [[False, False, False, True]]


def test_errors() -> None:
    with pytest.raises(ArgumentError, match=r"uint8 in 0\.\.5"):
        pack_choices(torch.tensor([6], dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="4 choices take 2 bytes"):
        unpack_choices(torch.zeros(1, dtype=torch.uint8), 4)
    with pytest.raises(CheckpointError, match="hold the byte 216, above 215: they are damaged"):
        unpack_choices(torch.tensor([216], dtype=torch.uint8), 3)
    with pytest.raises(CheckpointError, match=r"has \(16, 2\)"):
        decode(torch.zeros(15, 2), torch.zeros(6, dtype=torch.uint8), (8, 8))


@pytest.mark.parametrize("dtype", SIZES)
def test_torch_converters_round_trip(dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 128) * 20).to(dtype)
    weight = torch.where(ss.magnitude_mask(weight), weight, torch.zeros((), dtype=dtype))
    weight[0], weight[1, 4:] = 0, 0  # groups without and with one non-zero
    if dtype.is_floating_point:
        weight[3, weight[3] != 0] = -torch.inf
    check_semi_structured(weight)
    values, meta = sparse_semi_structured_from_dense_cutlass(weight)
    again = sparse_semi_structured_to_dense_cutlass(values, meta)
    assert torch.equal(as_bits(again), as_bits(weight))
    decoded = decode(*encode(weight, mask_to_choices(weight)), weight.shape)
    assert torch.equal(as_bits(decoded), as_bits(weight))


def test_torch_converter_changes_the_bits_of_some_nans() -> None:
    """On a CPU, PyTorch 2.15 changes the bits of bfloat16 NaNs; ours keeps them."""
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[2, ::2] = torch.nan
    again = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert torch.equal(again.isnan(), weight.isnan())
    decoded = decode(*encode(weight, mask_to_choices(weight)), weight.shape)
    assert torch.equal(as_bits(decoded), as_bits(weight))


def test_torch_converter_loses_weights_that_validation_finds() -> None:
    """The converter silently keeps two of three, which is why every exporter validates first."""
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[5, :3] = 1
    again = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert int((again != 0).sum()) == 2
    with pytest.raises(ArgumentError, match="1 of 512 groups"):
        ss.validate(weight)


def test_all_types_are_covered() -> None:
    assert {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8} == set(DTYPES)
