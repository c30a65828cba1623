"""Pictures of training curves: what is drawn for each kind of task, and runs of any length."""

import math

import numpy as np
import pytest
from PIL import Image

from widekernel.engine.curves import COLORS, draw_losses, draw_metrics, metric_groups, save_curves
from widekernel.engine.metrics import Metric
from widekernel.figures import new_figure

TOP1, TOP5 = Metric("val_top1", "top-1", "%"), Metric("val_top5", "top-5", "%")
LOSS = Metric("val_loss", "loss", larger_is_better=False)
BOX_LOSS = Metric("val_loss_box", "box loss", larger_is_better=False)
ERROR = Metric("val_error", "boundary error", "px", larger_is_better=False, digits=1)


def rows_of(count, **figures):
    """Return rows in which each figure is a function of the number of the row."""
    return [{"step": 10 * n, "lr": 0.1 / n, **{key: f(n) for key, f in figures.items()}} for n in range(1, count + 1)]


def panel():
    return new_figure(5, 4).subplots()


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_metrics_of_one_unit_and_direction_share_a_panel():
    other = Metric("val_miss", "misses", "%", larger_is_better=False)
    assert metric_groups((TOP1, LOSS, ERROR, TOP5, other, BOX_LOSS)) == [(TOP1, TOP5), (ERROR,), (other,)]


def test_metrics_and_their_best_values():
    rows = rows_of(4, val_top1=float, ema_val_top1=lambda n: 10.0 - (n - 2) ** 2, val_top5=lambda n: 90.0 + n)
    axes = panel()
    draw_metrics(axes, rows, (TOP1, TOP5))
    assert legend(axes) == ["top-1 (best 10.00 %)", "top-5 (best 94.00 %)", "averaged weights", "weights"]
    assert (axes.get_title(), axes.get_ylabel()) == ("Held-out top-1, top-5", "%")
    plain, averaged, best, top5, best5 = axes.lines
    assert list(plain.get_ydata()) == [1, 2, 3, 4] and list(averaged.get_ydata()) == [9, 10, 9, 6]
    assert plain.get_color() == averaged.get_color() == COLORS[0] and top5.get_color() == COLORS[1]
    assert plain.get_linewidth() < averaged.get_linewidth()
    assert [(*ring.get_xdata(), *ring.get_ydata()) for ring in (best, best5)] == [(20, 10), (40, 94)]


def test_lower_is_better_is_said_and_decides_the_best():
    axes = panel()
    draw_metrics(axes, rows_of(5, val_error=lambda n: math.nan if n == 1 else 10 + (n - 3) ** 2), (ERROR,))
    assert axes.get_title() == "Held-out boundary error (lower is better)"
    assert legend(axes) == ["boundary error (best 10.0 px)"]


def test_losses_by_name():
    rows = rows_of(3, train_loss=lambda n: 3.0, train_loss_box=lambda n: 2.0, train_loss_cls=lambda n: 1.0,
                   val_loss=lambda n: 3.5, val_loss_box=lambda n: 2.5)  # fmt: skip
    axes = panel()
    draw_losses(axes, rows, (TOP1, LOSS, BOX_LOSS))
    assert legend(axes) == ["training", "training: box", "training: cls", "held-out", "held-out: box loss"]
    color = {line.get_label(): line.get_color() for line in axes.lines}
    assert color["training: box"] == color["held-out: box loss"]
    assert len(set(color.values())) == 4
    (rate,) = (other for other in axes.figure.axes if other is not axes)
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.05, 0.1 / 3]


@pytest.mark.parametrize(
    ("last", "scale"), [(6.0, "linear"), (0.2, "log"), (0.0, "linear"), (-1.0, "linear"), (math.nan, "linear")]
)
def test_the_axis_of_losses_is_logarithmic_if_they_span_much(last, scale):
    axes = panel()
    draw_losses(axes, rows_of(3, train_loss=lambda n: (6.5, 6.2, last)[n - 1]), ())
    assert axes.get_yscale() == scale


def test_a_long_training_loss_is_smoothed_over_its_own_points():
    noise = np.random.default_rng(0).normal(size=2000)
    axes = panel()
    draw_losses(axes, rows_of(2000, train_loss=lambda n: math.nan if n == 700 else 5 + noise[n - 1]), ())
    raw, smooth = axes.lines
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 2000
    assert np.isnan(smooth.get_ydata()).nonzero()[0].tolist() == [699]
    assert smooth.get_ydata()[1000] == pytest.approx(5 + noise[960:1041].mean())
    assert smooth.get_ydata()[0] == pytest.approx(5 + noise[:41].mean())


def test_points_that_lines_would_hide_are_marked():
    for value, marked in ((float, False), (lambda n: n if n % 2 else math.nan, True)):
        axes = panel()
        draw_metrics(axes, rows_of(100, val_top1=value), (TOP1,))
        assert (axes.lines[0].get_marker() == ".") == marked


@pytest.mark.parametrize(
    "rows",
    [[], rows_of(1, train_loss=float), rows_of(1, train_loss=float, val_top1=float),
     rows_of(2, train_loss=lambda n: math.nan), rows_of(2, val_top1=lambda n: None, train_loss=lambda n: math.inf)],
)  # fmt: skip
def test_short_and_broken_runs(tmp_path, rows):
    save_curves(rows, (TOP1, LOSS, ERROR), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height
