"""Lazy import of the names of a package (PEP 562), so that importing only its settings stays cheap."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping


def attach(
    package: str, where: Mapping[str, str], moved: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        where: public name -> module that defines it. A name that equals the last part of its module's name stands for the
            module itself. No other name may be that of a submodule, which would replace it once imported.
        moved: name that has left the package -> where it is now: "module", or "module:Name" if it was renamed as well. Using
            it warns.
    """
    moved = moved or {}

    def get(name: str) -> object:
        if name in moved:
            module, _, new = moved[name].partition(":")
            change = f"is now called {new}: import that" if new else "has moved: import it"
            warnings.warn(f"{package}.{name} {change} from {module}", FutureWarning, stacklevel=2)
            return getattr(importlib.import_module(module), new or name)
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        defining = importlib.import_module(where[name])
        value = defining if where[name] == f"{package}.{name}" else getattr(defining, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return get, names
