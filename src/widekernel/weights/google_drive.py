"""Downloads from Google Drive, whose pages in front of large files gdown can answer."""

from __future__ import annotations

from pathlib import Path

from widekernel.errors import FetchError, in_short
from widekernel.weights.listener import Listener

_TIMEOUT = 60.0  # seconds
_RETRIES = 3


def from_google_drive(identifier: str, target: Path, listener: Listener) -> None:
    """Download a file from Google Drive to `target`; an interrupted download is continued.

    Raises:
        FetchError: gdown is missing, or Google Drive sends a page instead of the file, as it does at the end of a quota.
    """
    try:
        import gdown
    except ImportError as error:
        raise FetchError("gdown is not installed: pip install 'widekernel[weights]'") from error
    started = list(target.parent.glob(f"{target.name}????????.part"))
    if len(started) > 1:  # gdown does not know which to continue
        _remove(started)
    try:
        gdown.download(
            id=identifier, output=str(target), quiet=True, use_cookies=False, resume=True,
            progress=listener.advance, timeout=_TIMEOUT, retries=_RETRIES,
        )  # fmt: skip
    except gdown.exceptions.FileURLRetrievalError as error:
        reason = " ".join(str(error).split()).removeprefix("Failed to retrieve file url: ")
        raise FetchError(f"a page came instead of the file ({reason.partition(' You may still')[0]})") from error
    except gdown.exceptions.DownloadError as error:
        if len(started) == 1:  # begun earlier; the file may have changed since
            _remove(started)
            from_google_drive(identifier, target, listener)
            return
        raise FetchError(_reason(error)) from error
    except Exception as error:  # those of its HTTP library, and what an unexpected answer makes gdown raise
        raise FetchError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """Return why gdown failed: no connection, or what it says."""
    from requests.exceptions import ConnectionError as NoConnection

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NoConnection):
            return "no connection"
        cause = cause.__cause__
    return in_short(error)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
