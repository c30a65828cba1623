"""How a run makes its network sparse, as the loop sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from widekernel.errors import CheckpointError
from widekernel.sparsity import DynamicSparsity, SparsityReport, load_masks, semi_structured
from widekernel.sparsity.config import with_total_steps
from widekernel.sparsity.selection import Choice
from widekernel.training.config import Metrics, SparsityConfig


class Sparsification(Protocol):
    """What the loop asks at the places of a step where sparsity matters."""

    def trained(self, model: nn.Module) -> nn.Module | list[nn.Parameter]:
        """What the optimizer is to be made for."""

    def attach(self, optimizer: Optimizer, average: ModelEmaV3 | None, total_steps: int) -> None:
        """Take notice of the optimizer and of averaged weights, once both exist."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a step, if anything."""

    def before_clipping(self) -> None:
        """All gradients of a step are there, and are about to be clipped."""

    def after_step(self) -> None:
        """The optimizer has made a step."""

    def figures(self) -> Metrics:
        """Figures for a row of metrics."""

    def state(self) -> dict[str, Any] | None:
        """What a training state keeps."""

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` gave."""

    def report(self) -> SparsityReport | None:
        """Tell what is masked, why not the rest, and how masks have moved."""

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask."""

    def finished(self, model: nn.Module) -> nn.Module:
        """The network to be saved at the end of the run."""


class Dense(Sparsification):
    """Nothing is masked."""

    kind = "none"

    def trained(self, model: nn.Module) -> nn.Module | list[nn.Parameter]:
        """The network."""
        return model

    def attach(self, optimizer: Optimizer, average: ModelEmaV3 | None, total_steps: int) -> None:
        """Nothing to do."""

    def penalty(self) -> Tensor | None:
        """No penalty."""
        return None

    def before_clipping(self) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Nothing to do."""

    def figures(self) -> Metrics:
        """No figures."""
        return {}

    def state(self) -> dict[str, Any] | None:
        """No state."""
        return None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Refuse the state of a sparse run."""
        _check_kind(state, self.kind)

    def report(self) -> SparsityReport | None:
        """No report."""
        return None

    def masks(self) -> dict[str, Tensor]:
        """No masks."""
        return {}

    def finished(self, model: nn.Module) -> nn.Module:
        """The network as it is."""
        return model


class Dynamic(Dense):
    """Masks move while the weights are trained.

    Args:
        model: the network.
        config: the settings.
        seed: of the run, to which that of the masks is added.
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
        """Put masks around the optimizer."""
        settings = with_total_steps(self._config.dynamic, total_steps)
        settings = replace(settings, seed=settings.seed + self._seed)
        given = None if self._config.masks is None else load_masks(self._config.masks, self._model)
        averages = [] if average is None else [average]
        self._controller = DynamicSparsity(self._model, optimizer, settings, averages=averages, masks=given)

    def before_clipping(self) -> None:
        """Let the norm of the gradients be that of the live weights."""
        self.controller.mask_gradients()

    def figures(self) -> Metrics:
        """Sparsity of the masked parameters, updates so far, and the share of live weights that the last one moved."""
        controller = self.controller
        total = sum(mask.numel() for mask in controller.masks.values())
        if not total:
            return {}
        active = controller.active()
        last = controller.churn[-1].grown if controller.churn else 0
        return {"sparsity": 1 - active / total, "mask_updates": controller.updates, "churn": last / max(1, active)}

    def state(self) -> dict[str, Any] | None:
        """Masks and counters."""
        return {"kind": self.kind, "state": self.controller.state_dict()}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Put masks and counters back."""
        _check_kind(state, self.kind)
        assert state is not None
        self.controller.load_state_dict(state["state"])

    def report(self) -> SparsityReport | None:
        """Tell about every parameter."""
        return SparsityReport.of(self._model, self.controller.choices, self.controller.masks, self.controller)

    def masks(self) -> dict[str, Tensor]:
        """The masks now."""
        return self.controller.masks


class Learned(Dense):
    """2:4 masks are trained over frozen weights.

    Args:
        model: the network, whose weights are parametrised from now on.
        config: the settings.
        seed: of the run, to which that of the noise is added.
        total_steps: optimizer steps of the run.
    """

    kind = "2:4"

    def __init__(self, model: nn.Module, config: SparsityConfig, seed: int, total_steps: int) -> None:
        settings = config.semi_structured
        self._model = model
        self._settings = replace(settings, total_steps=total_steps, seed=settings.seed + seed)
        self._controller = semi_structured.prepare(model, self._settings)

    def trained(self, model: nn.Module) -> nn.Module | list[nn.Parameter]:
        """The logits of the masks."""
        return self._controller.parameters()

    def penalty(self) -> Tensor | None:
        """The regularisation of the logits."""
        return self._controller.regularisation()

    def after_step(self) -> None:
        """Move temperature and noise on."""
        self._controller.step()

    def figures(self) -> Metrics:
        """Entropy of the choices in nats, and the share that changed since the last row."""
        return {"mask_entropy": self._controller.entropy(), "mask_flips": self._controller.flip_rate()}

    def state(self) -> dict[str, Any] | None:
        """Logits, step and the configuration to prepare a network with."""
        return {"kind": self.kind, "state": self._controller.state_dict()}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Put logits and step back."""
        _check_kind(state, self.kind)
        assert state is not None
        self._controller.load_state_dict(state["state"])

    def report(self) -> SparsityReport | None:
        """Tell about every layer."""
        reasons = {f"{row.name}.weight".lstrip("."): row.reason for row in self._controller.report}
        shapes = {f"{row.name}.weight".lstrip("."): tuple(row.shape) for row in self._controller.report}
        choices = [Choice(name, shapes[name], reason) for name, reason in reasons.items()]
        return SparsityReport.of(self.finished(self._model), choices, self.masks())

    def masks(self) -> dict[str, Tensor]:
        """The masks that evaluation uses."""
        return self._controller.masks

    def finished(self, model: nn.Module) -> nn.Module:
        """The plain network with zeros."""
        return semi_structured.convert(model)


def create_sparsification(model: nn.Module, config: SparsityConfig, seed: int, total_steps: int) -> Sparsification:
    """Give what `config` asks for; may parametrise the network."""
    if config.method == "dynamic":
        return Dynamic(model, config, seed)
    if config.method == "2:4":
        return Learned(model, config, seed, total_steps)
    return Dense()


def restore_learned(model: nn.Module, weights: dict[str, Tensor], sparsity: dict[str, Any] | None) -> nn.Module:
    """Load the weights of a training state into a fresh network, with learned masks applied if it has any.

    Args:
        model: the network, dense.
        weights: the state dict of the trained one.
        sparsity: the part of the training state about sparsity.
    """
    if sparsity is None or sparsity["kind"] != Learned.kind:
        model.load_state_dict(weights)
        return model
    saved = sparsity["state"]["config"]
    settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    controller = semi_structured.prepare(model, semi_structured.SemiStructuredConfig(**settings))
    model.load_state_dict(weights)
    controller.load_state_dict(sparsity["state"])
    return semi_structured.convert(model)


def _check_kind(state: dict[str, Any] | None, kind: str) -> None:
    found = "none" if state is None else state["kind"]
    if found != kind:
        raise CheckpointError(
            f"The run was saved with sparsity.method {found!r} and is resumed with {kind!r}. Resume with the same."
        )
