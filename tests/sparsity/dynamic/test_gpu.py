"""Dynamic sparse training on a CUDA device, under fp16 with a gradient scaler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.sparsity.nets import data, masks_of, quick, same, small_net
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
def test_masks_hold_under_mixed_precision(growth: str, fused: bool) -> None:
    model = small_net().train().cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    config = DynamicSparsityConfig(sparsity=0.5, growth=growth, update_interval=2)
    controller = DynamicSparsity(model, optimizer, config)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)  # overflows at first
    for step in range(40):
        x, y = (part.cuda() for part in data(step))
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        controller.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = controller.step
        scaler.step(optimizer)
        scaler.update()
        assert controller.step - before in (0, 1)
        for name, parameter in model.named_parameters():
            if name in controller.masks:
                assert not parameter[~controller.masks[name]].any()
                assert all(not s[~controller.masks[name]].any() for s in moments(optimizer, parameter))
    assert 0 < controller.step < 40 and controller.updates == controller.step // 2
    assert all(mask.is_cuda for mask in controller.masks.values())
    total = sum(mask.numel() for mask in controller.masks.values())
    assert controller.active() == round(0.5 * total)


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[torch.Tensor]:
    found = optimizer.state[parameter].values() if parameter in optimizer.state else ()
    return [value for value in found if isinstance(value, torch.Tensor) and value.shape == parameter.shape]


def test_states_load_on_another_device() -> None:
    config = DynamicSparsityConfig(sparsity=0.5, init="erk")
    there, here = small_net().cuda(), small_net()
    first = DynamicSparsity(there, torch.optim.SGD(there.parameters(), 0.1), config)
    second = DynamicSparsity(here, torch.optim.SGD(here.parameters(), 0.1), config)
    second.load_state_dict(first.state_dict())
    assert same({name: mask.cpu() for name, mask in masks_of(first).items()}, masks_of(second))


def test_masks_follow_a_network_that_moves_to_the_device() -> None:
    model = small_net().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    controller = DynamicSparsity(model, optimizer, quick(growth="momentum"))
    model.cuda()
    for step in range(4):
        x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(step)).cuda()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert controller.updates == 2 and all(mask.is_cuda for mask in controller.masks.values())
    assert not any(p[~controller.masks[n]].any() for n, p in model.named_parameters() if n in controller.masks)
