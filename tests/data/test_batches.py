"""Division of global batches, batches of any content, and mixing that does not depend on the division."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import Mixup
from torch.utils.data._utils.pin_memory import pin_memory

from widekernel.data import Batch, BatchPlan, EvaluationLoader, EvaluationSamples, GroupMixup, LoaderOptions, Shard
from widekernel.data.batches import Unreadable
from widekernel.data.mixing import GROUP
from widekernel.errors import ArgumentError, ConfigError


@pytest.mark.parametrize(
    ("arguments", "per_process", "per_pass", "accumulate", "text"),
    [
        ((4096, 256, 8), 512, 256, 2, "batch of 4096 images = 8 processes × 2 forward passes × 256"),
        ((4096, None, 8), 512, 512, 1, "batch of 4096 images = 8 processes × 512"),
        ((60, 20), 60, 20, 3, "batch of 60 images = 3 forward passes × 20"),
        ((60,), 60, 60, 1, "batch of 60 images"),
        ((1,), 1, 1, 1, "batch of 1 image"),
    ],
)
def test_divisions(arguments, per_process, per_pass, accumulate, text) -> None:
    plan = BatchPlan(*arguments)
    assert (plan.per_process, plan.per_pass, plan.accumulate, plan.describe()) == (per_process, per_pass, accumulate, text)
    firsts = [plan.first(rank, number) for rank in range(plan.world_size) for number in range(accumulate)]
    assert firsts == list(range(0, plan.batch_size, per_pass))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"^loop\.batch_size is 0, but must be a whole number, at least 1\.$"),
        ((8, 0), r"^loop\.micro_batch is 0, but must be a whole number, at least 1\.$"),
        ((100, None, 8), r"^loop\.batch_size is 100, which 8 processes cannot .* Set loop\.batch_size to 96 or 104\.$"),
        ((3, None, 8), r"^loop\.batch_size is 3, .* Set loop\.batch_size to 8\.$"),
        (
            (60, 25),
            r"^loop\.micro_batch is 25, .* the 60 images of .*_batch to 20 or 30, or loop\.batch_size to 50 or 75\.$",
        ),
        (
            (120, 25, 2),
            r"the 60 images per process of .*_batch to 20 or 30, or loop\.batch_size to 100 or 150\.$",
        ),
        ((8, 100), r"Set loop\.micro_batch to 8, or loop\.batch_size to 100\.$"),
    ],
)
def test_divisions_that_leave_a_remainder(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchPlan(*arguments)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 8))
def test_the_sizes_that_an_error_names_work(batch_size, micro_batch, world_size) -> None:
    try:
        BatchPlan(batch_size, micro_batch, world_size)
    except ConfigError as error:
        fix = str(error).partition("Set ")[2].rstrip(".")
        assert fix
        for part in fix.split(", or "):
            key, _, sizes = part.removeprefix("loop.").partition(" to ")
            for size in sizes.split(" or "):
                if key == "micro_batch":
                    BatchPlan(batch_size, int(size), world_size)
                else:  # a batch that the processes can share may still need another micro-batch
                    BatchPlan(int(size), micro_batch if "micro_batch is" in str(error) else None, world_size)


class Boxes(NamedTuple):
    corners: torch.Tensor
    kinds: list[torch.Tensor]


def test_batches_of_any_content_move_to_a_device() -> None:
    image = torch.rand(2, 3, 4, 4)
    content = {"images": image, "boxes": (Boxes(torch.rand(5, 4), [torch.arange(3)]), torch.ones(1, 1, 2, 2).long())}
    batch = Batch(content, 2, (Unreadable("a.png", "damaged"),))
    moved = batch.to(torch.device("cpu"), torch.channels_last)
    assert moved.content["images"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.content["images"], image)
    boxes, mask = moved.content["boxes"]
    assert type(boxes) is Boxes and type(boxes.kinds) is list and torch.equal(boxes.kinds[0], torch.arange(3))
    assert mask.is_contiguous() and (moved.size, moved.unreadable) == (2, batch.unreadable)
    on_meta = batch.to(torch.device("meta"))
    assert {on_meta.content["images"].device.type, on_meta.content["boxes"][0].kinds[0].device.type} == {"meta"}
    assert Batch(None, 0).to(torch.device("cpu")) == Batch(None, 0)


def test_pinning_keeps_the_structure(monkeypatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor)
    batch = Batch({"boxes": [Boxes(torch.ones(1), [torch.ones(2)])]}, 1, (Unreadable("a", "b"),))
    assert pin_memory(batch) == batch
    assert len(pinned) == 2 and isinstance(pin_memory(batch).unreadable[0], Unreadable)


class Numbers:
    """A source of items that are not labeled images."""

    def __len__(self) -> int:
        return 5

    def load(self, index: int) -> dict:
        return {"number": index, "signal": torch.full((2,), float(index))}

    def sample_name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_of_other_items(workers: int) -> None:
    samples = EvaluationSamples(Numbers(), lambda item: {**item, "signal": item["signal"] + 1})
    batches = list(EvaluationLoader(samples, 2, LoaderOptions(workers), Shard(1, 2)))
    assert [batch.content["number"].tolist() for batch in batches] == [[1, 3]]
    assert batches[0].content["signal"].tolist() == [[2, 2], [4, 4]]


def mixer(**changes) -> GroupMixup:
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.9, "label_smoothing": 0.1, "num_classes": 10}
    return GroupMixup(Mixup(**{**settings, **changes}))


def mixed(mix: GroupMixup, images, targets, sizes, step=3):
    """Mix the parts of a batch that have `sizes`, one after the other."""
    parts, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        parts.append(mix(images[part], targets[part], seed=5, step=step, first=first))
        first += size
    return tuple(torch.cat(list(side)) for side in zip(*parts, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 50), st.booleans())
def test_mixing_does_not_depend_on_the_division(halves, step, channels_last) -> None:
    count = 2 * sum(halves)
    images = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(count))
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    before, targets = images.clone(), torch.arange(count) % 10
    whole = mixed(mixer(), images, targets, [count], step)
    parts = mixed(mixer(), images, targets, [2 * half for half in halves], step)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert torch.equal(images, before)  # the images of the loader are left alone


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_neighbors_are_mixed(kind: str) -> None:
    """Mixing pairs of neighbors by one strength and box per group is what timm makes of mirrored groups."""
    alphas = {"mixup_alpha": 1.0, "cutmix_alpha": 0.0} if kind == "mixup" else {"mixup_alpha": 0.0}
    mix = mixer(prob=1.0, label_smoothing=0.0, **alphas)
    count = GROUP + 6
    images = torch.arange(count, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, 9, 9).contiguous()
    out, soft = mix(images, torch.arange(count) % 10, seed=1, step=2, first=0)
    assert soft.shape == (count, 10) and torch.allclose(soft.sum(1), torch.ones(count))
    strengths = set()
    for place in range(count):
        partner = place ^ 1
        if place % 10 == partner % 10:
            continue
        own = soft[place, place % 10].item()
        assert soft[place, partner % 10].item() == pytest.approx(1 - own, abs=1e-6)
        assert out[place].mean().item() == pytest.approx(own * place + (1 - own) * partner, abs=1e-4)
        if kind == "cutmix":
            assert set(out[place].unique().tolist()) <= {place, partner}
        strengths.add((place // GROUP, round(own, 6)))
    assert len(strengths) == len({strength for _, strength in strengths}) == 2  # one per group


def test_mixing_draws_from_its_own_stream() -> None:
    images, targets = torch.rand(8, 3, 4, 4), torch.arange(8)
    mix = mixer(prob=1.0)
    state = np.random.get_state()[1].copy()
    outcomes = [mix(images, targets, seed=seed, step=step, first=0)[1] for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(outcomes[0], outcomes[3]) and np.array_equal(state, np.random.get_state()[1])
    assert not torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[0], outcomes[2])


def test_mixing_refuses_images_without_partner() -> None:
    for count, first in ((3, 0), (4, 1)):
        with pytest.raises(ArgumentError, match="even number of images"):
            mixer()(torch.rand(count, 3, 4, 4), torch.arange(count), seed=0, step=0, first=first)
    with pytest.raises(ArgumentError, match="must be 'batch'"):
        mixer(mode="elem")
