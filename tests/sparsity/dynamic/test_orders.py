"""Making, loading, moving, copying and replacing in any order: live weights are never lost silently."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from tests.sparsity.dynamic.test_resume import bf16_steps, build, equal
from tests.sparsity.nets import OPTIMIZERS, controlled, masks_of, quick, same, small_net, train_step, weights_outside
from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig, published_slak
from widekernel.sparsity.dynamic.state import MaskState

PARTS = ["model", "optimizer", "average", "make", "controller"]
ORDERS = [order for order in itertools.permutations(PARTS) if order.index("make") < order.index("controller")]
SETTINGS = [
    {"init": "erk", "growth": "gradient"},
    {"init": "magnitude", "growth": "momentum", "block": "kernel"},
    {"init": "from_weights", "growth": "random"},
    {"init": "uniform", "growth": "random", "rule": "published"},
    {"init": "snip", "growth": "gradient"},
]


def states(parts: dict) -> dict:
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- resuming ----------------------------------------------------------------------------------------------------------


# One setting in every order, the others in every fourth; the slow ones in all of them.
CASES = [(settings, ORDERS[number % 4 :: 4] if number else ORDERS) for number, settings in enumerate(SETTINGS)]
CASES += [pytest.param(settings, ORDERS, marks=pytest.mark.slow) for settings in SETTINGS[1:]]


@pytest.mark.parametrize(
    ("settings", "orders"),
    CASES,
    ids=lambda value: f"{value['init']}-{value['growth']}" if isinstance(value, dict) else str(len(value)),
)
def test_a_run_resumes_in_any_order_of_making_and_loading(settings: dict, orders: list) -> None:
    """The orders are tried right after an update, when grown weights are zero and new masks differ from the run's."""
    config = DynamicSparsityConfig(sparsity=0.5, update_interval=3, **settings)
    whole = build(config)
    if settings["init"] == "from_weights":
        for parameter in whole["controller"]._state.parameters.values():
            parameter.data[..., ::2] = 0
        whole["controller"].remove()
        whole["controller"] = DynamicSparsity(whole["model"], whole["optimizer"], config, averages=[whole["average"]])
    bf16_steps(whole, 0, 3, 1)
    saved = states(whole)
    assert saved["controller"]["updates"] == 1
    bf16_steps(whole, 3, 5, 1)
    expected = states(whole)
    for number, order in enumerate(orders):
        parts = build(config)
        parts.pop("controller").remove()
        parts["model"].load_state_dict(small_net().state_dict())
        for name in order:
            if name == "make":
                made = DynamicSparsity(parts["model"], parts["optimizer"], config, averages=[parts["average"]])
                parts["controller"] = made
            else:
                parts[name].load_state_dict(copy.deepcopy(saved[name]))
        assert equal(parts["model"].state_dict(), saved["model"]), order
        assert equal(parts["controller"].state_dict(), saved["controller"]), order
        assert equal(parts["average"].state_dict(), saved["average"]), order
        if number % 6 == 0:
            bf16_steps(parts, 3, 5, 1)
            assert equal({name: parts[name].state_dict() for name in expected}, expected), order


@pytest.mark.parametrize("between", ["nothing", "bfloat16", "channels_last", "copy", "twice"])
def test_weights_removed_by_first_masks_are_restored(between: str) -> None:
    """This works even if the network was converted, or another state was loaded, in between."""
    model, optimizer, controller = controlled(quick(growth="random"))
    for step in range(4):
        train_step(model, optimizer, step)
    weights, state = copy.deepcopy(model.state_dict()), controller.state_dict()
    fresh = small_net(1).train()
    fresh.load_state_dict(weights)
    other = DynamicSparsity(fresh, OPTIMIZERS["adamw"](fresh.parameters()), quick(seed=5, init="erk"))
    assert not equal(fresh.state_dict(), weights) and weights_outside(fresh, other) == 0
    if between == "bfloat16":
        fresh.bfloat16()
        weights = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    elif between == "channels_last":
        fresh.to(memory_format=torch.channels_last)
    elif between == "copy":
        copy.deepcopy(fresh)
    elif between == "twice":
        other.load_state_dict(controlled(quick(seed=9))[2].state_dict())
        assert not equal(fresh.state_dict(), weights)
    other.load_state_dict(state)
    assert equal(fresh.state_dict(), weights)
    assert same(masks_of(other), masks_of(controller))


def test_a_state_without_counts_of_zeros_loads() -> None:
    """Older versions wrote such states."""
    model, optimizer, controller = controlled(quick())
    train_step(model, optimizer, 0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), controller.state_dict()))
    assert set(saved[2].pop("live_zeros")) == set(controller.masks)
    again = controlled(quick(seed=4), seed=1)
    for part, state in zip(again, saved):
        part.load_state_dict(state)
    train_step(again[0], again[1], 1)
    assert again[2].step == 2 and weights_outside(again[0], again[2]) == 0


def test_removed_weights_are_dropped_after_the_first_step() -> None:
    model, optimizer, controller = controlled(quick())
    assert controller._removed is not None
    train_step(model, optimizer, 0)
    assert controller._removed is None


def test_moments_loaded_from_dense_training_do_not_move_removed_weights() -> None:
    dense = small_net().train()
    former = OPTIMIZERS["adamw"](dense.parameters())
    for step in range(2):
        train_step(dense, former, step)
    model, optimizer, controller = controlled(quick(update_interval=100))
    train_step(model, optimizer, 2)
    optimizer.load_state_dict(former.state_dict())
    for step in range(3, 5):
        train_step(model, optimizer, step)
        assert weights_outside(model, controller) == 0
    assert optimizer.state[model.fc.weight]["step"] == 4


def test_layers_that_were_left_dense_elsewhere() -> None:
    """With scores from other weights (here, another seed), other layers may be drawn almost dense."""
    made = [controlled(published_slak(0.02, init="uniform", seed=seed)) for seed in range(6)]
    model, _, controller = max(made, key=lambda parts: len(parts[2].masks))
    fresh, _, other = min(made, key=lambda parts: len(parts[2].masks))
    assert set(controller.masks) - set(other.masks)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(controller.state_dict())
    assert same(masks_of(other), masks_of(controller)) and list(other.masks) == list(controller.masks)
    assert all(not choice.reason for choice in other.selection if choice.name in controller.masks)
    train_step(fresh, other.optimizer, 0)
    assert other.step == 1 and weights_outside(fresh, other) == 0


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_sparse_network_without_its_masks_is_an_error() -> None:
    model, optimizer, controller = controlled(quick())
    for step in range(3):
        train_step(model, optimizer, step)
    for options in ({"init": "erk"}, {"init": "uniform", "seed": 3}, {"init": "snip"}):
        again = small_net(2).train()
        again.load_state_dict(model.state_dict())
        other = OPTIMIZERS["adamw"](again.parameters())
        DynamicSparsity(again, other, quick(**options))
        with pytest.raises(ArgumentError, match="so the network is sparse already: load the state of the controller"):
            train_step(again, other, 3)
    again = small_net(2).train()
    again.load_state_dict(model.state_dict())
    other = OPTIMIZERS["adamw"](again.parameters())
    given = DynamicSparsity(again, other, quick(), masks=controller.masks)
    train_step(again, other, 3)
    assert given.step == 1 and weights_outside(again, given) == 0


def test_layers_initialized_with_zeros_are_not_taken_for_sparse() -> None:
    model = small_net().train()
    nn.init.zeros_(model.head.weight)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    controller = DynamicSparsity(model, optimizer, quick())
    train_step(model, optimizer, 0)
    assert controller.step == 1


def test_weights_loaded_without_masks_are_an_error() -> None:
    """This holds before the first step and later; apply_masks removes the weights on request."""
    for steps in (0, 2):
        model, optimizer, controller = controlled(quick())
        for step in range(steps):
            train_step(model, optimizer, step)
        dense = small_net(4).state_dict()
        model.load_state_dict(dense)
        with pytest.raises(
            ArgumentError, match=r"weights are nonzero outside the masks of 8 parameters \(\d+ in stem\.weight\)"
        ):
            train_step(model, optimizer, steps)
        assert torch.equal(model.fc.weight, dense["fc.weight"])  # nothing was lost
        with pytest.raises(ArgumentError, match="Load the controller's state with the weights"):
            controller.state_dict()
        controller.apply_masks()
        assert torch.equal(model.fc.weight, dense["fc.weight"] * controller.masks["fc.weight"])
        train_step(model, optimizer, steps)
        assert controller.step == steps + 1 and weights_outside(model, controller) == 0


@pytest.mark.parametrize(("write", "steps"), [("replace", 1), ("add", 2)])
def test_writes_that_pytorch_does_not_count_are_an_error(write: str, steps: int) -> None:
    """Replaced memory is noticed at the next step, values written into the same memory at the next update."""
    model, optimizer, _controller = controlled(quick())
    for step in range(2):
        train_step(model, optimizer, step)
    weight = model.stem.weight
    before = weight._version
    if write == "replace":
        weight.data = torch.ones_like(weight.data)
    else:
        weight.data.add_(1)
    assert weight._version == before
    with pytest.raises(
        ArgumentError, match=r"weights are nonzero outside the masks of 1 parameters \(\d+ in stem\.weight\)"
    ):
        _ = [train_step(model, optimizer, step) for step in range(steps)]


def test_masks_loaded_without_weights_are_an_error() -> None:
    """The network was trained further, so the weights that its masks removed are gone."""
    model, optimizer, controller = controlled(quick(growth="random"))
    train_step(model, optimizer, 0)
    early = (copy.deepcopy(model.state_dict()), controller.state_dict())
    for step in range(1, 6):
        train_step(model, optimizer, step)
    controller.load_state_dict(early[1])
    with pytest.raises(CheckpointError, match=r"live weights of \d parameters, such as .* are zero now but were not"):
        train_step(model, optimizer, 1)
    for order in ((0, 1), (1, 0)):
        for place in order:
            (model, controller)[place].load_state_dict(copy.deepcopy(early[place]))
        train_step(model, optimizer, 1)
        assert controller.step == 2 and weights_outside(model, controller) == 0


def test_parameters_replaced_by_loading_are_an_error() -> None:
    model, optimizer, controller = controlled(quick())
    train_step(model, optimizer, 0)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(ArgumentError, match=r"no longer the parameter .* without assign=True"):
        controller.state_dict()
    with pytest.raises(ArgumentError, match=r"no longer the parameter"):
        controller.load_state_dict(controlled(quick())[2].state_dict())


@pytest.mark.parametrize("second", ["made later", "unpickled"])
def test_steps_of_another_optimizer_are_an_error(second: str) -> None:
    model, optimizer, controller = controlled(quick())
    train_step(model, optimizer, 0)
    if second == "made later":
        other = OPTIMIZERS["adamw"](model.parameters())
        train_step(model, other, 1)
    else:
        model, other = pickle.loads(pickle.dumps((model, optimizer)))
        before = controller.active()
        train_step(model, other, 1)  # the copy is another network, which this controller does not mask
        assert controller.active() == before and controller.step == 1
        return
    with pytest.raises(ArgumentError, match="or another optimizer"):
        controller.state_dict()
    with pytest.raises(ArgumentError, match="or another optimizer"):
        train_step(model, optimizer, 2)


def test_a_controller_cannot_be_pickled() -> None:
    _, _, controller = controlled(quick())
    with pytest.raises(ArgumentError, match=r"cannot be pickled: save its state_dict\(\)"):
        torch.save({"sparsity": controller}, io.BytesIO())


# -- networks that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", ["momentum", "gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masks_hold_in_a_network_that_changes_its_type(dtype: torch.dtype, growth: str) -> None:
    model, optimizer, controller = controlled(quick(growth=growth), "sgd")
    for step in range(2):
        train_step(model, optimizer, step)
    model.to(dtype)
    for value in optimizer.state.values():
        value["momentum_buffer"] = value["momentum_buffer"].to(dtype)
    optimizer.zero_grad()
    for step in range(2, 6):
        x = torch.randn(4, 3, 10, 10, dtype=dtype, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert weights_outside(model, controller) == 0
    assert controller.updates == 3 and controller.grown["fc.weight"] > 0


def test_masks_follow_their_parameters_to_another_device() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    state = MaskState(quick(), {"a": weight}, [])
    state.fresh = {"a": torch.zeros(4, 3, dtype=torch.bool)}
    held = state.masks["a"]
    state.follow_parameters()
    assert state.masks["a"] is held
    state.parameters["a"] = nn.Parameter(weight.detach().to("meta"))
    state.follow_parameters()
    assert state.masks["a"].device.type == state.fresh["a"].device.type == "meta"


def test_parameters_frozen_later_do_not_change() -> None:
    model, optimizer, controller = controlled(quick(update_interval=1))
    train_step(model, optimizer, 0)
    model.fc.weight.requires_grad_(False)
    optimizer.zero_grad()
    weight, mask = model.fc.weight.clone(), controller.masks["fc.weight"].clone()
    for step in range(1, 4):
        train_step(model, optimizer, step)
    assert controller.updates == 4 and controller.grown["head.weight"] > 0 == controller.grown["fc.weight"]
    assert torch.equal(model.fc.weight, weight) and torch.equal(controller.masks["fc.weight"], mask)


def test_groups_added_later_train_densely_as_their_selection_says() -> None:
    model = small_net().train()
    model.fc.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    controller = DynamicSparsity(model, optimizer, quick(update_interval=1))
    model.fc.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.fc.parameters())})
    before = model.fc.weight.clone()
    for step in range(3):
        train_step(model, optimizer, step)
    assert "fc.weight" not in controller.masks and model.fc.weight.all() and not torch.equal(model.fc.weight, before)
    assert next(choice for choice in controller.selection if choice.name == "fc.weight").reason.startswith("is frozen")
    assert weights_outside(model, controller) == 0


def test_two_optimizers_need_two_controllers() -> None:
    model = small_net().train()
    body = torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("head")], 0.1)
    head = torch.optim.AdamW(model.head.parameters(), 0.01)
    with pytest.raises(ArgumentError, match="make one DynamicSparsity for each, with the layers that it trains"):
        DynamicSparsity(model, body, quick())
    ours = [
        DynamicSparsity(model, body, quick(exclude="head.*")),
        DynamicSparsity(model, head, quick(layers="head.*", update_interval=3)),
    ]
    for step in range(6):
        x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        for optimizer in (body, head):
            optimizer.step()
            optimizer.zero_grad()
    assert [one.updates for one in ours] == [3, 2] and all(weights_outside(model, one) == 0 for one in ours)


def test_averages_that_were_replaced_are_found_again() -> None:
    parts = build(quick(update_interval=1))
    average = parts["average"]
    average.load_state_dict(copy.deepcopy(average.state_dict()), assign=True)
    bf16_steps(parts, 0, 3, 1)
    assert weights_outside(average.module, parts["controller"]) == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.parametrize("first", ["wrapper", "controller"])
def test_wrappers_may_be_made_before_or_after(wrap, first: str) -> None:
    model = small_net().train()
    wrapped = wrap(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    controller = DynamicSparsity(wrapped if first == "wrapper" else model, optimizer, quick())
    for step in range(2):
        train_step(wrapped, optimizer, step)
    assert set(controller.masks) <= {name for name, _ in model.named_parameters()}
    assert controller.updates == 1 and weights_outside(model, controller) == 0
    torch._dynamo.reset()


def test_a_new_controller_takes_the_masks_of_one_whose_parameters_were_replaced() -> None:
    model, optimizer, controller = controlled(quick())
    train_step(model, optimizer, 0)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.requires_grad_(True)
    other = OPTIMIZERS["adamw"](model.parameters())
    again = DynamicSparsity(model, other, quick(), masks=controller.masks)
    for step in range(1, 3):
        train_step(model, other, step)
        assert weights_outside(model, again) == 0
    assert again.updates == 1
