"""Dynamic sparse training: masks beside the parameters, which move while the weights are trained."""

from widekernel.lazy import attach

__all__ = ["DynamicSparsity", "DynamicSparsityConfig"]

_WHERE = {
    "DynamicSparsity": "widekernel.sparsity.dynamic.controller",
    "DynamicSparsityConfig": "widekernel.sparsity.dynamic.config",
}
__getattr__, __dir__ = attach(__name__, _WHERE)
