"""Optimizer steps, in all the ways in which training loops make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.sparsity.nets import OPTIMIZERS, controlled, data, masks_of, quick, same, small_net, train_step
from widekernel.errors import ArgumentError
from widekernel.sparsity import DynamicSparsity

Step = Callable[[torch.optim.Optimizer, Callable[[], Any]], Any]


def first_backward(step: Step) -> Step:
    def call(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Any:
        closure()
        return step(optimizer, closure)

    return call


WAYS: dict[str, Step] = {
    "alone": first_backward(lambda optimizer, _: optimizer.step()),
    "None": first_backward(lambda optimizer, _: optimizer.step(None)),
    "closure=None": first_backward(lambda optimizer, _: optimizer.step(closure=None)),
    "closure": lambda optimizer, closure: optimizer.step(closure),
    "closure=": lambda optimizer, closure: optimizer.step(closure=closure),
}


def closure_for(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, calls: list | None = None):
    def closure() -> torch.Tensor:
        if calls is not None:
            calls.append(step)
        x, y = data(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
        loss.backward()
        return loss

    return closure


def check_masked(model: nn.Module, controller: DynamicSparsity) -> None:
    weights = dict(model.named_parameters())
    assert controller.masks
    for name, mask in controller.masks.items():
        assert not weights[name][~mask].any(), name


@pytest.mark.parametrize("settings", [{"init": "snip_mask", "growth": "gradient"}, {"init": "erk", "growth": "momentum"}])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_stepping_trains_alike(way: str, settings: dict) -> None:
    """They run in float64, where no two scores differ only by rounding."""
    found = []
    for how in ("alone", way):
        model = small_net().train().double()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        controller = DynamicSparsity(model, optimizer, quick(**settings))
        calls: list[int] = []
        for step in range(4):
            result = WAYS[how](optimizer, closure_for(model, optimizer, step, calls))
            assert (result is not None) == how.startswith("closure") * (how != "closure=None")
            check_masked(model, controller)
        assert calls == [0, 1, 2, 3] and (controller.step, controller.updates) == (4, 2)
        found.append((masks_of(controller), dict(model.named_parameters())))
    assert same(found[0][0], found[1][0])
    for name, weight in found[0][1].items():
        torch.testing.assert_close(weight, found[1][1][name], rtol=1e-9, atol=1e-12)


def test_gradients_of_a_closure_are_masked_before_the_optimizer_sees_them() -> None:
    model, optimizer, controller = controlled(quick(), "sgd")
    seen = []

    class Looking(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if n in controller.masks})
            return loss

    controller.remove()
    optimizer = Looking(model.parameters(), 0.1)
    controller = DynamicSparsity(model, optimizer, quick(), masks=controller.masks)
    assert optimizer.step(closure_for(model, optimizer, 0)).requires_grad
    assert seen[0].keys() == controller.masks.keys()
    for name, gradient in seen[0].items():
        assert gradient[controller.masks[name]].any() and not gradient[~controller.masks[name]].any()


def test_old_gradients_draw_no_masks_before_a_closure() -> None:
    found = []
    for stale in (False, True):
        model, optimizer, controller = controlled(quick(init="snip_mask"), "sgd")
        if stale:
            closure_for(model, optimizer, 7)()
        optimizer.step(closure_for(model, optimizer, 0))
        found.append(masks_of(controller))
    assert same(*found)


@pytest.mark.parametrize("way", ["alone", "closure"])
def test_a_step_without_gradients_draws_no_masks(way: str) -> None:
    """Some loops step before the first backward pass, for a scheduler: there are no gradients to score weights with."""
    model, optimizer, controller = controlled(quick(init="snip"), "sgd")
    optimizer.step() if way == "alone" else optimizer.step(lambda: None)
    assert controller.masks == {} and controller.active() == sum(p.numel() for p in controller._state.parameters.values())
    train_step(model, optimizer, 0)
    check_masked(model, controller)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_calls_the_base_class_counts_once(way: str) -> None:
    """Both classes call the hooks, but it is one step."""

    class Outer(torch.optim.AdamW):
        def step(self, closure=None):
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(1e-3)
            return loss

    model = small_net().train()
    torch.optim.AdamW(model.parameters())  # so that the base class has its hooks
    optimizer = Outer(model.parameters(), 1e-2)
    controller = DynamicSparsity(model, optimizer, quick(growth="gradient"))
    for step in range(4):
        WAYS[way](optimizer, closure_for(model, optimizer, step))
        check_masked(model, controller)
    assert (controller.step, controller.updates) == (4, 2) and sum(controller.grown.values())


def test_a_closure_that_is_called_many_times() -> None:
    model = small_net().train()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)
    controller = DynamicSparsity(model, optimizer, quick(init="snip", growth="gradient"))
    calls: list[int] = []
    for step in range(4):
        optimizer.step(closure_for(model, optimizer, step, calls))
        check_masked(model, controller)
    assert len(calls) > 8 and (controller.step, controller.updates) == (4, 2)


def test_a_closure_that_fails_is_not_counted_as_a_step() -> None:
    model, optimizer, controller = controlled(quick(), "sgd")

    def failing() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert controller.step == 0
    train_step(model, optimizer, 0)
    assert controller.step == 1
    check_masked(model, controller)


class Wrapper:
    """A wrapper like those of Accelerate and Lightning, from another library."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
        self.optimizer, self.factor = optimizer, factor

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def step(self, closure=None):
        result = self.optimizer.step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                # PyTorch does not count this write.
                parameter.data.copy_(parameter.data * self.factor + (self.factor != 1.0))
        return result


def test_the_optimizer_is_found_in_its_wrappers() -> None:
    model = small_net().train()
    inner = OPTIMIZERS["adamw"](model.parameters())
    wrapped = Wrapper(Wrapper(inner))
    controller = DynamicSparsity(model, wrapped, quick())
    assert controller.optimizer is inner
    for step in range(2):
        wrapped.step(closure_for(model, inner, step))
        check_masked(model, controller)
    assert controller.updates == 1


def test_a_wrapper_that_writes_to_weights_is_an_error() -> None:
    model = small_net().train()
    inner = OPTIMIZERS["adamw"](model.parameters())
    wrapped = Wrapper(inner, 0.5)
    DynamicSparsity(model, wrapped, quick(update_interval=100))
    wrapped.step(closure_for(model, inner, 0))
    with pytest.raises(ArgumentError, match="weights are nonzero outside the masks of 8 parameters"):
        wrapped.step(closure_for(model, inner, 1))


@pytest.mark.parametrize("first", ["scheduler", "controller"])
def test_schedulers_that_wrap_the_step(first: str) -> None:
    model = small_net().train()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    if first == "scheduler":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 10)
    controller = DynamicSparsity(model, optimizer, quick())
    if first == "controller":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 10)
    for step in range(4):
        train_step(model, optimizer, step)
        scheduler.step()
        check_masked(model, controller)
    assert (controller.step, controller.updates) == (4, 2)


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_variants_of_one_optimizer(kind: str) -> None:
    model = small_net().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **{kind: True})
    controller = DynamicSparsity(model, optimizer, quick(growth="momentum", init="snip"))
    for step in range(4):
        train_step(model, optimizer, step)
        check_masked(model, controller)
    assert controller.updates == 2
