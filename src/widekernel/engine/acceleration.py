"""The layers of a run that are fastest on its machine (`loop.accelerate`): chosen once, and kept in its training states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from widekernel.data.batch_plan import BatchPlan
from widekernel.data.batches import Batch
from widekernel.engine.config import LoopConfig
from widekernel.engine.error_context import NetworkError
from widekernel.engine.run_context import RunContext
from widekernel.engine.task import Task
from widekernel.errors import ArgumentError, ConfigError, in_short
from widekernel.ops.cpu import library
from widekernel.transforms.acceleration import AccelerationReport, accelerate, swap_layers

_NAMES = {
    "device": "device",
    "images": "images in a forward pass",
    "torch": "version of PyTorch",
    "gpu": "GPU",
    "threads": "threads",
    "instructions": "instructions of PyTorch",
    "native": "instructions of the native library",
}
"""What messages call the circumstances of a measurement."""


class Acceleration:
    """Swaps layers of the network, and of its average, for the implementations that are fastest in training.

    Process 0 measures on its first batch, between two steps; then all processes swap the same layers. Layers keep their
    parameters, so optimizers, masks and gradient averaging need not know. The choices belong to the training state: a run
    that is resumed under the same circumstances computes as before.

    Args:
        model: the network, which is not compiled.
        average: the network of averaged weights, if there is one.
        task: gives the example to measure with.
        config: whether to swap anything, and the size of batches.
        autocast: function that returns the context of a forward pass.
        context: device, processes and reporter.

    Attributes:
        is_due: whether layers are still to be chosen.
    """

    def __init__(
        self,
        model: nn.Module,
        average: nn.Module | None,
        task: Task,
        config: LoopConfig,
        autocast: Callable[[], AbstractContextManager],
        context: RunContext,
    ) -> None:
        self._model, self._average, self._task = model, average, task
        self._config, self._autocast, self._context = config, autocast, context
        self._state: dict[str, Any] | None = None
        self._changed = ""
        self.is_due = config.accelerate

    def choose(self, batch: Batch, step: int) -> None:
        """Measure, and swap layers; all processes call this together.

        Args:
            batch: batch of a forward pass in training, on the device of the network, which is in training mode.
            step: optimizer steps done.

        Raises:
            ConfigError: the task has no example for the network, or nothing can be measured, as in a compiled network.
            Exception: the network fails on the example; this is the network's own error if `NetworkError` restates it.
        """
        context = self._context
        context.processes.note(step, "choosing the fastest layers")
        context.reporter.message(f"loop.accelerate: timing layers{self._changed} …")
        report, circumstances = context.processes.from_main(lambda: (self._measured(batch), self._circumstances()))
        self._swap({row.name: row.after for row in report.swapped if row.after is not None}, circumstances)
        kinds = Counter(row.after for row in report.swapped)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        context.reporter.message(f"loop.accelerate: {report.summary()}{named and f' {named}.'}")

    def state(self) -> dict[str, Any] | None:
        """Return the circumstances of the measurement, and the class of each swapped layer by name; `None` before it."""
        return self._state

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Swap the layers of a result of `state`, unless it was measured under other circumstances or nothing is due.

        A training state of an earlier version has `None`: layers are then chosen before the next step.
        """
        if not self.is_due or state is None:
            return
        now = self._context.processes.from_main(self._circumstances)
        then = state["circumstances"]
        changed = [_difference(key, then, value) for key, value in now.items() if then.get(key) != value]
        if changed:
            # If no steps remain, nothing is chosen, and the layers of the state are those that were trained.
            self._state, self._changed = state, f" anew ({'; '.join(changed)})"
            return
        swapped = self._swap(state["layers"], now)
        left = [name or "(itself)" for name in state["layers"] if name not in swapped]
        stay = f" Layers that cannot be swapped now: {', '.join(left)}." if left else ""
        count = "1 layer" if len(swapped) == 1 else f"{len(swapped)} layers"
        self._context.reporter.message(f"loop.accelerate: {count} swapped, as before.{stay}")

    def _measured(self, batch: Batch) -> AccelerationReport:
        example = self._task.example(batch)
        if example is None:
            raise ConfigError(
                "loop.accelerate is true, but the task gives no input of the network to measure with: set it to false, or "
                f"implement {type(self._task).__name__}.example."
            )
        try:
            with self._autocast():
                return accelerate(self._model, example, blocks=False)[1]
        except ArgumentError as error:
            cause = error.__cause__
            if isinstance(cause, NetworkError.causes):
                raise cause from None  # the network failed as it would in training: the caller says what to do
            # Users of the command line never see the argument that the text is about.
            text = str(error).splitlines()[0].replace("example_input", f"the result of {type(self._task).__name__}.example")
            reason = in_short(cause) if isinstance(cause, Exception) else text
            raise ConfigError(
                f"loop.accelerate is true, but nothing can be measured: {reason.rstrip('.')}. Set it to false."
            ) from error

    def _circumstances(self) -> dict[str, Any]:
        """Return what the times of layers depend on, apart from the settings that a resumed run cannot change."""
        context, config = self._context, self._config
        plan = BatchPlan(config.batch_size, config.micro_batch, context.processes.world_size)
        found = {"device": context.device.type, "images": plan.per_pass, "torch": str(torch.__version__)}
        if context.device.type == "cuda":
            return {**found, "gpu": torch.cuda.get_device_name(context.device)}
        if context.device.type != "cpu":
            return found
        native = library.load()
        # Without OpenMP, calls of the native library run on one thread.
        kernels = native.isa + ("" if native.threads_available else " without OpenMP") if native.reason is None else "none"
        instructions = torch.backends.cpu.get_cpu_capability()
        return {**found, "threads": torch.get_num_threads(), "instructions": instructions, "native": kernels}

    def _swap(self, layers: dict[str, str], circumstances: dict[str, Any]) -> tuple[str, ...]:
        """Swap layers in all networks; return the names of those that are swapped now, which the state then holds."""
        swapped = swap_layers(self._model, layers)
        if self._average is not None:
            swap_layers(self._average, layers)
        self._state = {"circumstances": circumstances, "layers": {name: layers[name] for name in swapped}}
        self.is_due = False
        return swapped


def _difference(key: str, then: dict[str, Any], now: Any) -> str:
    before = f"{then[key]} before, " if key in then else ""
    return f"{_NAMES[key]}: {before}{now} now"
