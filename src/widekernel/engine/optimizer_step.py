"""One optimizer step: gradients of several forward passes, a check that everything is finite, and the step itself.

All processes decide together whether a step is made, before anything changes. Usually the host reads that decision. On
CUDA, it does not wait: a fused optimizer skips the step on the device, and the host reads the number of skipped steps when
it writes a row of metrics (`deferred`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from widekernel.data.batches import Batch
from widekernel.engine.average import Average
from widekernel.engine.buffer_guard import BufferGuard
from widekernel.engine.config import OptimizerConfig
from widekernel.engine.meters import LossMeter
from widekernel.engine.nonfinite import first_nonfinite, first_of_all
from widekernel.engine.processes import Processes
from widekernel.engine.randomness import seed_forward
from widekernel.engine.sparsification import Sparsification
from widekernel.engine.task import Position, Task

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Trained:
    """What a step trains and changes.

    Args:
        model: the network
        wrapped: the network as it is called in training; with several processes, this averages gradients
        optimizer: the optimizer
        scaler: scaler of the losses, which does nothing except in fp16
        sparsity: the sparsification of the network
        average: the moving average of the weights, if there is one
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    sparsity: Sparsification
    average: Average | None


class OptimizerStep:
    """Performs optimizer steps.

    Args:
        trained: what the steps train
        task: the task, which computes the losses
        config: settings of clipping
        autocast: function that returns the context of a forward pass
        processes: the processes that train together
        deferred: let a fused optimizer skip steps on the device, so that the host need not wait

    Attributes:
        deferred: whether the next step is decided on the device; it can be turned off, and on again if `can_defer`
        can_defer: whether steps can be decided on the device
        meter: means of the losses since the last row of metrics
        nonfinite: description of the last thing that was not finite
    """

    def __init__(
        self,
        trained: Trained,
        task: Task,
        config: OptimizerConfig,
        autocast: Autocast,
        processes: Processes,
        deferred: bool,
    ) -> None:
        self._trained, self._task, self._config = trained, task, config
        self._autocast, self._processes = autocast, processes
        self._parameters = [each for group in trained.optimizer.param_groups for each in group["params"]]
        device = self._parameters[0].device
        self._guard = BufferGuard(trained.model)
        self.deferred = self.can_defer = deferred
        self._has_stepped = False
        self._skipped = torch.zeros(3, dtype=torch.int64, device=device)  # all, those in a row, most in a row
        self.meter = LossMeter(device)
        self.nonfinite = ""

    # -- counts of skipped steps -------------------------------------------------------------------------------------

    def skipped(self) -> tuple[int, int, int]:
        """Return the numbers of skipped steps: all, those in a row up to now, and the most in a row since the last call.

        This waits for the device.
        """
        total, row, most = self.counts()
        self._skipped[2] = row
        return total, row, most

    def counts(self) -> list[int]:
        """Return the numbers that `skipped` returns, without beginning a new count of the most in a row."""
        return [int(value) for value in self._skipped.tolist()]

    def set_counts(self, counts: Sequence[int]) -> None:
        """Continue from a result of `counts`."""
        self._skipped.copy_(torch.tensor(counts))

    # -- a step ------------------------------------------------------------------------------------------------------

    def make(
        self, batches: Sequence[Batch], positions: Sequence[Position], move: Callable[[Batch], Batch] = lambda batch: batch
    ) -> bool | None:
        """Perform the step of `batches`, one forward pass each, at `positions`.

        Args:
            batches: the micro-batches.
            positions: their positions.
            move: moves a micro-batch to the device.

        Returns:
            whether the step was made; `None` if the device decides and the host does not know yet.
        """
        self._guard.remember()
        losses: dict[str, Tensor] = {}
        for number, (batch, position) in enumerate(zip(batches, positions, strict=True)):
            final = number == len(positions) - 1
            with nullcontext() if final else self._processes.without_sync(self._trained.wrapped):
                for name, value in self._backward(move(batch), position, len(positions)).items():
                    losses[name] = losses[name] + value if name in losses else value
        norm = self._gradient_norm()
        made = self._all_finite(losses, norm)
        # Before the first step, the fused form of SGD has no momenta: if it skipped that step, they would stay unset.
        if self.deferred and (self._has_stepped or self._trained.optimizer.state):
            self._clip(norm)
            self._step_on_device(made)
            self.meter.add(losses, made)
            return None
        if bool(made):
            self._clip(norm)
            self._step()
            self.meter.add(losses)
            self._skipped[1] = 0
            return True
        self._skip(losses, batches)
        return False

    def _backward(self, batch: Batch, position: Position, count: int) -> dict[str, Tensor]:
        """Add the gradients of one of `count` forward passes, and return its part of the losses of the step."""
        trained = self._trained
        seed_forward(position)
        with self._autocast():
            losses = self._task.loss(trained.wrapped, batch, position)
            penalty = trained.sparsity.penalty()
        total = torch.stack([value.float() for value in losses.values()]).sum()
        trained.scaler.scale((total if penalty is None else total + penalty) / count).backward()
        return {name: value.detach() / count for name, value in losses.items()}

    def _gradient_norm(self) -> Tensor:
        """Unscale the gradients, and return their norm, a scalar on the device."""
        trained = self._trained
        trained.scaler.unscale_(trained.optimizer)
        if self._config.clip_grad is not None:
            trained.sparsity.before_clipping()
        return get_total_norm([each.grad for each in self._parameters if each.grad is not None])

    def _all_finite(self, losses: Mapping[str, Tensor], norm: Tensor) -> Tensor:
        """Return whether losses and gradients are finite: a scalar bool on the device, the same in all processes."""
        finite = torch.stack([value.float() for value in losses.values()]).isfinite().all() & norm.isfinite()
        return self._processes.all_finite(finite)

    def _clip(self, norm: Tensor) -> None:
        clip, mode = self._config.clip_grad, self._config.clip_mode
        if clip is not None and mode == "norm":
            clip_grads_with_norm_(self._parameters, clip, norm)
        elif clip is not None:
            dispatch_clip_grad(self._parameters, clip, mode=mode)

    def _step(self) -> None:
        trained = self._trained
        self._has_stepped = True
        trained.scaler.step(trained.optimizer)
        trained.scaler.update()
        trained.sparsity.after_step()
        trained.optimizer.zero_grad(set_to_none=True)

    def _skip(self, losses: Mapping[str, Tensor], batches: Sequence[Batch]) -> None:
        """Restore what the forward pass has changed, drop the gradients, and note what was not finite."""
        trained = self._trained
        self._guard.restore()
        self.nonfinite = first_of_all(first_nonfinite(losses, batches, trained.model), self._processes)
        trained.scaler.update()  # in fp16, lowers the scale
        trained.optimizer.zero_grad(set_to_none=True)
        row = int(self._skipped[1]) + 1
        self._skipped.copy_(torch.tensor([int(self._skipped[0]) + 1, row, max(row, int(self._skipped[2]))]))

    def _step_on_device(self, made: Tensor) -> None:
        """Let the optimizer make the step or not, as `made` says, and count it, without waiting for the device."""
        trained = self._trained
        optimizer = trained.optimizer
        # The interface through which a gradient scaler tells a fused optimizer to skip a step.
        optimizer.found_inf, optimizer.grad_scale = (~made).float(), None  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        self._guard.restore(made)
        optimizer.zero_grad(set_to_none=True)
        total, row, most = self._skipped.unbind()
        row = torch.where(made, torch.zeros_like(row), row + 1)
        self._skipped = torch.stack([total + ~made, row, torch.maximum(most, row)])

    def average(self, step: int, made: bool | None) -> None:
        """Add the weights after optimizer step `step`, counted from 1, to the moving average, unless it was skipped."""
        average = self._trained.average
        if average is None or made is False:
            return
        on_device = (self._skipped[1] == 0).float() if made is None else None
        average.update(self._trained.model, step, on_device)


def can_be_deferred(trained: Trained) -> bool:
    """Return whether a fused optimizer can skip steps on the device.

    The hooks of dynamic sparsity and the scaler of fp16 read the decision in any case.
    """
    fused = bool(getattr(trained.optimizer, "_step_supports_amp_scaling", False))
    # An average of bfloat16 weights is rounded at random, which cannot be undone.
    rounded = trained.average is not None and any(each.dtype == torch.bfloat16 for each in trained.model.parameters())
    return fused and not trained.scaler.is_enabled() and trained.sparsity.kind == "none" and not rounded
