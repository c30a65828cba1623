"""A run of `widekernel bench` on a CPU or a device: what it measures, prints and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from widekernel.cli.bench_output import rich_table
from widekernel.cli.console import progress, table_console

if TYPE_CHECKING:
    from widekernel.bench import Platform, TimeBudget
    from widekernel.bench.devices import Accelerator
    from widekernel.bench.tables import Column


class Page(NamedTuple):
    """The parts of a page around the rows: title, columns, notes on how to read them, and the command."""

    title: str
    columns: Sequence[Column]
    notes: Sequence[str]
    command: str


class Run:
    """A run on a CPU or a device, from the first check to the printed table.

    Args:
        values: the options.
        files: files to write, by option.
        accelerator: the device; None for the CPU.
        steps: number of steps of the progress bar.
    """

    def __init__(self, values: dict[str, Any], files: dict[str, Path], accelerator: Accelerator | None, steps: int) -> None:
        from widekernel.bench import TimeBudget

        self._values, self._files, self._accelerator, self._steps = values, files, accelerator, steps
        self.budget: TimeBudget = TimeBudget() if accelerator is None else TimeBudget(values["minutes"])
        self.platform: Platform

    def measure(self, measure: Callable[..., Iterator], check: Callable[[], None]) -> list:
        """Measure the platform, then collect the rows of `measure`; each row is written to the CSV file before the next one.

        On the CPU, `check` is called first.
        """
        from widekernel.bench import keeping_memory, tables, using_threads

        current = nullcontext() if self._accelerator is None else self._accelerator.current()
        with keeping_memory(), using_threads(self._values["threads"]), current, progress(self._steps) as advance:
            self.platform = self._measured_platform(advance, check)
            measured = measure(self.platform, self.budget, advance)
            return list(tables.write_each(measured, self._files.get("csv")))

    def show(self, page: Page, rows: Sequence[Any]) -> None:
        """Print the table, the facts about the machine and the notes of the run; write the page if a file is given."""
        from widekernel.bench import tables

        remarks, console = self.budget.lines(), table_console()
        console.print(rich_table(page.title, page.columns, rows, self.platform.facts))
        for remark in remarks:
            console.print(remark, soft_wrap=True)
        if "markdown" in self._files:
            content = tables.markdown(rows, page.columns)
            text = tables.document(page.title, self.platform.facts, content, (*remarks, *page.notes), page.command)
            tables.write(text.encode(), self._files["markdown"])

    def _measured_platform(self, advance: Callable[[str, int], None], check: Callable[[], None]) -> Platform:
        from widekernel.bench import cpu_platform, cuda_platform, gpu, measure_machine

        if self._accelerator is not None:
            advance("measuring the device", 0)
            return cuda_platform(self._accelerator, gpu.measure_gpu(self._accelerator))
        advance("checking the operator", 0)
        check()
        return cpu_platform(measure_machine())
