"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Without a GPU, Triton's kernels run in its interpreter, which must be known when Triton is imported: by timm, for instance.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests import interpreting, pictures
from tests.suites import SuiteReport

ROOT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """Return the folder of reference numbers and real images: beside the repository, or where the variable says."""
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


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    with pictures.stand_ins():
        yield


@pytest.fixture
def drawn_pictures() -> Iterator[None]:
    """Let runs of the test draw the pictures of their curves and masks."""
    with pictures.drawn():
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SuiteReport(config))
    # Processes that run tests side by side share the cores. Tests of threads choose their number.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection() -> None:
    # Imported modules and collected tests stay; looking for garbage among them, again and again, takes several seconds.
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = [item for item in items if item.get_closest_marker("interpreted")]
    if interpreted and os.environ.get("TRITON_INTERPRET") == "1" and (reason := interpreting.why_not()):
        for item in interpreted:
            item.add_marker(pytest.mark.skip(reason=reason))
