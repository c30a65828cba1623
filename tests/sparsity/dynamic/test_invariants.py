"""Invariants that hold after every step of every kind of sparse training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sparsity.nets import OPTIMIZERS, controlled, small_net, states_of, train_step
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig
from widekernel.sparsity.dynamic.blocks import Blocks
from widekernel.sparsity.dynamic.densities import erk_densities, whole_counts
from widekernel.sparsity.dynamic.ranking import at_random, generator_for, largest, smallest
from widekernel.sparsity.dynamic.rules import exact
from widekernel.sparsity.dynamic.schedules import prune_fraction, sparsity_at
from widekernel.sparsity.packing import pack, unpack
from widekernel.sparsity.semi_structured import magnitude_mask

BLOCKS = ["element", "kernel", "branch", "channel", (3, 3), (2, 3)]


@st.composite
def configs(draw: st.DrawFn) -> DynamicSparsityConfig:
    gradual = draw(st.booleans())
    sparsity = draw(st.floats(0.0, 0.95))
    return DynamicSparsityConfig(
        sparsity=sparsity,
        init=draw(st.sampled_from(["snip", "snip_mask", "erk", "uniform", "magnitude"])),
        growth=draw(st.sampled_from(["random", "gradient", "momentum", "none"])),
        prune_fraction=draw(st.floats(0, 1)),
        prune_schedule=draw(st.sampled_from(["constant", "cosine"])),
        update_interval=draw(st.integers(1, 3)),
        total_steps=8,
        stop_fraction=draw(st.sampled_from([0.5, 0.75, 1.0])),
        initial_sparsity=sparsity * draw(st.floats(0, 1)) if gradual else None,
        layers=draw(st.sampled_from(["all", "large_kernel_only"])),
        block=draw(st.sampled_from(BLOCKS)),
        share_every=draw(st.integers(1, 3)),
        regrow=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )


class Spy:
    """Exact rule that records the masks and weights that an update ranked."""

    allocate_densities, draw_masks = staticmethod(exact.allocate_densities), staticmethod(exact.draw_masks)

    def __init__(self) -> None:
        self.masks: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def update_masks(self, state, *arguments) -> bool:
        self.masks = {name: mask.clone() for name, mask in state.masks.items()}
        self.weights = {name: parameter.detach().clone() for name, parameter in state.parameters.items()}
        return exact.update_masks(state, *arguments)


def check_nothing_lives_outside(model, optimizer, controller, average) -> None:
    averages = dict(average.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in controller.masks:
            continue
        dead = ~controller.masks[name]
        assert not parameter[dead].any(), name
        assert parameter.grad is None or not parameter.grad[dead].any(), name
        assert not averages[name][dead].any(), name
        for value in states_of(optimizer, parameter):
            assert not value[dead].any(), name


def check_counts(controller: DynamicSparsity, step: int) -> None:
    state = controller._state
    counts = exact.target_counts(state, step)
    for group in state.groups:
        for alive in state.live_blocks(group):
            assert int(alive.sum()) == counts[group.names[0]]
        for name, blocks, alive in zip(group.names, group.blocks, state.live_blocks(group)):
            assert torch.equal(state.masks[name], blocks.expand(alive))  # whole blocks


def check_moves(controller: DynamicSparsity, former: dict, weights: dict) -> None:
    """Check that the removed blocks are the smallest, and that as many have grown."""
    state = controller._state
    for group in state.groups:
        if len(group.names) > 1 and not group.always_shared:
            continue  # their masks may have differed before, so the shared ranking includes blocks of the others
        before = group.blocks[0].live(former[group.names[0]])
        after = group.blocks[0].live(state.masks[group.names[0]])
        scores = state.block_magnitudes(group, weights)
        by_hand = sum(b.sums(weights[n].double().abs()) for n, b in zip(group.names, group.blocks))
        if group.blocks[0].tile is not None:  # tiles at an edge may be smaller
            by_hand = by_hand / sum(b.sizes() for b in group.blocks)
        torch.testing.assert_close(scores.double(), by_hand, rtol=1e-5, atol=1e-6)
        removed, grown = before & ~after, after & ~before
        if controller.config.initial_sparsity is None:
            assert int(removed.sum()) == int(grown.sum())
        else:
            # Through rounding a layer may get one block more while the network becomes sparser.
            assert int(removed.sum()) >= int(grown.sum()) - 1
        if controller.config.regrow:
            continue
        k = int(removed.sum())
        assert torch.equal(removed, smallest(scores, k, before))


def run(config: DynamicSparsityConfig, optimizer_name: str, steps: int = 8) -> None:
    model = small_net(config.seed).train()
    keys, average = list(model.state_dict()), small_net(config.seed)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    controller = DynamicSparsity(model, optimizer, config, averages=[average])
    assert list(model.state_dict()) == keys
    started = not controller._pending
    for step in range(1, steps + 1):
        if started:
            check_counts(controller, (step - 1) // config.update_interval * config.update_interval if gradual(config) else 0)
        spy = controller._rule = Spy()
        train_step(model, optimizer, step)
        controller._rule = exact
        for ours, value in zip(average.parameters(), model.parameters()):
            ours.data.lerp_(value.data, 0.1)
        started = True
        assert controller.step == step
        check_nothing_lives_outside(model, optimizer, controller, average)
        assert bool(spy.masks) == config.is_due(step)
        if spy.masks:
            check_moves(controller, spy.masks, spy.weights)
    last = math.floor(config.stop_step / config.update_interval) * config.update_interval
    if last:
        check_counts(controller, steps if not gradual(config) else last)


def gradual(config: DynamicSparsityConfig) -> bool:
    return config.initial_sparsity is not None and math.floor(config.stop_step / config.update_interval) > 0


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
def test_invariants(config: DynamicSparsityConfig, optimizer: str) -> None:
    run(config, optimizer)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
def test_invariants_in_many_cases(config: DynamicSparsityConfig, optimizer: str) -> None:
    run(config, optimizer)


shapes = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_packing_is_invertible(shape: tuple[int, ...], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert pack(mask).numel() == math.ceil(mask.numel() / 8)
    assert torch.equal(unpack(pack(mask), shape), mask)
    if len(shape) == 4:
        assert torch.equal(pack(mask.to(memory_format=torch.channels_last)), pack(mask))


@settings(max_examples=300, deadline=None)
@given(
    layers=st.dictionaries(st.text("abc", min_size=1, max_size=3), shapes, min_size=1, max_size=6),
    density=st.floats(1e-3, 1.0),
)
def test_erk_densities_are_valid_and_add_up(layers: dict, density: float) -> None:
    found = erk_densities(layers, density)
    total = sum(math.prod(shape) for shape in layers.values())
    kept = sum(found[name] * math.prod(shape) for name, shape in layers.items())
    assert all(0 <= value <= 1 + 1e-12 for value in found.values())
    assert kept == pytest.approx(density * total, rel=1e-9)


@settings(max_examples=300, deadline=None)
@given(
    layers=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 500), min_size=1, max_size=6),
    data=st.data(),
)
def test_whole_counts_add_up(layers: dict, data: st.DataObject) -> None:
    densities = {name: data.draw(st.floats(0, 1)) for name in layers}
    counts = whole_counts(layers, densities, {})
    wanted = {name: layers[name] * densities[name] for name in layers}
    assert abs(sum(counts.values()) - sum(wanted.values())) <= 0.5 + 1e-6
    assert all(abs(counts[name] - wanted[name]) < 1 + 1e-6 and 0 <= counts[name] <= layers[name] for name in layers)


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=30), data=st.data())
def test_smallest_and_largest_take_ties_by_position(values: list[int], data: st.DataObject) -> None:
    among = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    places = among.nonzero().flatten().tolist()
    k = data.draw(st.integers(0, len(places)))
    scores = torch.tensor(values, dtype=torch.float)
    for sign, pick in ((1, smallest), (-1, largest)):
        expected = sorted(places, key=lambda place: (sign * values[place], place))[:k]
        assert sorted(pick(scores, k, among).nonzero().flatten().tolist()) == sorted(expected)
    generator = generator_for(torch.device("cpu"), 0, k, "x")
    picked = at_random(k, among, generator)
    assert int(picked.sum()) == k and not (picked & ~among).any()


@settings(max_examples=200, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 7)] * 4), tile=st.tuples(*[st.integers(1, 4)] * 2), seed=st.integers(0, 99))
def test_every_weight_is_in_one_block(shape: tuple[int, ...], tile: tuple[int, int], seed: int) -> None:
    grid = [-(-side // size) for side, size in zip(shape[2:], tile)]
    for blocks in (
        Blocks(shape, shape[0] * shape[1] * math.prod(grid), tile),
        Blocks(shape, shape[0]),
        Blocks(shape, shape[0] * shape[1]),
        Blocks(shape, math.prod(shape)),
    ):
        assert int(blocks.sizes().sum()) == math.prod(shape)
        alive = torch.rand(blocks.count, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask = blocks.expand(alive)
        assert mask.shape == shape
        assert torch.equal(blocks.live(mask), alive)
        assert int(mask.sum()) == int(blocks.sizes()[alive].sum())
        # Every block has the sum of its own weights.
        numbered = torch.rand(shape, dtype=torch.float64)
        one = torch.zeros(blocks.count, dtype=torch.bool)
        one[seed % blocks.count] = True
        assert blocks.sums(numbered)[seed % blocks.count] == pytest.approx(numbered[blocks.expand(one)].sum().item())


@settings(max_examples=200, deadline=None)
@given(config=configs())
def test_schedules_are_monotone_and_end_exactly(config: DynamicSparsityConfig) -> None:
    steps = range(20)
    fractions = [prune_fraction(config, step) for step in steps]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(fractions))
    aims = [sparsity_at(config, step) for step in steps]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(aims))
    assert aims[-1] == config.sparsity


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_density_one_is_dense_training(optimizer: str) -> None:
    model, made, controller = controlled(
        DynamicSparsityConfig(sparsity=0.0, init="uniform", growth="gradient", update_interval=2), optimizer
    )
    plain = small_net().train()
    other = OPTIMIZERS[optimizer](plain.parameters())
    for step in range(6):
        assert train_step(model, made, step) == train_step(plain, other, step)
    assert controller.updates == 3
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("init", ["uniform", "erk", "magnitude", "snip", "snip_mask"])
def test_every_output_keeps_its_least_fan_in(init: str) -> None:
    config = DynamicSparsityConfig(sparsity=0.97, init=init, min_fan_in=2, update_interval=1, growth="gradient")
    model, optimizer, controller = controlled(config)
    for step in range(5):
        train_step(model, optimizer, step)
        for name, mask in controller.masks.items():
            assert int(mask.flatten(1).sum(1).min()) >= min(2, mask[0].numel()), name


@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
def test_semi_structured_masks_hold_through_training(growth: str) -> None:
    config = DynamicSparsityConfig(sparsity=0.5, block="semi_structured", init="magnitude", growth=growth, update_interval=2)
    model, optimizer, controller = controlled(config)
    assert set(controller.masks) == {"fc.weight", "head.weight"}  # the others have 1 or 3 input channels
    assert set(controller.densities().values()) == {0.5}
    former = {name: mask.clone() for name, mask in controller.masks.items()}
    for step in range(6):
        train_step(model, optimizer, step)
        for name, mask in controller.masks.items():
            assert (mask.view(-1, 4).sum(1) == 2).all()
            assert not dict(model.named_parameters())[name][~mask].any()
    assert controller.updates == 3 and sum(controller.grown.values()) > 0
    assert any(not torch.equal(former[name], mask) for name, mask in controller.masks.items())


@pytest.mark.parametrize("init", ["magnitude", "uniform", "from_weights"])
def test_semi_structured_masks_of_channels_that_are_not_a_multiple_of_four(init: str) -> None:
    """Two weights of the last, incomplete group are live too, and they move like the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(7, 6, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(600, 4))
    if init == "from_weights":
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.mul_(magnitude_mask(layer.weight))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    config = DynamicSparsityConfig(sparsity=0.5, block="semi_structured", init=init, growth="gradient", update_interval=1)
    controller = DynamicSparsity(model, optimizer, config)
    mask = controller.masks["0.weight"]
    for step in range(4):
        before = mask.clone()
        x = torch.randn(2, 7, 10, 10, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        assert (mask[:, :4].sum(1) == 2).all() and (mask[:, 4:].sum(1) == 2).all()
        assert not torch.equal(before, mask) and controller.grown["0.weight"] > 0
        assert not model[0].weight[~mask].any()
    assert controller.densities()["0.weight"] == pytest.approx(4 / 7)
