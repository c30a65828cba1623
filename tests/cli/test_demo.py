"""The demo: shortened in the fast tests, complete in the slow ones."""

import re

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import widekernel
from widekernel.cli import demo_picture, train
from widekernel.cli import demo_run as demo
from widekernel.cli.main import main
from widekernel.engine.curves import draw_losses, draw_metrics
from widekernel.tasks.assembly import build_model
from widekernel.tasks.classification.evaluation import METRICS

pytest.importorskip("sklearn")


@pytest.fixture
def short(monkeypatch):
    """Shorten the demo to two epochs of a narrower network at half the resolution."""

    def shortened(arguments):
        changes = ["--schedule.epochs=2", "--schedule.warmup_epochs=0", "--data.input_size=32", "--loop.batch_size=64",
                   "--model.args.dims", "[8, 16, 16, 32]"]  # fmt: skip
        return train.parse_config([*arguments, *changes])

    monkeypatch.setattr(demo, "parse_config", shortened)


def accuracies(text: str) -> list[str]:
    return re.findall(r"│\s+(\d+\.\d\d)\s+│\s+\d+\.\d\d\s+│", text)


def test_demo(short, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "demo"
    assert main(["demo", "--output", str(folder)]) == 0
    first = capsys.readouterr().out
    assert len(accuracies(first)) == 4
    assert len(set(accuracies(first))) == 1
    assert str(folder / "demo.png") in first.replace("\n", "")
    assert {path.name for path in folder.iterdir()} >= {"dense.safetensors", "folded.safetensors", "demo.png"}
    with Image.open(folder / "demo.png") as picture:
        assert min(picture.size) > 800
    drawn = []
    monkeypatch.setattr(demo, "draw", lambda content, path: drawn.append(path))
    assert main(["demo", "--output", str(folder)]) == 0
    second = capsys.readouterr().out
    assert "already finished" in second and "Trained" in first and "Trained" not in second
    assert accuracies(second) == accuracies(first) and drawn == [folder / "demo.png"]
    damage_the_folded_form(monkeypatch)
    assert main(["demo", "--output", str(folder)]) == 2
    assert "must agree" in capsys.readouterr().err


def damage_the_folded_form(monkeypatch):
    restore = demo.restore_model

    def damaged(path):
        model, saved = restore(path)
        if path.name == "folded.safetensors":
            with torch.no_grad():
                model.head.fc.bias[3] += 100
        return model, saved

    monkeypatch.setattr(demo, "restore_model", damaged)


def test_kernels_share_one_scale_and_networks_their_width():
    figure = Figure()
    top, bottom = figure.subfigures(2, 1)
    dense = build_model("slak_nano", 10, {}).eval()
    rows = [{"step": n, "train_loss": 1.0, **dict.fromkeys(("val_loss", "ema_val_loss", "val_top1", "ema_val_top1"), n)}
            for n in (1, 2)]  # fmt: skip
    content = demo_picture.PictureContent([], (), [], [], rows, METRICS, dense, widekernel.fold(dense), [])
    demo_picture._draw_kernels(bottom, content)
    *panels, bar = bottom.axes
    assert len(panels) >= 4
    assert len({panel.images[0].get_clim() for panel in panels}) == 1
    low, high = panels[0].images[0].get_clim()
    assert low == -high
    assert bar.get_ylabel() == "weight"
    loss, accuracy = top.subplots(1, 2)
    draw_losses(loss, rows, METRICS)
    draw_metrics(accuracy, rows, METRICS[:1])
    widths = [[line.get_linewidth() for line in axes.lines[-count:]] for axes, count in ((loss, 2), (accuracy, 3))]
    assert widths[0] == widths[1][:2] and widths[0][0] < widths[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_complete_demo(seed, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo"), "--seed", str(seed)]) == 0
    assert float(accuracies(capsys.readouterr().out)[0]) >= 98.0
