"""Loading the native library, its C interface (native/include/widekernel.h) in ctypes, and the reason if it is missing.

Importing this module does nothing. `load()` opens the library on first use and returns the same object from then on.

Environment variables that `load()` reads:

* `WIDEKERNEL_NATIVE=0`: do not use the library.
* `WIDEKERNEL_ISA=avx2`: use this instruction set instead of the best one that the processor supports.
* `WIDEKERNEL_LIBRARY=build/native/_native.so`: load this file, for instance one built with sanitizers.
* `WIDEKERNEL_REQUIRE_NATIVE=1`: raise if the library should run and cannot. (At installation, the same variable makes a
  failed build an error.)
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from widekernel.errors import ArgumentError, WidekernelError
from widekernel.ops.cpu.openmp import openmp_runtime
from widekernel.ops.cpu.structures import (
    Address,
    BatchNorm,
    DepthwiseConv,
    Gate,
    Partial,
    Pass,
    PatchGeometry,
    Place,
    PointwiseCall,
    PointwiseGrad,
    PointwiseWeights,
    Rect,
    Samples,
    Step,
    Sum,
    Tensor,
    WeightGrad,
)

__all__ = [  # of the structures, which are a part of the interface; what is defined here needs no mention
    "Address",
    "BatchNorm",
    "DepthwiseConv",
    "Gate",
    "Partial",
    "Pass",
    "PatchGeometry",
    "Place",
    "PointwiseCall",
    "PointwiseGrad",
    "PointwiseWeights",
    "Rect",
    "Samples",
    "Step",
    "Sum",
    "Tensor",
    "WeightGrad",
]
ABI, MOST_PASSES, MOST_RECTS = 8, 16, 64
FLOAT32, BFLOAT16, FLOAT16, INT8 = range(4)
DIRECT, HYBRID_ALONG_ROWS, HYBRID_ALONG_COLUMNS = range(3)
NO_ACTIVATION, RELU, GELU, GELU_TANH = range(4)
PRODUCTS_STEP, DEPTHWISE_STEP, GATE_STEP, CONV_STEP = range(4)
REQUIRED = "WIDEKERNEL_REQUIRE_NATIVE"
OK, BAD_ARGUMENT, OUT_OF_MEMORY, UNAVAILABLE = range(4)
ISAS = ("avx512", "avx2", "neon", "portable")


class NativeMemoryError(WidekernelError, MemoryError):
    """The native library could not allocate its working memory."""


class NativeMissingError(WidekernelError, RuntimeError):
    """The environment requires the native library, and it cannot run."""


_int32, _text, _bytes = ctypes.c_int32, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "wk_abi": (_int32, []),
    "wk_isa": (_text, []),
    "wk_use_isa": (_int32, [_text]),
    "wk_lanes": (_int32, []),
    "wk_processor": (_text, []),
    "wk_bind_openmp": (_int32, [_text]),
    "wk_depthwise_sum": (_int32, [ctypes.POINTER(Sum)]),
    "wk_depthwise_weight_grad": (_int32, [ctypes.POINTER(WeightGrad)]),
    "wk_depthwise_sum_at": (_int32, [ctypes.POINTER(Sum), *[Address] * 5, _int32, Address]),
    "wk_depthwise_branches_at": (_int32, [ctypes.POINTER(Sum), Address, Address, Address]),
    "wk_depthwise_weight_grad_at": (_int32, [ctypes.POINTER(WeightGrad), Address, Address, Address]),
    "wk_sum_workspace": (None, [ctypes.POINTER(Sum), _bytes, _bytes]),
    "wk_sum_form": (_text, [ctypes.POINTER(Sum)]),
    "wk_weight_grad_workspace": (None, [ctypes.POINTER(WeightGrad), _bytes, _bytes]),
    "wk_pointwise_pack": (_int32, [ctypes.POINTER(PointwiseWeights), ctypes.POINTER(Address)]),
    "wk_pointwise_free": (None, [Address]),
    "wk_pointwise_run": (_int32, [Address, ctypes.POINTER(PointwiseCall)]),
    "wk_pointwise_run_at": (_int32, [Address, ctypes.POINTER(PointwiseCall), Address, Address, Address, Address]),
    "wk_pointwise_workspace": (None, [Address, _int32, _bytes, _bytes]),
    "wk_gate_run": (_int32, [ctypes.POINTER(Gate)]),
    "wk_gate_run_at": (_int32, [ctypes.POINTER(Gate), Address, Address]),
    "wk_depthwise_conv_run": (_int32, [ctypes.POINTER(DepthwiseConv)]),
    "wk_depthwise_conv_run_at": (_int32, [ctypes.POINTER(DepthwiseConv), Address, Address]),
    "wk_run_steps": (_int32, [Address, _int32, Address]),
    "wk_samples_equal": (_int32, [Address, _int32, Address]),
    "wk_pointwise_weight_grad": (_int32, [ctypes.POINTER(PointwiseGrad)]),
    "wk_batch_norm_run": (_int32, [ctypes.POINTER(BatchNorm)]),
    "wk_error_text": (_text, [_int32]),
    "wk_fma_peak": (ctypes.c_double, [_int32, ctypes.c_double]),
    "wk_why_no_products": (_text, [_int32]),
    "wk_product_peak": (ctypes.c_double, [_int32, _int32, ctypes.c_double]),
}


@dataclass
class Library:
    """The loaded library, or the reason why there is none.

    Attributes:
        reason: why the library cannot run; None if it can.
        calls: the C functions, under the names of the header. Set only if `reason` is None, like all attributes below.
        path: the file.
        openmp: the file of the OpenMP runtime whose threads are used; None if calls run on one thread.
        isas: the instruction sets of this build that the processor supports, the preferred one first.
        isa: the instruction set in use.
        lanes: number of channels that this instruction set processes at once.
        processor: "zen4", "amd" (others of AMD's) or "other"; constants and rules were measured for each.
        wanted: False if the user has switched the library off, so that no warning is needed.
    """

    reason: str | None = None
    calls: Any = None
    path: Path | None = None
    openmp: str | None = None
    isas: tuple[str, ...] = ()
    isa: str = ""
    lanes: int = 0
    processor: str = "other"
    wanted: bool = True

    @property
    def threads_available(self) -> bool:
        """Return whether a call can use more than one thread."""
        return self.openmp is not None

    def use_isa(self, name: str) -> None:
        """Use the instruction set `name` from now on, in every thread.

        Raises:
            ArgumentError: if this build or the processor lacks it, or the library cannot run.
        """
        if self.reason is not None:
            raise ArgumentError(f"no instruction set can be chosen: {self.reason}")
        if self.calls.wk_use_isa(name.encode()) != OK:
            raise ArgumentError(_isa_unavailable(repr(name), self.isas))
        self.isa, self.lanes = self.calls.wk_isa().decode(), self.calls.wk_lanes()

    def check(self, error: int) -> None:
        """Raise the error that corresponds to the code that a C function returned, unless the code is `OK`.

        Raises:
            NativeMemoryError: for `OUT_OF_MEMORY`.
            ArgumentError: for everything else.
        """
        if error != OK:
            raised = NativeMemoryError if error == OUT_OF_MEMORY else ArgumentError
            raise raised(f"the native CPU library refused a call ({error}): {self.calls.wk_error_text(error).decode()}")


_LOCK = threading.Lock()
_loaded: Library | None = None
_warned = False


def load() -> Library:
    """Load the library on the first call; return the same object, usable or not, on every later one."""
    global _loaded
    if _loaded is None:
        with _LOCK:
            if _loaded is None:
                _loaded = open_library(os.environ)
    return _loaded


def warn_once_if_missing() -> None:
    """Warn once per process that native kernels should run but cannot, and why; not if the user switched them off.

    Raises:
        NativeMissingError: every time, if `WIDEKERNEL_REQUIRE_NATIVE` is set.
    """
    global _warned
    library = load()
    if library.reason is None:
        return
    required = os.environ.get(REQUIRED, "")
    if is_on(required):
        raise NativeMissingError(
            f"{REQUIRED} is {required!r}, so operators may not run without the native CPU library, but "
            f"{library.reason}. Unset {REQUIRED} to run without it."
        )
    if _warned or not library.wanted:
        return
    with _LOCK:
        if _warned:
            return
        _warned = True
    # Outside the lock: a filter may turn the warning into an exception.
    warnings.warn(
        f"widekernel computes large kernels with PyTorch's convolutions, many times slower: {library.reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def is_on(value: str) -> bool:
    """Return whether the value of an environment variable means yes, by the rules of the build system."""
    if value.isdigit():
        return int(value) != 0
    return value.lower() not in ("", "n", "no", "off", "false", "f")


def open_library(environment: Mapping[str, str]) -> Library:
    """Find, load and check the library; any obstacle becomes the `reason`."""
    switch = environment.get("WIDEKERNEL_NATIVE", "")
    if switch not in ("", "1"):
        reason = f"the native CPU library is switched off by WIDEKERNEL_NATIVE={switch} (unset it, or set it to 1)"
        return Library(reason, wanted=False)
    path, missing = _find(environment.get("WIDEKERNEL_LIBRARY", ""))
    if path is None:
        return Library(missing)
    again = "reinstall widekernel, in a checkout with `pip install --editable .`, or remove the file"
    try:
        calls = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(f"{path} cannot be loaded ({error}); {again}")
    try:
        calls.wk_abi.restype, calls.wk_abi.argtypes = _SIGNATURES["wk_abi"]
        abi = calls.wk_abi()
        if abi != ABI:
            return Library(f"{path} has interface version {abi}, but this version of widekernel needs {ABI}; {again}")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(calls, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        return Library(f"{path} is not the native library of widekernel ({error}); {again}")
    return _configured(Library(calls=calls, path=path), environment.get("WIDEKERNEL_ISA", ""))


def _find(named: str) -> tuple[Path | None, str | None]:
    """Return the library file, which is next to this module, and None; or None and the reason."""
    if named:
        path = Path(named).resolve()
        return (path, None) if path.is_file() else (None, f"WIDEKERNEL_LIBRARY={named} is not a file: correct or unset it")
    folder = Path(__file__).parent
    for suffix in (".dylib", ".so") if sys.platform == "darwin" else (".so",):
        path = folder / f"_native{suffix}"
        if path.is_file():
            return path, None
    return None, (
        f"the native CPU library was not built ({folder} has none); install a C++17 compiler (GCC or Clang), then run "
        f"`{REQUIRED}=1 pip install --force-reinstall --no-deps --no-cache-dir widekernel` (in a checkout, `.` instead of "
        "widekernel), which prints the reason if it fails; without --no-cache-dir pip reinstalls the wheel it built before"
    )


def _configured(library: Library, isa: str) -> Library:
    """Choose the instruction set and bind the threads of a library that has just been loaded."""
    default = library.calls.wk_isa().decode()
    others = [name for name in ISAS if name != default and library.calls.wk_use_isa(name.encode()) == OK]
    library.isas = (default, *others)
    if isa and isa not in library.isas:
        return Library(_isa_unavailable(f"WIDEKERNEL_ISA={isa}", library.isas))
    library.use_isa(isa or default)
    library.processor = library.calls.wk_processor().decode()
    runtime = openmp_runtime()
    if runtime is not None and library.calls.wk_bind_openmp(os.fsencode(runtime)):
        library.openmp = runtime
    return library


def _isa_unavailable(value: str, available: tuple[str, ...]) -> str:
    return f"{value}: for this processor the native CPU library has {', '.join(available)}; choose one of these"
