"""Complete runs of any task from its settings, by one or several processes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from widekernel.data import BatchPlan, LoaderOptions
from widekernel.data.paths import expand_path
from widekernel.engine import Processes, Reporter, RunContext, RunFolder, SilentReporter, Trainer
from widekernel.engine.joining import joined_processes
from widekernel.engine.preflight import notes_on_workers
from widekernel.engine.step_batches import RunData
from widekernel.errors import ConfigError
from widekernel.settings import flatten
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.config import RunConfig
from widekernel.tasks.fingerprint import code_fingerprint
from widekernel.tasks.results import RunResult, earlier_result, has_states, write_results
from widekernel.tasks.run_parts import Kind, RunParts, RunSamples, Sources
from widekernel.tasks.saved import SavedModel


def train(kind: Kind, config: RunConfig, reporter: Reporter | None = None) -> RunResult:
    """Train as configured in the folder `config.output`; the same call again resumes the run, or returns its result.

    If torchrun's environment says that there are several processes, all of them make this call and train together; the first
    one alone reports and writes files. The global random generators are as before afterwards.

    Args:
        kind: what the task brings to its runs.
        config: settings of the run.
        reporter: receives progress and messages.

    Raises:
        WidekernelError: settings, data or run folder cannot be used (before anything is trained), or training fails.
        Interrupted: a signal stopped the training, after saving.
    """
    if config.output is None:
        raise ConfigError("output is not set; give the run folder.")
    with joined_processes(config.loop.device, config.loop.timeout) as processes, ExitStack() as stack:
        shown = reporter if reporter is not None and processes.is_main else SilentReporter()
        folder = RunFolder(config.output, config.upgraded)
        processes.from_main(lambda: _enter(stack, folder))
        return _Run(kind(config, processes, shown.message), config, folder, shown, processes).result()


def _enter(stack: ExitStack, folder: RunFolder) -> None:
    stack.enter_context(folder.reserved())


@dataclass(frozen=True)
class _Run:
    """One call of `train`, on one process."""

    parts: RunParts
    config: RunConfig
    folder: RunFolder
    reporter: Reporter
    processes: Processes

    def result(self) -> RunResult:
        """Train, unless the run is finished, and return the result."""
        config, folder, processes, parts = self.config, self.folder, self.processes, self.parts
        _require_same(flatten(config.to_dict()), processes, "settings", "Start all processes with the same command.")
        device = processes.device or choose_device(config.loop.device, "loop.device")
        plan = BatchPlan(config.loop.batch_size, config.loop.micro_batch, processes.world_size)
        starts = not processes.from_main(lambda: has_states(folder))
        parts.check(plan, device, starts)
        settings = _with_absolute_root(config)
        processes.from_main(lambda: folder.prepare(settings))
        processes.note(0, "opening the data")
        sources = processes.main_first(parts.open_data)
        self._report(list(dict.fromkeys(parts.notes(sources, starts))))
        processes.note(0, "building the network")
        model = processes.main_first(lambda: parts.build(sources, starts))
        saved = parts.describe(sources, model)
        samples = parts.samples(sources, model, saved)
        task = processes.main_first(lambda: parts.create_task(sources, model, saved))
        context = self._make_context(sources, saved, device, settings, task.digests)
        was_finished = processes.from_main(folder.summary.exists)
        evaluated = () if sources[1] is None else config.training.evaluated
        result = processes.from_main(lambda: earlier_result(config.ema.decay is not None, evaluated, task, context))
        if result is not None:
            return result
        self._report(self._notes_on_steps(plan))

        data = self._make_loaders(samples, plan, context)
        layout = torch.channels_last if config.loop.channels_last else torch.contiguous_format
        task.prepare(model, config.seed)
        task.to(device, layout)
        trainer = Trainer(model.to(device).to(memory_format=layout), task, data, config.training, context)
        report = trainer.sparsity.report()
        if report is not None:
            self.reporter.message(report.summary())
        trainer.run()
        self._report(parts.closing_notes(sources, trainer.progress.unreadable))
        for network in (trainer.model, *(() if trainer.average is None else (trainer.average.module,))):
            task.finish(network)
        processes.note(trainer.progress.step, "saving the results")
        summary = processes.from_main(lambda: write_results(trainer, saved))
        return RunResult(folder, summary, was_finished, task.metrics)

    def _report(self, notes: list[str]) -> None:
        for note in filter(None, notes):
            self.reporter.message(note)

    def _notes_on_steps(self, plan: BatchPlan) -> list[str]:
        """Return notes on the loading processes, the division of a batch and a learning rate that is scaled to it."""
        config = self.config
        notes = notes_on_workers(config.data.workers)
        if plan.world_size * plan.accumulate > 1:
            notes.append(f"One optimizer step: {plan.describe()}.")
        if config.schedule.lr_scale_batch is not None:
            notes.append(
                f"The peak learning rate is {config.training.optimizer.lr:.6g}: optimizer.lr ({config.optimizer.lr:g}) × "
                f"loop.batch_size ({plan.batch_size}) / schedule.lr_scale_batch ({config.schedule.lr_scale_batch})."
            )
        return notes

    def _make_context(
        self, sources: Sources, saved: SavedModel, device: torch.device, settings: dict[str, Any], digests: dict[str, str]
    ) -> RunContext:
        processes, data = self.processes, {**self.parts.fingerprint(sources), **digests}
        _require_same(data, processes, "data", "Give all hosts the same data (data.root).")
        code = code_fingerprint()
        return RunContext(self.folder, device, processes, self.reporter, data, code, saved.to_dict(), settings)

    def _make_loaders(self, samples: RunSamples, plan: BatchPlan, context: RunContext) -> RunData:
        """Return the loaders of the training and held-out batches of this process."""
        pinned, parts = context.device.type == "cuda", self.parts
        options = LoaderOptions.configured(self.config.data, pin_memory=pinned, notify=context.reporter.message)
        held_out = samples.held_out
        return RunData(
            parts.training_loader(samples.train, options, plan),
            None if held_out is None else parts.evaluation_loader(held_out, options, plan),
        )


def _require_same(values: dict[str, Any], processes: Processes, what: str, fix: str) -> None:
    """Raise a `ConfigError` unless all processes have the same `values`; `what` names them."""
    found = processes.gather(values)
    for rank, other in enumerate(found):
        differing = [key for key in found[0].keys() | other.keys() if found[0].get(key) != other.get(key)]
        if differing:
            key = min(differing)
            raise ConfigError(
                f"Process {rank} has other {what} than process 0: {key} is {other.get(key)!r} instead of "
                f"{found[0].get(key)!r}. {fix}"
            )


def _with_absolute_root(config: RunConfig) -> dict[str, Any]:
    """Return the settings as the run stores them: with an absolute `data.root`, which is valid from any folder."""
    if config.data.root is not None:
        root = os.path.abspath(expand_path("data.root", config.data.root))  # noqa: PTH100 - resolve() would follow links
        config = config.with_data_root(root)
    return config.to_dict()
