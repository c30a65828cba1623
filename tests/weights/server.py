"""A file server on this machine that misbehaves as told."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behavior = Callable[["Handler"], None]
PAGE = b"<!DOCTYPE html><html><body>Too many users have viewed this file recently.</body></html>"


@dataclass
class Server:
    """What the server serves, how, and which requests it got.

    `plan` lists what it does with the next requests; after that, it serves the file properly.
    """

    content: bytes
    url: str = ""
    etag: str | None = '"first"'
    ranges: bool = True
    plan: list[Behavior] = field(default_factory=list)
    always: Behavior | None = None
    requests: list[Any] = field(default_factory=list)

    def asked(self) -> list[str | None]:
        """Return the range that each request asked for."""
        return [headers.get("Range") for _, headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    @property
    def state(self) -> Server:
        return self.server.state

    def do_GET(self) -> None:
        state = self.state
        state.requests.append((self.path, self.headers))
        behavior = state.plan.pop(0) if state.plan else state.always or whole
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            behavior(self)
        self.close_connection = True

    def start(self) -> tuple[bytes, int]:
        """Send status and headers of the file, or of the part that was asked for; return the body and its length.

        The length is -1 if nothing is left to send.
        """
        state = self.state
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, state.etag)
        first = int(match[1]) if match and state.ranges and same else 0
        if first and first >= len(state.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(state.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b"", -1
        body = state.content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(state.content) - 1}/{len(state.content)}")
        self.send_header("Content-Type", "application/octet-stream")
        if state.etag:
            self.send_header("ETag", state.etag)
        return body, len(body)

    def announce(self, length: int | None) -> None:
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def whole(handler: Handler) -> None:
    body, length = handler.start()
    if length >= 0:
        handler.announce(length)
        handler.wfile.write(body)


def cut(after: int) -> Behavior:
    """Announce everything, send `after` bytes and close the connection."""

    def behave(handler: Handler) -> None:
        body, length = handler.start()
        if length >= 0:
            handler.announce(length)
            handler.wfile.write(body[:after])

    return behave


def reset(after: int) -> Behavior:
    """Announce everything, send `after` bytes and reset the connection."""

    def behave(handler: Handler) -> None:
        cut(after)(handler)
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        handler.connection.close()

    return behave


def announcing(extra: int) -> Behavior:
    """Announce more bytes than there are."""

    def behave(handler: Handler) -> None:
        body, length = handler.start()
        if length >= 0:
            handler.announce(length + extra)
            handler.wfile.write(body)

    return behave


def without_length(handler: Handler) -> None:
    body, _ = handler.start()
    handler.announce(None)
    handler.wfile.write(body)


def slow(pieces: int, pause: float) -> Behavior:
    def behave(handler: Handler) -> None:
        body, length = handler.start()
        handler.announce(length)
        step = -(-length // pieces)
        for start in range(0, length, step):
            handler.wfile.write(body[start : start + step])
            handler.wfile.flush()
            time.sleep(pause)

    return behave


def stall(after: int, seconds: float) -> Behavior:
    """Send `after` bytes and then nothing for some time."""

    def behave(handler: Handler) -> None:
        body, length = handler.start()
        handler.announce(length)
        handler.wfile.write(body[:after])
        handler.wfile.flush()
        time.sleep(seconds)

    return behave


def status(code: int) -> Behavior:
    def behave(handler: Handler) -> None:
        handler.send_response(code)
        handler.announce(0)

    return behave


def page(kind: str = "text/html; charset=utf-8") -> Behavior:
    """Send a web page with status 200, as hosts do at the end of a quota or for a login."""

    def behave(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.announce(len(PAGE))
        handler.wfile.write(PAGE)

    return behave


def replaced(content: bytes, etag: str) -> Behavior:
    """Replace the file before serving it."""

    def behave(handler: Handler) -> None:
        handler.state.content, handler.state.etag = content, etag
        whole(handler)

    return behave


@contextlib.contextmanager
def running(content: bytes) -> Iterator[Server]:
    """Serve `content` under every path within the block."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.state = Server(content, f"http://127.0.0.1:{httpd.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield httpd.state  # type: ignore[attr-defined]
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
