"""Downloads from Google Drive and Hugging Face; their requests are sent to a server on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save

from tests.weights.conftest import file_bytes
from tests.weights.server import Handler, Server, status
from widekernel.errors import FetchError
from widekernel.weights import Listener, Source, fetch, google_drive

NAME = "slak_tiny.in1k_224"
QUOTA = b"""<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body></html>"""
CONFIRM = (
    b'<!DOCTYPE html>\n<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    b'<input type="hidden" name="id" value="123"><input type="hidden" name="confirm" value="t"></form>'
)


class Steps(Listener):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None]] = []

    def advance(self, done: int, total: int | None) -> None:
        self.seen.append((done, total))


def html(text: bytes) -> Callable[[Handler], None]:
    def behave(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html; charset=utf-8")
        handler.announce(len(text))
        handler.wfile.write(text)

    return behave


def attachment(after: int | None = None) -> Callable[[Handler], None]:
    """Send the file as Google Drive does; cut it off after some bytes."""

    def behave(handler: Handler) -> None:
        body, length = handler.start()
        handler.send_header("Content-Disposition", 'attachment; filename="weights.pth"')
        handler.announce(length)
        handler.wfile.write(body[:after])

    return behave


@pytest.fixture
def drive(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Send every request to a host of Google to the server."""
    pytest.importorskip("gdown")
    import requests

    send = requests.adapters.HTTPAdapter.send

    def redirected(self: Any, request: Any, **kwargs: Any) -> Any:
        asked = urlsplit(request.url)
        assert asked.hostname in ("drive.google.com", "drive.usercontent.google.com")
        request.url = f"{server.url}{asked.path}?{asked.query}"
        return send(self, request, **kwargs)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", redirected)
    monkeypatch.setattr(google_drive, "_RETRIES", 0)
    server.always = attachment()
    return server


def paths(server: Server) -> list[str]:
    return [path for path, _ in server.requests]


def from_drive(publish: Any, listener: Listener | None = None) -> Path:
    publish(Source("google_drive", id="123"), like=NAME)
    return fetch(NAME, listener=listener)


def test_a_small_file_on_google_drive(drive: Server, publish: Any, capfd: pytest.CaptureFixture) -> None:
    steps = Steps()
    path = from_drive(publish, steps)
    assert path.read_bytes() == drive.content
    assert steps.seen[-1] == (len(drive.content), len(drive.content))
    assert paths(drive) == ["/uc?id=123"]
    assert capfd.readouterr() == ("", "")
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".json", ".lock", ".pth"]


def test_a_large_file_on_google_drive(drive: Server, publish: Any) -> None:
    """Google Drive first asks to confirm that the file was not scanned for viruses."""
    drive.plan = [html(CONFIRM)]
    assert from_drive(publish).read_bytes() == drive.content
    assert paths(drive) == ["/uc?id=123", "/download?id=123&confirm=t"]


def test_the_quota_of_google_drive(drive: Server, publish: Any, cache: Path) -> None:
    drive.always = html(QUOTA)
    with pytest.raises(FetchError) as caught:
        from_drive(publish)
    text = str(caught.value)
    link = "https://drive.google.com/file/d/123/view"
    assert f"  {link}: a page came instead of the file (Too many users have viewed or downloaded this file recent" in text
    assert f"Fetch it by hand from {link} and save it as {cache / NAME}.pth" in text
    assert not list(cache.glob("*.pth"))


@pytest.mark.parametrize("code", [404, 500])
def test_errors_of_google_drive(code: int, drive: Server, publish: Any) -> None:
    drive.always = status(code)
    with pytest.raises(FetchError, match=rf"/view: .*(HTTPError: {code}|Content-Type|content-type|page came)"):
        from_drive(publish)


def test_a_download_from_google_drive_is_continued(drive: Server, publish: Any) -> None:
    drive.content, drive.always = file_bytes() * 20, attachment(600_000)
    with pytest.raises(FetchError, match="incomplete: received 524288 bytes"):
        from_drive(publish)
    drive.always = attachment()
    drive.requests.clear()
    assert from_drive(publish).read_bytes() == drive.content
    assert "bytes=524288-" in drive.asked()


def test_a_partial_file_that_cannot_be_continued_is_dropped(drive: Server, publish: Any, cache: Path) -> None:
    drive.content, drive.always = file_bytes() * 20, attachment(600_000)
    with pytest.raises(FetchError, match="incomplete"):
        from_drive(publish)
    drive.content, drive.etag, drive.always = drive.content + b"new", '"second"', attachment()
    drive.ranges = False
    assert from_drive(publish).read_bytes() == drive.content
    assert not list(cache.glob("*.part*"))


def test_several_partial_files_are_dropped(drive: Server, publish: Any, cache: Path) -> None:
    cache.mkdir(parents=True)
    for middle in ("12345678", "abcdefgh"):
        (cache / f"{NAME}.google_drive.part{middle}.part").write_bytes(b"x")
    assert from_drive(publish).read_bytes() == drive.content
    assert not list(cache.glob("*.part*"))


def test_no_connection_to_google_drive(publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gdown")
    import requests

    def refuse(*_: Any, **__: Any) -> None:
        raise requests.exceptions.ConnectionError("HTTPSConnectionPool: Max retries exceeded")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse)
    for retries in (0, 1):
        monkeypatch.setattr(google_drive, "_RETRIES", retries)
        with pytest.raises(FetchError, match="view: no connection\n"):
            from_drive(publish)


def test_gdown_is_missing(publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(FetchError, match=r"gdown is not installed: pip install 'widekernel\[weights\]'"):
        from_drive(publish)


def test_a_file_on_hugging_face(server: Server, publish: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(Source("huggingface", repo="someone/nets", file="model.safetensors"), like=NAME)
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    server.content = save({"head.weight": torch.arange(9.0)})
    path = fetch(NAME)
    assert path == cache / f"{NAME}.safetensors"
    assert path.read_bytes() == server.content
    assert paths(server) == ["/someone/nets/resolve/main/model.safetensors"]


def test_the_way_by_hand_to_hugging_face(publish: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(Source("huggingface", repo="someone/nets", file="model.safetensors"), like=NAME)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    link = "https://huggingface.co/someone/nets/resolve/main/model.safetensors"
    with pytest.raises(FetchError, match=f"by hand from {link} and save it as {cache / NAME}.safetensors"):
        fetch(NAME)
