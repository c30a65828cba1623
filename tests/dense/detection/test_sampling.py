"""Random choice of candidates."""

from __future__ import annotations

import pytest
import torch

from widekernel.dense.detection.sampling import SampleOptions, permutation, sample
from widekernel.errors import ArgumentError


def draw(positives: int, count: int, options: SampleOptions, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    positive = torch.arange(count) < positives
    return sample(positive, ~positive, permutation(seed, "test", count), options)


@pytest.mark.parametrize(
    ("positives", "count", "wanted"),
    [(50, 100, (10, 30)), (4, 100, (4, 36)), (0, 100, (0, 40)), (90, 100, (10, 10)), (3, 5, (3, 2))],
)
def test_numbers(positives: int, count: int, wanted: tuple[int, int]) -> None:
    chosen = draw(positives, count, SampleOptions(40, 0.25))
    assert (chosen.positive.sum().item(), chosen.negative.sum().item()) == wanted
    assert not chosen.positive[positives:].any()
    assert not chosen.negative[:positives].any()


def test_no_candidates() -> None:
    assert draw(0, 0, SampleOptions(40, 0.25)).positive.shape == (0,)


def test_the_seed_alone_decides() -> None:
    options = SampleOptions(40, 0.25)
    first = draw(500, 1000, options)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = draw(500, 1000, options), draw(500, 1000, options, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.positive, other.positive)
    assert not torch.equal(first.negative, other.negative)


def test_purposes_are_unrelated() -> None:
    assert permutation(3, "anchors", 50).sort().values.tolist() == list(range(50))
    assert not torch.equal(permutation(3, "anchors", 50), permutation(3, "proposals", 50))


def test_every_candidate_is_chosen_equally_often() -> None:
    options, times = SampleOptions(10, 0.5), torch.zeros(20)
    for seed in range(400):
        chosen = draw(10, 20, options, seed)
        times += chosen.positive.float() + chosen.negative.float()
    assert (times - 200).abs().max() < 50  # five standard deviations


@pytest.mark.parametrize("wrong", [(0, 0.5), (10, -0.1), (10, 1.1)])
def test_options_are_checked(wrong: tuple) -> None:
    with pytest.raises(ArgumentError, match="at least one candidate and a share between 0 and 1"):
        SampleOptions(*wrong)
