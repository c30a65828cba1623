"""What a step must not repeat: work that costs time in every step, and changes nothing."""

import random

import numpy as np
import pytest
import torch
from tests.engine.tiny import TinyNet, make_config, make_trainer, states_equal

from widekernel.data.seeding import STEP_STREAM, derive_seed
from widekernel.engine.randomness import generators_restored, seed_forward
from widekernel.engine.task import Position


class WatchedNet(TinyNet):
    """Network that counts switches to training mode, and notes the modes in which it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.switches, self.modes = 0, []

    def train(self, mode: bool = True) -> "WatchedNet":
        self.switches += mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append({module.training for module in self.modules()})
        return super().forward(x)


def test_modules_are_switched_to_training_once_although_evaluations_switch_them_back(tmp_path):
    model = WatchedNet()
    model.norm.eval()  # a mode left behind must not stay
    trainer = make_trainer(make_config(tmp_path / "run"), model=model)
    trainer.run()
    assert trainer.progress.step == 9
    assert model.switches == 1
    assert model.modes.count({True}) == 9 * 3  # three micro-batches per step
    assert model.modes.count({False}) == 3 * 3  # three evaluations of three batches
    assert len(model.modes) == 9 * 3 + 3 * 3


@pytest.mark.parametrize("cuda", [False, True], ids=["CUDA-unused", "CUDA-in-use"])
def test_forward_passes_are_seeded_as_by_manual_seed_without_its_stack_traces(monkeypatch, cuda):
    seed = derive_seed(STEP_STREAM, 3, 7, 8)
    with generators_restored():
        torch.manual_seed(seed)
        expected = torch.rand(5)
        seeded: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
        monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("torch.manual_seed was called"))
        seed_forward(Position(3, 7, 8))
        drawn = torch.rand(5), random.random(), np.random.random()
        seed_forward(Position(3, 7, 8))
        again = torch.rand(5), random.random(), np.random.random()
        monkeypatch.undo()
    assert torch.equal(drawn[0], expected)
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]
    assert seeded == ([seed] * 2 if cuda else [])


def test_optimizers_are_fused_and_stay_so_after_loading_a_state_of_another_implementation(tmp_path):
    trainer = make_trainer(make_config(tmp_path / "run"))
    trainer.run()
    optimizer = trainer.components.trained.optimizer
    assert all(group["fused"] for group in optimizer.param_groups)
    state = trainer.state()
    for group in state["optimizer"]["param_groups"]:
        group["fused"], group["foreach"], group["lr"] = None, False, 0.25
    other = make_trainer(make_config(tmp_path / "other"))
    other.components.load_state(state, other.context.processes)
    loaded = other.components.trained.optimizer
    assert [(group["fused"], group["foreach"], group["lr"]) for group in loaded.param_groups] == [(True, None, 0.25)] * 2
    assert states_equal(loaded.state_dict()["state"], optimizer.state_dict()["state"])
