"""`loop.accelerate`: a run swaps faster layers in before its first step, trains the same weights, and resumes with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.nonfinite_program import PLAIN
from tests.engine.sequences import FindEnds
from tests.engine.test_resume import KillAt, Killed
from tests.engine.test_sparse_runs import dynamic, learned
from tests.engine.tiny import array_source, make_config, make_trainer, states_equal
from tests.native import needs_native
from tests.tasks.dense_settings import settings_of, write_scenes, write_settings
from tests.transforms.acceleration import replace_measurement
from torch import nn
from torch.testing import assert_close

from widekernel import ops
from widekernel.cli.main import main
from widekernel.cli.train import parse_config
from widekernel.data.batches import Batch
from widekernel.engine import (
    CheckpointConfig,
    EmaConfig,
    LoopConfig,
    Processes,
    RunContext,
    RunFolder,
    ScheduleConfig,
    Trainer,
)
from widekernel.engine.acceleration import Acceleration
from widekernel.engine.config import SparsityConfig
from widekernel.engine.error_context import NetworkError
from widekernel.engine.reporter import SilentReporter
from widekernel.errors import ConfigError
from widekernel.layers import DepthwiseConv2d, NativeBatchNorm2d, PointwiseGradConv2d, PointwiseLinear
from widekernel.ops.cpu import library
from widekernel.tasks.classification.config import ModelConfig
from widekernel.tasks.classification.task import Classification
from widekernel.tasks.results import write_results
from widekernel.transforms.acceleration import timing

WIDTH = 64  # enough channels for the threads of any test machine
SWAPPED = {
    "spatial": "DepthwiseConv2d",
    "norm": "NativeBatchNorm2d",
    "pointwise": "PointwiseGradConv2d",
    "head": "PointwiseLinear",
}


class Net(nn.Module):
    """A network with every kind of layer that can be swapped. Biases before the norm would have gradients of rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.spatial = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.pointwise = nn.Conv2d(WIDTH, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pointwise(self.norm(self.spatial(self.stem(x)))).relu().mean((2, 3)))


class InPlace(Net):
    """The same network, which changes its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.div_(4.0))


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def trainer_of(
    folder: Path,
    reporter: Any = None,
    accelerate: bool = True,
    sparsity: SparsityConfig | None = None,
    micro_batch: int = 3,
    steps: int = 3,
    network: type[Net] = Net,
) -> Trainer:
    config = make_config(
        folder,
        augment=PLAIN,
        model=ModelConfig(weights="given"),  # the tests build the network themselves
        loop=LoopConfig(batch_size=6, micro_batch=micro_batch, device="cpu", accelerate=accelerate),
        schedule=ScheduleConfig(steps=steps, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=1, keep=9),
        sparsity=sparsity or SparsityConfig(),
        ema=EmaConfig(decay=None if sparsity and sparsity.method == "semi_structured" else 0.5),
    )
    return make_trainer(config, source=array_source(18), model=network(), reporter=reporter, held_out=4)


def acceleration_of(network: nn.Module, folder: Path, listener: Listener) -> Acceleration:
    context = RunContext(RunFolder(folder), torch.device("cpu"), reporter=listener)
    config = LoopConfig(batch_size=6, accelerate=True)
    return Acceleration(network, None, Classification(PLAIN, 0.0, 3), config, nullcontext, context)


def images() -> Batch:
    return Batch((torch.randn(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)), 3)


def grad_is_best(after: nn.Module, _: torch.Tensor) -> bool:
    """Let `PointwiseConv2d` lose, so that its rival in training is chosen."""
    return type(after).__name__ != "PointwiseConv2d"


def kinds_of(model: nn.Module) -> dict[str, str]:
    own = (DepthwiseConv2d, NativeBatchNorm2d, PointwiseGradConv2d, PointwiseLinear)
    return {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, own)}


@pytest.fixture(autouse=True)
def _without_earlier_measurements() -> Iterator[None]:
    timing.forget()
    yield
    timing.forget()


@needs_native
def test_layers_are_swapped_once_and_the_weights_are_those_of_a_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, listener = replace_measurement(monkeypatch, grad_is_best), Listener()
    plain, fast = trainer_of(tmp_path / "plain", accelerate=False), trainer_of(tmp_path / "fast", listener)
    keys = list(fast.model.state_dict())
    plain.run()
    assert not asked and kinds_of(plain.model) == {}
    with ops.trace() as trace:
        fast.run()
    # Shapes are those of a forward pass, and backward passes count.
    assert {shape[0] for _, _, shape, _ in asked} == {3} and all(backward for *_, backward in asked)
    assert kinds_of(fast.model) == SWAPPED and kinds_of(fast.average.module).items() <= SWAPPED.items()
    assert "DepthwiseConv2d" in kinds_of(fast.average.module).values()
    # Two forward passes in each of three steps.
    assert len(trace.batch_norms) == 6
    assert Counter((call.backend, call.outputs) for call in trace.pointwise_grads) == {("native", 8): 6, ("native", 3): 6}
    assert list(fast.model.state_dict()) == keys == list(plain.model.state_dict())
    for name, value in plain.model.state_dict().items():
        assert_close(fast.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert fast.progress.best_step == plain.progress.best_step  # evaluations took place
    assert [text for text in listener.messages if "4 of 4 layers swapped" in text and "1 NativeBatchNorm2d" in text]
    assert fast.state()["acceleration"]["layers"] == SWAPPED


def test_a_network_that_changes_its_input_is_trained_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_measurement(monkeypatch, False)  # nothing is swapped, so that all is equal
    plain, fast = (trainer_of(tmp_path / str(on), accelerate=on, steps=2, network=InPlace) for on in (False, True))
    plain.run()
    fast.run()
    assert states_equal(fast.model.state_dict(), plain.model.state_dict())


@needs_native
def test_a_resumed_run_computes_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, grad_is_best)
    whole = trainer_of(tmp_path / "whole")
    whole.run()
    with pytest.raises(Killed):
        trainer_of(tmp_path / "cut", KillAt(2)).run()
    asked, listener = replace_measurement(monkeypatch, False), Listener()
    resumed = trainer_of(tmp_path / "cut", listener)
    resumed.run()
    assert not asked and kinds_of(resumed.model) == SWAPPED
    assert states_equal(resumed.state(), whole.state())
    assert "loop.accelerate: 4 layers swapped, as before." in listener.messages


@needs_native
def test_other_circumstances_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace_measurement(monkeypatch)
    with pytest.raises(Killed):
        trainer_of(tmp_path, KillAt(3), steps=5).run()
    # Larger forward passes are measured again.
    asked.clear()
    killer = KillAt(4)
    larger = trainer_of(tmp_path, killer, micro_batch=6, steps=5)
    with pytest.raises(Killed):
        larger.run()
    assert {shape[0] for _, _, shape, _ in asked} == {6} and kinds_of(larger.model)
    assert "loop.accelerate: timing layers anew (images in a forward pass: 3 before, 6 now) …" in killer.messages
    # The rest is trained without.
    plain = trainer_of(tmp_path, accelerate=False, micro_batch=6, steps=5)
    plain.run()
    assert kinds_of(plain.model) == {} and plain.progress.step == 5 and plain.state()["acceleration"] is None


@needs_native
def test_resuming_without_the_native_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, listener = replace_measurement(monkeypatch, grad_is_best), Listener()
    first, second = (acceleration_of(Net(), tmp_path, listener) for _ in range(2))
    first.choose(images(), 0)
    asked.clear()
    timing.forget()
    isa, off = library.load().isa, library.open_library({"WIDEKERNEL_NATIVE": "0"})
    monkeypatch.setattr(library, "load", lambda: off)
    second.load_state(first.state())
    assert second.is_due and second.state() == first.state()
    second.choose(images(), 0)
    assert asked and second.state()["circumstances"]["native"] == "none"
    assert [
        text for text in listener.messages if f"instructions of the native library: {isa}" in text and "none now" in text
    ]
    assert not [text for text in listener.messages if "as before" in text]


@needs_native
def test_resuming_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, grad_is_best)
    trainer_of(tmp_path).run()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    listener = Listener()
    resumed = trainer_of(tmp_path, listener)
    resumed.run()
    assert resumed.state()["acceleration"]["layers"] == SWAPPED  # those that were trained
    assert not [text for text in listener.messages if text.startswith("loop.accelerate")]
    for name in ("save_model", "save_curves"):
        monkeypatch.setattr(f"widekernel.tasks.results.{name}", lambda *_: None)
    saved: Any = None  # no model is written
    write_results(resumed, saved)
    assert json.loads((tmp_path / "acceleration.json").read_text())["layers"] == SWAPPED
    plain = trainer_of(tmp_path, accelerate=False)
    plain.run()
    write_results(plain, saved)
    assert not (tmp_path / "acceleration.json").exists()


@needs_native
def test_an_old_state_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, grad_is_best)
    trainer = trainer_of(tmp_path)
    state = trainer.state()
    del state["acceleration"]
    trainer.load_state(state)
    assert trainer.components.acceleration.is_due and trainer.state()["acceleration"] is None
    trainer.run()
    assert kinds_of(trainer.model) == SWAPPED


@needs_native
def test_layers_that_can_no_longer_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, grad_is_best)
    listener, network = Listener(), Net()
    first = acceleration_of(Net(), tmp_path, listener)
    first.choose(images(), 0)
    network.norm = nn.SyncBatchNorm(WIDTH)
    second = acceleration_of(network, tmp_path, listener)
    second.load_state(first.state())
    text = "loop.accelerate: 3 layers swapped, as before. Layers that cannot be swapped now: norm."
    assert listener.messages[-1] == text and type(network.norm) is nn.SyncBatchNorm
    assert second.state()["layers"] == kinds_of(network) == {name: SWAPPED[name] for name in SWAPPED if name != "norm"}


def test_no_layer_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, False)
    listener = Listener()
    acceleration_of(Net(), tmp_path, listener).choose(images(), 0)
    assert listener.messages[0] == "loop.accelerate: timing layers …"
    assert "0 of 4 layers swapped; none of those measured is faster in another way" in listener.messages[1]


@needs_native
def test_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, grad_is_best)
    moving = trainer_of(tmp_path / "dynamic", sparsity=dynamic(update_interval=1))
    moving.run()
    assert kinds_of(moving.model) == SWAPPED
    weights, masks = dict(moving.model.named_parameters()), moving.sparsity.masks()
    assert moving.sparsity.controller.updates > 0 and masks
    assert all(not weights[name][~mask].any() for name, mask in masks.items())
    frozen = trainer_of(tmp_path / "learned", sparsity=learned())
    frozen.run()
    # Masked layers are parametrized, and left alone.
    assert kinds_of(frozen.model).items() <= SWAPPED.items() and "norm" in kinds_of(frozen.model)
    assert "pointwise" not in kinds_of(frozen.model)
    assert type(frozen.sparsity.finished(frozen.model).pointwise) is nn.Conv2d


def context_of(folder: Path, processes: Processes) -> RunContext:
    return RunContext(RunFolder(folder), torch.device("cpu"), processes)


class Second(Processes):
    """Process 1 of two, which receives what process 0 has found."""

    found: Any = None

    def from_main(self, function: Any) -> Any:
        return Second.found


@needs_native
def test_process_0_chooses_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace_measurement(monkeypatch, grad_is_best)
    task, config = Classification(PLAIN, 0.0, 3), LoopConfig(batch_size=6, accelerate=True)
    batch = Batch((torch.randn(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)), 3)
    first = Processes(0, 2)
    monkeypatch.setattr(Processes, "from_main", lambda _, function: setattr(Second, "found", function()) or Second.found)
    networks = []
    for processes in (first, Second(1, 2)):
        network = Net()
        acceleration = Acceleration(network, None, task, config, nullcontext, context_of(tmp_path, processes))
        acceleration.choose(batch, 0)
        networks.append((kinds_of(network), acceleration.state(), len(asked)))
    assert networks[0] == networks[1] and networks[1][0] == SWAPPED and networks[1][1]["circumstances"]["images"] == 3


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"loop.accelerate is true, and loop.compile is 'default'.*Choose one"):
        LoopConfig(accelerate=True, compile="default")
    with pytest.raises(ConfigError, match=r"loop.accelerate and loop.deterministic.*Choose one"):
        LoopConfig(accelerate=True, deterministic=True)
    config, context = LoopConfig(batch_size=6, accelerate=True), context_of(tmp_path, Processes())
    batch = Batch((torch.randn(2, 5, 8, 8), torch.zeros(2, dtype=torch.long)), 2)
    with pytest.raises(ConfigError, match=r"gives no input of the network.*FindEnds.example"):
        Acceleration(Net(), None, FindEnds(), config, nullcontext, context).choose(batch, 0)
    network, task = Net(), Classification(PLAIN, 0.0, 3)
    acceleration = Acceleration(network, None, task, config, nullcontext, context)
    with pytest.raises(RuntimeError, match=r"expected input\[2, 5, 8, 8\]"):  # the network's own error, for `errors_as`
        acceleration.choose(batch, 0)
    monkeypatch.setattr(task, "example", lambda _: [])
    with pytest.raises(ConfigError, match=r"measured: the result of Classification.example is a list.*Set it to false"):
        acceleration.choose(batch, 0)
    assert kinds_of(network) == {}


class Small(Net):
    """A network for larger images than those of the tests."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.conv2d(x, torch.ones(3, 3, 9, 9)))


def test_parameters_that_are_divided_among_processes(tmp_path: Path) -> None:
    class DTensor(torch.Tensor): ...

    class Divided(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = nn.Parameter(self.head.weight.detach().as_subclass(DTensor))

    with pytest.raises(ConfigError, match=r"head.weight is divided.*process 0 runs the network alone. Set it to false"):
        trainer_of(tmp_path, network=Divided)


def test_a_network_that_fails(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"Choosing the fastest layers \(loop.accelerate\) failed.*raise data.input_size"):
        trainer_of(tmp_path, network=Small).run()


@pytest.mark.parametrize("kind", ["segmentation", "fcos", pytest.param("mask_rcnn", marks=pytest.mark.slow)])
def test_dense_tasks_through_the_command_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace_measurement(monkeypatch)
    file = write_settings(tmp_path / "run.yaml", settings_of(kind, write_scenes(tmp_path), steps=2))
    arguments = ["--config", file, "--output", str(tmp_path / "run"), "--loop.accelerate", "true"]
    assert parse_config(arguments).loop.accelerate
    assert main(["train", *arguments]) == 0, capsys.readouterr().err
    shown = " ".join(capsys.readouterr().err.split())
    assert "loop.accelerate:" in shown and "DepthwiseConv2d" in shown
    record = (tmp_path / "run" / "acceleration.json").read_text()
    assert '"device": "cpu"' in record and '"DepthwiseConv2d"' in record
    assert (nn.Conv2d, DepthwiseConv2d) in {pair[:2] for pair in asked}
