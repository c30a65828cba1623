"""Training that a controller is not told of while its masks are still to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from widekernel.errors import ArgumentError


class UntoldSteps:
    """Finds weights that are written to after gradients came in, without a step of the controller's optimizer.

    Before the first step weights may be loaded: nothing has computed gradients by then. Gradients followed by new weights
    are training, and if the controller's optimizer took no part in it, another one did. Hooks on the gradients notice that;
    they are on no copy of the parameters, and taken off once masks are drawn.

    Args:
        parameters: that are to be masked.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._seen: dict[str, tuple[object, ...]] = {}  # parameters as they were when their last gradients came
        self._written: str | None = None
        self._handles: list[RemovableHandle] = []
        self.watch()

    def watch(self) -> None:
        """Begin, or begin anew."""
        self.stop()
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._noter(name)))

    def stop(self) -> None:
        """Forget everything, and look no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.told()

    def told(self) -> None:
        """Take what has been written until now for the work of the controller's optimizer."""
        self._seen.clear()
        self._written = None

    def check(self) -> None:
        """Raise an `ArgumentError` if the network was trained by something else."""
        for name, parameter in self._parameters.items():
            self._compare(name, parameter)
        if self._written is not None:
            raise ArgumentError(
                f"no masks are drawn, but {self._written} and perhaps others were trained: gradients came and weights "
                "changed without a step of the controller's optimizer, so the network is dense. Make the controller with "
                "the optimizer whose step() is called (of wrappers such as SAM, the base optimizer); if weights were loaded "
                "after a trial pass, make the controller after loading them"
            )

    def _noter(self, name: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            self._compare(name, parameter)
            self._seen[name] = _identity(parameter)

        return note

    def _compare(self, name: str, parameter: Tensor) -> None:
        seen, now = self._seen.get(name), _identity(parameter)
        # Moved or converted is not written to.
        if seen is not None and seen != now and seen[2:] == now[2:] and self._written is None:
            self._written = name


def _identity(parameter: Tensor) -> tuple[object, ...]:
    return parameter._version, parameter.data_ptr(), parameter.device, parameter.dtype, parameter.stride()
