"""Settings of the loop change what runs, not only what is stored: precision, layout, compilation, gradient checkpointing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.nonfinite_program import PLAIN
from tests.engine.tiny import TinyNet, array_source, make_config, make_trainer
from torch import nn

from widekernel.cli.main import main
from widekernel.engine import CheckpointConfig, EvaluationConfig, LoopConfig, RunData, ScheduleConfig, Trainer
from widekernel.engine.randomness import generators_restored, seed_forward
from widekernel.engine.task import Position
from widekernel.tasks import run as run_module
from widekernel.tasks.classification.task import Classification


def trainer_of(folder: Path, model: nn.Module | None = None, **loop: Any) -> Trainer:
    config = make_config(
        folder,
        augment=PLAIN,
        loop=LoopConfig(batch_size=6, micro_batch=3, device="cpu", **loop),
        schedule=ScheduleConfig(steps=3, warmup_steps=1),
        evaluation=EvaluationConfig(every_steps=100),
        checkpoint=CheckpointConfig(every_epochs=100),
    )
    return make_trainer(config, source=array_source(18), model=model)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_and_layout_inside_the_network(
    precision: str, dtype: torch.dtype, channels_last: bool, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, precision=precision, channels_last=channels_last)
    seen = Counter()

    def watch(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        for value in (inputs[0], output):
            seen[module.training, value.is_contiguous(memory_format=torch.channels_last)] += 1
        seen[module.training, output.dtype] += 1

    trainer.model.conv.register_forward_hook(watch)
    gradients = []
    trainer.model.conv.weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.dtype))
    trainer.run()
    assert seen[True, dtype] == 6 and seen[True, channels_last] == 12 and seen[True, not channels_last] == 0
    assert sum(count for (training, kind), count in seen.items() if training and isinstance(kind, torch.dtype)) == 6
    assert seen[False, channels_last] > 0 and seen[False, not channels_last] == 0  # evaluation, too
    assert seen[False, torch.float32] > 0 and seen[False, torch.bfloat16] == 0  # which is in full precision
    assert set(gradients) == {torch.float32} and trainer.model.conv.weight.dtype == torch.float32


def test_a_compiled_graph_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        ran["graphs"] += 1
        return lambda *arguments: (ran.update(calls=1), graph(*arguments))[1]

    compile_module = nn.Module.compile

    def compiled(module: nn.Module, mode: str) -> None:
        assert mode == "reduce-overhead"
        ran["modules"] += 1
        compile_module(module, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    torch.compiler.reset()
    results = []
    for mode in (None, "reduce-overhead"):
        trainer = trainer_of(tmp_path / str(mode), compile=mode)
        trainer.run()
        results.append(trainer.model.state_dict())
    assert ran["modules"] == 1 and 1 <= ran["graphs"] <= 4 and ran["calls"] >= 6
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_inductor_compiles(tmp_path: Path) -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, compiled = trainer_of(tmp_path / "plain", Still()), trainer_of(tmp_path / "compiled", Still(), compile="default")
    plain.run()
    assert not counters["stats"]
    compiled.run()
    assert counters["stats"]["unique_graphs"] >= 1 and counters["aot_autograd"]["ok"] >= 1
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


class Still(TinyNet):
    """The tiny network without dropout, whose random numbers depend on the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()


class Captured(BaseException):
    """Ends a run before the first step."""


def built(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, RunData]:
    """Return the network and the data that the command line builds for digits."""
    found: list[Any] = []

    class Stop:
        def __init__(self, model: nn.Module, task: object, data: RunData, *_: object) -> None:
            found.extend((model, data))
            raise Captured

    monkeypatch.setattr(run_module, "Trainer", Stop)
    common = ["--data.name", "digits", "--data.workers", "0", "--model.name", "slak_nano", "--loop.device", "cpu"]
    with pytest.raises(Captured):
        main(["train", *common, "--loop.batch_size", "4", "--output", "run", *arguments])
    return found[0], found[1]


def test_the_command_line_recomputes_activations_and_lays_out_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drop = ["--model.args.drop_path_rate", "0.3"]
    results = []
    for arguments in (drop, [*drop, "--model.grad_checkpointing", "true", "--loop.channels_last", "true"]):
        model, data = built(arguments, monkeypatch)
        model.train()
        calls = Counter()
        block = model.stages[0].blocks[0]
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.update(forward=1))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # recomputing updates running statistics twice
        batch = next(iter(data.train.epoch(0)))
        with generators_restored():
            position = Position(0, 0, 0)
            seed_forward(position)
            task = Classification(make_config(tmp_path, augment=PLAIN).augment, 0.1, 10)
            sum(task.loss(model, batch, position).values()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((calls["forward"], gradients, model))
    (once, plain, first), (twice, recomputed, second) = results
    assert (once, twice) == (1, 2)
    assert plain.keys() == recomputed.keys() and len(plain) > 50
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    for model, expected in ((first, False), (second, True)):
        # Other shapes have both layouts.
        weights = [each for each in model.parameters() if each.ndim == 4 and each.shape[1] > 1 and each.shape[2] > 1]
        assert weights and {each.is_contiguous(memory_format=torch.channels_last) for each in weights} == {expected}
