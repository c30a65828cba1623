"""Fetching published checkpoints: the cache, the digests, the order of the sources, and what the errors say."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.weights.conftest import file_bytes, url
from tests.weights.server import Server, cut, page, slow, status
from widekernel.errors import CheckpointError, FetchError, WidekernelError
from widekernel.weights import Listener, Source, cached_file, fetch, find_checkpoint
from widekernel.weights.store import cache_folder

NAME = "replknet_31b.in1k_224"
Publish = Callable[..., object]


class Events(Listener):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def start(self, place: str) -> None:
        self.seen.append(f"start {place}")

    def failed(self, place: str, reason: str) -> None:
        self.seen.append(f"failed {place}: {reason}")

    def wait(self, lock: str) -> None:
        self.seen.append(f"wait {Path(lock).name}")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def record(cache: Path) -> dict:
    return json.loads((cache / f"{NAME}.json").read_text())


def test_a_file_is_fetched_once(server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server))
    assert cached_file(NAME) is None
    path = fetch(NAME)
    assert path == cache / f"{NAME}.pth" == cached_file(NAME)
    assert path.read_bytes() == server.content
    assert record(cache) == {
        "file": path.name,
        "bytes": len(server.content),
        "source": f"{server.url}/file.pth",
        "sha256": {f"{server.url}/file.pth": digest(server.content)},
    }
    assert fetch(NAME) == path
    assert len(server.requests) == 1
    assert not list(cache.glob("*.part*"))


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "weights"
    monkeypatch.delenv("WIDEKERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "widekernel" / "weights"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / "home" / ".cache" / "widekernel" / "weights"


def test_another_folder(server: Server, publish: Publish, tmp_path: Path) -> None:
    publish(url(server))
    assert fetch(NAME, folder=tmp_path / "elsewhere") == tmp_path / "elsewhere" / f"{NAME}.pth"


def test_a_changed_file_is_refused(server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server))
    path = fetch(NAME)
    path.write_bytes(file_bytes() + b"!")
    with pytest.raises(FetchError, match=rf"{path} has changed since .*digest was {digest(server.content)} and is"):
        fetch(NAME)
    path.unlink()
    assert fetch(NAME).read_bytes() == server.content


def test_a_file_that_was_replaced_at_its_source_is_refused(server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server))
    fetch(NAME).unlink()
    first, server.content = digest(server.content), server.content + b"x"
    with pytest.raises(FetchError, match=rf"was {first} when it was fetched before.* Remove .*\.json to accept it"):
        fetch(NAME)
    assert cached_file(NAME) is None
    (cache / f"{NAME}.json").unlink()
    assert fetch(NAME).read_bytes() == server.content


def test_a_file_that_was_put_there_by_hand(server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server), Source("by_hand", url="https://pan.example/s/1"))
    server.always = status(404)
    with pytest.raises(FetchError) as caught:
        fetch(NAME)
    said = re.search(r"save it as (\S+)", str(caught.value))
    assert said is not None
    Path(said[1]).write_bytes(file_bytes())
    server.requests.clear()
    assert fetch(NAME) == Path(said[1])
    assert record(cache)["source"] == "by hand"
    assert server.requests == []
    Path(said[1]).write_bytes(b"another")
    with pytest.raises(FetchError, match="has changed since it was first used"):
        fetch(NAME)


def test_errors_name_every_source_and_the_way_by_hand(server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server, "/a.pth"), url(server, "/b.pth"), Source("by_hand", url="https://pan.example/s/1"))
    server.plan = [status(404), page()]
    events = Events()
    with pytest.raises(FetchError) as caught:
        fetch(NAME, listener=events)
    assert str(caught.value).splitlines() == [
        f"{NAME} cannot be fetched:",
        f"  {server.url}/a.pth: the server answers 404 Not Found",
        f"  {server.url}/b.pth: a web page came instead of the file",
        f"Fetch it by hand from {server.url}/a.pth or {server.url}/b.pth or https://pan.example/s/1 and save it as "
        f"{cache / NAME}.pth (WIDEKERNEL_CACHE moves this folder)",
    ]
    assert [event.split()[0] for event in events.seen] == ["start", "failed", "start", "failed"]
    assert isinstance(caught.value, WidekernelError) and isinstance(caught.value, OSError)


def test_the_next_source_is_tried(server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server, "/a.pth"), url(server, "/b.pth"))
    server.plan = [page()]
    fetch(NAME)
    assert record(cache)["source"] == f"{server.url}/b.pth"


def test_an_interrupted_download_is_continued(server: Server, publish: Publish) -> None:
    publish(url(server))
    server.plan = [cut(1000), *[status(503)] * 3]
    with pytest.raises(FetchError, match="503"):
        fetch(NAME)
    server.requests.clear()
    assert fetch(NAME).read_bytes() == server.content
    assert server.asked() == ["bytes=1000-"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>quota</html>", r"a web page \(HTML or XML\) came instead of the checkpoint"),
        (b"", "an empty file came instead"),
        (b'{"error": "quota"}', "text that starts with"),
        (file_bytes()[:5000], "the file is cut off"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    content: bytes, message: str, server: Server, publish: Publish, cache: Path
) -> None:
    """Even if the server calls it one."""
    publish(url(server))
    server.content, good = content, server.content
    with pytest.raises(FetchError, match=message):
        fetch(NAME)
    assert cached_file(NAME) is None
    server.content = good
    assert fetch(NAME).read_bytes() == good


def test_a_published_digest_is_compared(server: Server, publish: Publish) -> None:
    publish(url(server, sha256="0123abcd"))
    with pytest.raises(FetchError, match=f"digest is {digest(server.content)}, but the publisher says 0123abcd…"):
        fetch(NAME)
    publish(url(server, sha256=digest(server.content)[:8]))
    fetch(NAME)


@pytest.mark.parametrize("variable", ["WIDEKERNEL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(variable: str, server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    publish(url(server))
    monkeypatch.setenv(variable, "1")
    message = rf"{NAME} is not in {cache}, and {variable}=1 forbids downloads. Fetch it by hand from {server.url}"
    with pytest.raises(FetchError, match=message):
        fetch(NAME)
    assert server.requests == [] and not cache.exists()
    monkeypatch.setenv(variable, "0")
    path = fetch(NAME)
    monkeypatch.setenv(variable, "TRUE")
    assert fetch(NAME) == path


def test_names() -> None:
    with pytest.raises(
        CheckpointError, match=r"no published checkpoint 'slak_tiny.in1k'\. Did you mean 'slak_tiny.in1k_224'"
    ):
        find_checkpoint("slak_tiny.in1k")
    with pytest.raises(CheckpointError, match=r"'slak_base' has several published checkpoints: .* slak_base.in1k_224"):
        find_checkpoint("slak_base")


def test_without_a_link(cache: Path) -> None:
    with pytest.raises(FetchError, match=r"published no link for it: see https://github.com/VITA-Group/SLaK"):
        fetch("slak_tiny.in1k_ft_coco_cascade_3x")


@pytest.mark.parametrize("content", ["{", "[]", '{"sha256": 1}'])
def test_damaged_records(content: str, server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server))
    fetch(NAME)
    (cache / f"{NAME}.json").write_text(content)
    with pytest.raises(FetchError, match=r"which holds digests, (is damaged|cannot be read .*): remove it"):
        fetch(NAME)
    (cache / f"{NAME}.json").unlink()
    fetch(NAME)


def test_a_cache_that_cannot_be_written(server: Server, publish: Publish, tmp_path: Path) -> None:
    publish(url(server))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(WidekernelError, match="cannot be written"):
        fetch(NAME)


def test_waiting_for_another_process(server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server))
    cache.mkdir(parents=True)
    code = f"""
import sys, time
from filelock import FileLock
with FileLock({str(cache / NAME) + ".lock"!r}):
    print("held", flush=True)
    time.sleep(0.4)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        events = Events()
        fetch(NAME, listener=events)
        assert other.wait() == 0
    assert events.seen == [f"wait {NAME}.lock", "start 127.0.0.1"]


def test_the_lock_is_released(server: Server, publish: Publish, cache: Path) -> None:
    publish(url(server))
    server.always = status(404)
    with pytest.raises(FetchError):
        fetch(NAME)
    with FileLock(cache / f"{NAME}.lock", timeout=0):
        pass


PROGRAM = """
import widekernel_command  # so that importing the package does not import PyTorch
import dataclasses, sys
from types import MappingProxyType
from widekernel.weights import Source, catalog, fetch, find_checkpoint

checkpoint = dataclasses.replace(find_checkpoint({name!r}), sources=(Source("url", url={url!r}),))
catalog._catalog = lambda: MappingProxyType({{{name!r}: checkpoint}})
print(fetch({name!r}))
"""


def program(server: Server) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(name=NAME, url=f"{server.url}/file.pth")]


def test_processes_fetch_once_between_them(server: Server, cache: Path) -> None:
    server.always = slow(pieces=8, pause=0.05)
    running = [
        subprocess.Popen(program(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    done = [process.communicate(timeout=100) for process in running]
    assert [out for out, _ in done] == [f"{cache / NAME}.pth\n"] * 3, done
    assert len(server.requests) == 1
    assert (cache / f"{NAME}.pth").read_bytes() == server.content


def test_a_killed_process_leaves_what_the_next_continues(server: Server, cache: Path) -> None:
    server.content = file_bytes() * 40
    server.plan = [slow(pieces=400, pause=0.05)]
    process = subprocess.Popen(program(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = cache / f"{NAME}.url.part"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert partial.exists() and not (cache / f"{NAME}.pth").exists()
    assert subprocess.run(program(server), capture_output=True, text=True).stdout == f"{cache / NAME}.pth\n"
    assert re.fullmatch(r"bytes=[1-9]\d*-", server.asked()[-1] or "")
    assert (cache / f"{NAME}.pth").read_bytes() == server.content
