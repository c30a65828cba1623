"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Without a GPU, Triton's kernels run in its interpreter, which must be known when Triton is imported: by timm, for instance.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """Find the folder of reference numbers and real images, which lies beside the repository or where the variable says."""
    named = os.environ.get("WIDEKERNEL_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    return folder if (folder / "parity").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("the folder of reference numbers is not here: set WIDEKERNEL_SHARED to it")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "parity" / "golden"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _interpreter_fails() -> bool:
    """Whether Triton's interpreter fails here: that of 3.6, not of 3.9, makes numbers of arrays, as NumPy 2.4 forbids."""
    import numpy
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    return old and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = [item for item in items if item.get_closest_marker("interpreted")]
    if interpreted and os.environ.get("TRITON_INTERPRET") == "1" and _interpreter_fails():
        skip = pytest.mark.skip(reason="Triton's interpreter does not work with this NumPy: pip install 'numpy<2.4'")
        for item in interpreted:
            item.add_marker(skip)
