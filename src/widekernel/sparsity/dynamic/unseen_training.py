"""Detection of training that a controller does not see before its masks are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from widekernel.errors import ArgumentError


class UnseenTraining:
    """Detector of weights that change after a backward pass without a step of the controller's optimizer.

    Loading weights before the first step is allowed, because no gradients have been computed by then. But if weights change
    after gradients were computed, and the controller's optimizer made no step, something else has trained the network. Hooks
    on the gradients notice this. Copies of the parameters do not have the hooks, which are removed once masks are drawn.

    Args:
        parameters: the parameters to be masked, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._seen: dict[str, tuple[object, ...]] = {}  # parameters as they were when their last gradients were computed
        self._written: str | None = None
        self._handles: list[RemovableHandle] = []
        self.start()

    def start(self) -> None:
        """Start watching, or start again."""
        self.stop()
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._make_hook(name)))

    def stop(self) -> None:
        """Stop watching and forget everything seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.acknowledge()

    def acknowledge(self) -> None:
        """Attribute everything written so far to the controller's optimizer."""
        self._seen.clear()
        self._written = None

    def check(self) -> None:
        """Raise an `ArgumentError` if something else has trained the network."""
        for name, parameter in self._parameters.items():
            self._compare(name, parameter)
        if self._written is not None:
            raise ArgumentError(
                f"no masks are drawn yet, but {self._written} and perhaps others were trained: gradients were computed and "
                "weights changed without a step of the controller's optimizer, so the network is dense. Make the controller "
                "with the optimizer whose step() is called (for wrappers such as SAM, the base optimizer); if weights were "
                "loaded after a trial pass, make the controller after loading them"
            )

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self._compare(name, parameter)
            self._seen[name] = _identity(parameter)

        return hook

    def _compare(self, name: str, parameter: Tensor) -> None:
        seen, now = self._seen.get(name), _identity(parameter)
        # A parameter that was moved or converted was not written to.
        if seen is not None and seen != now and seen[2:] == now[2:] and self._written is None:
            self._written = name


def _identity(parameter: Tensor) -> tuple[object, ...]:
    return parameter._version, parameter.data_ptr(), parameter.device, parameter.dtype, parameter.stride()
