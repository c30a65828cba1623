"""Dynamic sparse training: masks beside the parameters, held by hooks around the optimizer's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from widekernel.errors import ArgumentError
from widekernel.sparsity import exact, published
from widekernel.sparsity.allocation import check_finite
from widekernel.sparsity.blocks import groups_of
from widekernel.sparsity.config import DynamicSparsityConfig
from widekernel.sparsity.processes import check_equal
from widekernel.sparsity.saving import restore_state, state_of
from widekernel.sparsity.selection import Choice, check_optimizer, masked_parameters, unwrap
from widekernel.sparsity.setting_up import averaged_weights, choices_for, snip_scores
from widekernel.sparsity.state import Churn, MaskState

# With these a weight whose gradient, moments and value are zero stays zero: no need to mask it after each step.
_KEEP_ZEROS = {getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")}


class DynamicSparsity:
    """Keeps a network sparse while it is trained, and moves its masks (SET, RigL, SNFS; SLaK, section 3.2).

    The weights stay plain parameters, with the keys that they have, and are exactly zero outside the masks. Create it after
    the optimizer; from then on the optimizer's steps do everything. Under mixed precision steps that the gradient scaler
    skips are not counted, with accumulated gradients a step is a step of the optimizer, and under data parallelism every
    process finds the same masks by itself, which a digest of 8 bytes checks at every update.

    Two things the hooks cannot do. Where gradients are clipped, call `mask_gradients()` once before, so that their norm is
    that of the live weights. And `state_dict()` belongs into the checkpoint beside those of model and optimizer.

    With an `init` that needs gradients the masks are drawn from `batch`, or, without one, from the gradients of the first
    step, which are those of all processes; until then all weights live.

    Args:
        model: the network, wrapped or not.
        optimizer: of the network's parameters.
        config: the settings.
        batch: inputs and targets to score weights with (`init="snip"`), used on a copy of the network in training mode.
        loss: of the network's outputs and the targets of `batch`.
        averages: networks of the same parameter names that hold moving averages of the weights, such as timm's ModelEmaV3;
            what is removed is removed there too, and what grew starts from the live weight instead of its old average.
        masks: start from these (parameter name -> bool), and mask only these parameters.

    Attributes:
        masks: parameter name -> bool tensor of its shape, True where weights live; changed in place.
        choices: for every parameter of the network whether it is masked, and if not, why.
        step: optimizer steps done.
        updates: updates of the masks done.
        skipped: updates left out because scores were not finite.
        churn: what the updates did, newest last.
        moved: weights that grew at the last update, by parameter name.

    Raises:
        ArgumentError: nothing can be masked; the optimizer is not the network's; a parameter is shared; the masks belong to
            another network.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: DynamicSparsityConfig | None = None,
        *,
        batch: tuple[Tensor, Tensor] | None = None,
        loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
        averages: Sequence[nn.Module] = (),
        masks: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config or DynamicSparsityConfig()
        self.config.check_timed()
        self.optimizer = optimizer
        self._model = unwrap(model)
        self.choices = choices_for(self._model, self.config, masks)
        parameters = masked_parameters(self._model, self.choices)
        check_optimizer(optimizer, parameters)
        self._averages = [averaged_weights(network, parameters) for network in averages]
        _check_alone(optimizer, set(parameters))
        self._state = MaskState(self.config, parameters, groups_of(self._model, parameters, self.config))
        self._rule = exact if self.config.rule == "exact" else published
        self.step = self.updates = self.skipped = 0
        self.churn: list[Churn] = []
        self.moved: dict[str, int] = {}
        self._dense: dict[str, Tensor] | None = None
        self._momentum: dict[str, Tensor] = {}
        self._pending = masks is None and self.config.init in ("snip", "snip_mask")
        if masks is not None:
            self._take(masks)
        elif not self._pending:
            weights = {name: parameter.detach().abs() for name, parameter in parameters.items()}
            self._initialise(weights)
        elif batch is not None:
            self._initialise(snip_scores(self._model, parameters, batch, loss))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
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
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Give masks (bit-packed), counters and what else an exact resumption needs, as tensors and plain containers."""
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; weights outside the masks are set to zero.

        Raises:
            CheckpointError: the state belongs to another network.
        """
        restore_state(self, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ArgumentError(
            "a DynamicSparsity belongs to one network and its optimizer and cannot be copied: copy those, make a new one, "
            "and give it this one's state_dict()"
        )

    # -- around a step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set gradients outside the masks to zero; call it once between the backward pass and clipping.

        Without clipping there is no need to: it happens before every step.
        """
        if self._pending:
            self._initialise_from_gradients()
        if self._pending or self.config.rule == "published":
            return
        gradients = {name: p.grad for name, p in self._state.parameters.items() if p.grad is not None}
        due = self.config.is_due(self.step + 1)
        if self.config.growth == "momentum" or (due and self.config.growth == "gradient"):
            # A fused optimizer takes scaled gradients and is told the scale, which changes from step to step.
            scale = getattr(self.optimizer, "grad_scale", None)
            self._dense = {n: gradient.clone() if scale is None else gradient / scale for n, gradient in gradients.items()}
        self._mask_again(gradients)

    def _mask_again(self, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            gradient.mul_(self._state.masks[name])

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise ArgumentError(
                "the optimizer was given a closure, which computes gradients after they were to be masked: call it and "
                "backward() yourself, then optimizer.step()"
            )
        if _overflowed(optimizer):
            return
        if self._dense is None:
            self.mask_gradients()
        else:
            with torch.no_grad():
                self._mask_again({n: p.grad for n, p in self._state.parameters.items() if p.grad is not None})

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dense, self._dense = self._dense, None
        if _overflowed(optimizer):
            return
        self.step += 1
        if self._pending:
            return
        self._follow_momentum(dense)
        if self.config.rule == "published":
            self._mask_published()
        elif type(optimizer) not in _KEEP_ZEROS:
            self._state.mask_weights()
        self._start_averages()
        if self.config.is_due(self.step):
            self._update(dense)

    def _follow_momentum(self, dense: dict[str, Tensor] | None) -> None:
        if self.config.rule == "published" or self.config.growth != "momentum":
            return
        for name, gradient in (dense or {}).items():
            mean = self._momentum.setdefault(name, torch.zeros_like(gradient))
            mean.lerp_(gradient, 1 - self.config.momentum)

    def _mask_published(self) -> None:
        self._state.mask_weights()
        for name, parameter in self._state.parameters.items():
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                buffer.mul_(self._state.masks[name])

    def _start_averages(self) -> None:
        """Let averages of weights that grew at the last update begin at their first value that is not zero."""
        for average in self._averages:
            for name, parameter in self._state.parameters.items():
                values = average[name]  # may be on another device
                if self.config.rule == "published":
                    mask = self._state.masks[name].to(values.device)
                    values.mul_(mask)
                    values.copy_(torch.where(mask & (values == 0), parameter.to(values), values))
                elif name in self._state.fresh:
                    values.copy_(torch.where(self._state.fresh[name].to(values.device), parameter.to(values), values))
        self._state.fresh = {}

    # -- updates ---------------------------------------------------------------------------------------------------------

    def _update(self, dense: dict[str, Tensor] | None) -> None:
        self._check_attached()
        state = self._state
        former = {name: mask.clone() for name, mask in state.masks.items()}
        # The published code counts intervals; an update that is left out here was none.
        number = self.step // self.config.update_interval
        if not self._rule.update(state, self.step, number, self._growth_scores(dense)):
            self.skipped += 1
            return
        self.updates += 1
        state.mask_weights()
        removed, self.moved = 0, {}
        for name, parameter in state.parameters.items():
            survivors, new = former[name] & state.masks[name], state.masks[name] & ~former[name]
            removed += int((former[name] & ~state.masks[name]).sum())
            self.moved[name] = int(new.sum())
            if self.config.rule == "exact":
                self._clear(name, parameter, survivors)
                if self._averages and self.moved[name]:
                    state.fresh[name] = new
        self.churn.append(Churn(self.step, removed, sum(self.moved.values()), self.active()))
        check_equal(state.masks)

    def _clear(self, name: str, parameter: nn.Parameter, survivors: Tensor) -> None:
        """Forget gradient, moments and averages of what was removed or has just grown."""
        if parameter.grad is not None:
            parameter.grad.mul_(survivors)
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.mul_(survivors.to(value.device))
        for average in self._averages:
            average[name].mul_(survivors.to(average[name].device))

    def _growth_scores(self, dense: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        if self.config.growth in ("random", "none"):
            return None
        found: dict[str, Tensor | None]
        if self.config.rule == "exact":
            chosen = self._momentum if self.config.growth == "momentum" else dense or {}
            found = {name: chosen.get(name) for name in self._state.parameters}
        elif self.config.growth == "momentum":
            found = {n: published.momentum_scores(self.optimizer, p) for n, p in self._state.parameters.items()}
        else:
            found = {name: parameter.grad for name, parameter in self._state.parameters.items()}
        # A parameter that took no part in the loss has no gradient: none of its weights is better than another.
        zeros = {name: torch.zeros_like(self._state.parameters[name]) for name, value in found.items() if value is None}
        return {name: zeros[name] if value is None else value for name, value in found.items()}

    def _check_attached(self) -> None:
        now = dict(self._model.named_parameters())
        lost = [name for name, parameter in self._state.parameters.items() if now.get(name) is not parameter]
        if lost:
            raise ArgumentError(
                f"{lost[0]} is no longer the parameter that its mask was made for: change weights in place, or make a new "
                "DynamicSparsity after replacing parts of the network"
            )

    # -- first masks -----------------------------------------------------------------------------------------------------

    def _initialise_from_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self._state.parameters.values() if parameter.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            return  # an overflow, after which the scaler skips the step
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

    def _give_up(self, names: list[str]) -> None:
        for name in names:
            self._state.masks[name].fill_(True)
        keep = [group for group in self._state.groups if not set(group.names) <= set(names)]
        gone = set(self._state.parameters) - {name for group in keep for name in group.names}
        self._state.groups = keep
        for name in gone:
            del self._state.parameters[name], self._state.masks[name], self._state.densities[name]
        self.choices = [
            Choice(choice.name, choice.shape, "was drawn almost dense") if choice.name in gone else choice
            for choice in self.choices
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
        self._pending = False
        self._state.mask_weights()
        for name, parameter in self._state.parameters.items():
            if self.config.rule == "exact":
                self._clear(name, parameter, self._state.masks[name])
        check_equal(self._state.masks)


def _check_alone(optimizer: Optimizer, names: set[str]) -> None:
    """Raise if another controller masks the same parameters through this optimizer."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, DynamicSparsity) and (both := sorted(names & set(other._state.parameters))):
            raise ArgumentError(
                f"{both[0]} is masked by another DynamicSparsity of this optimizer already: call its remove() first, or "
                "mask other layers"
            )


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has told a fused optimizer to leave out this step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
