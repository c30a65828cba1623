"""Controller of a network's 2:4 masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.deprecation import renamed_attribute
from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity.semi_structured.config import SemiStructuredConfig
from widekernel.sparsity.semi_structured.eligibility import LayerReport, layer_name, weight_name
from widekernel.sparsity.semi_structured.learned import ChoiceMask, Schedule, kept_share
from widekernel.sparsity.semi_structured.manifest import Manifest, MaskedWeight
from widekernel.sparsity.semi_structured.masks import check_choices, choices_to_mask

STATE_VERSION = 1


class SemiStructured:
    """Controller of the 2:4 masks of a network; `prepare` returns it and attaches it to the network.

    With the methods "magnitude" and "permuted", weights stay plain parameters with zeros; to train them, call `apply_masks`
    after every optimizer step. With "learned", they are parametrized: pass `parameters()` to an optimizer without weight
    decay, add `regularization()` to the loss, and call `step()` after every optimizer step. Adam with a learning rate of 0.1
    to 0.3, for a few hundred steps, is a good start.

    Attributes:
        model: the network.
        config: the settings that it was prepared with.
        frozen: names of the parameters that are frozen while masks are learned; `convert` makes them trainable again.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SemiStructuredConfig,
        report: tuple[LayerReport, ...],
        weights: Mapping[str, MaskedWeight],
        learned: Mapping[str, ChoiceMask],
        schedule: Schedule,
        frozen: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.config = config
        self._report = report
        self.frozen = frozen
        self._weights = dict(weights)
        self._learned = dict(learned)
        self._schedule = schedule
        self._last = self.choices

    @property
    def report(self) -> tuple[LayerReport, ...]:
        """One row for every Conv2d and Linear, in the network's order; learned masks are reported as they are now."""
        if not self._learned:
            return self._report
        return tuple(replace(row, kept=self._kept_now(row.name)) if row.masked else row for row in self._report)

    @property
    def choices(self) -> dict[str, Tensor]:
        """Parameter name -> (G,) uint8; for learned masks, the currently most probable patterns."""
        learned = {name: mask.choices() for name, mask in self._learned.items()}
        return learned or {name: weight.choices for name, weight in self._weights.items()}

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of the weight's shape, as evaluation uses it."""
        shapes = {row.weight_name: row.shape for row in self._report}
        return {
            name: choices_to_mask(choices, shapes[name], self._weights[name].axis, self._weights[name].groups)
            for name, choices in self.choices.items()
        }

    @property
    def manifest(self) -> Manifest:
        """Record of the masks that a converted or saved network carries."""
        old = self._weights
        return Manifest(
            {name: MaskedWeight(old[name].axis, old[name].groups, choices) for name, choices in self.choices.items()}
        )

    @property
    def is_learned(self) -> bool:
        """Whether the masks are learned, so that weights are parametrized."""
        return bool(self._learned)

    @property
    def steps(self) -> int:
        """Number of calls of `step`."""
        return self._schedule.step

    @property
    def tau(self) -> float:
        """The current temperature."""
        return self._schedule.tau

    @property
    def kappa(self) -> float:
        """The current factor on the logits."""
        return self._schedule.kappa

    def parameters(self) -> list[nn.Parameter]:
        """Return the logits, (G, 6) float32 per layer; empty unless masks are learned. Train them without weight decay."""
        return [mask.logits for mask in self._learned.values()]

    def step(self) -> None:
        """Advance temperature, logit scale and noise; call it once after each optimizer step."""
        self._schedule.step += 1

    def entropy(self) -> float:
        """Return the mean entropy of the choices in nats: log 6 = 1.79 at random, 0 when decided or not learned."""
        if not self._learned:
            return 0.0
        with torch.no_grad():
            return float(self._entropies().mean())

    def flip_rate(self) -> float:
        """Return the share of groups whose most probable pattern has changed since the last call (0 at the first)."""
        now = self.choices
        flipped = sum(int((now[name] != self._last[name].to(now[name].device)).sum()) for name in now)
        self._last = now
        return flipped / max(1, sum(choices.numel() for choices in now.values()))

    def regularization(self) -> Tensor:
        """Return the term to add to the loss; 0 unless masks are learned.

        It is entropy_penalty · mean entropy - weight_regularization · sum of ||M * W||², where M are the masks that the
        forward passes of this step draw.
        """
        if not self._learned:
            return torch.zeros(())
        total = torch.zeros((), device=self.parameters()[0].device)
        if self.config.entropy_penalty:
            total = total + self.config.entropy_penalty * self._entropies().mean()
        if self.config.weight_regularization:
            for name, mask in self._learned.items():
                norm = (self._original(layer_name(name)).float() * mask.drawn()).square().sum().to(total.device)
                total = total - self.config.weight_regularization * norm
        return total

    regularisation = renamed_attribute("regularisation", "regularization")

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set weights outside the masks to zero, in place; with learned masks, do nothing, as their weights are frozen."""
        if self._learned:
            return
        for name, mask in self.masks.items():
            weight = self.model.get_parameter(name)
            weight.masked_fill_(~mask.to(weight.device), 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs besides the network's own state: tensors, numbers and strings only."""
        return {
            "version": STATE_VERSION,
            "config": _plain(self.config),
            "step": self._schedule.step,
            "logits": {name: mask.logits.detach().clone() for name, mask in self._learned.items()},
            "choices": {name: choices.clone() for name, choices in self.choices.items()},
            "last": {name: choices.clone() for name, choices in self._last.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the network must have been prepared with the same configuration.

        Raises:
            CheckpointError: if the state belongs to another network or configuration; nothing is changed then.
        """
        parts = {"version", "config", "step", "logits", "choices", "last"}
        if not isinstance(state, Mapping) or set(state) != parts or state["version"] != STATE_VERSION:
            raise CheckpointError(
                f"this is not a state of 2:4 masks of version {STATE_VERSION}: give what state_dict() returned"
            )
        ours = _plain(self.config)
        changed = [
            f"{key} {state['config'].get(key)!r} -> {value!r}"
            for key, value in ours.items()
            if state["config"].get(key) != value
        ]
        if changed:
            raise CheckpointError(
                f"the masks were made with another configuration ({'; '.join(changed)}): prepare the network with that one"
            )
        self._refuse_other_network(state)
        self._schedule.step = int(state["step"])
        for name, mask in self._learned.items():
            mask.logits.copy_(state["logits"][name])
        for name, old in self._weights.items():
            self._weights[name] = MaskedWeight(old.axis, old.groups, state["choices"][name].to(old.choices.device).clone())
        self._last = {name: state["last"][name].to(old.choices.device).clone() for name, old in self._weights.items()}
        self.apply_masks()

    def _refuse_other_network(self, state: Mapping[str, Any]) -> None:
        shapes = {row.weight_name: row.shape for row in self._report}
        wanted: dict[str, Mapping[str, Any]] = {"choices": self._weights, "last": self._weights, "logits": self._learned}
        for part, mine in wanted.items():
            different = sorted(set(state[part]) ^ set(mine))
            if different:
                raise CheckpointError(
                    f"the masks belong to another network: only one of the two has {', '.join(different)} ({part})"
                )
        try:
            for name, old in self._weights.items():
                for part in ("choices", "last"):
                    check_choices(state[part][name], shapes[name], old.axis, old.groups, f"{part} of {name}")
        except ArgumentError as error:
            raise CheckpointError(f"the masks belong to another network: {error}") from None
        for name, mask in self._learned.items():
            theirs = state["logits"][name]
            if theirs.shape != mask.logits.shape:
                raise CheckpointError(
                    f"the masks belong to another network: logits of {name} have shape {tuple(theirs.shape)}, "
                    f"here {tuple(mask.logits.shape)}"
                )

    def _kept_now(self, layer: str) -> float:
        mask = self._learned[weight_name(layer)]
        return kept_share(self._original(layer), mask.choices(), mask.axis, mask.groups)

    def _original(self, layer: str) -> Tensor:
        """Return the weight that a learned mask is applied to."""
        parametrized: Any = self.model.get_submodule(layer).parametrizations
        return parametrized["weight"].original.detach()

    def _entropies(self) -> Tensor:
        device = next(iter(self._learned.values())).logits.device
        return torch.cat([mask.entropies().to(device) for mask in self._learned.values()])


def _plain(config: SemiStructuredConfig) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def keep_in_evaluation(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward pre-hook that keeps a norm in evaluation mode, whatever mode the training loop sets."""
    if module.training:
        module.eval()


keep_in_evaluation.only_in_training = True  # type: ignore[attr-defined] # so that folding may remove the norm


def apply_learned_mask(layer: nn.Module) -> None:
    """Replace the parametrization of a layer by the plain weight that it has in evaluation."""
    parametrized: Any = layer.parametrizations
    others = [name for name in parametrized if name != "weight"]
    if others or len(parametrized["weight"]) != 1:
        raise ArgumentError(
            f"{type(layer).__name__} was parametrized again after prepare: remove that parametrization first"
        )
    parametrized.eval()
    with torch.no_grad():
        weight = nn.Parameter(layer.weight.detach(), requires_grad=parametrized["weight"].original.requires_grad)  # type: ignore[operator,union-attr,arg-type]
    # torch's remove_parametrizations is not used: it deletes an attribute of the class, which copies of the layer share.
    layer.__class__ = type(layer).__bases__[0]
    del layer._modules["parametrizations"]
    rest = dict(layer._parameters)
    layer._parameters.clear()  # so that the weight comes first again
    layer._parameters.update({"weight": weight, **rest})
