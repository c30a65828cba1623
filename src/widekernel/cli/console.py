"""Console: progress on standard error, results on standard output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from widekernel.engine.reporter import Reporter

WIDE = 120
"""Width of the terminal from which progress bars are long, and show the elapsed and remaining time."""

_NO_SCREEN = 400
"""Width for tables that go to a file or a pipe."""

Advance = Callable[[str, int], None]
"""Function that receives a text on the current work, and the number of steps by which the bar moves."""


def result_console() -> Console:
    """Return the console for results, which interprets no markup or emoji, not even in tables and their titles."""
    return Console(highlight=False, markup=False, emoji=False)


def progress_console() -> Console:
    """Return the console for progress and messages: standard error, so that results can be piped."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def table_console() -> Console:
    """Return the console for tables, which is that for results, but wide enough for all columns if not a terminal."""
    console = result_console()
    if not console.is_terminal:
        console.width = _NO_SCREEN
    return console


def _plain(template: str) -> TextColumn:
    """Return a column of a progress bar whose text is not interpreted as markup."""
    return TextColumn(template, markup=False)


@contextmanager
def progress(total: int) -> Iterator[Advance]:
    """Show a progress bar on standard error within the block; yield the function that sets its text and moves it."""
    columns = _plain("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=progress_console(), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(what: str, steps: int) -> None:
            bar.update(task, advance=steps, description=what)

        yield advance


class ConsoleReporter(Reporter):
    """Context manager that shows progress bars and messages of training and evaluation."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or progress_console()
        times = [TimeElapsedColumn(), TimeRemainingColumn()] if self.console.width >= WIDE else []
        self._progress = Progress(
            _plain("{task.description}"),
            BarColumn(bar_width=40 if self.console.width >= WIDE else 12),
            MofNCompleteColumn(),
            *times,
            _plain("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._epochs = 0

    def __enter__(self) -> "ConsoleReporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress.live.is_started:  # stopping a bar that never started prints an empty line
            self._progress.stop()

    @override
    def message(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    @override
    def start_training(self, epochs: int, steps_per_epoch: int, first_step: int) -> None:
        self._epochs = epochs
        total = epochs * steps_per_epoch
        self._progress.start()
        self._training = self._progress.add_task("training", total=total, completed=first_step, note="")

    @override
    def step(self, epoch: int, step: int, loss: float, lr: float) -> None:
        if self._training is not None:
            note = f"epoch {epoch + 1}/{self._epochs}  loss {loss:.3f}  lr {lr:.1e}"
            self._progress.update(self._training, completed=step, note=note)

    @override
    def start_evaluation(self, batches: int, name: str) -> None:
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
        self._progress.start()
        self._evaluation = self._progress.add_task("evaluating", total=batches, note=name)

    @override
    def evaluated(self, batches: int) -> None:
        if self._evaluation is not None:
            self._progress.advance(self._evaluation, batches)

    @override
    def epoch(self, epoch: int, metrics: dict[str, Any]) -> None:
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None
        text = f"epoch {epoch + 1:>3}/{self._epochs}  top-1 {metrics['val_top1']:6.2f} %  loss {metrics['val_loss']:.4f}"
        if "ema_val_top1" in metrics:
            text += f"  averaged weights: top-1 {metrics['ema_val_top1']:6.2f} %  loss {metrics['ema_val_loss']:.4f}"
        self.console.print(text, soft_wrap=True)
