"""Settings of dynamic sparse training: sparsity, selection of layers, blocks, and how the masks move."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from widekernel.deprecation import renamed_attribute
from widekernel.errors import ArgumentError, nearest
from widekernel.settings import comma_separated, require, require_number, require_one_of, require_whole, require_within
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED, current_name

INITS = ("snip", "snip_mask", "erk", "uniform", "magnitude", "from_weights")
GROWTHS = ("random", "gradient", "momentum", "none")
SCHEDULES = ("constant", "cosine")
LAYER_RULES = ("all", "large_kernel_only")
BLOCKS = ("element", "kernel", "branch", "channel", SEMI_STRUCTURED)
RULES = ("exact", "published")


@dataclass(frozen=True)
class DynamicSparsityConfig:
    """Settings of `DynamicSparsity`.

    Args:
        sparsity: share of zeros among the masked weights, from 0 to below 1
        init: how the first masks are chosen. `snip`: SNIP scores |weight · gradient|, ranked over all layers, set the
            density of each layer, and its live weights are drawn at random (as in SLaK). `snip_mask`: the weights with the
            highest SNIP scores are kept. `erk`: Erdős–Rényi-kernel densities, live weights drawn at random. `uniform`: the
            same density in every layer, live weights drawn at random. `magnitude`: the largest |weight| over all layers.
            `from_weights`: all weights that are nonzero now, whatever `sparsity` is
        prune: which weights an update removes; `magnitude`: the smallest |weight| of each layer
        growth: which weights an update grows in their place: `random` ones, those with the largest dense `gradient`, those
            with the largest running mean of dense gradients (`momentum`), or `none`, with which only `initial_sparsity`
            changes the masks
        prune_fraction: share of a layer's live weights that an update moves
        prune_schedule: `constant`, or `cosine`, which lowers `prune_fraction` to 0 at the last update
        update_interval: optimizer steps between updates of the masks
        total_steps: optimizer steps of the whole training, required by `cosine` and `initial_sparsity`; `widekernel train`
            fills it in. Without it, updates never stop
        stop_fraction: share of `total_steps` after which the masks no longer change
        initial_sparsity: sparsity at the start, which changes to `sparsity` along a cubic curve and reaches it at the last
            update (Zhu & Gupta, 2017); by default, the sparsity is constant
        layers: what to mask: `all` matrices and kernels, `large_kernel_only` (the widest kernels of every large-kernel
            layer), or patterns of parameter names, as a list or separated by commas. The name of a module selects all its
            parameters
        exclude: patterns of parameter names, or names of modules, to keep dense
        block: unit that is pruned and grown as a whole: an `element`; a `kernel` (the N×N window of one input and one output
            channel, or one tile of Shift-wise convolution); a `branch` (the kernel of one channel in one branch of a
            large-kernel layer); a `channel` (one channel in all branches; in other layers, an output channel); two numbers
            (tiles of that height and width); or `semi_structured` (2:4: two of every four consecutive input channels are
            kept). Layers without such blocks are masked by element, or stay dense with `semi_structured`
        share_every: at every `share_every`-th update, the tile sets that a Shift-wise layer adds up are ranked together and
            share one mask (`sparse_gap` in the official code); at the other updates, each set is ranked separately
        regrow: let weights that an update removes grow again in the same update
        min_fan_in: smallest number of weights that every output channel keeps (only with `block="element"`)
        momentum: decay of the running mean for `growth="momentum"`
        seed: seed of all random choices, which otherwise depend only on the step and the parameter's name
        rule: `exact` keeps the number of live weights exact and everything outside the masks at zero; `published` reproduces
            the code of SLaK and Shift-wise convolution (see `published_slak`)

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
        object.__setattr__(self, "block", current_name("block", self.block))
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
            # A single word that is not a rule, and is not similar to one, may be the name of a module.
            word = self.layers.strip() and not any(sign in self.layers for sign in "*?[,.")
            if not self.layers.strip() or (word and (self.layers in LAYER_RULES or nearest(self.layers, LAYER_RULES))):
                require_one_of("layers", self.layers, LAYER_RULES)
            else:
                object.__setattr__(self, "layers", comma_separated(self.layers))
        for name in ("layers", "exclude"):
            value = getattr(self, name)
            patterns = comma_separated(value) if isinstance(value, str) else value
            if not isinstance(patterns, Collection) or not all(isinstance(p, str) and p for p in patterns):
                raise ArgumentError(f"{name}={value!r} must hold patterns of parameter names, such as 'stages.*.fc1.weight'")
            if name == "layers" and not patterns:
                raise ArgumentError(
                    f"layers={value!r} selects nothing: give patterns such as 'stages.*.fc1.weight', or "
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
        if self.block == SEMI_STRUCTURED and (self.sparsity != 0.5 or self.initial_sparsity is not None):
            raise ArgumentError(
                f"block={SEMI_STRUCTURED!r} keeps two of four weights: set sparsity=0.5 (it is {self.sparsity}) and no "
                "initial_sparsity"
            )
        if self.rule == "published" and (
            self.initial_sparsity is not None or self.min_fan_in or self.block == SEMI_STRUCTURED
        ):
            raise ArgumentError("rule='published' has no initial_sparsity, min_fan_in or 2:4 blocks: use rule='exact'")

    def check_total_steps(self) -> None:
        """Raise an `ArgumentError` if a schedule needs `total_steps` but it is not set."""
        schedules = {
            "prune_schedule='cosine'": self.prune_schedule == "cosine",
            "initial_sparsity": self.initial_sparsity is not None,
        }
        for name, used in schedules.items():
            if used and self.total_steps is None:
                raise ArgumentError(f"{name} needs the length of the training: set total_steps to its optimizer steps")

    check_timed = renamed_attribute("check_timed", "check_total_steps")

    @property
    def stop_step(self) -> float:
        """The optimizer step after which masks no longer change."""
        if self.total_steps is None:
            return math.inf
        # The published code moves weights until the last step.
        return self.total_steps * (1.0 if self.rule == "published" else self.stop_fraction)

    def is_due(self, step: int) -> bool:
        """Return whether the masks move after `step` optimizer steps."""
        return step > 0 and step % self.update_interval == 0 and step <= self.stop_step

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def published_slak(sparsity: float = 0.4, **changes: Any) -> DynamicSparsityConfig:
    """Return settings under which `DynamicSparsity` reproduces SLaK's code.

    It differs from the default (`rule="exact"`) in these points:

    * Masks and random growth are drawn weight by weight, so counts are exact only on average.
    * Layers whose drawn density is 0.99 or more lose their mask.
    * Gradients are not masked, and the moments of removed weights continue, so weights grow with old moments.
    * The number of removed weights is rounded up.
    * Removed weights may grow again in the same update, and then keep their value.
    * Masks move until the last step.
    * The cosine falls to 0.005.

    Args:
        sparsity: share of zeros.
        changes: other settings of `DynamicSparsityConfig`; `total_steps` turns the cosine on, as in the official code.
    """
    if changes.get("total_steps") is not None:
        changes.setdefault("prune_schedule", "cosine")
    settings = {"init": "snip", "growth": "random", "prune_fraction": 0.3, "regrow": True, **changes}
    return DynamicSparsityConfig(sparsity=sparsity, rule="published", **settings)


def published_shiftwise(sparsity: float = 0.3, **changes: Any) -> DynamicSparsityConfig:
    """Return settings under which `DynamicSparsity` reproduces the coarse pruning (`rep_coarse`) of Shift-wise's code.

    They are those of `published_slak`, for whole N×N tiles of the large kernels. The tile sets share one mask at the
    start and at every 131st update. The official code masks all sets but the first only after one step.

    Args:
        sparsity: share of zeros among the tiles.
        changes: other settings of `DynamicSparsityConfig`.
    """
    return published_slak(sparsity, **{"block": "kernel", "layers": "large_kernel_only", "share_every": 131, **changes})


def with_total_steps(config: DynamicSparsityConfig, total_steps: int) -> DynamicSparsityConfig:
    """Return `config` with `total_steps` filled in, unless it is set already."""
    return config if config.total_steps is not None else replace(config, total_steps=total_steps)
