"""Controller of dynamic sparse training: masks beside the parameters, enforced by hooks around the optimizer's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from widekernel.deprecation import renamed_attribute
from widekernel.errors import ArgumentError
from widekernel.layers.wrappers import unwrap
from widekernel.sparsity.dynamic.blocks import groups_of
from widekernel.sparsity.dynamic.config import DynamicSparsityConfig
from widekernel.sparsity.dynamic.init import copy_masks, draw_masks, gradient_scores, snip_scores
from widekernel.sparsity.dynamic.masked_gradients import MaskedGradients
from widekernel.sparsity.dynamic.masked_parameters import masked_parameters, select_parameters
from widekernel.sparsity.dynamic.optimizer_utils import (
    check_trained,
    clear_moments,
    inner_optimizer,
    keeps_zeros,
)
from widekernel.sparsity.dynamic.processes import check_equal
from widekernel.sparsity.dynamic.removed_weights import RemovedWeights
from widekernel.sparsity.dynamic.rules import exact, published
from widekernel.sparsity.dynamic.serialization import ControllerState, check_settings, names_left_dense, settings_in_masks
from widekernel.sparsity.dynamic.state import MaskState
from widekernel.sparsity.dynamic.step_hooks import Outcome, StepHooks, owners_of
from widekernel.sparsity.dynamic.tamper_checks import TamperChecks
from widekernel.sparsity.dynamic.topology import move_masks
from widekernel.sparsity.dynamic.unseen_training import UnseenTraining
from widekernel.sparsity.dynamic.weight_averages import WeightAverages
from widekernel.sparsity.selection import Selection, check_not_sharded
from widekernel.sparsity.snapshot import SparsitySnapshot, TopologyUpdate, take_snapshot


class DynamicSparsity:
    """Controller that keeps a network sparse during training and moves its masks (SET, RigL, SNFS; SLaK, section 3.2).

    The weights stay plain parameters with unchanged keys, and are exactly zero outside the masks. Create the controller
    after the optimizer; from then on it acts on every optimizer step, with or without a closure. Under mixed precision,
    steps that the gradient scaler skips are not counted. With gradient accumulation, only optimizer steps count. Under data
    parallelism, every process computes the same masks independently; a digest of 8 bytes verifies this at every update.

    To continue a run, load network, optimizer, averages and controller in any order, before or after making the controller.
    The weights that its first masks remove are kept until the first step, and restored if the loaded masks keep them. These
    mistakes raise an error at the next step or at `state_dict()`: weights written outside the masks, replaced parameters,
    and training steps that the controller did not see.

    The training loop has to do two things itself. If it clips gradients, it must call `mask_gradients()` once before, so
    that their norm is that of the live weights. And it must save `state_dict()` with those of model and optimizer.

    If `init` needs gradients, the masks are drawn from `batch` or, without one, from the gradients of the first step,
    averaged over all processes. Until then, all weights are live.

    Args:
        model: the network, wrapped or not.
        optimizer: optimizer of the network's parameters, or the wrapper of Accelerate, Lightning or Fabric around it.
        config: the settings.
        batch: inputs and targets to score weights with (`init="snip"`); they run on a copy of the network in training mode.
        loss: function of the network's outputs and the targets of `batch`.
        averages: networks with the same parameter names that hold moving averages of the weights, such as timm's ModelEmaV3.
            Removed weights are removed there too; the averages of grown weights start from the live weight, not from an old
            average.
        masks: initial masks (parameter name -> bool); only these parameters are masked.

    Attributes:
        optimizer: the optimizer itself, without wrappers.
        masks: parameter name -> bool tensor of its shape, True where weights are live; changed in place, unless the network
            moves to another device.
        selection: for every parameter of the network, whether it is masked and, if not, why.
        step: optimizer steps done.
        updates: topology updates done.
        skipped: topology updates that were skipped because scores were not finite.
        churn: the topology updates, newest last.
        grown: weights that grew at the last update, by parameter name.

    Raises:
        ArgumentError: nothing can be masked, the optimizer does not train the network, a parameter is shared or is sharded
            over processes, or the masks belong to another network.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: DynamicSparsityConfig | None = None,
        *,
        batch: tuple[Tensor, Tensor] | None = None,
        loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
        averages: Sequence[nn.Module] = (),
        masks: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config or DynamicSparsityConfig()
        self.config.check_total_steps()
        self._model = unwrap(model)
        check_not_sharded(self._model)
        self.optimizer, trusted = inner_optimizer(optimizer)
        self.selection = select_parameters(self._model, self.config, masks)
        self._initial_selection = self.selection
        parameters = masked_parameters(self._model, self.selection)
        check_trained(self.optimizer, parameters)
        self._state = MaskState(self.config, parameters, groups_of(self._model, parameters, self.config))
        self._averages = WeightAverages(averages, self._state)
        _check_only_controller(self.optimizer, set(parameters))
        # Masks that are given or taken from zeros do not follow from the settings, and the network may be sparse already.
        self._from_settings = masks is None and self.config.init != "from_weights"
        self._checks = TamperChecks(self._model, self._state, trusted, self._from_settings)
        self._rule = exact if self.config.rule == "exact" else published
        self.step = self.updates = self.skipped = 0
        self.churn: list[TopologyUpdate] = []
        self.grown: dict[str, int] = {}
        self._gradients = MaskedGradients(self._state)
        self._removed: RemovedWeights | None = None  # until the next step
        self._hooks: StepHooks | None = None
        self._pending = masks is None and self.config.init in ("snip", "snip_mask")
        self._unseen = UnseenTraining(parameters)
        if masks is not None:
            copy_masks(self._state, masks)
            self._start()
        elif not self._pending:
            self._draw({name: parameter.detach().abs() for name, parameter in parameters.items()})
        elif batch is not None:
            self._draw(snip_scores(self._model, parameters, batch, loss))
        self._hooks = StepHooks(
            self.optimizer,
            self,
            self._before_step,
            before_closure=self._gradients.drop_dense,
            after_closure=self._mask_gradients_of_step,
            after=self._after_step,
        )
        self._load_hook = self.optimizer.register_load_state_dict_post_hook(lambda _: self._checks.repeat())

    choices = renamed_attribute("choices", "selection")
    moved = renamed_attribute("moved", "grown")

    # -- public state ----------------------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor, True where weights are live. Empty until masks are drawn."""
        return {} if self._pending else dict(self._state.masks)

    def densities(self) -> dict[str, float]:
        """Return the target density of each masked parameter, by name; 1 until masks are drawn."""
        return dict(self._state.densities)

    def active(self) -> int:
        """Return the number of live weights of all masked parameters."""
        return self._state.active()

    def snapshot(self) -> SparsitySnapshot:
        """Return a snapshot of the masks as they are now, for a `SparsityReport`."""
        return take_snapshot(
            self._model,
            self.selection,
            self.masks,
            densities=self.densities(),
            grown=self.grown,
            churn=self.churn,
            pending=self._pending,
        )

    def remove(self) -> None:
        """Remove the hooks from the optimizer: from now on the network trains densely."""
        self._unseen.stop()
        self._load_hook.remove()
        if self._hooks is not None:
            self._hooks.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs (bit-packed masks, counters, ...), as tensors and plain containers.

        Raises:
            ArgumentError: weights are nonzero outside the masks, or the network was trained before any masks were drawn.
        """
        self._state.follow_parameters()
        self._checks.check_parameters()
        self._unseen.check()
        if not self._pending:
            self._checks.check_zero_outside(self._state.parameters)
        return ControllerState(
            settings=settings_in_masks(self.config),
            step=self.step,
            updates=self.updates,
            skipped=self.skipped,
            pending=self._pending,
            masks=self._state.masks,
            densities=self._state.densities,
            fresh=self._state.fresh,
            momentum=self._gradients.momentum,
            churn=self.churn,
            grown=self.grown,
            live_zeros={} if self._pending else self._checks.live_zeros(),
        ).to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; weights outside the masks are set to zero.

        Before the first step, weights that were removed only by this controller's first masks are restored first.

        Raises:
            CheckpointError: the state belongs to another network, or was saved with another sparsity, block or rule.
        """
        self._state.follow_parameters()
        self._checks.check_parameters()
        self._averages.refresh()
        saved = ControllerState.from_dict(state)
        check_settings(saved, self.config, self._from_settings)
        self._restore(saved, names_left_dense(saved, self._state))

    def _restore(self, saved: ControllerState, left_dense: Iterable[str]) -> None:
        state = self._state
        if self._removed is not None:
            self._removed.restore(self._masked_tensors(), state.masks)
        self._leave_dense(left_dense)
        self._averages.refresh()
        self._removed = RemovedWeights(self._masked_tensors())
        with torch.no_grad():
            for name, mask in state.masks.items():
                mask.copy_(saved.masks[name])
        self._pending = saved.pending
        self._unseen.start() if self._pending else self._unseen.stop()
        self.apply_masks()
        self._checks.masks_were_loaded(saved.live_zeros)
        state.densities = {name: saved.densities[name] for name in state.masks}
        state.fresh = {name: fresh.to(state.masks[name].device) for name, fresh in saved.fresh.items()}
        self._gradients.momentum = {n: mean.to(state.parameters[n], copy=True) for n, mean in saved.momentum.items()}
        self.step, self.updates, self.skipped = saved.step, saved.updates, saved.skipped
        self.churn, self.grown = saved.churn, saved.grown

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set weights and averages outside the masks to zero, whatever wrote to them."""
        self._state.follow_parameters()
        if not self._pending:
            self._state.mask_weights()
            if self.config.rule == "exact":
                self._averages.mask(self._state.masks)
            self._checks.record()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ArgumentError(
            "a DynamicSparsity belongs to one network and its optimizer and cannot be copied: copy those, make a new one "
            "for the copies, and load this one's state_dict() into it"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ArgumentError(
            "a DynamicSparsity belongs to one network and its optimizer and cannot be pickled: save its state_dict()"
        )

    # -- around a step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set gradients outside the masks to zero; call it once between the backward pass and clipping.

        Without clipping there is no need to call it: gradients are masked before every step.
        """
        self._state.follow_parameters()
        if self._pending and (scores := gradient_scores(self._state)) is not None:
            self._draw(scores)
        if self._pending or self.config.rule == "published":
            return
        self._gradients.store_dense(self.step + 1, getattr(self.optimizer, "grad_scale", None))
        self._gradients.mask()

    def _mask_gradients_of_step(self) -> None:
        if self._gradients.has_dense:  # masked before clipping
            self._gradients.mask()
        else:
            self.mask_gradients()
        if not self._checks.done:
            self._check_before_step()

    def _before_step(self, has_closure: bool) -> None:
        self._check_before_step()
        # A closure will compute the gradients of this step. Present ones may be old, so no masks are drawn from them.
        if not (has_closure and self._pending):
            self._mask_gradients_of_step()

    def _check_before_step(self) -> None:
        """Raise if something has undone the masks since the last step, and forget the weights that they removed."""
        if self._pending:
            return
        self._state.follow_parameters()
        if not self._checks.before_step():
            return
        self._averages.refresh()
        self._removed = None
        if self.config.rule == "exact":
            for name, parameter in self._state.parameters.items():
                clear_moments(self.optimizer, parameter, self._state.masks[name])

    def _after_step(self, outcome: Outcome) -> None:
        self._unseen.acknowledge()
        if outcome == "skipped":
            self._gradients.drop_dense()
            return
        if outcome == "repeated":
            self._keep_masked()
            return
        self.step += 1
        if self._pending:
            return
        self._gradients.update_momentum()
        self._keep_masked()
        self._averages.start_fresh()
        self._state.fresh = {}
        if self.config.is_due(self.step):
            self._update_topology()
        self._gradients.drop_dense()

    def _keep_masked(self) -> None:
        """Set to zero what a step may have changed outside the masks."""
        if self._pending:
            return
        if self.config.rule == "published":
            self._state.mask_weights()
            published.mask_momentum(self.optimizer, self._state)
        elif not keeps_zeros(self.optimizer):
            self._state.mask_weights()
        self._checks.record()

    # -- masks -----------------------------------------------------------------------------------------------------------

    def _update_topology(self) -> None:
        self._checks.check_parameters()
        self._checks.check_zero_outside(self._state.parameters)  # writes to `parameter.data` show only here
        self._averages.refresh()
        change = move_masks(self._state, self._rule, self.step, self._gradients.growth_scores(self.optimizer))
        if change is None:
            self.skipped += 1
            return
        self.updates += 1
        self.grown = {name: int(new.sum()) for name, new in change.new.items()}
        if self.config.rule == "exact":
            self._clear_moved(change.survivors, change.new)
        self.churn.append(TopologyUpdate(self.step, change.removed, sum(self.grown.values()), self.active()))
        self._checks.record()
        check_equal(self._state.masks)

    def _clear_moved(self, survivors: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Clear gradient, moments and averages of weights that were removed or have just grown."""
        for name, parameter in self._state.parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(survivors[name])
            clear_moments(self.optimizer, parameter, survivors[name])
            self._averages.mask({name: survivors[name]})
            if self._averages.weights and self.grown[name]:
                self._state.fresh[name] = new[name]

    @torch.no_grad()
    def _draw(self, scores: dict[str, Tensor]) -> None:
        self._leave_dense(draw_masks(self._state, self._rule, scores))
        self._start()

    def _leave_dense(self, names: Iterable[str]) -> None:
        """Mask all selected parameters except these, which the published rule leaves dense."""
        dense = self._state.leave_dense(names)
        self.selection = [
            Selection(each.name, each.shape, "was drawn almost dense") if each.name in dense else each
            for each in self._initial_selection
        ]

    @torch.no_grad()
    def _start(self) -> None:
        """Apply the masks for the first time."""
        self._pending = False
        self._unseen.stop()
        in_step = self._hooks is not None and self._hooks.in_step
        if in_step:
            self._checks.check_first_masks()
        self._removed = None if in_step else RemovedWeights(self._masked_tensors())
        self.apply_masks()
        check_equal(self._state.masks)

    def _masked_tensors(self) -> list[dict[str, nn.Parameter]]:
        return [self._state.parameters, *self._averages.weights]


def _check_only_controller(optimizer: Optimizer, names: set[str]) -> None:
    """Raise if another controller masks the same parameters through this optimizer."""
    for other in owners_of(optimizer):
        if isinstance(other, DynamicSparsity) and (both := sorted(names & set(other._state.parameters))):
            raise ArgumentError(
                f"{both[0]} is masked by another DynamicSparsity of this optimizer: call its remove() first, or "
                "mask other layers"
            )
