"""Masks in Lightning's training loop, with the callback of docs/sparsity.md, and in Fabric's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.clients.support import CONFIG, documented, in_two, network, outside, samples
from tests.sparsity.nets import equal
from widekernel.sparsity import DynamicSparsity

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed"),
]


def module(seed: int) -> Any:
    """Return the small network as a LightningModule."""
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(seed)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            images, targets = batch
            return nn.functional.cross_entropy(self.net(images), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.05)

    return Classifier()


def fit(folder: Path, epochs: int, seed: int = 0, start: Path | None = None, **settings: Any) -> tuple[Any, Any]:
    """Train for epochs of 8 batches, or of 4 per process; return the Trainer and the callback."""
    from lightning.pytorch import Trainer

    callback = documented("Lightning")["Sparse"](CONFIG)
    settings = {"precision": "bf16-mixed", "gradient_clip_val": 1.0, "devices": 1, **settings}
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[callback], default_root_dir=str(folder), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module(seed), samples(), ckpt_path=None if start is None else str(start))
    return trainer, callback


def parts(trainer: Any, callback: Any) -> list[Any]:
    return [trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict(), callback.sparsity.state_dict()]


def trained_and_continued(folder: Path, **settings: Any) -> dict[str, Any]:
    trainer, callback = fit(folder, 1, **settings)
    done = {"steps": callback.sparsity.step, "updates": callback.sparsity.updates}
    done["outside"] = outside(trainer.lightning_module, callback.sparsity)
    trainer.save_checkpoint(folder / "state.ckpt")
    expected = parts(*fit(folder, 2, **settings))
    again = fit(folder, 2, seed=1, start=folder / "state.ckpt", **settings)
    return {**done, "continued": again[1].sparsity.step, "exact": equal(parts(*again), expected)}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_documented_callback_masks_and_continues_exactly(precision: str, tmp_path: Path) -> None:
    done = trained_and_continued(tmp_path, precision=precision)
    assert done == {"steps": 8, "updates": 4, "outside": 0, "continued": 16, "exact": True}


def test_accumulated_gradients_make_one_step(tmp_path: Path) -> None:
    trainer, callback = fit(tmp_path, 1, accumulate_grad_batches=2)
    assert (callback.sparsity.step, callback.sparsity.updates) == (4, 2)
    assert outside(trainer.lightning_module, callback.sparsity) == 0


def test_fabric(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net = network()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 1e-2))
    sparsity = DynamicSparsity(model, optimizer, CONFIG)
    for images, targets in fabric.setup_dataloaders(samples()):
        fabric.backward(nn.functional.cross_entropy(model(images), targets))
        optimizer.step()
        optimizer.zero_grad()
    assert (sparsity.step, sparsity.updates, outside(net, sparsity)) == (8, 4, 0)
    assert set(sparsity.masks) <= {name for name, _ in net.named_parameters()}


def in_each(rank: int, folder: Path) -> dict[str, Any]:
    return trained_and_continued(folder, devices=2, strategy="ddp")


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    for done in in_two(tmp_path, in_each):
        assert done == {"steps": 4, "updates": 2, "outside": 0, "continued": 8, "exact": True}
