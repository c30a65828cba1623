"""Reading what `torch.save` wrote without running anything: tensors are rebuilt, all else becomes an inert placeholder.

Checkpoints found in the wild hold numbers of NumPy, paths, dates, settings of frameworks that are not installed, ... beside
the weights. Nobody reads them here, so that no class of theirs is ever looked up: in its place stands a class made on the
spot, which takes whatever it is given and does nothing. What is called for true is the few functions of PyTorch that put a
tensor together; and no attribute of anything is ever set.

As a second fence, a file is refused that names what it takes to run something: anything of the standard library but its
values, such as `os.system`, and `builtins.getattr`, which also stands for a bound method.
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

# Modules of the standard library that hold values. What others offer does something, and is in no checkpoint by chance.
# Of `builtins` and `operator`, some names only; exceptions are values too.
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
# Of Python 2, which the default protocol keeps to.
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}
_NEWEST_OF_OLD_FILES = 2
_TRUE = ("1", "y", "yes", "true")


class RefusedError(pickle.UnpicklingError):
    """A file asks for something that no checkpoint needs."""


class UnreadableError(pickle.UnpicklingError):
    """A file is whole and harmless, for all that is known, but not of a kind that is read here."""


class Placeholder(dict[Any, Any]):
    """What stands in the place of an object of a class that is not looked up; entries of a mapping are kept.

    Attributes:
        named: the class that the file names.
        harmless: whether it is known to hold values and no more.
    """

    named = ""
    harmless = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Make one, whatever it is given."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    # An element of a set, or a key of a mapping, may be one.
    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<{self.named}>"

    def append(self, item: Any) -> None:
        """Drop an entry of a list."""

    def extend(self, items: Any) -> None:
        """Drop entries of a list."""

    def add(self, item: Any) -> None:
        """Drop an element of a set."""


def load(path: Path) -> Any:
    """Read a file of `torch.save`, on the CPU.

    Where `TORCH_FORCE_WEIGHTS_ONLY_LOAD` is set, PyTorch reads it, and refuses all that it does not know.

    Raises:
        RefusedError: if the file names something that no checkpoint needs, such as a function that runs commands, or is a
            bare pickle of objects.
        UnreadableError: if it holds a tensor of a kind that is unknown here.
        UnpicklingError: if it is no such file.
        Exception: whatever the damaged bytes lead to.
    """
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in _TRUE:
        return torch.load(path, map_location="cpu", weights_only=True)
    zipped = _is_zip(path)
    # For these two `torch.load` leaves the unpickler it is given.
    if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise pickle.UnpicklingError("a TorchScript archive")
    if not zipped and tarfile.is_tarfile(path):
        raise pickle.UnpicklingError("a tar archive")

    class Reader(_Reader):
        newest = pickle.HIGHEST_PROTOCOL if zipped else _NEWEST_OF_OLD_FILES

    module: Any = types.SimpleNamespace(__name__=__name__, Unpickler=Reader, load=functools.partial(_load_numbers, Reader))
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)


def _load_numbers(reader_class: type[_Reader], file: Any, **options: Any) -> Any:
    """Read one of the pickles around that of the contents, which name no class in a file of `torch.save`."""
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
    """Unpickler that looks nothing up but what tensors are made of."""

    newest: int
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, **options)
        self.unknown: set[str] = set()  # classes met that are not known to be harmless

    def find_class(self, module: str, name: str) -> Any:
        """Give what a tensor is made of, or the class of a placeholder."""
        module = _OLD_NAMES.get(module, module)
        if any(character.isspace() for character in module):
            raise pickle.UnpicklingError(f"a module called {module!r}")
        if (module, name) in _PARTS:
            return _PARTS[module, name]
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
        """What gives the storages that lie outside of the pickle; PyTorch sets it."""
        return self._persistent_load

    @persistent_load.setter
    def persistent_load(self, load: Callable[[Any], Any]) -> None:
        def checked(saved: Any) -> Any:
            if type(saved) is not tuple or not saved:
                raise UnreadableError(f"it keeps {saved!r} outside of the pickle, as files of pickle protocol 0 do")
            kind = saved[0]
            if type(kind) is not str or kind not in ("module", "storage"):
                raise RefusedError(f"it keeps {kind!r} outside of the pickle")
            # Old files keep classes of modules there, whose sources PyTorch would compare.
            return saved[1] if kind == "module" else load(saved)

        self._persistent_load = checked

    def get_extension(self, code: int) -> None:
        """Refuse what stands for a registered object."""
        raise RefusedError(f"it names a registered object by the number {code}")

    def load_proto(self) -> None:
        """Refuse protocols that files of this kind never had."""
        protocol = self.read(1)[0]  # type: ignore[attr-defined]
        if protocol > self.newest:
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
    """Give a tensor; `rest` is whether it had a gradient, its hooks, and its marks, all of which older files may lack."""
    return _marked(_utils._rebuild_tensor(storage, offset, size, stride), *rest[2:])


def _tensor_of_type(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Give a tensor of one of the newer types, whose storage is of bytes; its type comes after the hooks."""
    return _marked(torch.empty(0, dtype=rest[2]).set_(storage._untyped_storage, offset, size, stride), *rest[3:])


def _marked(tensor: Tensor, marks: Any = None, *rest: Any) -> Tensor:
    """Mark a tensor whose storage holds the negatives or conjugates; in old files, the storage is filled later."""
    if rest or not (marks is None or type(marks) is dict):
        raise UnreadableError(f"it describes a tensor in a way that is unknown here: {(marks, *rest)!r}")
    for mark, value in (marks or {}).items():
        if mark not in ("conj", "neg") or value is not True:
            raise UnreadableError(f"it marks a tensor with {mark!r}: {value!r}; known are 'conj' and 'neg', each True")
    _utils.set_tensor_metadata(tensor, marks or {})
    return tensor


def _itself(data: Any, *rest: Any) -> Any:
    """Give the data of a parameter; hooks and state that it may have are dropped."""
    return data


def _of_subclass(make: Callable[..., Any], kind: Any, args: Any, *state: Any) -> Any:
    """Give a tensor with attributes, or of a subclass, as a plain one."""
    if make not in _PARTS.values():
        raise RefusedError(f"it names {make!r} where a tensor is put together")
    return make(*args)


_PARTS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_subclass,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _utils._rebuild_meta_tensor_no_storage,
    ("torch._utils", "_rebuild_parameter"): _itself,
    ("torch._utils", "_rebuild_parameter_with_state"): _itself,
    ("torch._utils", "_rebuild_qtensor"): _utils._rebuild_qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _utils._rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
}
