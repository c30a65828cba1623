"""Steps that log nothing never make the host wait for the device.

On a CPU, every way to read a value of a tensor counts: operators with results on the host or of unknown size, and methods of
tensors. On a CUDA device, PyTorch itself raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.nonfinite_program import PLAIN
from tests.engine.tiny import array_source, make_config, make_trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from widekernel.engine import (
    CheckpointConfig,
    EmaConfig,
    EvaluationConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    Trainer,
)
from widekernel.engine import components as components_module
from widekernel.engine.optimization import create_optimizer
from widekernel.engine.optimizer_step import can_be_deferred

METHODS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "nonzero",
    "equal",
}
OPERATORS = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique", "allclose")


class MethodWatch(TorchFunctionMode):
    """Records calls of methods that read values."""

    def __init__(self, found: list[str]) -> None:
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in METHODS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class OperatorWatch(TorchDispatchMode):
    """Records operators that read values, and counts all."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found, self.count = found, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if function.overloadpacket.__name__.startswith(OPERATORS):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def watch_steps(trainer: Trainer, watched: Callable[[], Any]) -> list[int]:
    """Run what follows the loading of a batch within `watched`, except in the first and last step, which save.

    Returns:
        a list to which the numbers of these steps are added.
    """
    steps: list[int] = []

    def within(function: Callable[..., Any], done: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            number = trainer.progress.step + 1 - done
            if number in (1, trainer.length.steps):
                return function(*arguments)
            steps.append(number)
            with watched():
                return function(*arguments)

        return call

    trainer.step.make = within(trainer.step.make, 0)  # type: ignore[method-assign]
    trainer.step.average = within(trainer.step.average, 0)  # type: ignore[method-assign]
    trainer._after_step = within(trainer._after_step, 1)  # type: ignore[method-assign]
    return steps


def trainer_of(folder: Path, optimizer: OptimizerConfig, log_every: int, **changes: Any) -> Trainer:
    settings = {
        "augment": PLAIN,
        "optimizer": optimizer,
        "ema": EmaConfig(decay=0.5),
        "loop": LoopConfig(batch_size=6, micro_batch=3, log_every=log_every, device="cpu"),
        "schedule": ScheduleConfig(steps=8, warmup_steps=2),
        "checkpoint": CheckpointConfig(every_epochs=100),
        "evaluation": EvaluationConfig(every_steps=100),
    }
    return make_trainer(make_config(folder, **{**settings, **changes}), source=array_source(18))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainers use fused optimizers on the CPU."""
    monkeypatch.setattr(
        components_module, "create_optimizer", lambda trained, config, fused: create_optimizer(trained, config, fused=True)
    )


def values_read(trainer: Trainer, deferred: bool) -> tuple[list[str], int]:
    """Return what reads values between steps 2 and 7, and the number of operators that ran."""
    trainer.step.deferred = trainer.step.can_defer = deferred
    found: list[str] = []
    operators = OperatorWatch(found)

    @contextmanager
    def watched() -> Any:
        with MethodWatch(found), operators:
            yield

    steps = watch_steps(trainer, watched)
    trainer.run()
    assert steps == [step for step in range(2, 8) for _ in range(3)]
    return found, operators.count


CLIPPED = {
    "adamw": OptimizerConfig(lr=0.01, clip_grad=1.0),
    "sgd": OptimizerConfig(name="sgd", lr=0.01, clip_grad=0.1, clip_mode="value"),
    "agc": OptimizerConfig(lr=0.01, clip_grad=0.1, clip_mode="agc"),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_nothing_is_read_in_steps_that_log_nothing(name: str, tmp_path: Path, fused: None) -> None:
    trainer = trainer_of(tmp_path, CLIPPED[name], log_every=100)
    assert can_be_deferred(trainer.components.trained)
    found, count = values_read(trainer, deferred=True)
    assert found == [] and count > 6 * 100


def test_what_is_read_is_seen(tmp_path: Path, fused: None) -> None:
    found, _ = values_read(trainer_of(tmp_path / "rows", CLIPPED["adamw"], log_every=3), deferred=True)
    assert "tolist" in found
    found, _ = values_read(trainer_of(tmp_path / "host", CLIPPED["adamw"], log_every=100), deferred=False)
    assert found.count("__bool__") == 6 or found.count("aten._local_scalar_dense.default") == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CLIPPED)
def test_a_cuda_device_is_not_waited_for(name: str, precision: str, tmp_path: Path) -> None:
    loop = LoopConfig(batch_size=6, micro_batch=3, log_every=100, device="cuda", precision=precision, channels_last=True)
    trainer = trainer_of(tmp_path, CLIPPED[name], 100, loop=loop)
    assert trainer.step.deferred

    @contextmanager
    def watched() -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    steps = watch_steps(trainer, watched)
    trainer.run()
    assert len(steps) == 6 * 3
