"""Damaged, mixed up and hostile training states.

    python -m pytest -m "slow or not slow" -s -n 0 tests/faults/test_damage.py

prints how many were detected.
"""

from __future__ import annotations

import functools
import io
import pickle
import random
import resource
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from widekernel.engine.checkpoint import CheckpointStore
from widekernel.errors import CheckpointError
from widekernel.files import sha256_of

OLD, NEW = "step-00000008.pt", "step-00000016.pt"


def state(value: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(value)
    weights = {f"layer.{number}": torch.randn(1500, generator=generator) for number in range(8)}
    return {"model": weights, "progress": {"step": value, "names": {"a"}}}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "checkpoints"
    store = CheckpointStore(folder)
    for step in (8, 16):
        assert store.save_now(state(step), step, None)
    return folder


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def clear(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(0, len(content), 4096)
    return content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]


def extend(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.randrange(1, 5000))


def exchange(content: bytes, draw: random.Random) -> bytes:
    first, second = draw.sample(range(len(content) // 4096), 2)
    pages = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    pages[first], pages[second] = pages[second], pages[first]
    return b"".join(pages)


def damage_digest(folder: Path, draw: random.Random) -> None:
    path = folder / f"{NEW}.sha256"
    content = bytearray(path.read_bytes())
    content[draw.randrange(64)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def mix_up(folder: Path, draw: random.Random) -> None:
    """Put one or both files of the older state in the place of the newer, or remove the digest."""
    copied = draw.choice([[""], [".sha256"], ["", ".sha256"], []])
    for end in copied:
        shutil.copy(folder / f"{OLD}{end}", folder / f"{NEW}{end}")
    if not copied:
        (folder / f"{NEW}.sha256").unlink()


def in_content(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        path = folder / NEW
        content = path.read_bytes()
        changed = content
        while changed == content:
            changed = change(content, draw)
        path.write_bytes(changed)

    return damage


KINDS = [*(in_content(change) for change in (flip, flip, cut, clear, extend, exchange)), damage_digest, mix_up]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_damage_is_detected_and_the_previous_state_used(count: int, intact: Path, tmp_path: Path) -> None:
    detected = 0
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(intact, folder)
        KINDS[number % len(KINDS)](folder, random.Random(number))
        messages: list[str] = []
        found = CheckpointStore(folder, report=messages.append).load_latest(resume=True)
        assert found is not None
        same = all(torch.equal(found["model"][name], value) for name, value in state(8)["model"].items())
        detected += found["header"]["step"] == 8 and same and len(messages) == 1 and NEW in messages[0]
        shutil.rmtree(folder)
    print(f"\n{detected} of {count} damaged states were detected, and the previous state was used")
    assert detected == count


# -- hostile files ---------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments

    def __reduce__(self) -> Any:
        return Named(self.module, self.name), self.arguments


class Named:
    """Pickles as the name of a function, and can be called so that `pickle` accepts it."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None: ...


class Pickler(pickle._Pickler):
    def save(self, thing: Any, *rest: Any, **options: Any) -> None:
        if isinstance(thing, Named):
            self.write(b"c" + f"{thing.module}\n{thing.name}\n".encode())
        else:
            super().save(thing, *rest, **options)


def pickled(thing: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(thing)
    return file.getvalue()


def wrapped(thing: Any) -> dict[str, Any]:
    return {"format": 2, "header": {"step": 16}, "model": {"w": thing}}


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """Return an archive like those of `torch.save`, with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        everything = {"data.pkl": content, "version": b"3\n", "byteorder": b"little", "data/0": bytes(64), **records}
        for name, record in everything.items():
            archive.writestr(f"archive/{name}", record)
    return file.getvalue()


def torch_file(thing: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def calls(canary: str) -> dict[str, Call]:
    """Return calls each of which creates the file `canary`, or would let the process hang or end."""
    code = f"open({canary!r}, 'w')"
    return {
        "os.system": Call("os", "system", f"touch {canary}"),
        "posix.mkdir": Call("posix", "mkdir", canary),
        "subprocess": Call("subprocess", "check_output", ["touch", canary]),
        "eval": Call("builtins", "eval", code),
        "exec": Call("builtins", "exec", code),
        "exec of Python 2": Call("__builtin__", "exec", code),
        "open": Call("builtins", "open", canary, "w"),
        "io.open": Call("io", "open", canary, "w"),
        "import": Call("builtins", "__import__", "antigravity"),
        "importlib": Call("importlib", "import_module", "this"),
        "runpy": Call("runpy", "run_path", canary),
        "timeit": Call("timeit", "timeit", code, "pass"),
        "profile": Call("cProfile", "run", code),
        "getattr": Call("builtins", "getattr", Call("builtins", "__import__", "os"), "system"),
        "partial": Call("functools", "partial", Named("os", "system"), f"touch {canary}"),
        "attrgetter": Call("operator", "attrgetter", "system"),
        "map": Call("builtins", "list", Call("builtins", "map", Named("os", "system"), [f"touch {canary}"])),
        "ctypes": Call("ctypes", "CDLL", canary),
        "exit": Call("os", "_exit", 0),
        "kill": Call("os", "kill", 0, 9),
        "sleep": Call("time", "sleep", 100),
        "torch.load": Call("torch", "load", canary),
        "torch.hub": Call("torch.hub", "load", canary, "x"),
        "torch.ops": Call("torch.ops", "load_library", canary),
        "cpp_extension": Call("torch.utils.cpp_extension", "load_inline", "x", code),
        "rmtree": Call("shutil", "rmtree", canary),
    }


@functools.cache
def bomb() -> bytes:
    return zipped(pickled(wrapped(1)), zipfile.ZIP_DEFLATED, **{"data/1": bytes(3 * 10**8)})


def hostile(canary: str, large: Callable[[], bytes] = bomb) -> dict[str, bytes]:
    """Return files that must not run anything, take long or take much memory."""
    storage = ("storage", torch.FloatStorage, "0", "cpu", 16)

    class WithStorage(Pickler):
        numel = 16

        def persistent_id(self, thing: Any) -> Any:
            return (*storage[:4], self.numel) if thing is storage else None

    def tensor(size: tuple, stride: tuple, numel: int = 16) -> bytes:
        file = io.BytesIO()
        pickler = WithStorage(file, protocol=2)
        pickler.numel = numel
        rebuild = Call("torch._utils", "_rebuild_tensor_v2", storage, 0, size, stride, False, {})
        pickler.dump(wrapped(rebuild))
        return zipped(file.getvalue())

    found = {f"zip, {name}": zipped(pickled(wrapped(call))) for name, call in calls(canary).items()}
    found |= {f"bare, {name}": pickled(wrapped(call)) for name, call in list(calls(canary).items())[:3]}
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    deep: Any = 1
    for _ in range(3000):
        deep = b"]" + (deep if isinstance(deep, bytes) else b"K\x01") + b"a"
    return found | {
        "a tensor of 1e12 elements over 16": tensor((10**12,), (0,)),
        "a tensor of 1e12 elements": tensor((10**12,), (1,)),
        "a storage of 1e12 elements": tensor((10**12,), (1,), 10**12),
        "a negative size": tensor((-4,), (1,)),
        "a tensor that is larger than its storage": tensor((17,), (1,)),
        "a buffer of 1e12 bytes": zipped(pickled(wrapped(Call("builtins", "bytearray", 10**12)))),
        "a storage made of a number": zipped(pickled(wrapped(Call("torch.storage", "UntypedStorage", 10**12)))),
        "a bomb": large(),
        "a code archive": zipped(pickled(wrapped(1)), **{"constants.pkl": pickled(())}),
        "a tar file": tar.getvalue(),
        "3000 nested lists": zipped(b"\x80\x02" + deep + b"."),
        "a list": torch_file([1]),
        "no header": torch_file({"format": 2, "model": {}}),
        "a header of another kind": torch_file({"format": 2, "header": [16]}),
        "the format of the future": torch_file({"format": 3, "header": {"step": 16}}),
        "foreign keys": torch_file({"state_dict": {"w": torch.ones(2)}, "epoch": 3}),
        "a module": torch_file(wrapped(nn.Linear(2, 2))),
        "a sparse tensor": torch_file(wrapped(torch.ones(1).to_sparse())),
        "NaN weights": torch_file(wrapped(torch.tensor([float("nan")]))),
        "text": b"hello" * 100,
    }


NAMES = list(hostile("canary", bytes))  # compressing a large file takes a second


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    canary = tmp_path_factory.mktemp("harm") / "canary"
    return canary, hostile(str(canary))


def put(folder: Path, content: bytes) -> None:
    """Put a file in the place of the newest state, with its digest."""
    path = folder / NEW
    path.write_bytes(content)
    (folder / f"{NEW}.sha256").write_text(f"{sha256_of(path)}  {NEW}\n")


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_hostile_states(name: str, files: tuple[Path, dict[str, bytes]], intact: Path, tmp_path: Path) -> None:
    canary, contents = files
    folder = tmp_path / "checkpoints"
    shutil.copytree(intact, folder)
    put(folder, contents[name])
    before, start = peak_memory(), time.monotonic()
    messages: list[str] = []
    found = CheckpointStore(folder, report=messages.append).load_latest(resume=True)
    if name != "NaN weights":
        with pytest.raises(CheckpointError, match=NEW):
            CheckpointStore(folder).load_step(16)
    assert time.monotonic() - start < 2
    assert peak_memory() - before < 200e6
    assert found is not None and found["header"]["step"] == 8
    assert len(messages) == 1 and NEW in messages[0] and len(messages[0]) < 600
    assert not canary.exists()


def test_the_payloads_would_do_harm(files: tuple[Path, dict[str, bytes]]) -> None:
    """Where pickles are trusted, the same files run code."""
    canary, contents = files
    for name in ("zip, os.system", "zip, posix.mkdir", "zip, exec", "zip, io.open"):
        torch.load(io.BytesIO(contents[name]), weights_only=False)
        assert canary.exists()
        canary.rmdir() if canary.is_dir() else canary.unlink()
