"""Downloads through the libraries of the hosts: Google Drive by gdown, Hugging Face by huggingface_hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

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
    import requests

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
        raise FetchError(in_short(error)) from error
    except (requests.exceptions.RequestException, OSError) as error:
        raise FetchError(in_short(error)) from error


def from_hugging_face(repo: str, file: str, target: Path, listener: Listener) -> None:
    """Download a file of a repository on Hugging Face to `target`; an interrupted download is continued.

    Raises:
        FetchError: huggingface_hub is missing, or it cannot fetch the file.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise FetchError("huggingface_hub is not installed: pip install 'widekernel[weights]'") from error
    folder = target.with_name(f"{target.name}.folder")
    try:
        path = hf_hub_download(repo, file, local_dir=folder, tqdm_class=_progress_class(listener))
    except Exception as error:  # those of huggingface_hub and of its HTTP library have no common base
        raise FetchError(in_short(error)) from error
    Path(path).replace(target)
    shutil.rmtree(folder)


def _progress_class(listener: Listener) -> Any:
    """Return a class that stands in for tqdm's, prints nothing and tells the listener."""
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self.n, self.total = kwargs.get("initial", 0), kwargs.get("total")

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            listener.advance(int(self.n), int(self.total) if self.total else None)

    return Silent


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
