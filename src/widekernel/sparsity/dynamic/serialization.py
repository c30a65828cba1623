"""State of a controller as plain values, and its form in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from widekernel.errors import CheckpointError
from widekernel.sparsity.dynamic.config import DynamicSparsityConfig
from widekernel.sparsity.dynamic.state import MaskState
from widekernel.sparsity.mask_files import check_names
from widekernel.sparsity.packing import pack, unpack
from widekernel.sparsity.semi_structured.config import OLD_NAME, SEMI_STRUCTURED
from widekernel.sparsity.snapshot import TopologyUpdate

FORMAT = 1
KEYS = ("step", "updates", "skipped", "pending", "shapes", "masks", "densities", "fresh", "momentum", "churn", "moved")


@dataclass(frozen=True)
class ControllerState:
    """State that a `DynamicSparsity` needs to continue exactly.

    Attributes:
        settings: result of `settings_in_masks`; None in states of older versions.
        step: optimizer steps done.
        updates: topology updates done.
        skipped: topology updates that were skipped.
        pending: whether masks are still to be drawn.
        masks: parameter name -> bool tensor.
        densities: share of each parameter to keep in the end.
        fresh: weights that no step has trained yet, parameter name -> bool tensor.
        momentum: running mean of the dense gradients, by parameter name.
        churn: the topology updates.
        grown: weights that grew at the last update, by parameter name.
        live_zeros: live weights that are zero, by parameter name; empty in states of older versions.
    """

    settings: dict[str, Any] | None
    step: int
    updates: int
    skipped: int
    pending: bool
    masks: dict[str, Tensor]
    densities: dict[str, float]
    fresh: dict[str, Tensor]
    momentum: dict[str, Tensor]
    churn: list[TopologyUpdate]
    grown: dict[str, int]
    live_zeros: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers, with bit-packed masks; nothing in it changes later."""
        return {
            "format": FORMAT,
            "config": self.settings,
            "step": self.step,
            "updates": self.updates,
            "skipped": self.skipped,
            "pending": self.pending,
            "shapes": {name: list(mask.shape) for name, mask in self.masks.items()},
            "masks": {name: pack(mask) for name, mask in self.masks.items()},
            "densities": dict(self.densities),
            "fresh": {name: pack(mask) for name, mask in self.fresh.items()},
            "momentum": {name: value.clone() for name, value in self.momentum.items()},
            "churn": [(update.step, update.removed, update.grown, update.active) for update in self.churn],
            "moved": dict(self.grown),
            "live_zeros": self.live_zeros,
        }

    @classmethod
    def from_dict(cls, saved: Any) -> ControllerState:
        """Read what `to_dict` returned.

        Raises:
            CheckpointError: it is not a state, is incomplete, or comes from a newer version.
        """
        if not isinstance(saved, Mapping):
            raise CheckpointError(
                f"the sparsity state is a {type(saved).__name__}: give the dict that state_dict() returned"
            )
        if saved.get("format") != FORMAT:
            raise CheckpointError(
                f"the sparsity state has format {saved.get('format')!r}; this version reads format {FORMAT}"
            )
        if missing := [key for key in KEYS if key not in saved]:
            raise CheckpointError(
                f"the sparsity state lacks {', '.join(missing)}: give everything that state_dict() returned"
            )
        shapes = {name: tuple(shape) for name, shape in saved["shapes"].items()}
        settings = saved.get("config")
        if settings is not None and settings["block"] == OLD_NAME:
            settings = {**settings, "block": SEMI_STRUCTURED}
        return cls(
            settings=settings,
            step=saved["step"],
            updates=saved["updates"],
            skipped=saved["skipped"],
            pending=saved["pending"],
            masks={name: unpack(saved["masks"][name], shape) for name, shape in shapes.items()},
            densities={name: float(density) for name, density in saved["densities"].items()},
            fresh={name: unpack(bits, shapes[name]) for name, bits in saved["fresh"].items()},
            momentum=dict(saved["momentum"]),
            churn=[TopologyUpdate(*row) for row in saved["churn"]],
            grown=dict(saved["moved"]),
            live_zeros=dict(saved.get("live_zeros", {})),
        )


def settings_in_masks(config: DynamicSparsityConfig) -> dict[str, Any]:
    """Return, as plain values, the settings that masks and densities reflect; others may change when a state is loaded."""
    start = config.initial_sparsity
    return {
        "rule": config.rule,
        "block": config.block if isinstance(config.block, str) else list(config.block),
        "sparsity": float(config.sparsity),
        "initial_sparsity": None if start is None else float(start),
    }


def check_settings(saved: ControllerState, config: DynamicSparsityConfig, from_settings: bool) -> None:
    """Raise a `CheckpointError` if the masks of a state reflect other settings than the controller's.

    Args:
        saved: the state.
        config: the settings of the controller that loads it.
        from_settings: whether the masks of that controller follow from its sparsity.
    """
    theirs = saved.settings
    if theirs is None or saved.pending:  # from an older version, or masks are still to be drawn with the settings here
        return
    ours = settings_in_masks(config)
    names = ["rule", "block"]
    if from_settings:
        names += ["sparsity", "initial_sparsity"]
    different = [name for name in names if ours[name] != theirs[name]]
    if different:
        here, there = (", ".join(f"{name}={values[name]!r}" for name in different) for values in (ours, theirs))
        raise CheckpointError(
            f"the sparsity state was saved with {there}, and this controller was made with {here}, which the state would "
            f"override: make it with {there}; or load the weights alone and start with new masks "
            "(init='magnitude' for a higher sparsity)"
        )


def names_left_dense(saved: ControllerState, state: MaskState) -> list[str]:
    """Return the parameters that were selected here but have no mask in a saved state.

    The published rule leaves layers dense whose masks it draws almost dense. Here these may be other layers than in the run
    that saved the state. Under the exact rule, the masks must belong to the same parameters.

    Raises:
        CheckpointError: the state belongs to another network.
    """
    shapes = {name: tuple(mask.shape) for name, mask in saved.masks.items()}
    if state.config.rule != "published":
        check_names(shapes, {name: tuple(mask.shape) for name, mask in state.masks.items()})
        return []
    known = {name: tuple(parameter.shape) for name, parameter in state.selected.items()}
    check_names(shapes, {name: shape for name, shape in known.items() if name in shapes})
    return [name for name in known if name not in shapes]
