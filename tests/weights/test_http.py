"""Downloads from a server that misbehaves: complete and right, or an error that says why not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.weights.server import (
    Server,
    announcing,
    cut,
    page,
    replaced,
    reset,
    running,
    slow,
    stall,
    status,
    whole,
    without_length,
)
from widekernel.errors import FetchError, WidekernelError
from widekernel.weights import Listener
from widekernel.weights.http import Patience, download

QUICK = Patience(tries=3, pause=0.0, timeout=0.5)


class Steps(Listener):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None]] = []

    def advance(self, done: int, total: int | None) -> None:
        self.seen.append((done, total))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "file.part"


def get(server: Server, target: Path, patience: Patience = QUICK) -> list[tuple[int, int | None]]:
    steps = Steps()
    download(f"{server.url}/file.pth", target, steps, patience)
    return steps.seen


def assert_whole(server: Server, target: Path) -> None:
    assert target.read_bytes() == server.content
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_good_server(server: Server, target: Path) -> None:
    seen = get(server, target)
    assert_whole(server, target)
    assert server.asked() == [None]
    assert seen[-1] == (len(server.content), len(server.content))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("break_off", [cut, reset])
def test_a_cut_connection_is_continued(break_off: Callable, server: Server, target: Path) -> None:
    server.plan = [break_off(1000), break_off(5000)]
    get(server, target)
    assert_whole(server, target)
    first, second, third = server.asked()
    assert first is None
    assert (second, third) == ("bytes=1000-", "bytes=6000-") or break_off is reset


def test_another_process_continues(server: Server, target: Path) -> None:
    server.plan = [cut(1000), status(503), status(503)]
    with pytest.raises(FetchError, match="the server answers 503 Service Unavailable, 3 times in a row"):
        get(server, target)
    assert target.stat().st_size == 1000
    server.requests.clear()
    get(server, target)
    assert server.asked() == ["bytes=1000-"]
    assert_whole(server, target)


def test_without_ranges_it_starts_again(server: Server, target: Path) -> None:
    server.ranges = False
    server.plan = [cut(1000)]
    get(server, target)
    assert_whole(server, target)
    assert server.asked() == [None, "bytes=1000-"]


def test_without_a_version_nothing_is_continued(server: Server, target: Path) -> None:
    server.etag = None
    server.plan = [cut(1000)]
    get(server, target)
    assert server.asked() == [None, None]
    assert_whole(server, target)


def test_a_replaced_file_is_not_joined_to_the_old_one(server: Server, target: Path) -> None:
    server.plan = [cut(1000), replaced(bytes(5000), '"second"')]
    get(server, target)
    assert_whole(server, target)
    assert server.content == bytes(5000)


def test_a_server_that_ignores_the_version(server: Server, target: Path) -> None:
    """It sends a part of a longer file although the version has changed: the size gives it away."""

    def other(handler) -> None:
        handler.state.content += b"more"
        handler.headers.replace_header("If-Range", handler.state.etag)
        whole(handler)

    server.plan = [cut(1000), other]
    get(server, target)
    assert_whole(server, target)
    assert server.asked() == [None, "bytes=1000-", None]


def test_a_part_at_another_place_is_not_used(server: Server, target: Path) -> None:
    def elsewhere(handler) -> None:
        handler.headers.replace_header("Range", "bytes=500-")
        whole(handler)

    server.plan = [cut(1000), elsewhere]
    get(server, target)
    assert_whole(server, target)


def test_a_wrong_size(server: Server, target: Path) -> None:
    server.always = announcing(7)
    with pytest.raises(FetchError, match=r"shorter than announced|was cut after \d+ of \d+ bytes"):
        get(server, target)
    assert len(server.requests) == QUICK.tries


def test_a_wrong_size_once(server: Server, target: Path) -> None:
    server.plan = [announcing(7)]
    get(server, target)
    assert_whole(server, target)


def test_a_length_that_is_not_announced(server: Server, target: Path) -> None:
    server.plan = [without_length]
    seen = get(server, target)
    assert_whole(server, target)
    assert seen[-1] == (len(server.content), None)


def test_the_file_is_complete_already(server: Server, target: Path) -> None:
    """A process ended between the last byte and the removal of the notes."""
    target.write_bytes(server.content)
    notes = {"url": f"{server.url}/file.pth", "validator": server.etag, "total": len(server.content)}
    Path(f"{target}.json").write_text(json.dumps(notes))
    get(server, target)
    assert_whole(server, target)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "notes", ["", "{", "[]", '{"url": 1}', '{"url": "http://elsewhere/", "validator": "x", "total": 9}']
)
def test_damaged_notes_are_not_believed(notes: str, server: Server, target: Path) -> None:
    target.write_bytes(b"of another file")
    Path(f"{target}.json").write_text(notes)
    get(server, target)
    assert_whole(server, target)
    assert server.asked() == [None]


def test_a_slow_server(server: Server, target: Path) -> None:
    """Each pause is shorter than the timeout, all together are not."""
    server.plan = [slow(pieces=6, pause=0.1)]
    seen = get(server, target, Patience(tries=1, timeout=0.4))
    assert_whole(server, target)
    assert len(seen) >= 6


def test_a_server_that_stalls(server: Server, target: Path) -> None:
    server.plan = [stall(3000, seconds=0.8)]
    get(server, target, Patience(tries=2, pause=0.0, timeout=0.3))
    assert_whole(server, target)
    assert server.asked() == [None, "bytes=3000-"]


def test_a_server_that_always_stalls(server: Server, target: Path) -> None:
    server.always = stall(0, seconds=0.5)
    with pytest.raises(FetchError, match="the server sends nothing, 2 times in a row"):
        get(server, target, Patience(tries=2, pause=0.0, timeout=0.2))


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_final_answers_are_not_repeated(code: int, server: Server, target: Path) -> None:
    server.always = status(code)
    with pytest.raises(FetchError, match=f"the server answers {code}"):
        get(server, target)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_passing_answers_are(code: int, server: Server, target: Path) -> None:
    server.plan = [status(code), status(code)]
    get(server, target)
    assert_whole(server, target)


def test_a_web_page(server: Server, target: Path) -> None:
    server.always = page()
    with pytest.raises(FetchError, match="a web page came instead of the file"):
        get(server, target)
    assert len(server.requests) == 1
    assert not target.exists()


def test_a_web_page_leaves_what_was_there(server: Server, target: Path) -> None:
    server.plan = [cut(1000), page()]
    with pytest.raises(FetchError, match="web page"):
        get(server, target)
    get(server, target)
    assert_whole(server, target)
    assert server.asked()[-1] == "bytes=1000-"


def test_no_server(target: Path) -> None:
    with running(b"") as gone:
        pass
    with pytest.raises(FetchError, match=r"no connection .*refused.*, 3 times in a row"):
        get(gone, target)


def test_a_folder_that_cannot_be_written_is_not_repeated(server: Server, tmp_path: Path) -> None:
    for etag in ('"first"', None):
        server.requests.clear()
        server.etag = etag
        with pytest.raises(WidekernelError, match="cannot be written: No such file or directory"):
            get(server, tmp_path / "missing" / "file.part")
        assert len(server.requests) == 1


def test_no_such_host_is_not_repeated(target: Path) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError, match="no network, or no such host"):
        download("http://host.invalid/file.pth", target, Listener(), Patience(tries=3, pause=10.0))
    assert time.monotonic() - started < 9
