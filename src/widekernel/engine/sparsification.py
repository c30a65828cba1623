"""Sparsification of the network of a run, as the training loop sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from widekernel.engine.config import Metrics, SparsityConfig
from widekernel.errors import CheckpointError
from widekernel.sparsity import DynamicSparsity, SparsityReport, load_masks, semi_structured
from widekernel.sparsity.dynamic.config import with_total_steps
from widekernel.sparsity.semi_structured.config import OLD_NAME, SEMI_STRUCTURED
from widekernel.sparsity.semi_structured.snapshot import semi_structured_snapshot


class Sparsification(Protocol):
    """Interface that the training loop calls wherever sparsity matters."""

    kind: str
    """Name of the method: none, dynamic or semi_structured."""

    def trained(self, model: nn.Module) -> nn.Module | list[nn.Parameter]:
        """Return the network or the parameters that the optimizer trains."""

    def attach(self, optimizer: Optimizer, average: ModelEmaV3 | None, total_steps: int) -> None:
        """Attach to the optimizer and the averaged weights, once both exist."""

    def penalty(self) -> Tensor | None:
        """Return the term that is added to the loss of a step, or None."""

    def before_clipping(self) -> None:
        """Prepare the complete gradients of a step for clipping."""

    def after_step(self) -> None:
        """Finish a step, after that of the optimizer."""

    def figures(self) -> Metrics:
        """Return figures for a row in the metrics."""

    def state(self) -> dict[str, Any] | None:
        """Return the part of a training state that describes the sparsity."""

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from a result of `state`."""

    def report(self) -> SparsityReport | None:
        """Return a report on what is masked, why the rest is not, and how the masks have moved."""

    def masks(self) -> dict[str, Tensor]:
        """Return the masks: parameter name -> bool tensor."""

    def finished(self, model: nn.Module) -> nn.Module:
        """Return the network to save at the end of the run."""


class Dense(Sparsification):
    """Sparsification that does nothing: the network stays dense."""

    kind = "none"

    def trained(self, model: nn.Module) -> nn.Module | list[nn.Parameter]:
        """Return the network."""
        return model

    def attach(self, optimizer: Optimizer, average: ModelEmaV3 | None, total_steps: int) -> None:
        """Do nothing."""

    def penalty(self) -> Tensor | None:
        """Return None."""
        return None

    def before_clipping(self) -> None:
        """Do nothing."""

    def after_step(self) -> None:
        """Do nothing."""

    def figures(self) -> Metrics:
        """Return no figures."""
        return {}

    def state(self) -> dict[str, Any] | None:
        """Return None."""
        return None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Raise a `CheckpointError` if the state is that of a sparse run."""
        _check_kind(state, self.kind)

    def report(self) -> SparsityReport | None:
        """Return None."""
        return None

    def masks(self) -> dict[str, Tensor]:
        """Return no masks."""
        return {}

    def finished(self, model: nn.Module) -> nn.Module:
        """Return the network as it is."""
        return model


class Dynamic(Dense):
    """Dynamic sparse training: masks move while the weights are trained.

    Args:
        model: the network.
        config: the settings.
        seed: seed of the run, which is added to that of the masks.
    """

    kind = "dynamic"

    def __init__(self, model: nn.Module, config: SparsityConfig, seed: int) -> None:
        self._model, self._config, self._seed = model, config, seed
        self._controller: DynamicSparsity | None = None

    @property
    def controller(self) -> DynamicSparsity:
        """The controller of the masks."""
        assert self._controller is not None, "attach comes first"
        return self._controller

    def attach(self, optimizer: Optimizer, average: ModelEmaV3 | None, total_steps: int) -> None:
        """Make the controller for the optimizer and the averaged weights."""
        settings = with_total_steps(self._config.dynamic, total_steps)
        settings = replace(settings, seed=settings.seed + self._seed)
        given = None if self._config.masks is None else load_masks(self._config.masks, self._model)
        averages = [] if average is None else [average]
        self._controller = DynamicSparsity(self._model, optimizer, settings, averages=averages, masks=given)

    def before_clipping(self) -> None:
        """Mask the gradients, so that their norm is that of the live weights."""
        self.controller.mask_gradients()

    def figures(self) -> Metrics:
        """Return the sparsity, the number of topology updates, and the share of live weights that the last one moved."""
        controller = self.controller
        total = sum(mask.numel() for mask in controller.masks.values())
        if not total:
            return {}
        active = controller.active()
        last = controller.churn[-1].grown if controller.churn else 0
        return {"sparsity": 1 - active / total, "mask_updates": controller.updates, "churn": last / max(1, active)}

    def state(self) -> dict[str, Any] | None:
        """Return masks and counters."""
        return {"kind": self.kind, "state": self.controller.state_dict()}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Restore masks and counters."""
        _check_kind(state, self.kind)
        assert state is not None
        self.controller.load_state_dict(state["state"])

    def report(self) -> SparsityReport | None:
        """Return a report on every parameter."""
        return SparsityReport(self.controller.snapshot())

    def masks(self) -> dict[str, Tensor]:
        """Return the current masks."""
        return self.controller.masks


class Learned(Dense):
    """Learned 2:4 masks over frozen weights.

    Args:
        model: the network, whose weights this parametrizes.
        config: the settings.
        seed: seed of the run, which is added to that of the noise.
        total_steps: optimizer steps of the run.
    """

    kind = SEMI_STRUCTURED

    def __init__(self, model: nn.Module, config: SparsityConfig, seed: int, total_steps: int) -> None:
        settings = config.semi_structured
        self._model = model
        self._settings = replace(settings, total_steps=total_steps, seed=settings.seed + seed)
        self._controller = semi_structured.prepare(model, self._settings)

    def trained(self, model: nn.Module) -> nn.Module | list[nn.Parameter]:
        """Return the logits of the masks."""
        return self._controller.parameters()

    def penalty(self) -> Tensor | None:
        """Return the regularization of the logits."""
        return self._controller.regularization()

    def after_step(self) -> None:
        """Advance temperature and noise."""
        self._controller.step()

    def figures(self) -> Metrics:
        """Return the entropy of the choices in nats, and the share of choices that changed since the last row."""
        return {"mask_entropy": self._controller.entropy(), "mask_flips": self._controller.flip_rate()}

    def state(self) -> dict[str, Any] | None:
        """Return logits, step, and the configuration with which to prepare a network."""
        return {"kind": self.kind, "state": self._controller.state_dict()}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Restore logits and step."""
        _check_kind(state, self.kind)
        assert state is not None
        self._controller.load_state_dict(state["state"])

    def report(self) -> SparsityReport | None:
        """Return a report on every Conv2d and Linear."""
        return SparsityReport(semi_structured_snapshot(self.finished(self._model), self._controller.report, self.masks()))

    def masks(self) -> dict[str, Tensor]:
        """Return the masks that evaluation uses."""
        return self._controller.masks

    def finished(self, model: nn.Module) -> nn.Module:
        """Return the plain network with zeros."""
        return semi_structured.convert(model)


def create_sparsification(model: nn.Module, config: SparsityConfig, seed: int, total_steps: int) -> Sparsification:
    """Return the sparsification that `config` describes; learned masks parametrize the network."""
    if config.method == "dynamic":
        return Dynamic(model, config, seed)
    if config.method == SEMI_STRUCTURED:
        return Learned(model, config, seed, total_steps)
    return Dense()


def restore_learned(model: nn.Module, weights: dict[str, Tensor], sparsity: dict[str, Any] | None) -> nn.Module:
    """Load the weights of a training state into a fresh network, and apply its learned masks if it has any.

    Args:
        model: the network, dense.
        weights: the state dict of the trained network.
        sparsity: the part of the training state that describes the sparsity.
    """
    if sparsity is None or _kind(sparsity) != Learned.kind:
        model.load_state_dict(weights)
        return model
    saved = sparsity["state"]["config"]
    settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    controller = semi_structured.prepare(model, semi_structured.SemiStructuredConfig(**settings))
    model.load_state_dict(weights)
    controller.load_state_dict(sparsity["state"])
    return semi_structured.convert(model)


def _kind(state: dict[str, Any] | None) -> str:
    """Return the method that a state was saved with, by its present name."""
    found = "none" if state is None else str(state["kind"])
    return SEMI_STRUCTURED if found == OLD_NAME else found


def _check_kind(state: dict[str, Any] | None, kind: str) -> None:
    found = _kind(state)
    if found != kind:
        raise CheckpointError(
            f"The run was saved with sparsity.method {found!r}, but is resumed with {kind!r}. Use {found!r} again."
        )
