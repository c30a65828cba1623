"""Safe reading of checkpoints with objects of all kinds beside the weights, none of which is imported or run."""

from __future__ import annotations

import argparse
import builtins
import collections
import copyreg
import datetime
import decimal
import enum
import functools
import io
import operator
import os
import pathlib
import pickle
import re
import sys
import tarfile
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import widekernel
from tests.models.checkpoints import assert_refused
from tests.models.zoo import alive, assert_same_state, create
from widekernel import safe_pickle
from widekernel.errors import CheckpointError
from widekernel.models.checkpoint import reader


class Color(enum.Enum):
    RED = 1


class Settings(dict):  # type: ignore[type-arg]
    """Mapping of a framework that is not installed where the file is read."""


class Holder:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the file's author was run")


EXTRAS: dict[str, Any] = {
    "numpy_scalars": [
        np.float64(0.5),
        np.float32(1),
        np.int64(3),
        np.bool_(True),
        np.str_("a"),
        np.datetime64("2024-01-01"),
    ],
    "numpy_arrays": {"curve": np.arange(4.0), "names": np.array(["a", "b"]), "objects": np.array([None, "x"], dtype=object)},
    "numpy_types": [np.dtype("float32"), np.float64, np.random.RandomState(0), np.random.default_rng(0)],
    "paths": [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("C:/a"), Path("c")],
    "dates": [datetime.datetime.now(), datetime.date.today(), datetime.timedelta(3), datetime.timezone.utc],
    "dicts": [
        collections.OrderedDict(a=1),
        collections.defaultdict(list, a=[1]),
        collections.Counter("aab"),
        collections.defaultdict(functools.partial(collections.defaultdict, int)),
    ],
    "sequences": [collections.deque([1, 2], maxlen=3), {1, 2}, frozenset([3]), slice(1, 2), range(3), (1, None), b"x", 1j],
    "namespaces": [argparse.Namespace(lr=0.1, out=Path("o")), types.SimpleNamespace(a=1)],
    "torch": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.tensor(3), nn.Parameter(torch.ones(2))],
    "modules": [nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(3), nn.GELU())],
    "optimizer": torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict(),
    "exceptions": [ValueError("a"), OSError(2, "b"), KeyboardInterrupt()],
    "functions": [operator.itemgetter(1), len, max],
    "others": [decimal.Decimal("1.5"), uuid.uuid4(), re.compile("a+"), Color.RED, Ellipsis, NotImplemented],
    "unhashable_keys": {Path("a"): 1, np.int64(3): 2, Color.RED: 3, frozenset([1]): {Path("b")}},
    "unknown": [Holder(a=1, b=Holder(c=torch.ones(2))), Settings(a=Settings(b=1))],
}


def _save(path: Path, content: Any, protocol: int = 2, zipped: bool = True) -> Path:
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("form", ["zip", "zip_of_protocol_4", "old"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_objects_beside_the_weights_are_ignored(extra: str, form: str, tmp_path: Path) -> None:
    state = nn.BatchNorm2d(3).state_dict()
    content = {extra: EXTRAS[extra], "model": state, "epoch": np.int64(7)}
    path = _save(tmp_path / "a.pth", content, 4 if form == "zip_of_protocol_4" else 2, form != "old")
    found = reader.read_checkpoint(path)
    assert set(found.others) == {extra, "epoch"}
    assert_same_state(found.state, state)


def test_weights_load_with_any_objects_beside_them(tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    report = widekernel.load_checkpoint(other, _save(tmp_path / "a.pth", {**EXTRAS, "model": model.state_dict()}))
    assert set(report.unused) == set(EXTRAS)
    assert_same_state(other.state_dict(), model.state_dict())


def test_no_class_of_a_file_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes classes that no longer exist."""
    path = _save(tmp_path / "a.pth", {"model": alive("slak_nano").state_dict(), "args": Holder(a=Settings(b=1))})
    monkeypatch.delattr(sys.modules[__name__], "Holder")
    monkeypatch.delattr(sys.modules[__name__], "Settings")
    found = safe_pickle.unpickle(path)["args"]
    assert isinstance(found, safe_pickle.Placeholder)
    assert repr(found) == f"<{__name__}.Holder>"
    assert widekernel.load_checkpoint(create("slak_nano"), path).unused == ("args",)


@pytest.mark.parametrize("name", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_scalars_of_numpy_1_and_2(name: str) -> None:
    """Both names of the module are read, whichever version is installed, or none."""
    assert repr(_read(b"\x80\x02c" + name.encode() + b"\nscalar\n)R.")) == f"<{name}.scalar>"


@pytest.mark.parametrize("kind", [collections.OrderedDict, collections.defaultdict, Settings])
def test_weights_in_any_mapping(kind: Any, tmp_path: Path) -> None:
    model = alive("slak_nano")
    state = kind(list) if kind is collections.defaultdict else kind()
    state.update(model.state_dict())
    for content in (state, {"state_dict": state, "hyper_parameters": Settings(lr=1)}, Settings(model=state)):
        other = create("slak_nano")
        widekernel.load_checkpoint(other, _save(tmp_path / "a.pth", content))
        assert_same_state(other.state_dict(), model.state_dict())


def test_weights_that_are_parameters_with_attributes(tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in model.state_dict().items()}
    state["head.fc.bias"].tag = Holder(a=1)  # type: ignore[union-attr]
    state["head.fc.weight"] = state["head.fc.weight"].detach()
    state["head.fc.weight"].tag = "x"  # type: ignore[union-attr]
    widekernel.load_checkpoint(other, _save(tmp_path / "a.pth", state))
    assert_same_state(other.state_dict(), model.state_dict())


def test_values_among_the_weights(tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    more = {"epoch": np.int64(3), "args": argparse.Namespace(lr=1), "when": datetime.datetime.now(), "out": Path("a")}
    report = widekernel.load_checkpoint(other, _save(tmp_path / "a.pth", {**model.state_dict(), **more}))
    assert set(report.unused) == set(more)
    assert_same_state(other.state_dict(), model.state_dict())


def _complex() -> torch.Tensor:
    return torch.tensor([1 + 1j, 2 + 2j, 3 - 3j])


TENSORS = {
    "negated": lambda: torch.conj(_complex()).imag,
    "conjugate": lambda: _complex().conj(),
    "negated_and_conjugate": lambda: torch._neg_view(_complex().conj()),
    "part": lambda: torch.conj(_complex()).imag[1:],
    "parameter": lambda: nn.Parameter(torch.conj(_complex()).imag),
    "float8": lambda: torch.tensor([1.0, -2.0, 3.0, 4.0]).to(torch.float8_e4m3fn)[1:],
    "unsigned": lambda: torch.tensor([1, 2]).to(torch.uint16),
}


# PyTorch itself cannot read the newest types from old files.
@pytest.mark.parametrize(
    ("kind", "zipped"),
    [(kind, zipped) for kind in TENSORS for zipped in (True, False) if zipped or kind not in ("float8", "unsigned")],
)
def test_tensors_that_are_stored_in_other_ways(kind: str, zipped: bool, tmp_path: Path) -> None:
    saved = TENSORS[kind]().detach()
    found = reader.read_checkpoint(_save(tmp_path / "a.pth", {"x": saved}, zipped=zipped)).state["x"]
    assert found.dtype is saved.dtype
    assert not found.is_neg() and not found.is_conj()
    wide = torch.complex128 if saved.is_complex() else torch.float64
    assert torch.equal(found.to(wide), saved.to(wide).resolve_neg().resolve_conj())


@pytest.mark.parametrize("marks", [{"scaled": True}, {"neg": 2}, {"neg": True, "other": True}, [1]])
def test_unknown_tensor_metadata_is_refused(marks: Any, tmp_path: Path) -> None:
    class Marked:
        def __reduce__(self) -> Any:
            function, arguments = torch.ones(2).__reduce_ex__(2)
            return function, (*arguments, marks)

    path = _save(tmp_path / "a.pth", {"x": Marked()})
    with pytest.raises(CheckpointError, match=r"cannot be read here: it (marks|describes) a tensor .*; save plain tensors"):
        reader.read_checkpoint(path)


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_damage_is_reported_with_any_objects_beside_the_weights(kept: float, zipped: bool, tmp_path: Path) -> None:
    content = {"args": [Holder(a=1), Settings()], "model": {"x": torch.ones(50_000)}}
    path = _save(tmp_path / "a.pth", content, zipped=zipped)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="is damaged, cut off or not a checkpoint"):
        reader.read_checkpoint(path)


# ---- What is refused


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_pickled_networks_are_refused_in_place_of_weights(key: str | None, tmp_path: Path) -> None:
    model = create("slak_nano")
    path = _save(tmp_path / "a.pth", {key: model, "epoch": 3} if key else model)
    message = assert_refused(
        create("slak_nano"), path, r"it was not opened\. \(where weights are looked for, it has a .*SLaK\)"
    )
    assert "torch.save(model.state_dict(), path)" in message


def test_weights_beside_a_whole_network_are_found(tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    path = _save(tmp_path / "a.pth", {"model": create("slak_nano"), "state_dict": model.state_dict()})
    assert widekernel.load_checkpoint(other, path).container == "state_dict"
    assert_same_state(other.state_dict(), model.state_dict())


class _Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


HOSTILE = {
    "system": lambda trace: _Call(os.system, f"touch {trace}"),
    "open": lambda trace: _Call(builtins.open, str(trace), "w"),
    "import": lambda trace: _Call(builtins.__import__, "antigravity"),
    "getattr": lambda trace: _Call(builtins.getattr, (), "count"),
    "operator": lambda trace: _Call(operator.attrgetter("system"), ()),
    "input": lambda trace: _Call(builtins.input),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_functions_that_run_code_are_refused(kind: str, protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    content = {"model": nn.BatchNorm2d(3).state_dict(), "args": [HOSTILE[kind](trace)]}
    with pytest.raises(CheckpointError, match="could run code when loaded; it was not opened"):
        reader.read_checkpoint(_save(tmp_path / "a.pth", content, protocol))
    assert not trace.exists()


@pytest.mark.parametrize("function", [np.save, torch.hub.load, torch.load, safe_pickle.unpickle, torch._dynamo.reset])
def test_functions_of_other_packages_are_not_called(function: Any, tmp_path: Path) -> None:
    """Like classes, they are replaced by placeholders that do nothing when called."""
    content = {"model": nn.BatchNorm2d(3).state_dict(), "args": _Call(function, str(tmp_path / "executed.npy"), 1)}
    assert reader.read_checkpoint(_save(tmp_path / "a.pth", content)).others == ("args",)
    assert not (tmp_path / "executed.npy").exists()


def _read(stream: bytes) -> Any:
    reader = type("Reader", (safe_pickle._Reader,), {"max_protocol": 5})
    return reader(io.BytesIO(stream)).load()


def test_no_attribute_of_resolved_names_can_be_set() -> None:
    before = dict(vars(torch.UntypedStorage))
    state = b"N}U\x07invadedU\x01xs\x86"
    assert _read(b"\x80\x02ctorch.storage\nUntypedStorage\n" + state + b"b.") is torch.UntypedStorage
    assert dict(vars(torch.UntypedStorage)) == before
    assert not hasattr(_read(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b."), "invaded")


def test_registered_objects_are_refused() -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(safe_pickle.RefusedError, match="number 240"):
            _read(b"\x80\x02\x82\xf0.")
    finally:
        copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize("kind", [b"module", "other", None, ("module",), "whole"])
def test_unknown_persistent_ids_are_refused(kind: Any) -> None:
    """PyTorch itself would compare the source of a class with the one in the file, and write a patch file."""
    given: list[Any] = []
    reader = type("Reader", (safe_pickle._Reader,), {"max_protocol": 5})(io.BytesIO())
    reader.persistent_load = given.append
    error = safe_pickle.UnreadableError if kind == "whole" else safe_pickle.RefusedError
    with pytest.raises(error, match="outside of the pickle"):
        reader.persistent_load("module" if kind == "whole" else (kind, nn.Linear, "a.py", "source"))
    assert reader.persistent_load(("module", nn.Linear, "a.py", "source")) is nn.Linear
    assert given == []
    reader.persistent_load(("storage", 1))
    assert given == [("storage", 1)]


def test_only_tensor_builders_are_called() -> None:
    stream = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c__main__\nmake\nc__main__\nKind\n)}tR."
    with pytest.raises(safe_pickle.RefusedError, match="where a tensor is rebuilt"):
        _read(stream)


def test_archives_of_other_kinds_are_refused(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "script.pth"))
    assert_refused(
        create("slak_nano"), tmp_path / "script.pth", r"not a checkpoint \(a TorchScript archive\); nothing in it was run"
    )
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert_refused(create("slak_nano"), tmp_path / "old.pth", r"not a checkpoint \(a tar archive\); nothing in it was run")


def test_weights_only_loading_can_be_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    plain = _save(tmp_path / "a.pth", {"model": alive("slak_nano").state_dict(), "epoch": 3})
    assert reader.read_checkpoint(plain).others == ("epoch",)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        reader.read_checkpoint(_save(tmp_path / "b.pth", {"model": alive("slak_nano").state_dict(), "args": Holder()}))


def test_pickles_of_a_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps(create("slak_nano"), protocol=2))
    assert_refused(create("slak_nano"), tmp_path / "a.pth", "could run code when loaded; it was not opened")
