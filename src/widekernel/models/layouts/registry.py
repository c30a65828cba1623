"""The layouts that networks can be loaded from, and the signatures that recognize a network by its keys.

Families register themselves: `@register_layouts(Network)` on a function that lists the layouts of a network, and
`register_signature` for every form in which its weights may be found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from widekernel.errors import ArgumentError
from widekernel.models.layouts.layout import Layout, State
from widekernel.models.layouts.nesting import innermost, nesting_of
from widekernel.settings import require_one_of

# In search order: a file in an official layout may have keys that match a native signature, too.
Form = Literal["folded", "official", "foreign", "native"]
# Keys of the blocks of our networks start with this pattern.
BLOCK_KEY = r"^stages\.\d+\.blocks\.\d+\."
ANY_FOLDED = "a folded widekernel network"

Rewriting = Callable[[State], State | None]
ListLayoutsT = TypeVar("ListLayoutsT", bound=Callable[[Any], tuple[Layout, ...]])


@dataclass(frozen=True)
class Signature:
    """A pattern that recognizes a network by the keys of its state dict.

    Attributes:
        name: name of the network in error messages; for official forms, the `family` of a `Layout`.
        pattern: regular expression that matches part of at least one key.
        form: "native" for our training form, "folded" for our folded form, "official" for the authors' form, which can be
            loaded, and "foreign" for networks that are recognized only so that errors can name them.
        over: names of less specific signatures of the same form that match such keys, too.
        without: regular expression that matches part of no key; "" for no such condition.
    """

    name: str
    pattern: str
    form: Form
    over: tuple[str, ...] = ()
    without: str = ""

    def matches(self, keys: Iterable[str]) -> bool:
        """Return whether a state dict with these keys belongs to the network."""
        found = any(re.search(self.pattern, key) for key in keys)
        return found and not (self.without and any(re.search(self.without, key) for key in keys))


_SIGNATURES: dict[str, Signature] = {}
_LAYOUTS: dict[type[nn.Module], Callable[[Any], tuple[Layout, ...]]] = {}
_REWRITINGS: dict[str, Rewriting] = {}


def register_signature(name: str, pattern: str, form: Form, over: tuple[str, ...] = (), without: str = "") -> None:
    """Register a signature; the arguments are the attributes of `Signature`.

    Raises:
        ArgumentError: if another signature has the name.
    """
    require_one_of("form", form, get_args(Form))
    signature = Signature(name, pattern, form, over, without)
    if _SIGNATURES.setdefault(name, signature) != signature:
        raise ArgumentError(f"the signature {name!r} is already registered with other keys: choose another name")


def register_layouts(network: type[nn.Module]) -> Callable[[ListLayoutsT], ListLayoutsT]:
    """Return a decorator that registers a function as the one that lists the layouts of a network.

    The function is called with a network of that class, or of a subclass without its own layouts. It returns the layouts
    that can be loaded; `save_checkpoint(layout="official")` writes the first one.
    """

    def register(list_layouts: ListLayoutsT) -> ListLayoutsT:
        _LAYOUTS[network] = list_layouts
        return list_layouts

    return register


def register_rewriting(name: str) -> Callable[[Rewriting], Rewriting]:
    """Return a decorator that registers a function for whole files of another library, such as classifiers with a backbone.

    The function gets the weights of every file before prefixes are removed. It returns them under the authors' names if the
    file is of this library, or else None.

    Args:
        name: the library's network, for the report.
    """

    def register(rewrite: Rewriting) -> Rewriting:
        _REWRITINGS[name] = rewrite
        return rewrite

    return register


def rewritten(state: State) -> tuple[State, str]:
    """Return the weights of a file under the authors' names, and the name of the other library's network, or ""."""
    for name, rewrite in _REWRITINGS.items():
        found = rewrite(state)
        if found is not None:
            return found, name
    return state, ""


def layouts_of(model: nn.Module) -> tuple[Layout, ...]:
    """Return the official layouts that a network can be loaded from; none if it has no official code.

    Those of a network that contains one of ours come from the layouts of the latter.
    """
    nesting = nesting_of(model)
    if nesting.body is not model:
        return tuple(nesting.layout(inner) for inner in layouts_of(nesting.body))
    for cls in type(model).__mro__:
        if cls in _LAYOUTS:
            return _LAYOUTS[cls](model)
    return ()


def identify(keys: Iterable[str]) -> Signature | None:
    """Return the signature of the network that a state dict with these keys belongs to; None if it is unknown."""
    keys = [innermost(key) for key in keys]
    for form in get_args(Form):
        found = [s for s in _SIGNATURES.values() if s.form == form and s.matches(keys)]
        general = {name for signature in found for name in signature.over}
        for signature in found:
            if signature.name not in general:
                return signature
    return None


register_signature(ANY_FOLDED, r"(mixer|large_kernel|layer)\.kernels\.\d+$", "folded")
