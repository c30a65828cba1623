"""Replacing modules within a network, so that what is shared stays shared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Replace = Callable[[nn.Module, str], tuple[nn.Module, bool]]


def replace_modules(root: nn.Module, replace: Replace) -> nn.Module:
    """Replace modules of a network in place, from the outside in, and return what takes the place of `root`.

    A module that is used in several places is asked about once, and its replacement is used in all of them.

    Args:
        root: the network.
        replace: is called with a module and its name. It returns what takes the module's place (the module itself to keep
            it), and whether the modules within that are to be looked at, too.
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
    """Return a shallow copy of `module` whose submodule `name` is `part`; `module`, which may be shared, does not change.

    Args:
        module: the module.
        name: of the submodule, with dots for one further down; modules on the way are copied, too.
        part: what the copy has there.
    """
    key, _, rest = name.partition(".")
    new = copy.copy(module)
    child = with_submodule(module.get_submodule(key), rest, part) if rest else part
    new._modules = {**module._modules, key: child}
    return new
