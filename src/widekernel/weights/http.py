"""Download of one file over HTTP(S), which resumes what an earlier try left, also one of another process.

The partial file is continued only if the server says that it still has the same file (`If-Range`), so that two files are
never joined.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from widekernel.errors import FetchError
from widekernel.files import write_file
from widekernel.weights.listener import Listener

_CHUNK = 1 << 20  # bytes
_PROGRESS = 1 << 20  # bytes that a try must add to count as progress
_REPEAT = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_ERROR = 200


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        tries: number of tries in a row without progress.
        pause: seconds before the second try; doubled each time.
        timeout: seconds without a byte after which a try has failed.
    """

    tries: int = 4
    pause: float = 1.0
    timeout: float = 60.0


class _TryFailedError(Exception):
    """A try failed in a way that another may not."""


def download(url: str, target: Path, listener: Listener, patience: Patience | None = None) -> None:
    """Download `url` to `target`; what arrives before a failure stays there, and the next call continues it.

    Args:
        url: address of the file.
        target: partial file, which is complete afterwards. `target` with ".json" appended says what it is part of.
        listener: receives the progress.
        patience: how long to try.

    Raises:
        FetchError: the server has no such file, sends a web page, or fails again and again.
    """
    patience = patience or Patience()
    failures = 0
    while True:
        before = _size(target)
        try:
            _try(url, target, listener, patience.timeout)
        except _TryFailedError as error:
            failures = 1 if _size(target) >= before + _PROGRESS else failures + 1
            if failures >= patience.tries:
                raise FetchError(f"{error}, {failures} times in a row") from error
            time.sleep(patience.pause * 2 ** (failures - 1))
        else:
            _state_of(target).unlink(missing_ok=True)
            return


def _try(url: str, target: Path, listener: Listener, timeout: float) -> None:
    """Make one request for what is missing, and append what arrives."""
    state = _read_state(target, url)
    have = _size(target) if state else 0
    headers = {"User-Agent": "widekernel", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": state["validator"]}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
            _receive(response, url, target, have, state, listener)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:
            _settle(error, target, have, state)
        elif error.code in _REPEAT:
            raise _TryFailedError(f"the server answers {error.code} {error.reason}") from error
        else:
            raise FetchError(f"the server answers {error.code} {error.reason}") from error
    except FetchError:
        raise
    except (OSError, http.client.HTTPException) as error:  # OSError: no network, cut connections, timeouts
        if isinstance(getattr(error, "reason", None), socket.gaierror):
            raise FetchError("no network, or no such host") from error
        raise _TryFailedError(_reason(error)) from error


def _receive(response: Any, url: str, target: Path, have: int, state: dict[str, Any], listener: Listener) -> None:
    """Append the body of a response to `target`, or replace what is there if the server starts from the beginning."""
    if response.headers.get_content_type() == "text/html":
        raise FetchError("a web page came instead of the file")
    length = response.headers.get("Content-Length")
    total = int(length) if length and length.isdigit() else None
    if response.status == 206:
        start, total = _range_of(response.headers.get("Content-Range", ""))
        if start != have or state["total"] not in (None, total):
            _discard(target)
            raise _TryFailedError("the server continues another file, or at another place")
    else:
        have = 0
        validator = _validator(response.headers)
        _discard(target)
        if validator:  # without one, a later try starts from the beginning
            write_file(_state_of(target), json.dumps({"url": url, "validator": validator, "total": total}).encode())
    with _explained(target), target.open("ab" if have else "wb") as file:
        while chunk := _read(response):
            file.write(chunk)
            have += len(chunk)
            listener.advance(have, total)
    if total is not None and have != total:
        raise _TryFailedError(f"the connection was cut after {have} of {total} bytes")


def _read(response: Any) -> bytes:
    """Return the next bytes of a response, as soon as some arrive; nothing at its end."""
    try:
        return response.read1(_CHUNK)  # type: ignore[no-any-return]
    except (OSError, http.client.HTTPException) as error:
        raise _TryFailedError(_reason(error)) from error


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FetchError(f"{target} cannot be written: {error.strerror}") from error


def _settle(error: urllib.error.HTTPError, target: Path, have: int, state: dict[str, Any]) -> None:
    """Deal with a server that has nothing after what is there: that may be all, or the file has changed."""
    match = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
    if match and int(match[1]) == have and state["total"] in (None, have):
        return
    _discard(target)
    raise _TryFailedError("the server's file is shorter than announced") from error


def _range_of(text: str) -> tuple[int, int | None]:
    """Return the first byte and the size of the whole file from a Content-Range; (-1, None) if it is not one."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
    if match is None:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _validator(headers: Any) -> str:
    """Return what tells one version of the file from another; "" if the server does not say."""
    tag = headers.get("ETag") or ""
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""


def _read_state(target: Path, url: str) -> dict[str, Any]:
    """Return what the partial file is part of; empty if that is not known, or not `url`."""
    try:
        state = json.loads(_state_of(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    complete = isinstance(state, dict) and isinstance(state.get("validator"), str) and "total" in state
    return state if complete and state.get("url") == url else {}


def _state_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _discard(target: Path) -> None:
    for path in (target, _state_of(target)):
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return "the server sends nothing"
    text = str(getattr(error, "reason", None) or error) or type(error).__name__
    return f"no connection ({text[:_LONGEST_ERROR]})"
