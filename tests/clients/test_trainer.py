"""Masks in the Trainer of transformers, with the callback of docs/sparsity.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.clients.support import CONFIG, Samples, documented, in_two, network, outside
from tests.sparsity.nets import equal

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(
        not (importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate")),
        reason="transformers and Accelerate are not installed",
    ),
]


class Classifier(nn.Module):
    """The small network with the interface that the Trainer expects."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = network(seed)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.net(x)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def trainer(folder: Path, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """Return a Trainer of 8 steps and its callback; the states of steps 4 and 8 are saved."""
    from transformers import Trainer, TrainingArguments

    settings = {"max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 4, "bf16": True, **settings}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=100, learning_rate=1e-2,
        weight_decay=0.05, **settings,
    )  # fmt: skip
    callback = documented("transformers' Trainer")["Sparse"](CONFIG)
    return Trainer(Classifier(seed), arguments, train_dataset=Samples(True), callbacks=[callback]), callback


def saved(folder: Path, step: int) -> list[Any]:
    """Return the weights, moments and masks of a checkpoint."""
    place = folder / f"checkpoint-{step}"
    return [load_file(place / "model.safetensors"), *(torch.load(place / f"{n}.pt") for n in ("optimizer", "sparsity"))]


def trained_and_continued(folder: Path) -> dict[str, Any]:
    whole, callback = trainer(folder)
    whole.train()
    done = {"steps": callback.sparsity.step, "updates": callback.sparsity.updates}
    done["outside"] = outside(whole.model, callback.sparsity)
    done["wrapped"] = type(whole.optimizer).__name__, type(callback.sparsity.optimizer).__name__
    expected = saved(folder, 8)
    again, callback = trainer(folder, seed=1)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    done["continued"] = callback.sparsity.step
    return {**done, "exact": equal(saved(folder, 8), expected) and equal(callback.sparsity.state_dict(), expected[2])}


def test_the_documented_callback_masks_and_continues_exactly(tmp_path: Path) -> None:
    done = trained_and_continued(tmp_path)
    assert done == {
        "steps": 8, "updates": 4, "outside": 0, "wrapped": ("AcceleratedOptimizer", "AdamW"), "continued": 8, "exact": True,
    }  # fmt: skip


def test_checkpoint_without_masks_is_an_error(tmp_path: Path) -> None:
    trainer(tmp_path)[0].train()
    (tmp_path / "checkpoint-4" / "sparsity.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"sparsity\.pt"):
        trainer(tmp_path)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def in_each(rank: int, folder: Path) -> dict[str, Any]:
    return trained_and_continued(folder)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    for done in in_two(tmp_path, in_each):
        assert (done["steps"], done["updates"], done["outside"], done["exact"]) == (8, 4, 0, True)
