"""Small networks with every kind of layer that can be masked, and a few steps of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from widekernel import LargeKernel, Rectangles, ShiftTiles
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.05),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, 1e-2),
    "radam": lambda parameters: torch.optim.RAdam(parameters, 1e-2),
    # Its factored second moment does not keep zeros.
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, 1e-2),
}


class SmallNet(nn.Module):
    """Network with a convolution, strips, two sets of shifted tiles, norms, a scale, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.strips = LargeKernel(Rectangles(8, [(7, 3), (3, 7), (3, 3)]), [nn.BatchNorm2d(8) for _ in range(3)])
        self.tiles = LargeKernel(ShiftTiles(8, 7, 3, paths=2), [nn.BatchNorm2d(8) for _ in range(3)])
        self.gamma = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.gamma * self.tiles(self.strips(x))
        return self.head(self.fc(x.mean((2, 3))).relu())


def small_net(seed: int = 0) -> SmallNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallNet()


def data(step: int, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 3, 10, 10, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    x, y = data(step)
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def controlled(
    config: DynamicSparsityConfig | None = None, optimizer: str = "adamw", seed: int = 0, **options
) -> tuple[nn.Module, torch.optim.Optimizer, DynamicSparsity]:
    model = small_net(seed).train()
    made = OPTIMIZERS[optimizer](model.parameters())
    return model, made, DynamicSparsity(model, made, config, **options)


def states_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """Return the optimizer's tensors that have one entry per weight."""
    found = optimizer.state.get(parameter, {}).values()
    return [value for value in found if isinstance(value, Tensor) and value.shape == parameter.shape]


def quick(**settings) -> DynamicSparsityConfig:
    return DynamicSparsityConfig(**{"sparsity": 0.5, "init": "uniform", "update_interval": 2, **settings})


def masks_of(controller: DynamicSparsity) -> dict[str, torch.Tensor]:
    return {name: mask.clone() for name, mask in controller.masks.items()}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def flat(state: Any) -> list:
    """Return the leaves of nested containers, with the keys of dictionaries."""
    if isinstance(state, dict):
        return [part for key in state for part in (key, *flat(state[key]))]
    if isinstance(state, (list, tuple)):
        return [part for item in state for part in flat(item)]
    return [state]


def equal(left: Any, right: Any) -> bool:
    """Return whether nested containers of tensors are equal bit by bit."""
    left, right = flat(left), flat(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right)
    )


def weights_outside(model: nn.Module, controller: DynamicSparsity) -> int:
    """Return the number of non-zero weights outside the masks."""
    weights = dict(model.named_parameters())
    return sum(int(weights[name][~mask].count_nonzero()) for name, mask in controller.masks.items())


def check_same_network(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Raise unless two networks in evaluation mode have bit-identical weights and buffers and equal outputs.

    Weights may have another memory order, for which other kernels are used. So outputs are compared in float64, in which the
    kernels differ by a rounding of 1e-16 only.

    Args:
        ours: with plain weights.
        theirs: with weights of the same names, plain or parametrized.
        x: input of both.
    """
    ours, theirs = copy.deepcopy(ours).eval(), copy.deepcopy(theirs).eval()
    names = [name for name, _ in (*ours.named_parameters(), *ours.named_buffers())]
    assert names
    for name in names:
        owner, _, key = name.rpartition(".")
        assert torch.equal(getattr(ours.get_submodule(owner), key), getattr(theirs.get_submodule(owner), key)), name
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(x.double()), theirs.double()(x.double()), rtol=1e-11, atol=1e-11)
