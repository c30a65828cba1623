"""Networks that fail when they are run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from widekernel.errors import ShapeError
from widekernel.training.error_context import LoadingError, NetworkError, explained_failure, explained_loading


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (
            lambda: nn.BatchNorm2d(4)(torch.ones(1, 4, 1, 1)),
            r"Step 1 failed \(ValueError: Exp.*raise loop\.batch_size",
        ),
        (lambda: nn.Conv2d(3, 4, 9)(torch.ones(1, 3, 4, 4)), r"too small for the network: raise data\.input_size"),
        (lambda: nn.MaxPool2d(4)(torch.ones(1, 3, 2, 2)), r"too small for the network: raise data\.input_size"),
        (lambda: torch.empty(2**60), r"The memory does not suffice: use smaller batches"),
        (lambda: [][0], r"Step 1 failed \(IndexError: list index out of range\)\. Check model\.args"),
    ],
)
def test_one_line_with_a_remedy(fail, words: str) -> None:
    with pytest.raises(NetworkError, match=words) as caught, explained_failure("Step 1"):
        fail()
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_what_is_raised_on_purpose_stays() -> None:
    with pytest.raises(ShapeError, match=r"^as it is$"), explained_failure("Step 1"):
        raise ShapeError("as it is")
    with pytest.raises(KeyError), explained_failure("Step 1"):  # nothing that PyTorch raises for its input
        _ = {}["x"]


def test_processes_that_load_images_are_no_networks() -> None:
    told = r"^Loading failed \(RuntimeError: DataLoader worker .*lower data\.workers"
    with pytest.raises(LoadingError, match=told), explained_loading("Loading"):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    with pytest.raises(ShapeError, match=r"^as it is$"), explained_loading("Loading"):
        raise ShapeError("as it is")
