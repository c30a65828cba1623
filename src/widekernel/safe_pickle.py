"""Reading of `torch.save` files without running code: tensors are rebuilt, all other objects become inert placeholders.

Besides the weights, published checkpoints hold NumPy numbers, paths, dates or settings of frameworks that are not installed.
None of these is needed here, so none of their classes is imported. Each object is replaced by a placeholder whose class is
created on the spot, accepts any arguments and does nothing. Only the few PyTorch functions that rebuild a tensor are called,
and no attribute of any object is ever set.

As a second line of defense, a file is refused if it names anything in the standard library other than value types, because
such names can run code: `os.system`, for example, or `builtins.getattr`, by which pickle also stores bound methods.
"""

from __future__ import annotations

import builtins
import functools
import os
import pickle
import sys
import tarfile
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, _utils
from torch.serialization import _get_layout

# Modules of the standard library with value types. Functions of other modules have effects; no honest checkpoint names them.
# Of `builtins` and `operator`, only some names are harmless; exceptions are values, too.
_HARMLESS = {
    *("_codecs", "argparse", "array", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions"),
    *(
        "functools",
        "ipaddress",
        "logging",
        "numbers",
        "pathlib",
        "random",
        "re",
        "string",
        "time",
        "types",
        "typing",
        "uuid",
    ),
    "zoneinfo",
}
_HARMLESS_BUILTINS = {
    *(
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "object",
        "range",
        "set",
        "slice",
    ),
    *("str", "tuple", "type", "Ellipsis", "NotImplemented", "long", "unicode", "xrange"),
    *("abs", "len", "max", "min", "pow", "round", "sorted", "sum"),
    *(name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)),
}
_HARMLESS_PACKAGES = {"numpy", "omegaconf"}
_HARMLESS_NAMES = {
    ("operator", "itemgetter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.torch_version", "TorchVersion"),
}
# Python 2 names, which pickle protocol 2 still writes.
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}
_MAX_PROTOCOL_OF_OLD_FILES = 2
_TRUE = ("1", "y", "yes", "true")


class RefusedError(pickle.UnpicklingError):
    """Error for a file that names something that no checkpoint needs."""


class UnreadableError(pickle.UnpicklingError):
    """Error for a file that seems intact and harmless, but is of a kind that cannot be read here."""


class Placeholder(dict[Any, Any]):
    """Inert replacement for an object whose class is not imported; it keeps the entries of a mapping.

    Attributes:
        named: name of the class in the file.
        harmless: whether the class is known to hold only values.
    """

    named = ""
    harmless = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Create a placeholder; the arguments are dropped."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    # Placeholders can be elements of sets and keys of mappings.
    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<{self.named}>"

    def append(self, item: Any) -> None:
        """Ignore an item appended to a list."""

    def extend(self, items: Any) -> None:
        """Ignore items appended to a list."""

    def add(self, item: Any) -> None:
        """Ignore an element added to a set."""


def unpickle(path: Path) -> Any:
    """Load a `torch.save` file on the CPU.

    If `TORCH_FORCE_WEIGHTS_ONLY_LOAD` is set, PyTorch's own unpickler loads the file and refuses everything unknown to it.

    Raises:
        RefusedError: if the file names something that no checkpoint needs, such as a function that runs commands, or is a
            bare pickle of objects.
        UnreadableError: if it holds a tensor of an unknown kind.
        UnpicklingError: if it is not such a file.
        Exception: damaged bytes can raise anything.
    """
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in _TRUE:
        return torch.load(path, map_location="cpu", weights_only=True)
    zipped = _is_zip(path)
    # For these two kinds of file, `torch.load` would not use the given unpickler.
    if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise pickle.UnpicklingError("a TorchScript archive")
    if not zipped and tarfile.is_tarfile(path):
        raise pickle.UnpicklingError("a tar archive")

    class Reader(_Reader):
        max_protocol = pickle.HIGHEST_PROTOCOL if zipped else _MAX_PROTOCOL_OF_OLD_FILES

    module: Any = types.SimpleNamespace(__name__=__name__, Unpickler=Reader, load=functools.partial(_load_header, Reader))
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)


def _load_header(reader_class: type[_Reader], file: Any, **options: Any) -> Any:
    """Load one of the pickles before or after the contents; in a genuine `torch.save` file they name no class."""
    reader = reader_class(file, **options)
    try:
        found = reader.load()
    except (OSError, EOFError, pickle.UnpicklingError):
        raise
    except Exception as error:
        if reader.unknown:
            raise RefusedError(f"it names {', '.join(sorted(reader.unknown))}") from error
        raise
    if reader.unknown:
        raise RefusedError(f"it names {', '.join(sorted(reader.unknown))}")
    return found


class _Reader(pickle._Unpickler):
    """Unpickler that resolves only the names that are needed to rebuild tensors."""

    max_protocol: int
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, **options)
        self.unknown: set[str] = set()  # names of classes in the file that are not known to be harmless

    def find_class(self, module: str, name: str) -> Any:
        """Return a function or type that rebuilds tensors, or else a placeholder class."""
        module = _OLD_NAMES.get(module, module)
        if any(character.isspace() for character in module):
            raise pickle.UnpicklingError(f"a module called {module!r}")
        if (module, name) in _TENSOR_BUILDERS:
            return _TENSOR_BUILDERS[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        harmless = _is_harmless(module, name)
        if not harmless and module.split(".")[0] in sys.stdlib_module_names:
            raise RefusedError(f"it names {module}.{name}")
        if not harmless:
            self.unknown.add(f"{module}.{name}")
        return type("Placeholder", (Placeholder,), {"named": f"{module}.{name}", "harmless": harmless})

    @property
    def persistent_load(self) -> Callable[[Any], Any]:  # type: ignore[override]
        """Function that loads the storages, which are outside of the pickle; PyTorch sets it."""
        return self._persistent_load

    @persistent_load.setter
    def persistent_load(self, load: Callable[[Any], Any]) -> None:
        def checked(saved: Any) -> Any:
            if type(saved) is not tuple or not saved:
                raise UnreadableError(f"it keeps {saved!r} outside of the pickle, as files of pickle protocol 0 do")
            kind = saved[0]
            if type(kind) is not str or kind not in ("module", "storage"):
                raise RefusedError(f"it keeps {kind!r} outside of the pickle")
            # Old files keep classes of modules there; PyTorch would compare their source code with that in the file.
            return saved[1] if kind == "module" else load(saved)

        self._persistent_load = checked

    def get_extension(self, code: int) -> None:
        """Refuse codes of the `copyreg` extension registry."""
        raise RefusedError(f"it names a registered object by the number {code}")

    def load_proto(self) -> None:
        """Refuse protocols that files of this kind never use."""
        protocol = self.read(1)[0]  # type: ignore[attr-defined]
        if protocol > self.max_protocol:
            raise pickle.UnpicklingError(f"a pickle of protocol {protocol}")
        self.proto = protocol

    def load_build(self) -> None:
        """Drop the state of an object instead of setting it."""
        self.stack.pop()  # type: ignore[attr-defined]

    dispatch[pickle.PROTO[0]] = load_proto
    dispatch[pickle.BUILD[0]] = load_build


def _is_harmless(module: str, name: str) -> bool:
    package = module.split(".")[0]
    if package == "builtins":
        return name in _HARMLESS_BUILTINS
    return package in _HARMLESS or package in _HARMLESS_PACKAGES or (module, name) in _HARMLESS_NAMES


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Rebuild a tensor; `rest` is its `requires_grad`, its hooks and its metadata, which older files may lack."""
    return _with_metadata(_utils._rebuild_tensor(storage, offset, size, stride), *rest[2:])


def _tensor_of_type(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Rebuild a tensor of one of the newer types, whose storage is untyped; its type follows the hooks."""
    return _with_metadata(torch.empty(0, dtype=rest[2]).set_(storage._untyped_storage, offset, size, stride), *rest[3:])


def _with_metadata(tensor: Tensor, metadata: Any = None, *rest: Any) -> Tensor:
    """Mark a tensor as the negative or conjugate of its storage, which old files fill only later."""
    if rest or not (metadata is None or type(metadata) is dict):
        raise UnreadableError(f"it describes a tensor in an unknown way: {(metadata, *rest)!r}")
    for mark, value in (metadata or {}).items():
        if mark not in ("conj", "neg") or value is not True:
            raise UnreadableError(f"it marks a tensor with {mark!r}: {value!r}; known are 'conj' and 'neg', each True")
    _utils.set_tensor_metadata(tensor, metadata or {})
    return tensor


def _parameter_data(data: Any, *rest: Any) -> Any:
    """Return the data of a parameter; its hooks and its state are dropped."""
    return data


def _plain_tensor(make: Callable[..., Any], kind: Any, args: Any, *state: Any) -> Any:
    """Rebuild a tensor of a subclass, or with attributes, as a plain tensor."""
    if make not in _TENSOR_BUILDERS.values():
        raise RefusedError(f"it names {make!r} where a tensor is rebuilt")
    return make(*args)


_TENSOR_BUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._tensor", "_rebuild_from_type_v2"): _plain_tensor,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _utils._rebuild_meta_tensor_no_storage,
    ("torch._utils", "_rebuild_parameter"): _parameter_data,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter_data,
    ("torch._utils", "_rebuild_qtensor"): _utils._rebuild_qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _utils._rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
}
