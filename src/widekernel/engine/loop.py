"""Training loop for any task, which can be resumed exactly after any optimizer step, by any number of processes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from widekernel.data.batches import Batch, Unreadable
from widekernel.engine.checkpoint import CheckpointStore
from widekernel.engine.components import create_components
from widekernel.engine.config import Metrics, TrainingConfig
from widekernel.engine.curves import save_curves
from widekernel.engine.determinism import deterministic_algorithms
from widekernel.engine.error_context import LoadingError, NetworkError, TrainingError, errors_as
from widekernel.engine.evaluation import EvaluationOptions, evaluate_all
from widekernel.engine.interrupts import InterruptGuard
from widekernel.engine.loggers import create_loggers
from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.nonfinite import REMEDIES, too_many_skipped
from widekernel.engine.optimizer_step import OptimizerStep, Trained
from widekernel.engine.preflight import check_run_length
from widekernel.engine.progress import Progress
from widekernel.engine.randomness import generators_restored
from widekernel.engine.rates import Rates
from widekernel.engine.reporter import RunLength
from widekernel.engine.run_context import RunContext
from widekernel.engine.run_log import RunLog
from widekernel.engine.schedule import create_schedule
from widekernel.engine.step_batches import RunData, StepBatches
from widekernel.engine.stopping import Stopping
from widekernel.engine.synced_norms import convert_batch_norms
from widekernel.engine.task import Task
from widekernel.engine.unreadable import check_unreadable
from widekernel.engine.write_policy import WritePolicy
from widekernel.errors import DataError, WidekernelError


class Trainer:
    """Trainer of a model for a task, which also maintains the run folder.

    With several processes, all of them create a trainer and call the same methods; the first one writes the files.

    Args:
        model: network on `context.device`; the first process's weights count
        task: loss and metrics
        data: training and held-out batches
        config: settings of the loop
        context: run folder, device, processes and reporter

    Raises:
        DataError: an epoch has fewer batches than one optimizer step needs.
        ConfigError: the precision is not available on the device.
    """

    def __init__(self, model: nn.Module, task: Task, data: RunData, config: TrainingConfig, context: RunContext) -> None:
        self.task, self.data, self.config, self.context = task, data, config, context
        if data.train.steps_per_epoch == 0:
            raise DataError(
                f"The training data has {len(data.train.samples)} {task.nouns[1]}, but one optimizer step takes "
                f"{config.loop.batch_size} (loop.batch_size). Lower loop.batch_size."
            )
        self.length = RunLength(config.schedule.total_steps(data.train.steps_per_epoch), data.train.steps_per_epoch)
        for note in check_run_length(config, self.length):
            context.reporter.message(note)
        if config.loop.sync_batch_norm:
            model = convert_batch_norms(model, context.processes)
        context.processes.equalize(model)
        self.components = create_components(model, task, config, self.length, context)
        self.model, self.sparsity, self.average = model, self._trained.sparsity, self._trained.average
        self._evaluated = config.evaluated
        self.schedule = create_schedule(self._trained.optimizer, config.schedule, self.length, config.optimizer)
        saving = config.checkpoint
        self.policy = WritePolicy(saving.on_failure, saving.max_failures, context.reporter.message)
        notify, count, settings = context.reporter.message, context.processes.world_size, context.settings
        self.store = CheckpointStore(
            context.folder.checkpoints, saving.keep, notify, policy=self.policy, world_size=count, settings=settings
        )
        loggers = create_loggers(config.logging, context.folder.path, settings, notify)
        self.log = RunLog(context.folder.metrics, loggers if context.processes.is_main else (), context.reporter.message)
        self.rates = Rates(context.device)
        self._batches = StepBatches(data.train, config.seed, context.processes.rank)
        self._postponed = False  # whether a training state was due during steps that were skipped

    @property
    def _trained(self) -> Trained:
        return self.components.trained

    @property
    def step(self) -> OptimizerStep:
        """The optimizer step."""
        return self.components.step

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self.components.progress

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the latest training state in the run folder, or from the start, to the end.

        The global random generators are as before afterwards.

        Raises:
            Interrupted: a signal asked to stop; the state was saved first.
            TrainingError: too many steps in a row were not finite, or more than `max_unreadable` images cannot be read.
            CheckpointError: no training state can be read, or none can be written.
        """
        self._resume_or_start()
        self.context.reporter.start_training(self.length, self.progress.step)
        deterministic = deterministic_algorithms(self.config.loop.deterministic)
        with InterruptGuard() as guard, generators_restored(), deterministic:
            stopping = Stopping(guard, self.context.processes)
            self.model.train()  # once, because it visits every module; evaluations restore the mode
            self.rates.reset()
            try:
                while not self._is_finished():
                    if self._evaluation_due():
                        with self.rates.excluded():
                            self._evaluate_and_save(stopping)
                    else:
                        self._train_step(stopping)
                self.store.wait()
            except BaseException:
                with suppress(WidekernelError):  # the first error is the one to report
                    self.store.wait()
                raise
            finally:
                self.log.close(self._is_finished())

    def _is_finished(self) -> bool:
        reached = self.progress.step if self.data.held_out is None else self.progress.evaluated
        return reached >= self.length.steps

    def _evaluation_due(self) -> bool:
        step = self.progress.step
        if self.data.held_out is None:
            return False
        interval = self.config.evaluation.interval(self.length.steps_per_epoch)
        return step > self.progress.evaluated and (step % interval == 0 or step == self.length.steps)

    def _save_due(self) -> bool:
        # The folder belongs to this run from the first step on; saving right then shows that states can be written.
        if self.progress.step in (1, self.length.steps):
            return True
        # What led to skipped steps may be in the weights: such states would push out those from before.
        return (self._postponed or self._save_interval_ends()) and not self.progress.skipped_in_a_row

    def _save_interval_ends(self) -> bool:
        config = self.config.checkpoint
        intervals = config.every_steps, config.every_epochs * self.length.steps_per_epoch
        return any(interval is not None and self.progress.step % interval == 0 for interval in intervals)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _train_step(self, stopping: Stopping) -> None:
        """Perform one optimizer step, and what is due after it."""
        end = self.progress.end_of_left_out()
        if end is not None:
            self.progress.step = end
            return
        number = self.progress.step + 1
        if not self.model.training:
            self.model.train()
        self.context.processes.note(self.progress.step, f"loading the {self.task.nouns[1]} of step {number}")
        with errors_as(LoadingError, f"Loading the {self.task.nouns[1]} of training step {number}"), self.rates.loading():
            batches = self._batches.take(self.progress.step)
        for batch in batches:
            self._note_unreadable(batch.unreadable)
        if self.components.acceleration.is_due:
            choosing = errors_as(NetworkError, "Choosing the fastest layers (loop.accelerate)", self.task.sizes[0])
            with choosing, self.rates.excluded():
                self.components.acceleration.choose(self._moved(batches[0]), self.progress.step)
        self.context.processes.note(self.progress.step, f"training step {number}")
        with errors_as(NetworkError, f"Training step {number}", self.task.sizes[0]):
            self.schedule.step_update(self.progress.step)
            made = self.step.make(batches, self._batches.positions(self.progress.step), self._moved)
            self.step.average(number, made)
        self.rates.stepped(self.data.train.plan.batch_size)
        if self.progress.step == 0 and self.context.processes.is_main:
            self.context.folder.begin()
            self.log.truncate(0)
        self.progress.step = number
        self._after_step(made, stopping)

    def _after_step(self, made: bool | None, stopping: Stopping) -> None:
        """Log, save and stop as is due after a step."""
        step = self.progress.step
        logs = step % self.config.loop.log_every == 0 or (step == self.length.steps and self.data.held_out is None)
        if made:
            self.progress.skipped_in_a_row = 0
        elif (made is False or logs or self._save_due() or self._evaluation_due()) and self._rolls_back():
            return
        row = {} if not logs or self._evaluation_due() else self._write_row({})
        self.context.reporter.step(step, row)
        if self.progress.skipped_in_a_row and self._save_interval_ends():
            self._postponed = True
        stop = stopping.after_step()
        if stop or (self._save_due() and not self._evaluation_due()):  # an evaluation saves afterwards
            with self.rates.excluded():
                self.save(at_once=stop or step == 1)
        if stop:
            stopping.stop()

    def _rolls_back(self) -> bool:
        """Report skipped steps; if there were too many in a row, end the run, or return to an earlier state.

        Returns:
            whether the run has returned to an earlier state.
        """
        total, row, most = self.step.skipped()
        new, self.progress.skipped, self.progress.skipped_in_a_row = total - self.progress.skipped, total, row
        if new <= 0:
            return False
        self.step.deferred = False  # from now on, the host sees every step, and can say what is not finite
        what = self.step.nonfinite or "a loss or a gradient"
        steps = "training step" if new == 1 and self.step.nonfinite else f"{new} training step(s) up to step"
        self.context.reporter.message(f"Skipped {steps} {self.progress.step}: {what} is not finite.")
        if most <= self.config.faults.max_skipped:
            return False
        reason = too_many_skipped(most, self.progress.step, what, self.config)
        if self.progress.rollbacks >= self.config.faults.rollbacks:
            raise TrainingError(f"{reason} {REMEDIES}")
        self._roll_back(reason)
        return True

    def _roll_back(self, reason: str) -> None:
        """Return to the latest training state, and leave out the batches since then."""
        reached, rollbacks = self.progress.step, self.progress.rollbacks + 1
        self.store.wait()
        state = self._load_latest()
        if state is None:
            raise TrainingError(f"{reason} There is no training state to return to.")
        self.load_state(state)
        self.step.set_counts([self.step.counts()[0], 0, 0])
        self.step.deferred = False
        self.progress.skipped_in_a_row = 0
        self.progress.rollbacks = rollbacks
        self.progress.left_out.append([self.progress.step, reached])
        self.context.reporter.message(
            f"{reason} The run returns to step {self.progress.step} and leaves out the batches up to step {reached}."
        )
        self.save(at_once=True)  # so that a run that is killed and resumed leaves them out, too

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate_and_save(self, stopping: Stopping) -> None:
        values = self._evaluate(stopping)
        if values is None:
            # The saved state is after the last step, so the resumed run begins with the evaluation.
            self.save(at_once=True)
            stopping.stop()
        progress = self.progress
        first = self.task.metrics[0]
        value = values[f"{self._evaluated[-1]}{first.name}"]
        is_best = first.is_better(value, progress.best)
        if is_best:
            progress.best, progress.best_step = value, progress.step
        row = self._write_row({**values, "train_unreadable": len(progress.unreadable)})
        self.context.reporter.step(progress.step, row)
        self.context.reporter.evaluation(progress.step, self.task.metrics, values, is_best)
        progress.evaluated = progress.step
        if is_best or self._save_due():
            self.save()
        if self.context.processes.is_main:
            with self.policy.attempt("curves.png"):
                save_curves(read_metrics(self.context.folder.metrics), self.task.metrics, self.context.folder.curves)

    def _evaluate(self, stopping: Stopping) -> Metrics | None:
        context, step = self.context, self.progress.step
        options = EvaluationOptions(
            device=context.device,
            max_unreadable=self.config.max_unreadable,
            processes=context.processes,
            reporter=context.reporter,
            stop=stopping.now,
            memory_format=self._memory_format,
            nouns=self.task.nouns,
            size=self.task.sizes[1],
            announce=lambda name: context.processes.note(step, f"evaluating the {name}"),
        )
        assert self.data.held_out is not None
        average = None if self.average is None else self.average.module
        networks = {prefix: self.model if average is None or not prefix else average for prefix in self._evaluated}
        return evaluate_all(networks, self.data.held_out, self.task.evaluator, options)

    # -- small helpers -----------------------------------------------------------------------------------------------

    def _moved(self, batch: Batch) -> Batch:
        return batch.to(self.context.device, self._memory_format)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.config.loop.channels_last else torch.contiguous_format

    def _note_unreadable(self, samples: tuple[Unreadable, ...]) -> None:
        for sample in samples:
            if sample.name not in self.progress.unreadable:
                self.context.reporter.message(f"Skipped an unreadable {self.task.nouns[0]}: {sample}")
                self.progress.unreadable.add(sample.name)
        check_unreadable(self.progress.unreadable, self.config.max_unreadable, "training", self.task.nouns[1])

    def _share_unreadable(self) -> None:
        """Let all processes know the unreadable images of each."""
        self.progress.unreadable = self.context.processes.union(self.progress.unreadable)
        check_unreadable(self.progress.unreadable, self.config.max_unreadable, "training", self.task.nouns[1])

    def _lr(self) -> float:
        # Layer decay scales the rates of groups down; the largest is the nominal one.
        return max(group["lr"] for group in self._trained.optimizer.param_groups)

    def _write_row(self, metrics: Metrics) -> Metrics:
        """Write a row of metrics.jsonl, and return it."""
        self._share_unreadable()
        step = self.progress.step
        losses = self.step.meter.take_means(self.context.processes)
        row: Metrics = {"epoch": self.length.epoch_of(step), "step": step}
        if losses:
            row["train_loss"] = sum(losses.values())
        row["lr"] = self._lr()
        if len(losses) > 1:
            row.update({f"train_loss_{name}": value for name, value in losses.items()})
        if self.progress.skipped:
            row["skipped_steps"] = self.progress.skipped
        row.update(self.sparsity.figures(), **self.rates.figures(), **metrics)
        if self.context.processes.is_main:
            with self.policy.attempt("metrics.jsonl"):
                self.log.append(row)
        return row

    # -- training states ---------------------------------------------------------------------------------------------

    def save(self, at_once: bool = False) -> None:
        """Write the training state after the steps done so far; all processes call this together.

        Args:
            at_once: wait until it is on disk.
        """
        self._postponed = False
        self.context.processes.note(self.progress.step, "saving")
        state = self.state()
        if self.context.processes.is_main:
            with self.policy.attempt("metrics.jsonl"):
                self.log.sync()
            save = self.store.save_now if at_once else self.store.save
            save(state, self.progress.step, self.progress.best_step)

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and plain containers; all processes call this together."""
        self._share_unreadable()
        return {
            **self.components.state(self.context.processes),
            "total_steps": self.length.steps,
            "metrics_rows": self.log.rows,
            "world_size": self.context.processes.world_size,
            "data": self.context.fingerprint,
            "code": self.context.code,
            "saved_model": self.context.description,
            "settings": self.context.settings,
        }

    def _load_latest(self) -> dict[str, Any] | None:
        """Return the newest training state, which the first process chooses; `None` if there is none."""
        folder, processes = self.context.folder, self.context.processes
        chosen = processes.from_main(lambda: self.store.choose(resume=True) if folder.has_begun() else None)
        return None if chosen is None else self.store.load(chosen)

    def _resume_or_start(self) -> None:
        self.context.processes.note(0, "loading the training state")
        state = self._load_latest()
        if state is None:
            self.context.processes.require_equal(self.model)
            return
        self.load_state(state)
        self.context.reporter.message(
            f"Resuming {self.context.folder.path} after step {self.progress.step} of {self.length.steps}."
        )
        if state["world_size"] != self.context.processes.world_size:
            self.context.reporter.message(
                f"{state['world_size']} process(es) trained it so far; now there are {self.context.processes.world_size}."
            )
        if state.get("code") != self.context.code:
            self.context.reporter.message("The steps so far ran with other code, or with other versions of libraries.")

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the training state `state`.

        Raises:
            CheckpointError: it belongs to a run with other settings or other training data.
        """
        self.context.folder.check_own(state, self.context.settings)
        self.context.folder.check_same_data(state["data"], self.context.fingerprint)
        self.components.load_state(state, self.context.processes)
        if self.context.processes.is_main:
            self.log.truncate(state["metrics_rows"])
