"""What dynamic sparse training is told: how sparse, where, in what blocks, and how the masks move."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from widekernel.errors import ArgumentError, nearest
from widekernel.settings import require, require_number, require_one_of, require_whole, require_within

INITS = ("snip", "snip_mask", "erk", "uniform", "magnitude", "from_weights")
GROWTHS = ("random", "gradient", "momentum", "none")
SCHEDULES = ("constant", "cosine")
LAYER_RULES = ("all", "large_kernel_only")
BLOCKS = ("element", "kernel", "branch", "channel", "2:4")
RULES = ("exact", "published")


@dataclass(frozen=True)
class DynamicSparsityConfig:
    """Settings of `DynamicSparsity`.

    Args:
        sparsity: share of the masked weights that is zero, from 0 to below 1.
        init: how many weights every layer keeps, and which. `snip`: as many as have the largest |weight · gradient| of all
            layers together, at random places (what SLaK does); `snip_mask`: exactly those; `erk`: Erdős–Rényi-kernel
            densities, at random places; `uniform`: the same density everywhere, at random places; `magnitude`: the largest
            |weight| of all layers together; `from_weights`: what is not zero now, whatever `sparsity` says.
        prune: what an update removes; `magnitude` is the smallest |weight| of each layer.
        growth: what an update lets grow in their place: `random`, the largest dense `gradient`, the largest running mean of
            dense gradients (`momentum`), or `none`, with which masks only change as `initial_sparsity` says.
        prune_fraction: share of a layer's active weights that an update moves.
        prune_schedule: `constant`, or `cosine`, which lets the fraction fall to 0 at the last update.
        update_interval: optimizer steps between updates.
        total_steps: optimizer steps of the training, needed by `cosine` and `initial_sparsity`; without it updates go on.
        stop_fraction: share of `total_steps` after which the masks stay as they are.
        initial_sparsity: start this sparse, and follow the cubic of Zhu & Gupta (2017) to `sparsity` at the last update.
        layers: `all` matrices and kernels, `large_kernel_only` (the widest of every large-kernel layer), or name
            patterns, in one text separated by commas or in several; the name of a module stands for all its parameters.
        exclude: name patterns of parameters, or names of modules, that stay dense.
        block: what lives or dies together: one `element`; an N×N `kernel` (one input of one output channel, or one tile of
            Shift-wise convolution); a channel's kernel in one `branch` of a large-kernel layer; a `channel` in all its
            branches (elsewhere: an output channel); a pair of numbers, for tiles of that height and width; or `2:4`, two of
            every four consecutive input channels. Where a layer has no such blocks, its elements are masked.
        share_every: tile sets that a Shift-wise layer adds up are ranked together and share one mask at every so-manieth
            update (officially `sparse_gap`), and on their own at the others.
        regrow: whether what an update removed may grow again in the same update.
        min_fan_in: weights that every output channel keeps at least (blocks of one element only).
        momentum: decay of the running mean of `growth="momentum"`.
        seed: of all random choices, which depend on nothing else but the step and the parameter's name.
        rule: `exact` keeps counts exact and everything outside the mask at zero; `published` does what the code of SLaK and
            Shift-wise does (see `published_slak`).

    Raises:
        ArgumentError: a value is unknown or out of range.
    """

    sparsity: float = 0.4
    init: str = "snip"
    prune: str = "magnitude"
    growth: str = "random"
    prune_fraction: float = 0.5
    prune_schedule: str = "constant"
    update_interval: int = 100
    total_steps: int | None = None
    stop_fraction: float = 0.75
    initial_sparsity: float | None = None
    layers: str | Sequence[str] = "all"
    exclude: str | Sequence[str] = ()
    block: str | Sequence[int] = "element"
    share_every: int = 1
    regrow: bool = False
    min_fan_in: int = 0
    momentum: float = 0.9
    seed: int = 0
    rule: str = "exact"

    def __post_init__(self) -> None:
        require_within("sparsity", self.sparsity, 0, 1)
        require_one_of("init", self.init, INITS)
        require_one_of("prune", self.prune, ("magnitude",))
        require_one_of("growth", self.growth, GROWTHS)
        require_one_of("prune_schedule", self.prune_schedule, SCHEDULES)
        require_one_of("rule", self.rule, RULES)
        for name in ("prune_fraction", "stop_fraction"):
            require_number(name, getattr(self, name))
        require(0 <= self.prune_fraction <= 1, "prune_fraction", self.prune_fraction, "from 0 to 1")
        require(0 < self.stop_fraction <= 1, "stop_fraction", self.stop_fraction, "above 0 and at most 1")
        require_within("momentum", self.momentum, 0, 1)
        if not isinstance(self.regrow, bool):
            raise ArgumentError(f"regrow={self.regrow!r} must be True or False")
        for name, least in (("update_interval", 1), ("share_every", 1), ("min_fan_in", 0), ("seed", 0)):
            require_whole(name, getattr(self, name), least)
        if self.total_steps is not None:
            require_whole("total_steps", self.total_steps, 1)
        self._check_layers()
        self._check_block()
        self._check_combinations()

    def _check_layers(self) -> None:
        if isinstance(self.layers, str):
            # One word that is no rule, nor resembles one, may be the name of a module.
            word = self.layers.strip() and not any(sign in self.layers for sign in "*?[,.")
            if not self.layers.strip() or (word and (self.layers in LAYER_RULES or nearest(self.layers, LAYER_RULES))):
                require_one_of("layers", self.layers, LAYER_RULES)
            else:
                object.__setattr__(self, "layers", _split(self.layers))
        for name in ("layers", "exclude"):
            value = getattr(self, name)
            patterns = _split(value) if isinstance(value, str) else value
            if not isinstance(patterns, Collection) or not all(isinstance(p, str) and p for p in patterns):
                raise ArgumentError(f"{name}={value!r} must hold patterns of parameter names, such as 'stages.*.fc1.weight'")
            if name == "layers" and not patterns:
                raise ArgumentError(
                    f"layers={value!r} names nothing to be masked: give patterns such as 'stages.*.fc1.weight', or "
                    f"one of {', '.join(LAYER_RULES)}"
                )
            if name == "exclude" or not isinstance(value, str):
                object.__setattr__(self, name, tuple(patterns))

    def _check_block(self) -> None:
        if isinstance(self.block, str):
            require_one_of("block", self.block, BLOCKS)
            return
        block = tuple(self.block) if isinstance(self.block, Sequence) else ()
        if len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block):
            pair = f", such as ({self.block}, {self.block})" if isinstance(self.block, int) and self.block > 0 else ""
            raise ArgumentError(f"block={self.block!r} must be one of {', '.join(BLOCKS)}, or two positive integers{pair}")
        object.__setattr__(self, "block", block)

    def _check_combinations(self) -> None:
        if self.initial_sparsity is not None:
            require_within("initial_sparsity", self.initial_sparsity, 0, 1)
            require(
                self.initial_sparsity <= self.sparsity, "initial_sparsity", self.initial_sparsity, f"at most {self.sparsity}"
            )
        if self.min_fan_in and self.block != "element":
            raise ArgumentError(
                f"min_fan_in={self.min_fan_in} counts single weights: use block='element', not {self.block!r}"
            )
        if self.block == "2:4" and (self.sparsity != 0.5 or self.initial_sparsity is not None):
            raise ArgumentError(
                f"block='2:4' keeps two of four weights: set sparsity=0.5 (it is {self.sparsity}) and no initial_sparsity"
            )
        if self.rule == "published" and (self.initial_sparsity is not None or self.min_fan_in or self.block == "2:4"):
            raise ArgumentError("rule='published' knows no initial_sparsity, min_fan_in or 2:4 blocks: use rule='exact'")

    def check_timed(self) -> None:
        """Raise an `ArgumentError` if a schedule needs to know when training ends, and `total_steps` is not set."""
        timed = {"prune_schedule='cosine'": self.prune_schedule == "cosine"}
        timed["initial_sparsity"] = self.initial_sparsity is not None
        for name, used in timed.items():
            if used and self.total_steps is None:
                raise ArgumentError(f"{name} needs to know when training ends: set total_steps to its optimizer steps")

    @property
    def stop_step(self) -> float:
        """The optimizer step after which masks no longer change."""
        if self.total_steps is None:
            return math.inf
        # The published code moves weights to the very end.
        return self.total_steps * (1.0 if self.rule == "published" else self.stop_fraction)

    def is_due(self, step: int) -> bool:
        """Whether the masks move after `step` optimizer steps."""
        return step > 0 and step % self.update_interval == 0 and step <= self.stop_step

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def published_slak(sparsity: float = 0.4, **changes: Any) -> DynamicSparsityConfig:
    """Give the settings under which `DynamicSparsity` does what SLaK's code does.

    It differs from the default (`rule="exact"`) in that masks and random growth are drawn weight by weight, so that counts
    only hold on average; layers whose drawn density is 0.99 or more lose their mask; gradients are not masked and the
    moments of removed weights run on, so that weights grow with old moments; the number removed is rounded up; what was
    removed may grow again at once, and then keeps its value; and masks move until the last step. Its cosine falls to 0.005.

    Args:
        sparsity: share of zeros.
        changes: other settings of `DynamicSparsityConfig`; `total_steps` switches the cosine on, as officially.
    """
    if changes.get("total_steps") is not None:
        changes.setdefault("prune_schedule", "cosine")
    settings = {"init": "snip", "growth": "random", "prune_fraction": 0.3, "regrow": True, **changes}
    return DynamicSparsityConfig(sparsity=sparsity, rule="published", **settings)


def published_shiftwise(sparsity: float = 0.3, **changes: Any) -> DynamicSparsityConfig:
    """Give the settings under which `DynamicSparsity` does what Shift-wise's coarse pruning (`rep_coarse`) does.

    As `published_slak`, for whole N×N tiles of the large kernels. The tile sets share one mask from the start, which
    officially holds for all but the first only after one step, and at every 131st update.

    Args:
        sparsity: share of the tiles that is zero.
        changes: other settings of `DynamicSparsityConfig`.
    """
    return published_slak(sparsity, **{"block": "kernel", "layers": "large_kernel_only", "share_every": 131, **changes})


def with_total_steps(config: DynamicSparsityConfig, total_steps: int) -> DynamicSparsityConfig:
    """Give `config` the length of the training, unless it has one."""
    return config if config.total_steps is not None else replace(config, total_steps=total_steps)


def _split(text: str) -> tuple[str, ...]:
    return tuple(pattern.strip() for pattern in text.split(",") if pattern.strip())
