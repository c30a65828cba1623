"""Old names of arguments and attributes, which still work for one version, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

CallableT = TypeVar("CallableT", bound=Callable[..., Any])


def renamed_arguments(**names: str) -> Callable[[CallableT], CallableT]:
    """Make a function accept keyword arguments by their old names too, with a `FutureWarning`.

    Args:
        names: the new name of each argument, by its old name: `old="new"`.

    Raises:
        TypeError: the function is called with an argument under both names.
    """

    def decorate(function: CallableT) -> CallableT:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}() got {old!r} and {new!r}, its new name: pass {new!r} only")
                warnings.warn(
                    f"{function.__qualname__}(): argument {old!r} is now called {new!r}; "
                    "the old name will stop working in the next version",
                    FutureWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renamed  # type: ignore[return-value]

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """Return a property named `old` that reads the attribute or method `new` with a `FutureWarning`."""

    def get(instance: Any) -> Any:
        warnings.warn(
            f"{type(instance).__name__}.{old} is now called {new}; the old name will stop working in the next version",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(instance, new)

    return property(get)
