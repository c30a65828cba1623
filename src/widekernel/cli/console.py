"""Console: progress on standard error, results on standard output."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text
from typing_extensions import override

from widekernel.cli.progress_text import GAP, duration, fitted, metric_texts, row_parts
from widekernel.engine.metrics import Metric
from widekernel.engine.reporter import Reporter, RunLength

WIDE = 120
"""Width of the terminal from which progress bars are long."""

_NO_SCREEN = 400
"""Width for tables that go to a file or a pipe."""

_BAR_SECONDS = 0.2
"""Least time between two updates of a bar."""

_LINE_SECONDS = 10.0
"""Least time between two lines on the training in a log file."""

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


@contextmanager
def progress_of_stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show the stages of some work on standard error within the block; in a log file, a line for each.

    Yield a function that receives a text on the current work, the number of steps done, and their total (0: unknown).
    """
    console, last = progress_console(), ""
    columns = _plain("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            nonlocal last
            bar.update(task, description=what, completed=done, total=total or None)
            if what != last and not console.is_terminal:
                console.print(f"{what} ...", soft_wrap=True)
            last = what

        yield advance


def download_bar(console: Console) -> Progress:
    """Return a progress bar of bytes, which shows nothing if nobody watches `console`."""
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_interactive)


class _Bars(Progress):
    """Progress bars, and under them a line with details, of which a narrow terminal shows the first ones."""

    details: Sequence[str] = ()

    @override
    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.details:
            yield Text(fitted(self.details, self.console.width - 1), no_wrap=True)


class ConsoleReporter(Reporter):
    """Context manager that shows training and evaluation: bars in a terminal, lines without control characters elsewhere.

    Args:
        console: where to; the default is standard error
        clock: clock in seconds
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or progress_console()
        self._clock = clock
        self._progress = _Bars(
            _plain("{task.description}"),
            BarColumn(bar_width=40 if self.console.width >= WIDE else 12),
            MofNCompleteColumn(),
            _plain("{task.fields[note]}"),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._length: RunLength | None = None
        self._row: Mapping[str, Any] = {}
        self._pace: tuple[float, int] | None = None
        self._shown = -math.inf
        self._widths: dict[str, int] = {}

    def __enter__(self) -> "ConsoleReporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress.live.is_started:  # stopping a bar that never started prints an empty line
            self._progress.stop()

    @override
    def message(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    @override
    def start_training(self, length: RunLength, first_step: int) -> None:
        self._length, self._row, self._pace, self._shown = length, {}, None, -math.inf
        if self.console.is_interactive:
            self._progress.start()
            self._training = self._progress.add_task("training", total=length.steps, completed=first_step, note="")

    @override
    def step(self, step: int, figures: Mapping[str, float]) -> None:
        if self._length is None:
            return
        now = self._clock()
        if self._pace is None:  # the first step takes longer: processes start, kernels are chosen
            self._pace = now, step
        if figures:
            self._row = figures
        if self._training is not None:
            if figures or now - self._shown >= _BAR_SECONDS:
                self._shown = now
                self._progress.update(self._training, completed=step, note=self._remaining(now, step))
                self._progress.details = row_parts(self._length, step, self._row)
        elif figures and now - self._shown >= _LINE_SECONDS:
            self._shown = now
            parts = [f"step {step}/{self._length.steps}", *row_parts(self._length, step, figures)]
            self.console.print(GAP.join(filter(None, [*parts, self._remaining(now, step)])), soft_wrap=True)

    @override
    def start_evaluation(self, batches: int, name: str) -> None:
        if self.console.is_interactive:
            self._end_evaluation()
            self._progress.start()
            self._evaluation = self._progress.add_task("evaluating", total=batches, note=name)

    @override
    def evaluated(self, batches: int) -> None:
        if self._evaluation is not None:
            self._progress.advance(self._evaluation, batches)

    @override
    def evaluation(self, step: int, metrics: tuple[Metric, ...], values: Mapping[str, float], is_best: bool = False) -> None:
        self._end_evaluation()
        texts = metric_texts(metrics, values, is_best, self._widths)
        shown = [text if kind == "weights" else f"{kind}: {text}" for kind, text in texts.items()]
        self.console.print(GAP.join([self._place(step), *shown]), soft_wrap=True)

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None

    def _place(self, step: int) -> str:
        """Return where in the run an evaluation took place: after an epoch, or else after a step."""
        length = self._length
        if length is None or step % length.steps_per_epoch:
            return f"step {step:>{len(str(length.steps)) if length else 0}}"
        epochs = str(length.epochs)
        return f"epoch {length.epoch_of(step):>{len(epochs)}}/{epochs}"

    def _remaining(self, now: float, step: int) -> str:
        """Return the time that the run will still take, with evaluations, at the pace since it was started or resumed."""
        if self._length is None or self._pace is None or step <= self._pace[1]:
            return ""
        since, first = self._pace
        return f"ETA {duration((now - since) / (step - first) * (self._length.steps - step))}"
