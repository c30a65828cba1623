"""Masks in Accelerate's training loop, as in docs/sparsity.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.support import documented, in_two, network, outside, samples
from tests.sparsity.nets import equal
from widekernel.sparsity import DynamicSparsity

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Accelerate is not installed"),
]


def loop(seed: int = 0, accumulate: int = 1) -> dict[str, Any]:
    """Run the documented loop for an epoch of 8 batches, or of 4 per process."""
    import accelerate
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.05)

    def on_cpu(**settings: Any) -> Accelerator:
        return Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **settings)

    original, accelerate.Accelerator = accelerate.Accelerator, on_cpu  # type: ignore[assignment,misc]
    try:
        return documented("Accelerate", model=model, optimizer=optimizer, loader=samples())
    finally:
        accelerate.Accelerator = original  # type: ignore[misc]


def again(made: dict[str, Any]) -> None:
    """Continue the documented loop with the objects that it created."""
    sparsity, accelerator, model, optimizer = (made[name] for name in ("sparsity", "accelerator", "model", "optimizer"))
    for images, targets in made["loader"]:
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.cross_entropy(model(images), targets))
            if accelerator.sync_gradients:
                sparsity.mask_gradients()
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()


def parts(made: dict[str, Any]) -> dict[str, Any]:
    return {name: made[name].state_dict() for name in ("model", "optimizer", "sparsity")}


def trained_and_continued(folder: Path) -> dict[str, Any]:
    whole = loop()
    done = {"steps": whole["sparsity"].step, "updates": whole["sparsity"].updates}
    done["outside"] = outside(whole["accelerator"].unwrap_model(whole["model"]), whole["sparsity"])
    done["wrapped"] = type(whole["optimizer"]).__name__, type(whole["sparsity"].optimizer).__name__
    whole["accelerator"].save_state(str(folder / "state"))
    again(whole)
    expected = parts(whole)
    resumed = loop(seed=1)  # other weights, moments and masks, replaced by loading
    resumed["accelerator"].load_state(str(folder / "state"))
    again(resumed)
    return {**done, "exact": equal(parts(resumed), expected)}


def test_the_documented_loop_masks_and_continues_exactly(tmp_path: Path) -> None:
    done = trained_and_continued(tmp_path)
    assert done == {
        "steps": 8, "updates": 4, "outside": 0, "wrapped": ("AcceleratedOptimizer", "AdamW"), "exact": True,
    }  # fmt: skip


def test_accumulated_gradients_make_one_step() -> None:
    made = loop(accumulate=4)
    assert (made["sparsity"].step, made["sparsity"].updates) == (2, 1)
    assert outside(made["model"], made["sparsity"]) == 0


def test_a_state_loaded_before_the_first_step(tmp_path: Path) -> None:
    """Weights, optimizer and masks are loaded in this order, after the controller's own masks have removed weights."""
    whole = loop()
    whole["accelerator"].save_state(str(tmp_path))
    from accelerate import Accelerator

    model = network(1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.05)
    accelerator = Accelerator(cpu=True)
    model.load_state_dict(whole["accelerator"].unwrap_model(whole["model"]).state_dict())
    model, optimizer = accelerator.prepare(model, optimizer)
    sparsity = DynamicSparsity(model, optimizer, whole["sparsity"].config)
    accelerator.register_for_checkpointing(sparsity)
    optimizer.load_state_dict(whole["optimizer"].state_dict())
    sparsity.load_state_dict(whole["sparsity"].state_dict())
    assert equal(model.state_dict(), whole["model"].state_dict())


def in_each(rank: int, folder: Path) -> dict[str, Any]:
    return trained_and_continued(folder)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    for done in in_two(tmp_path, in_each):
        assert (done["steps"], done["updates"], done["outside"], done["exact"]) == (4, 2, 0, True)
