"""Adaptation of Triton's interpreter to the installed NumPy, and to tests that run often."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch


def let_scalars_be_integers() -> None:
    """Let the interpreter of Triton 3.6 and 3.7 take a loop bound from an array of one element.

    They call ``int`` on arrays of shape ``(1,)``, which NumPy 2.4 and newer refuse. Later versions squeeze the array first.
    On them nothing changes.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "squeezes", False):
        return

    @functools.wraps(patch)
    def patched(tensor: Any, scope: Any) -> Any:
        given = patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
        return given

    patched.squeezes = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched


def leave_out_unused_work() -> None:
    """Let the interpreter leave out work without a result, which takes half of its time.

    Each sum and product of integers is repeated in 64 bits to detect overflows, but only debugging asserts the outcome. The
    table of NumPy's types is rebuilt for each look-up.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if not hasattr(interpreter._get_np_dtype, "known"):
        interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)


def _remembering(look_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `look_up` with a memory for plain types; those of blocks and pointers have no hashes."""
    known: dict[str, Any] = {}

    def found(dtype: Any) -> Any:
        name = getattr(dtype, "name", None) if type(dtype).__name__ == "dtype" else None
        if name is None:
            return look_up(dtype)
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    found.known = known  # type: ignore[attr-defined]
    return found


def share_types() -> None:
    """Let the interpreter describe the type of a block, and the attributes of tensors of a type, only once.

    Nearly every operation of a kernel builds both again, which takes a third of the interpreter's time.
    """
    from triton.language import core

    if not hasattr(core.tensor.__init__, "shares"):
        core.tensor.__init__ = _sharing_attributes(core.tensor.__init__)
        core.block_type.__new__, core.block_type.__init__ = _sharing_blocks(core.block_type)


def _sharing_attributes(original: Callable[..., None]) -> Callable[..., None]:
    """Return the constructor of tensors, with a memory for the attributes that follow from the type alone."""

    @functools.wraps(original)
    def construct(self: Any, handle: Any, type: Any) -> None:
        shared = type.__dict__.get("_attributes_of_tensors")
        if shared is None:
            original(self, handle, type)
            type._attributes_of_tensors = {name: value for name, value in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(shared)
            self.handle = handle

    construct.shares = True  # type: ignore[attr-defined]
    return construct


def _sharing_blocks(block_type: type) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Return what creates and what initializes types of blocks: one object for each element type and shape."""
    original = block_type.__init__  # type: ignore[misc]

    def create(cls: type, *arguments: Any, **named: Any) -> Any:
        if cls is not block_type or len(arguments) != 2:
            return object.__new__(cls)
        element, shape = arguments
        known = element.__dict__.setdefault("_blocks", {})
        size = tuple([getattr(length, "value", length) for length in shape])
        if size not in known:
            known[size] = object.__new__(cls)
        return known[size]

    @functools.wraps(original)
    def initialize(self: Any, *arguments: Any, **named: Any) -> None:
        if "_initialized" not in self.__dict__:
            original(self, *arguments, **named)
            self._initialized = True

    return create, initialize


def why_not() -> str:
    """Return why kernels cannot be interpreted here, or "" if they can. A kernel with a loop is run to find out."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    let_scalars_be_integers()
    leave_out_unused_work()
    share_types()
    from tests.interpreted_sample import counted

    out = torch.zeros(1, dtype=torch.int32)
    try:
        counted[(1,)](out, 3)
    except Exception as error:  # whatever it is, it is the reason
        return f"Triton's interpreter does not work here: {error}"
    return "" if int(out) == 3 else f"Triton's interpreter counts to {int(out)} instead of 3"
