"""The OpenMP runtime whose threads the native library shares with PyTorch."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch


class _SymbolInfo(ctypes.Structure):
    """The result of `dladdr`."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def openmp_runtime() -> str | None:
    """Return the file of the OpenMP runtime that PyTorch's operators run on; None if there is none to share.

    A process may have loaded several (scikit-learn brings its own), so searching the loaded files is not enough. The symbol
    is looked up as the dynamic linker does for PyTorch, including precedence of a preloaded runtime. This loads nothing.
    """
    if os.name != "posix":
        return None
    suffix = "dylib" if sys.platform == "darwin" else "so"
    pytorch = f"libtorch_cpu.{suffix}"
    # By path, as in PyTorch's wheels, or by name in case a distribution has moved the file.
    scopes: list[str | None] = [str(Path(torch.__file__).parent / "lib" / pytorch), pytorch]
    # On Linux, global symbols come before a library's own dependencies; on macOS each symbol names its library.
    scopes.insert(len(scopes) if sys.platform == "darwin" else 0, None)
    for scope in scopes:
        try:
            symbol = ctypes.CDLL(scope, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
            locate = ctypes.CDLL(None).dladdr
        except (OSError, AttributeError):
            continue
        locate.argtypes, locate.restype = [ctypes.c_void_p, ctypes.POINTER(_SymbolInfo)], ctypes.c_int
        found = _SymbolInfo()
        if locate(ctypes.cast(symbol, ctypes.c_void_p), ctypes.byref(found)) and found.file:
            return os.fsdecode(found.file)
    return None
