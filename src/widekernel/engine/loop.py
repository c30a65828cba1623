"""Training loop for one model and one objective, which can be resumed after any optimizer step."""

import math
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from widekernel.data.loading import Batch, TrainingLoader, Unreadable
from widekernel.deprecation import renamed_arguments, renamed_attribute
from widekernel.engine.checkpoint import CheckpointStore
from widekernel.engine.config import Metrics, TrainingConfig
from widekernel.engine.curves import save_curves
from widekernel.engine.error_context import LoadingError, NetworkError, TrainingError, errors_as
from widekernel.engine.interrupts import Interrupted, InterruptGuard
from widekernel.engine.metrics_log import MetricsLog, read_metrics
from widekernel.engine.objective import Objective
from widekernel.engine.optimization import create_optimizer, create_schedule
from widekernel.engine.preflight import check_run_length
from widekernel.engine.progress import Progress
from widekernel.engine.random_state import random_state, restore_random_state
from widekernel.engine.run_context import RunContext
from widekernel.engine.sparsification import create_sparsification
from widekernel.engine.unreadable import check_unreadable
from widekernel.errors import CheckpointError, ConfigError, DataError


class Trainer:
    """Trainer of a model for an objective, which also maintains the run folder.

    Args:
        model: network on `context.device`
        objective: loss and evaluation
        loader: training batches by epoch
        config: settings of the loop
        context: run folder, device, processes and reporter

    Raises:
        DataError: an epoch has fewer batches than one optimizer step needs.
        ConfigError: the precision is not available on the device.
    """

    @renamed_arguments(around="context")
    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        loader: TrainingLoader,
        config: TrainingConfig,
        context: RunContext,
    ) -> None:
        self.model, self.objective, self.loader, self.config, self.context = model, objective, loader, config, context
        self.steps_per_epoch = loader.batches_per_epoch // config.loop.accumulate
        if self.steps_per_epoch == 0:
            needed = config.loop.batch_size * config.loop.accumulate * context.processes.world_size
            raise DataError(
                f"The training data has {len(loader.samples)} images, but one optimizer step takes {needed} "
                f"(loop.batch_size × loop.accumulate × processes). Lower loop.batch_size."
            )
        for note in check_run_length(config, self.total_steps):
            context.reporter.message(note)
        self.sparsity = create_sparsification(model, config.sparsity, config.seed, self.total_steps)
        self.optimizer = create_optimizer(self.sparsity.trained(model), config.optimizer)
        self.schedule = create_schedule(self.optimizer, config.schedule, self.steps_per_epoch)
        decay = config.ema.decay
        self.ema = None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=config.ema.warmup)
        self.sparsity.attach(self.optimizer, self.ema, self.total_steps)
        self.autocast = _autocast(config.loop.precision, context.device)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=config.loop.precision == "fp16")
        self.progress = Progress()
        self.store = CheckpointStore(context.folder.checkpoints, config.checkpoint.keep, context.reporter.message)
        self.log = MetricsLog(context.folder.metrics)

    around = renamed_attribute("around", "context")

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the whole run."""
        return self.steps_per_epoch * self.config.schedule.epochs

    def run(self) -> None:
        """Train from the latest training state in the run folder, or from the start, to the end.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the state was saved first.
            TrainingError: the loss is not finite, or more than `max_unreadable` images cannot be read.
            CheckpointError: no training state can be read, or none can be written.
        """
        self._resume_or_start()
        self.context.reporter.start_training(self.config.schedule.epochs, self.steps_per_epoch, self.progress.step)
        with InterruptGuard() as guard:
            while self.progress.epoch < self.config.schedule.epochs:
                self._train_epoch(guard)
                self._finish_epoch(guard)

    # -- one epoch ---------------------------------------------------------------------------------------------------

    def _train_epoch(self, guard: InterruptGuard) -> None:
        self.model.train()
        accumulate = self.config.loop.accumulate
        batches = self.loader.epoch(self.progress.epoch, skip=self.progress.step_in_epoch * accumulate)
        while self.progress.step_in_epoch < self.steps_per_epoch:
            with errors_as(LoadingError, f"Loading the images of training step {self.progress.step + 1}"):
                images = [next(batches) for _ in range(accumulate)]
            with errors_as(NetworkError, f"Training step {self.progress.step + 1}"):
                self._step(images)
            every = self.config.checkpoint.every_steps
            # The folder belongs to this run from the first step on; saving right then shows that states can be written.
            due = self.progress.step == 1 or (every is not None and self.progress.step % every == 0)
            stop = self._stop_requested(guard)
            if due or stop:
                self.save()
            if stop:
                raise Interrupted(guard.received or signal.SIGTERM)  # another process may have received it

    def _step(self, batches: list[Batch]) -> None:
        """Make one optimizer step from the gradients of `batches`."""
        self.schedule.step_update(self.progress.step)
        total = sum(self._backward(batch, number, len(batches)) for number, batch in enumerate(batches))
        if not math.isfinite(total):
            raise TrainingError(
                f"The training loss is {total} at step {self.progress.step + 1}. Lower optimizer.lr "
                f"({self.config.optimizer.lr}), set optimizer.clip_grad, or use precision bf16 or fp32, "
                "in another output folder. The last training state was saved before that."
            )
        self._update()
        if self.progress.step == 0 and self.context.processes.is_main:
            self.context.folder.begin()
            self.log.truncate(0)
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        if self.ema is not None:
            # If given a step, timm overwrites the average at the first update, which is wanted only with warm-up.
            self.ema.update(self.model, step=self.progress.step if self.config.ema.warmup else None)
        self._log_step(total)

    def _backward(self, batch: Batch, number: int, count: int) -> float:
        """Add the gradients of batch `number` of the `count` in a step, and return its part of the step's loss."""
        self._note_unreadable(batch.unreadable)
        stream = (self.config.seed, self.progress.step, number, self.context.processes.rank)
        with self.autocast():
            loss: Tensor = self.objective.loss(self.model, self._on_device(batch), stream) / count
            penalty = self.sparsity.penalty()
        value = loss.item()
        self.scaler.scale(loss if penalty is None else loss + penalty / count).backward()
        return value

    def _update(self) -> None:
        """Clip the gradients if configured, and make the optimizer step."""
        clip = self.config.optimizer.clip_grad
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.sparsity.before_clipping()
            dispatch_clip_grad(self.model.parameters(), clip, mode=self.config.optimizer.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sparsity.after_step()
        self.optimizer.zero_grad(set_to_none=True)

    def _log_step(self, loss: float) -> None:
        progress = self.progress
        progress.loss_sum += loss
        progress.loss_count += 1
        self.context.reporter.step(progress.epoch, progress.step, loss, self._lr())
        # The last row of an epoch is written after the evaluation.
        if progress.step % self.config.loop.log_every == 0 and progress.step_in_epoch < self.steps_per_epoch:
            self._write_row({})

    def _finish_epoch(self, guard: InterruptGuard) -> None:
        metrics = self._evaluate(guard)
        if metrics is None:
            # All steps of this epoch are done in the saved state, so the resumed run begins with the evaluation.
            self.save()
            raise Interrupted(guard.received or signal.SIGTERM)
        progress = self.progress
        name = self.objective.best_metric
        value = float(metrics[name if self.ema is None else f"ema_{name}"])
        is_best = progress.note_value(value)
        self._write_row({**metrics, "train_unreadable": len(progress.unreadable)})
        self.context.reporter.epoch(progress.epoch, metrics)
        progress.epoch += 1
        progress.step_in_epoch = 0
        finished = progress.epoch == self.config.schedule.epochs
        if is_best or finished or progress.epoch % self.config.checkpoint.every_epochs == 0:
            self.save()
        if self.context.processes.is_main:
            save_curves(read_metrics(self.context.folder.metrics), self.context.folder.curves)

    def _evaluate(self, guard: InterruptGuard) -> Metrics | None:
        def stop() -> bool:
            return self._stop_requested(guard)

        metrics = self.objective.evaluate(self.model, "weights", stop)
        if metrics is None or self.ema is None:
            return metrics
        averaged = self.objective.evaluate(self.ema.module, "averaged weights", stop)
        return None if averaged is None else {**metrics, **{f"ema_{name}": value for name, value in averaged.items()}}

    # -- small helpers -----------------------------------------------------------------------------------------------

    def _stop_requested(self, guard: InterruptGuard) -> bool:
        """Return whether any process was asked to stop."""
        return self.context.processes.any(guard.received is not None)

    def _on_device(self, batch: Batch) -> Batch:
        layout = torch.channels_last if self.config.loop.channels_last else torch.contiguous_format
        images = batch.images.to(self.context.device, non_blocking=True, memory_format=layout)
        return Batch(images, batch.targets.to(self.context.device, non_blocking=True), batch.unreadable)

    def _note_unreadable(self, images: tuple[Unreadable, ...]) -> None:
        for image in images:
            if image.name not in self.progress.unreadable:
                self.context.reporter.message(f"Skipped an unreadable image: {image}")
                self.progress.unreadable.add(image.name)
        check_unreadable(self.progress.unreadable, self.config.max_unreadable, "training")

    def _lr(self) -> float:
        # Layer decay scales the rates of groups down; the largest is the nominal one.
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _write_row(self, metrics: Metrics) -> None:
        progress = self.progress
        loss = progress.take_mean_loss()
        row = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": loss, "lr": self._lr()}
        row.update(self.sparsity.figures(), **metrics)
        if self.context.processes.is_main:
            self.log.append(row)

    # -- training states ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the training state after the steps done so far."""
        if not self.context.processes.is_main:
            return
        self.log.sync()
        self.store.save_now(self.state(), self.progress.step, self.progress.best_step)

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and plain containers.

        Mixup and augmentation have no state, because they are functions of seed and position.
        """
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsity": self.sparsity.state(),
            "random": random_state(),
            "progress": self.progress.state(),
            "metrics_rows": self.log.rows,
            "world_size": self.context.processes.world_size,
            "data": self.context.fingerprint,
            "code": self.context.code,
            "saved_model": self.context.description,
            "settings": self.context.settings,
        }

    def _resume_or_start(self) -> None:
        state = self.store.load_latest() if self.context.folder.has_begun() else None
        if state is None:
            return
        self.load_state(state)
        self.context.reporter.message(
            f"Resuming {self.context.folder.path} after step {self.progress.step} of {self.total_steps}."
        )
        if state.get("code") != self.context.code:
            self.context.reporter.message("The steps so far ran with other code, or with other versions of libraries.")

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the training state `state`.

        Raises:
            CheckpointError: it belongs to a run with other settings, other training data or another number of processes.
        """
        self.context.folder.check_own(state, self.context.settings)
        self.context.folder.check_same_data(state["data"], self.context.fingerprint)
        if state["world_size"] != self.context.processes.world_size:
            raise CheckpointError(
                f"The run was saved by {state['world_size']} process(es), but is resumed by "
                f"{self.context.processes.world_size}. Resume it with the same number."
            )
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.sparsity.load_state(state.get("sparsity"))
        self.progress = Progress.from_state(state["progress"])
        self.log.truncate(state["metrics_rows"])
        restore_random_state(state["random"])


def _autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that creates the context of a forward pass in `precision`.

    Raises:
        ConfigError: the precision is not available on the device.
    """
    if precision == "fp32":
        return nullcontext
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"loop.precision is 'fp16', which needs a CUDA device, but the device is {device}. Use bf16 or fp32."
        )
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype)
