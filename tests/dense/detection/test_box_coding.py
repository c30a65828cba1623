"""Deltas and distances."""

from __future__ import annotations

import pytest
import torch

from widekernel.dense.detection.box_coding import LARGEST_RATIO, clip_boxes, decode_deltas, decode_distances, encode_deltas


def boxes(count: int) -> torch.Tensor:
    corners = torch.rand(count, 2) * 100
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * 50], dim=1)


@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_decoding_inverts_encoding(stds: tuple) -> None:
    references, wanted = boxes(50), boxes(50)
    deltas = encode_deltas(references, wanted, stds)
    torch.testing.assert_close(decode_deltas(references, deltas, stds), wanted, rtol=1e-4, atol=1e-3)


def test_several_boxes_for_a_reference() -> None:
    references, deltas = boxes(7), torch.randn(7, 12)
    whole = decode_deltas(references, deltas)
    for number in range(3):
        part = slice(4 * number, 4 * number + 4)
        assert torch.equal(whole[:, part], decode_deltas(references, deltas[:, part]))
    assert decode_deltas(references[:0], deltas[:0]).shape == (0, 12)


def test_sides_change_by_a_limited_factor() -> None:
    references = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    decoded = decode_deltas(references, torch.tensor([[0.0, 0.0, 100.0, -100.0]]))
    width, height = (decoded[0, 2:] - decoded[0, :2]).tolist()
    assert width == pytest.approx(10 * LARGEST_RATIO, rel=1e-5)
    assert height == pytest.approx(10 / LARGEST_RATIO, rel=1e-4)


def test_clipping_to_an_area() -> None:
    clipped = clip_boxes(torch.tensor([[-5.0, -5.0, 50.0, 50.0], [30.0, 30.0, 40.0, 40.0]]), (20, 25))
    assert clipped.tolist() == [[0.0, 0.0, 25.0, 20.0], [25.0, 20.0, 25.0, 20.0]]


def test_distances_lie_around_the_point() -> None:
    decoded = decode_distances(torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert decoded.tolist() == [[9.0, 18.0, 13.0, 24.0]]
    assert decode_distances(torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (22, 12)).tolist() == [
        [9.0, 18.0, 12.0, 22.0]
    ]
