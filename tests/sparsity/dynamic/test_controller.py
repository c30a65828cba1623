"""The controller together with optimizers, scalers, averages and wrappers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from tests.sparsity.nets import OPTIMIZERS, controlled, data, masks_of, quick, same, small_net, train_step
from widekernel.errors import ArgumentError
from widekernel.sparsity import DynamicSparsity, SparsityReport, published_slak
from widekernel.sparsity.selection import select
from widekernel.sparsity.snapshot import take_snapshot

# -- first masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["uniform", "erk", "magnitude", "from_weights", "snip", "snip_mask"])
def test_first_masks(init: str) -> None:
    model = small_net().train()
    with torch.no_grad():
        model.fc.weight[:, :3] = 0
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    controller = DynamicSparsity(model, optimizer, quick(init=init, sparsity=0.6), batch=data(0))
    masks = controller.masks
    total = sum(mask.numel() for mask in masks.values())
    if init == "from_weights":
        assert all(torch.equal(mask, weights[name] != 0) for name, mask in masks.items())
    else:
        assert controller.active() == round(0.4 * total)
    if init == "magnitude":
        alive = torch.cat([weights[name].abs()[mask] for name, mask in masks.items()])
        dead = torch.cat([weights[name].abs()[~mask] for name, mask in masks.items()])
        assert alive.min() >= dead.max()
    if init == "uniform":
        assert set(controller.densities().values()) == {0.4}
    for name, mask in masks.items():
        assert mask.float().mean().item() == pytest.approx(controller.densities()[name], abs=1 / mask.numel() + 1e-6)
        assert torch.equal(dict(model.named_parameters())[name].detach(), weights[name] * mask)


def test_snip_scores_a_batch_without_side_effects() -> None:
    model = small_net().train()
    model.strips.norms[0].momentum = 0.5
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    config = quick(init="snip_mask")
    controller = DynamicSparsity(model, OPTIMIZERS["sgd"](model.parameters()), config, batch=data(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(before[name], value) for name, value in buffers.items())
    trial = small_net().train()
    x, y = data(0)
    nn.functional.cross_entropy(trial(x), y).backward()
    scores = {name: (p * p.grad).abs() for name, p in trial.named_parameters() if name in controller.masks}
    kept = torch.cat([scores[name][mask] for name, mask in controller.masks.items()])
    lost = torch.cat([scores[name][~mask] for name, mask in controller.masks.items()])
    assert kept.min() >= lost.max()


@pytest.mark.parametrize("init", ["snip", "snip_mask"])
def test_snip_without_a_batch_uses_the_first_step(init: str) -> None:
    """SNIP uses all gradients of the step, including accumulated ones, and the weights before the step."""
    model, optimizer, controller = controlled(quick(init=init), "sgd")
    assert controller.masks == {} and set(controller.densities().values()) == {1.0}
    _reference, _other, expected = controlled(quick(init=init), "sgd", batch=data(1))
    x, y = data(1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert same(masks_of(controller), masks_of(expected))
    nn.functional.cross_entropy(small_net().train()(x), y)
    assert all(not p[~controller.masks[n]].any() for n, p in model.named_parameters() if n in controller.masks)


def test_scores_that_are_not_finite_are_an_error() -> None:
    model = small_net().train()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.inf
    with pytest.raises(ArgumentError, match=r"scores \(init='snip'\) of .* are not all finite"):
        DynamicSparsity(model, OPTIMIZERS["sgd"](model.parameters()), quick(init="snip"), batch=data(0))


def test_given_masks() -> None:
    _, _, donor = controlled(quick())
    wanted = masks_of(donor)
    del wanted["head.weight"]
    model, _optimizer, controller = controlled(quick(), seed=1, masks=wanted)
    assert same(masks_of(controller), wanted)
    assert not model.fc.weight[~wanted["fc.weight"]].any() and model.head.weight.all()
    for bad in ({"nowhere": torch.ones(2, dtype=torch.bool)}, {"fc.weight": torch.ones(2, 2, dtype=torch.bool)}, {}):
        with pytest.raises(ArgumentError, match="belong to another network"):
            controlled(quick(), masks=bad)
    with pytest.raises(ArgumentError, match=r"the mask given for stem\.weight cuts through its blocks"):
        controlled(quick(block="channel"), masks=wanted)
    with pytest.raises(ArgumentError, match="gamma has a mask, but scales or shifts channels"):
        controlled(quick(), masks={"gamma": torch.ones(1, 8, 1, 1, dtype=torch.bool)})


# -- steps -------------------------------------------------------------------------------------------------------------


def test_masks_depend_on_seed_step_and_name_only() -> None:
    found = []
    for noise in range(2):
        torch.manual_seed(noise)
        model, optimizer, controller = controlled(quick(growth="random"))
        for step in range(6):
            torch.rand(noise + 1)
            train_step(model, optimizer, step)
        found.append(masks_of(controller))
    assert same(*found)
    state = torch.get_rng_state()
    controlled(quick(growth="random", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    _, _, other = controlled(quick(growth="random", seed=1))
    assert not same(found[0], masks_of(other))


def test_gradient_growth_takes_the_largest_dense_gradients() -> None:
    model, optimizer, controller = controlled(quick(growth="gradient", prune_fraction=0.3), "sgd")
    train_step(model, optimizer, 0)
    former = masks_of(controller)
    x, y = data(1)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert any(dense[name][~mask].any() for name, mask in former.items())
    optimizer.step()
    assert controller.updates == 1
    for name, mask in controller.masks.items():
        grown = mask & ~former[name]
        left = ~mask & ~former[name]
        assert int(grown.sum()) == int((former[name] & ~mask).sum()) == controller.grown[name]
        if grown.any() and left.any():
            assert dense[name].abs()[grown].min() >= dense[name].abs()[left].max()


def test_clipping_uses_live_gradients_and_growth_dense_ones() -> None:
    clipped, plain = controlled(quick(growth="gradient"), "sgd"), controlled(quick(growth="gradient"), "sgd")
    for step in range(4):
        for index, (model, optimizer, controller) in enumerate((clipped, plain)):
            x, y = data(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if index == 0:
                controller.mask_gradients()
                live = [
                    p.grad[controller.masks[n]] if n in controller.masks else p.grad for n, p in model.named_parameters()
                ]
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
                assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in live]).norm().item(), rel=1e-5)
            optimizer.step()
    assert same(masks_of(clipped[2]), masks_of(plain[2])) and clipped[2].updates == 2


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_changes_nothing(fused: bool) -> None:
    model = small_net().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    controller = DynamicSparsity(model, optimizer, quick(growth="gradient", update_interval=1, init="snip"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        x, y = data(step)
        optimizer.zero_grad()
        overflows = step in (0, 3)
        scaler.scale(nn.functional.cross_entropy(model(x), y) * (torch.inf if overflows else 1)).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        masks, count = masks_of(controller), controller.step
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert controller.step == count and same(masks_of(controller), masks)
            assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
        else:
            assert controller.step == count + 1
    assert controller.step == controller.updates == 4
    assert all(not p[~controller.masks[n]].any() for n, p in model.named_parameters() if n in controller.masks)


def test_accumulated_gradients_count_as_one_step() -> None:
    """Up to rounding, a batches of b images equal one batch of a·b, with norms in evaluation mode.

    It runs in float64, where no two scores differ only by rounding.
    """
    found = []
    for parts in (1, 4):
        model = small_net().eval().double()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        controller = DynamicSparsity(model, optimizer, quick(growth="gradient", init="snip_mask"))
        for step in range(4):
            x, y = data(step, 8)
            x = x.double()
            optimizer.zero_grad()
            for piece, target in zip(x.chunk(parts), y.chunk(parts)):
                (nn.functional.cross_entropy(model(piece), target) / parts).backward()
            optimizer.step()
        assert controller.step == 4 and controller.updates == 2
        found.append((masks_of(controller), {n: p.detach() for n, p in model.named_parameters()}))
    assert same(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        assert torch.allclose(value, found[1][1][name], rtol=1e-9, atol=1e-12), name


def test_moments_of_moved_weights_are_cleared() -> None:
    model, optimizer, controller = controlled(quick(growth="random", prune_fraction=0.5))
    train_step(model, optimizer, 0)
    former = masks_of(controller)
    train_step(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        if name in controller.masks:
            survivors = former[name] & controller.masks[name]
            for key in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[parameter][key][~survivors].any()
                assert optimizer.state[parameter][key][survivors].any()


def test_averages_of_grown_weights_start_from_the_live_weight() -> None:
    model = small_net().train()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(model, decay=0.9)
    controller = DynamicSparsity(model, optimizer, quick(growth="gradient"), averages=[ema])
    averages = dict(ema.module.named_parameters())
    for step in range(3):
        former = masks_of(controller)
        train_step(model, optimizer, step)
        ema.update(model)
        if step == 1:
            grown = {name: mask & ~former[name] for name, mask in controller.masks.items()}
            assert all(not averages[name][new].any() for name, new in grown.items())
    weights = dict(model.named_parameters())
    for name, new in grown.items():
        assert torch.equal(averages[name][new], weights[name][new])
        old = controller.masks[name] & ~new
        assert not torch.equal(averages[name][old], weights[name][old])
    with pytest.raises(ArgumentError, match=r"has no stem\.weight"):
        DynamicSparsity(model, optimizer, quick(), averages=[nn.Linear(2, 2)])


def test_a_score_that_is_not_finite_skips_the_update() -> None:
    model, optimizer, controller = controlled(quick(growth="gradient"), "sgd")
    train_step(model, optimizer, 0)
    former = masks_of(controller)
    x, y = data(1)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    model.fc.weight.grad[~controller.masks["fc.weight"]] = torch.nan
    controller.mask_gradients()
    model.fc.weight.grad.nan_to_num_()
    optimizer.step()
    assert (controller.updates, controller.skipped) == (0, 1) and same(masks_of(controller), former)


def test_updates_stop_at_the_stop_fraction() -> None:
    model, optimizer, controller = controlled(quick(update_interval=1, total_steps=8, stop_fraction=0.5))
    for step in range(8):
        train_step(model, optimizer, step)
    assert [churn.step for churn in controller.churn] == [1, 2, 3, 4]


def test_gradual_sparsification_ends_exactly() -> None:
    config = quick(sparsity=0.8, initial_sparsity=0.0, update_interval=1, total_steps=8, init="magnitude", growth="none")
    model, optimizer, controller = controlled(config)
    total = sum(mask.numel() for mask in controller.masks.values())
    assert controller.active() == total
    found = []
    for step in range(8):
        train_step(model, optimizer, step)
        found.append(1 - controller.active() / total)
    expected = [0.8 - 0.8 * (1 - t / 6) ** 3 for t in range(1, 7)] + [0.8, 0.8]
    assert found == pytest.approx(expected, abs=1 / total)
    assert controller.active() == round(0.2 * total)


def test_tile_sets_share_masks_at_every_nth_update() -> None:
    config = quick(block="kernel", layers="large_kernel_only", share_every=2, update_interval=1, exclude=["strips.*"])
    model, optimizer, controller = controlled(config)
    first, second = (controller.masks[f"tiles.source.tiles.{path}"] for path in range(2))
    assert torch.equal(first, second)
    differed = []
    for step in range(4):
        train_step(model, optimizer, step)
        differed.append(not torch.equal(first, second))
    assert differed == [True, False, True, False]


@pytest.mark.parametrize("block", ["channel", "branch"])
def test_channels_and_branches_are_pruned_as_a_whole(block: str) -> None:
    config = quick(block=block, layers="large_kernel_only")
    model, optimizer, controller = controlled(config)
    for step in range(4):
        train_step(model, optimizer, step)
    by_channel = {name: mask.reshape(8, -1) for name, mask in controller.masks.items()}
    assert all(torch.equal(mask.any(1), mask.all(1)) for mask in by_channel.values())
    strips = [by_channel[f"strips.source.kernels.{index}"].all(1) for index in range(2)]
    assert torch.equal(*strips) == (block == "channel")
    assert all(int(alive.sum()) == 4 for alive in strips)


# -- wrappers, layouts, copies -----------------------------------------------------------------------------------------


def test_memory_order_does_not_matter() -> None:
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = small_net().train().double().to(memory_format=layout)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        controller = DynamicSparsity(model, optimizer, quick(init="magnitude", growth="random"))
        if layout is torch.channels_last:
            assert model.stem.weight.stride() == controller.masks["stem.weight"].stride() != (27, 9, 3, 1)
        found.append(masks_of(controller))
        for step in range(4):
            x, y = data(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            with torch.no_grad():  # equal gradients for both layouts, without rounding
                for _name, p in model.named_parameters():
                    p.grad.copy_(torch.sin(torch.arange(p.numel()).view(p.shape) * (step + 1.0)))
            optimizer.step()
        found.append(masks_of(controller))
    assert same(found[0], found[2]) and same(found[1], found[3])


def test_compiled_networks_keep_their_names_and_are_not_recompiled() -> None:
    model = small_net().train()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = OPTIMIZERS["sgd"](compiled.parameters())
    controller = DynamicSparsity(compiled, optimizer, quick(update_interval=1, growth="gradient"))
    assert set(controller.masks) <= {name for name, _ in model.named_parameters()}
    train_step(compiled, optimizer, 0)
    train_step(compiled, optimizer, 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(20):
            train_step(compiled, optimizer, step)
    assert controller.updates == 22
    torch._dynamo.reset()


def test_a_replaced_parameter_is_an_error() -> None:
    model, optimizer, _controller = controlled(quick(update_interval=1))
    old = list(model.parameters())
    model.head = nn.Linear(12, 4)
    for parameter in old:
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ArgumentError, match=r"head\.weight is no longer the parameter"):
        optimizer.step()


def test_copies_are_refused_and_remove_ends_masking() -> None:
    model, optimizer, controller = controlled(quick(), "sgd")
    with pytest.raises(ArgumentError, match="cannot be copied"):
        copy.deepcopy(controller)
    copied = copy.deepcopy(model)
    train_step(model, optimizer, 0)
    assert not torch.equal(copied.fc.weight, model.fc.weight)
    controller.remove()
    train_step(model, optimizer, 1)
    assert controller.step == 1 and model.fc.weight[~controller.masks["fc.weight"]].any()


# -- the published rule ------------------------------------------------------------------------------------------------


def test_published_rule_differs_as_documented() -> None:
    config = published_slak(0.5, init="uniform", update_interval=2, growth="gradient")
    model, optimizer, controller = controlled(config)
    total = sum(mask.numel() for mask in controller.masks.values())
    assert controller.active() != round(0.5 * total)  # drawn weight by weight
    for step in range(2):
        train_step(model, optimizer, step)
    outside = [
        optimizer.state[p]["exp_avg"][~controller.masks[n]].any()
        for n, p in model.named_parameters()
        if n in controller.masks
    ]
    assert any(outside)  # moments continue
    assert all(not p[~controller.masks[n]].any() for n, p in model.named_parameters() if n in controller.masks)


def test_published_rule_removes_masks_that_are_almost_dense() -> None:
    _model, _optimizer, controller = controlled(published_slak(0.001, init="uniform"))
    assert len(controller.masks) < 8
    assert any(choice.reason == "was drawn almost dense" for choice in controller.selection)
    again = controlled(published_slak(0.001, init="uniform"), seed=1)[2]
    again.load_state_dict(controller.state_dict())
    assert same(masks_of(again), masks_of(controller))


# -- the report --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn_pictures")
def test_the_report_lists_every_parameter_and_the_churn() -> None:
    model, optimizer, controller = controlled(quick(growth="gradient", init="snip", exclude="head.*"))
    waiting = SparsityReport(controller.snapshot())
    assert "masks are drawn at the first step" in waiting.summary() and waiting.picture().startswith(b"\x89PNG")
    for step in range(4):
        train_step(model, optimizer, step)
    report = SparsityReport(controller.snapshot())
    assert [layer.name for layer in report.layers] == [name for name, _ in model.named_parameters()]
    assert {layer.name for layer in report.masked} == set(controller.masks)
    assert sum(layer.active for layer in report.masked) == controller.active()
    assert report.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert [churn.step for churn in report.churn] == [2, 4]
    assert sum(layer.grown for layer in report.layers) == report.churn[-1].grown == report.churn[-1].removed
    plain = json.loads(json.dumps(report.to_dict()))
    assert {layer["reason"] for layer in plain["layers"]} == {"", "scales or shifts channels", "excluded by name"}
    assert "excluded by name" in report.summary()
    for name, image in report.snapshot.images.items():
        assert image.isnan().any() and not controller.masks[name].all()
    assert report.picture().startswith(b"\x89PNG")


@pytest.mark.usefixtures("drawn_pictures")
def test_networks_without_live_weights_are_plotted() -> None:
    model = small_net()
    masks = {"fc.weight": torch.zeros(12, 8, dtype=torch.bool)}
    report = SparsityReport(take_snapshot(model, select(model, ["fc.weight"]), masks))
    assert report.sparsity() == 1 and report.picture().startswith(b"\x89PNG")
