"""Replacing modules within a network so that shared modules stay shared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Replace = Callable[[nn.Module, str], tuple[nn.Module, bool]]


def replace_modules(root: nn.Module, replace: Replace) -> nn.Module:
    """Replace modules of a network in place, from the outside in, and return the replacement of `root`.

    `replace` is called once for a module that is used in several places, and the replacement is used in all of them.

    Args:
        root: the network.
        replace: called with a module and its name. It returns the replacement (the module itself to keep it), and whether
            to visit the submodules of the replacement, too.
    """
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> nn.Module:
        if module in done:
            return done[module]
        result, go_on = replace(module, name)
        done[module] = done[result] = result
        if go_on:
            # Not `named_children`, which leaves out the second name of a module.
            for key, child in list(result._modules.items()):
                if child is not None:
                    setattr(result, key, visit(child, f"{name}.{key}" if name else key))
        return result

    return visit(root, "")


def with_submodule(module: ModuleT, name: str, part: nn.Module) -> ModuleT:
    """Return a shallow copy of `module` with the submodule `name` replaced by `part`; `module` itself does not change.

    Args:
        module: the module, which may be shared.
        name: name of the submodule, with dots for a nested one; modules on the path to it are copied, too.
        part: the new submodule.
    """
    key, _, rest = name.partition(".")
    new = copy.copy(module)
    child = with_submodule(module.get_submodule(key), rest, part) if rest else part
    new._modules = {**module._modules, key: child}
    return new
