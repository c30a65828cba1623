"""Training batches of one group each, such as landscape or portrait images."""

from __future__ import annotations

import pytest
import torch

from widekernel.data import BatchPlan
from widekernel.data.samples import EpochBatches


def order_of(batches: EpochBatches, epoch: int = 0, first: int = 0) -> list[list[int]]:
    batches.epoch, batches.first = epoch, first
    return [[key[1] for key in batch] for batch in batches]


@pytest.mark.parametrize(("sizes", "batch_size"), [((50, 27), 4), ((3, 3), 4), ((64, 0), 8), ((30, 30, 30), 7), ((2, 1), 4)])
def test_batches_are_of_one_group(sizes: tuple[int, ...], batch_size: int) -> None:
    groups = torch.cat([torch.full((size,), group) for group, size in enumerate(sizes)])
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
    batches = EpochBatches(len(groups), BatchPlan(batch_size), seed=3, groups=groups)
    found = order_of(batches)
    assert len(found) == len(groups) // batch_size and all(len(batch) == batch_size for batch in found)
    items = [item for batch in found for item in batch]
    assert len(set(items)) == len(items)
    mixed = [batch for batch in found if len(groups[batch].unique()) > 1]
    assert len(mixed) < len([size for size in sizes if size])
    assert sum(len(groups[batch].unique()) == 1 for batch in found) >= sum(size // batch_size for size in sizes)


def test_the_order_depends_on_seed_and_epoch() -> None:
    groups = torch.arange(60) % 3 // 2
    batches = EpochBatches(60, BatchPlan(4), seed=3, groups=groups)
    first = order_of(batches)
    assert first == order_of(EpochBatches(60, BatchPlan(4), seed=3, groups=groups))
    assert first != order_of(batches, epoch=1) and first != order_of(EpochBatches(60, BatchPlan(4), seed=4, groups=groups))
    assert order_of(batches, first=5) == first[5:], "resuming yields the rest"
    landscape = [int(groups[batch[0]]) for batch in first]
    assert landscape != sorted(landscape), "batches of the groups are shuffled"


def test_the_division_does_not_change_the_order() -> None:
    groups = torch.arange(60) % 2
    whole = order_of(EpochBatches(60, BatchPlan(8), seed=0, groups=groups))
    parts = [order_of(EpochBatches(60, BatchPlan(8, 2, 2), seed=0, rank=rank, groups=groups)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert batch == [item for part in parts for micro in part[2 * step : 2 * step + 2] for item in micro]


def test_one_group_has_the_batches_of_none() -> None:
    same = torch.zeros(20, dtype=torch.int64)
    plain = order_of(EpochBatches(20, BatchPlan(5), seed=0))
    grouped = order_of(EpochBatches(20, BatchPlan(5), seed=0, groups=same))
    assert sorted(map(sorted, plain)) == sorted(map(sorted, grouped))
