"""Errors of networks and loading processes, restated with a remedy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from widekernel.engine.error_context import LoadingError, NetworkError, errors_as
from widekernel.errors import ShapeError


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (
            lambda: nn.BatchNorm2d(4)(torch.ones(1, 4, 1, 1)),
            r"Step 1 failed \(ValueError: Exp.*raise loop\.batch_size",
        ),
        (lambda: nn.Conv2d(3, 4, 9)(torch.ones(1, 3, 4, 4)), r"too small for the network: raise data\.input_size"),
        (lambda: nn.MaxPool2d(4)(torch.ones(1, 3, 2, 2)), r"too small for the network: raise data\.input_size"),
        (lambda: torch.empty(2**60), r"There is not enough memory: use smaller batches"),
        (lambda: [][0], r"Step 1 failed \(IndexError: list index out of range\)\. Check model\.args"),
    ],
)
def test_the_message_is_one_line_with_a_remedy(fail, words: str) -> None:
    with pytest.raises(NetworkError, match=words) as caught, errors_as(NetworkError, "Step 1"):
        fail()
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_the_remedy_names_the_setting_of_the_task() -> None:
    with pytest.raises(NetworkError, match=r"raise data\.crop_size\.$"), errors_as(NetworkError, "Step 1", "data.crop_size"):
        nn.MaxPool2d(4)(torch.ones(1, 3, 2, 2))
    with pytest.raises(NetworkError, match=r"or images \(data\.crop_size\)"), errors_as(NetworkError, "", "data.crop_size"):
        raise MemoryError


def test_our_own_errors_and_unexpected_ones_pass_unchanged() -> None:
    with pytest.raises(ShapeError, match=r"^as it is$"), errors_as(NetworkError, "Step 1"):
        raise ShapeError("as it is")
    with pytest.raises(KeyError), errors_as(NetworkError, "Step 1"):  # PyTorch raises no such error for its input
        _ = {}["x"]


def test_errors_of_loading_processes_suggest_fewer_workers() -> None:
    told = r"^Loading failed \(RuntimeError: DataLoader worker .*lower data\.workers"
    with pytest.raises(LoadingError, match=told), errors_as(LoadingError, "Loading"):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    with pytest.raises(ShapeError, match=r"^as it is$"), errors_as(LoadingError, "Loading"):
        raise ShapeError("as it is")
