"""A short sparse run on random images whose names are hostile, and the report on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from tests.native import thread_count
from tests.tasks.images import make_images
from widekernel.cli.main import main
from widekernel.data import DataConfig, Preprocessing
from widekernel.report.collecting import Report, collect
from widekernel.report.images import find_images
from widekernel.report.page import render_page
from widekernel.report.parts import ReportOptions
from widekernel.report.subject import Subject, open_subject
from widekernel.tasks.saved import SavedModel, save_model
from widekernel.transforms.acceleration import timing

CLASSES = ("<script>alert(1)", "b & \"c\" 'd'", "{{ 7 * 7 }}")
QUICK = ReportOptions(seconds=0.01, batch_sizes=(1,), erf_images=2, erf_size=32, cka_images=6, batch_size=4)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished sparse run of slak_nano."""
    root = tmp_path_factory.mktemp("report")
    make_images(root / "images", classes=CLASSES)
    settings = ["--model.name", "slak_nano", "--model.args.dims", "[8, 8, 8, 8]", "--data.root", str(root / "images")]
    settings += ["--data.input_size", "32", "--data.workers", "0", "--schedule.epochs", "2", "--schedule.warmup_epochs", "0"]
    settings += ["--loop.batch_size", "8", "--loop.log_every", "1", "--loop.device", "cpu", "--augment.auto_augment", "null"]
    settings += ["--sparsity.method", "dynamic", "--sparsity.dynamic.update_interval", "2", "--ema.decay", "0.9"]
    with thread_count(1):
        assert main(["train", *settings, "--output", str(root / "<i>run")]) == 0
    return root / "<i>run"


@pytest.fixture(scope="session")
def subject(run_folder: Path) -> Subject:
    return open_subject(str(run_folder))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Return another network with three outputs, from a file without class names."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    preprocessing = Preprocessing.resolve(DataConfig(), {"input_size": (3, 32, 32)})
    model = timm.create_model("replknet_nano", num_classes=3)
    save_model(model, path, SavedModel("replknet_nano", {}, "training", 3, (), preprocessing))
    return open_subject(str(path))


@pytest.fixture(scope="session")
def report(subject: Subject, other: Subject) -> Report:
    """Return the report on the run, compared with the other network."""
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise most of the time would go into comparing layers.
        patch.setattr(timing, "measure", lambda before, after, x, backward: (2.0, 1.0))
        timing.forget()
        found = collect(subject, find_images(subject, None), QUICK, other)
    timing.forget()
    return found


@pytest.fixture(scope="session")
def page(report: Report) -> str:
    pytest.importorskip("jinja2")
    return render_page(report, "widekernel report '<i>run'")


@pytest.fixture(scope="session")
def named() -> Subject:
    return open_subject("slak_nano")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of images without classes."""
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timing, "measure", lambda before, after, x, backward: (2.0, 1.0))
    timing.forget()
    yield
    timing.forget()
