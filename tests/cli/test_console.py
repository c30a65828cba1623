import io

import pytest
from rich.console import Console

from widekernel.cli.console import ConsoleReporter


@pytest.mark.parametrize("width", [80, 120])
def test_bars_fit_the_terminal(width):
    reporter = ConsoleReporter(Console(width=width, file=io.StringIO()))
    reporter.start_training(epochs=300, steps_per_epoch=1251, first_step=0)
    reporter.step(299, 375_000, 6.907, 4e-3)
    reporter.start_evaluation(390, "averaged weights")
    reporter.evaluated(350)
    page = Console(width=width, file=io.StringIO())
    page.print(reporter._progress.make_tasks_table(reporter._progress.tasks))
    reporter._progress.stop()
    text = page.file.getvalue()
    assert "…" not in text
    for words in ("375000/375300", "epoch 300/300  loss 6.907  lr 4.0e-03", "350/390", "averaged weights"):
        assert words in text
