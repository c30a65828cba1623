"""Training that the controller does not see before its first masks are drawn."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from tests.sparsity.nets import OPTIMIZERS, controlled, data, quick, small_net, train_step
from widekernel.errors import ArgumentError
from widekernel.sparsity import DynamicSparsity

SNIP = quick(init="snip")


def hooks(model: nn.Module) -> int:
    return sum(len(parameter._post_accumulate_grad_hooks or {}) for parameter in model.parameters())


def backward(model: nn.Module, step: int = 0) -> None:
    x, y = data(step)
    nn.functional.cross_entropy(model(x), y).backward()


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimization as commonly implemented: with its own steps, and those of a base optimizer."""

    def __init__(self, parameters, base: torch.optim.Optimizer) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = base

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.data.clone()
            parameter.add_(parameter.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data = self.state[parameter]["old"]
        self.base.step()

    def step(self, closure=None) -> None:
        raise NotImplementedError


def sharp_step(model: nn.Module, optimizer: Sharpness, step: int) -> None:
    backward(model, step)
    optimizer.first_step()
    optimizer.base.zero_grad()
    backward(model, step)
    optimizer.second_step()
    optimizer.base.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_of_another_optimizer_are_an_error(kind: str, steps: int) -> None:
    model, _, controller = controlled(SNIP)
    other = OPTIMIZERS[kind](model.parameters())
    for step in range(steps):
        train_step(model, other, step)
        other.zero_grad()
    for look in (controller.state_dict, controller.state_dict):
        with pytest.raises(
            ArgumentError, match=r"no masks are drawn yet, but .* were trained.*such as SAM, the base optimizer"
        ):
            look()


def test_a_step_before_the_last_backward_pass_is_noticed() -> None:
    model, _, controller = controlled(SNIP)
    train_step(model, OPTIMIZERS["sgd"](model.parameters()), 0)
    backward(model, 1)
    with pytest.raises(ArgumentError, match="no masks are drawn"):
        controller.state_dict()


def test_sharpness_aware_minimization() -> None:
    """Its own steps are an error; the controller must be made with its base optimizer."""
    model = small_net().train()
    base = OPTIMIZERS["sgd"](model.parameters())
    sharp = Sharpness(list(model.parameters()), base)
    blind = DynamicSparsity(model, sharp, SNIP)
    sharp_step(model, sharp, 0)
    with pytest.raises(ArgumentError, match="base optimizer"):
        blind.state_dict()
    blind.remove()
    controller = DynamicSparsity(model, base, SNIP)
    for step in range(3):
        sharp_step(model, sharp, step)
    assert controller.state_dict()["step"] == 3 and controller.updates == 1
    weights = dict(model.named_parameters())
    assert all(not weights[name][~mask].count_nonzero() for name, mask in controller.masks.items())


def test_loading_before_the_first_step_is_not_training() -> None:
    model, optimizer, controller = controlled(SNIP)
    model.load_state_dict(small_net(1).state_dict())
    assert controller.state_dict()["pending"]
    backward(model)
    backward(model, 1)
    assert controller.state_dict()["pending"]  # accumulated, not written
    model.double()  # moved, not written
    assert controller.state_dict()["pending"]
    model.float()
    optimizer.step()
    assert controller.state_dict()["step"] == 1 and hooks(model) == 0


def test_a_first_step_without_finite_gradients_is_not_unseen() -> None:
    model, optimizer, controller = controlled(SNIP)
    backward(model)
    model.fc.weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert controller.state_dict()["pending"]


def test_loading_a_pending_state_starts_again() -> None:
    model, _, controller = controlled(SNIP)
    weights, saved = copy.deepcopy(model.state_dict()), controller.state_dict()
    train_step(model, OPTIMIZERS["sgd"](model.parameters()), 0)
    model.load_state_dict(weights)
    controller.load_state_dict(saved)
    assert controller.state_dict()["pending"]


def test_copies_have_no_hooks_and_remove_removes_them() -> None:
    model, _, controller = controlled(SNIP)
    assert hooks(model) == len(controller.densities()) == 8
    assert hooks(copy.deepcopy(model)) == 0
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert hooks(torch.load(file, weights_only=False)) == 0
    controller.remove()
    assert hooks(model) == 0 and hooks(controlled(quick())[0]) == 0
