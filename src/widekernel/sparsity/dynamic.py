"""Dynamic sparse training: masks beside the parameters, held by hooks around the optimizer's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from widekernel.errors import ArgumentError
from widekernel.sparsity.allocation import check_finite
from widekernel.sparsity.averages import Averages
from widekernel.sparsity.blocks import groups_of
from widekernel.sparsity.config import DynamicSparsityConfig
from widekernel.sparsity.gradients import Gradients
from widekernel.sparsity.init import choices_for, snip_scores
from widekernel.sparsity.kept import Kept
from widekernel.sparsity.optimizers import (
    check_trained,
    clear_moments,
    closure_of,
    inner_optimizer,
    keeps_zeros,
    overflowed,
    with_closure,
)
from widekernel.sparsity.processes import check_equal
from widekernel.sparsity.rules import exact, published
from widekernel.sparsity.selection import Choice, check_whole, masked_parameters, unwrap
from widekernel.sparsity.serialization import restore_state, state_of
from widekernel.sparsity.state import Churn, MaskState
from widekernel.sparsity.untold import UntoldSteps
from widekernel.sparsity.watch import Watch


class DynamicSparsity:
    """Keeps a network sparse while it is trained, and moves its masks (SET, RigL, SNFS; SLaK, section 3.2).

    The weights stay plain parameters, with the keys that they have, and are exactly zero outside the masks. Create it after
    the optimizer; from then on the optimizer's steps do everything, with a closure or without. Under mixed precision steps
    that the gradient scaler skips are not counted, with accumulated gradients a step is a step of the optimizer, and under
    data parallelism every process finds the same masks by itself, which a digest of 8 bytes checks at every update.

    A run is continued by loading network, optimizer, averages and this in any order, before or after making this: what its
    first masks removed is kept until the first step and given back if the masks that are loaded let it live. Weights that
    something else has written outside the masks, parameters that were replaced, and steps that this did not see are errors
    at the next step or `state_dict()`.

    Two things the hooks cannot do. Where gradients are clipped, call `mask_gradients()` once before, so that their norm is
    that of the live weights. And `state_dict()` belongs into the checkpoint beside those of model and optimizer.

    With an `init` that needs gradients the masks are drawn from `batch`, or, without one, from the gradients of the first
    step, which are those of all processes; until then all weights live.

    Args:
        model: the network, wrapped or not.
        optimizer: of the network's parameters; or what Accelerate, Lightning or Fabric have wrapped around it.
        config: the settings.
        batch: inputs and targets to score weights with (`init="snip"`), used on a copy of the network in training mode.
        loss: of the network's outputs and the targets of `batch`.
        averages: networks of the same parameter names that hold moving averages of the weights, such as timm's ModelEmaV3;
            what is removed is removed there too, and what grew starts from the live weight instead of its old average.
        masks: start from these (parameter name -> bool), and mask only these parameters.

    Attributes:
        optimizer: the optimizer itself, out of its wrappers.
        masks: parameter name -> bool tensor of its shape, True where weights live; changed in place, unless the network
            moves to another device.
        choices: for every parameter of the network whether it is masked, and if not, why.
        step: optimizer steps done.
        updates: updates of the masks done.
        skipped: updates left out because scores were not finite.
        churn: what the updates did, newest last.
        moved: weights that grew at the last update, by parameter name.

    Raises:
        ArgumentError: nothing can be masked; the optimizer is not the network's; a parameter is shared, or spread over
            processes; the masks belong to another network.
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
        self.config.check_timed()
        self._model = unwrap(model)
        check_whole(self._model)
        self.optimizer, self._trusted = inner_optimizer(optimizer)
        self.choices = choices_for(self._model, self.config, masks)
        parameters = masked_parameters(self._model, self.choices)
        check_trained(self.optimizer, parameters)
        self._state = MaskState(self.config, parameters, groups_of(self._model, parameters, self.config))
        self._all_choices = self.choices
        self._averages = Averages(averages, self._state)
        _check_alone(self.optimizer, set(parameters))
        self._watch = Watch(self._model, self._state)
        self._rule = exact if self.config.rule == "exact" else published
        self.step = self.updates = self.skipped = 0
        self.churn: list[Churn] = []
        self.moved: dict[str, int] = {}
        self._gradients = Gradients(self._state)
        self._kept: Kept | None = None  # until the next step
        self._zeros: dict[str, int] | None = None  # live weights that were zero when the state was saved that was loaded
        # Masks by the settings, and such that nobody has seen yet.
        self._by_settings = self._chosen = masks is None and self.config.init != "from_weights"
        self._settled = self._running = False
        self._pending = masks is None and self.config.init in ("snip", "snip_mask")
        self._untold = UntoldSteps(parameters)
        if masks is not None:
            self._take(masks)
        elif not self._pending:
            weights = {name: parameter.detach().abs() for name, parameter in parameters.items()}
            self._initialise(weights)
        elif batch is not None:
            self._initialise(snip_scores(self._model, parameters, batch, loss))
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_load_state_dict_post_hook(self._unsettle),
        ]

    # -- what others see -------------------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor, True where weights live. Empty as long as no masks are drawn."""
        return {} if self._pending else dict(self._state.masks)

    def densities(self) -> dict[str, float]:
        """Share of each masked parameter that is to be kept, by name; 1 as long as no masks are drawn."""
        return dict(self._state.densities)

    def active(self) -> int:
        """Number of live weights of all masked parameters."""
        return sum(int(mask.sum()) for mask in self._state.masks.values())

    def remove(self) -> None:
        """Take the hooks off the optimizer: from now on the network trains densely."""
        self._untold.stop()
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Give masks (bit-packed), counters and what else an exact resumption needs, as tensors and plain containers.

        Raises:
            ArgumentError: the masks do not hold, or were never drawn: something else than the optimizer's steps trained.
        """
        self._state.follow()
        self._watch.check_attached()
        self._untold.check()
        if not self._pending:
            self._watch.check_outside(self._state.parameters)
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; weights outside the masks are set to zero.

        Before the first step, weights that only the first masks of this had removed are given back before.

        Raises:
            CheckpointError: the state belongs to another network, or was saved with another sparsity, block or rule.
        """
        self._state.follow()
        self._watch.check_attached()
        self._averages.find()
        restore_state(self, state)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set weights and averages outside the masks to zero, whatever has written to them."""
        self._state.follow()
        if not self._pending:
            self._state.mask_weights()
            if self.config.rule == "exact":
                self._averages.clear(self._state.masks)
            self._watch.note()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ArgumentError(
            "a DynamicSparsity belongs to one network and its optimizer and cannot be copied: copy those, make a new one, "
            "and give it this one's state_dict()"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ArgumentError(
            "a DynamicSparsity belongs to one network and its optimizer and cannot be pickled: save its state_dict()"
        )

    # -- around a step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set gradients outside the masks to zero; call it once between the backward pass and clipping.

        Without clipping there is no need to: it happens before every step.
        """
        self._state.follow()
        if self._pending:
            self._initialise_from_gradients()
        if self._pending or self.config.rule == "published":
            return
        self._gradients.remember(self.step + 1, getattr(self.optimizer, "grad_scale", None))
        self._gradients.mask()

    def _mask_gradients_of_step(self) -> None:
        if self._gradients.remembered:  # masked before clipping
            self._gradients.mask()
        else:
            self.mask_gradients()
        if not self._settled:
            self._settle()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if overflowed(optimizer):
            return None
        self._running, has_closure = True, closure_of(args, kwargs) is not None
        self._settle()
        # A closure computes the gradients of this step; those that are there may be old and choose no masks.
        if not (has_closure and self._pending):
            self._mask_gradients_of_step()
        return with_closure(args, kwargs, self._gradients.forget, self._mask_gradients_of_step) if has_closure else None

    def _settle(self) -> None:
        """Before a step: raise if something has undone the masks since the last one, and forget what they have removed."""
        if self._pending:
            return
        self._state.follow()
        # Writing past PyTorch's own count of writes is to be feared of wrappers that are not known.
        self._watch.check_outside(self._watch.written() if self._trusted else self._state.parameters)
        self._watch.note()
        if self._settled:
            return
        self._watch.check_attached()
        self._averages.find()
        if self._zeros is not None:
            self._watch.check_zeros(self._zeros)
        elif self._chosen:
            self._watch.check_not_sparse()
        self._kept, self._zeros, self._chosen, self._settled = None, None, False, True
        if self.config.rule == "exact":
            for name, parameter in self._state.parameters.items():
                clear_moments(self.optimizer, parameter, self._state.masks[name])

    def _unsettle(self, optimizer: Optimizer | None = None) -> None:
        """Have the next step look again: a state was loaded."""
        self._settled = False

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._untold.told()
        if overflowed(optimizer):
            self._gradients.forget()
            return
        again, self._running = not self._running, False
        if again:  # the step of a class around that of its base class, which both call hooks
            self._hold()
            return
        self.step += 1
        if self._pending:
            return
        self._gradients.follow()
        self._hold()
        self._averages.start()
        self._state.fresh = {}
        if self.config.is_due(self.step):
            self._update()
        self._gradients.forget()

    def _hold(self) -> None:
        """Set to zero what a step may have changed outside the masks."""
        if self._pending:
            return
        if self.config.rule == "published":
            self._state.mask_weights()
            published.mask_momentum(self.optimizer, self._state)
        elif not keeps_zeros(self.optimizer):
            self._state.mask_weights()
        self._watch.note()

    # -- updates ---------------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        self._watch.check_attached()
        self._watch.check_outside(self._state.parameters)  # what was written to `parameter.data` shows only here
        self._averages.find()
        state = self._state
        former = {name: mask.clone() for name, mask in state.masks.items()}
        # The published code counts intervals; an update that is left out here was none.
        number = self.step // self.config.update_interval
        if not self._rule.update(state, self.step, number, self._gradients.scores(self.optimizer)):
            self.skipped += 1
            return
        for name, parameter in state.parameters.items():
            if not parameter.requires_grad:  # frozen since: stays as it is
                state.masks[name].copy_(former[name])
        self.updates += 1
        state.mask_weights()
        removed, self.moved = 0, {}
        for name, parameter in state.parameters.items():
            survivors, new = former[name] & state.masks[name], state.masks[name] & ~former[name]
            removed += int((former[name] & ~state.masks[name]).sum())
            self.moved[name] = int(new.sum())
            if self.config.rule == "exact":
                self._clear(name, parameter, survivors)
                if self._averages.weights and self.moved[name]:
                    state.fresh[name] = new
        self.churn.append(Churn(self.step, removed, sum(self.moved.values()), self.active()))
        self._watch.note()
        check_equal(state.masks)

    def _clear(self, name: str, parameter: nn.Parameter, survivors: Tensor) -> None:
        """Forget gradient, moments and averages of what was removed or has just grown."""
        if parameter.grad is not None:
            parameter.grad.mul_(survivors)
        clear_moments(self.optimizer, parameter, survivors)
        self._averages.clear({name: survivors})

    # -- first masks -----------------------------------------------------------------------------------------------------

    def _initialise_from_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self._state.parameters.values() if parameter.grad is not None]
        # Without any, as in a step before the first backward pass, all scores would be equal. After an overflow the scaler
        # skips the step.
        if not gradients or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            return
        self._initialise(
            {
                name: torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
                for name, parameter in self._state.parameters.items()
            }
        )

    @torch.no_grad()
    def _initialise(self, scores: dict[str, Tensor]) -> None:
        if self.config.init in ("snip", "snip_mask", "magnitude"):
            check_finite(scores, f"the scores (init={self.config.init!r})")
        self._rule.allocate(self._state, scores)
        self._rule.draw(self._state, scores)
        if self.config.rule == "published":
            self._give_up(published.almost_dense(self._state))
        self._start()

    def _give_up(self, names: Iterable[str]) -> None:
        """Mask all parameters that were chosen but these, which the published rule leaves dense."""
        gone = self._state.give_up(names)
        self.choices = [
            Choice(choice.name, choice.shape, "was drawn almost dense") if choice.name in gone else choice
            for choice in self._all_choices
        ]

    @torch.no_grad()
    def _take(self, masks: dict[str, Tensor]) -> None:
        for group in self._state.groups:
            for name, blocks in zip(group.names, group.blocks):
                mask = masks[name].to(self._state.masks[name].device, torch.bool)
                if not torch.equal(blocks.expand(blocks.alive(mask)), mask):
                    raise ArgumentError(
                        f"the mask given for {name} cuts through its blocks (block={self.config.block!r}): use 'element', "
                        "or masks made with these blocks"
                    )
                self._state.masks[name].copy_(mask)
                self._state.densities[name] = mask.float().mean().item()
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        at_a_step, self._pending = self._running, False
        self._untold.stop()
        if at_a_step and self._chosen:
            self._watch.check_not_sparse()
        self._kept = None if at_a_step else Kept(self._holders())
        self.apply_masks()
        check_equal(self._state.masks)

    def _holders(self) -> list[dict[str, nn.Parameter]]:
        return [self._state.parameters, *self._averages.weights]


def _check_alone(optimizer: Optimizer, names: set[str]) -> None:
    """Raise if another controller masks the same parameters through this optimizer."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, DynamicSparsity) and (both := sorted(names & set(other._state.parameters))):
            raise ArgumentError(
                f"{both[0]} is masked by another DynamicSparsity of this optimizer already: call its remove() first, or "
                "mask other layers"
            )
