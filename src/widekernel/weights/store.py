"""The folder of fetched checkpoints, with the SHA-256 digest that each file had at first."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from widekernel.errors import FetchError
from widekernel.files import sha256_of, write_file
from widekernel.weights.catalog import Checkpoint

VARIABLE = "WIDEKERNEL_CACHE"
_OFFLINE = ("WIDEKERNEL_OFFLINE", "HF_HUB_OFFLINE")
_SUFFIXES = (".pth", ".safetensors")
BY_HAND = "by hand"


def cache_folder() -> Path:
    """Return the folder of fetched checkpoints: `weights` in `WIDEKERNEL_CACHE`, or else in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser() / "weights"
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard says to ignore relative paths in that variable.
    folder = Path(caches) if Path(caches).is_absolute() else Path("~/.cache").expanduser()
    return folder / "widekernel" / "weights"


def offline() -> str:
    """Return the environment variable that forbids downloads, with its value; "" if none does."""
    for name in _OFFLINE:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name}={os.environ[name]}"
    return ""


@dataclass(frozen=True)
class Entry:
    """The place of one checkpoint in the folder.

    Attributes:
        checkpoint: the checkpoint.
        folder: the folder.
    """

    checkpoint: Checkpoint
    folder: Path

    @property
    def lock(self) -> Path:
        """File that a process locks while it fetches."""
        return self.folder / f"{self.checkpoint.name}.lock"

    @property
    def record(self) -> Path:
        """File with the digests."""
        return self.folder / f"{self.checkpoint.name}.json"

    def path(self, suffix: str) -> Path:
        """Return the path of the file with this suffix."""
        return self.folder / f"{self.checkpoint.name}{suffix}"

    def partial(self, kind: str) -> Path:
        """Return the path of a partial file from a kind of source."""
        return self.folder / f"{self.checkpoint.name}.{kind}.part"

    def find(self) -> Path | None:
        """Return the file, or None if it is not there."""
        return next((path for path in map(self.path, _SUFFIXES) if path.is_file()), None)

    def remember(self, path: Path, digest: str, source: str) -> None:
        """Write down the digest of a file, and where it comes from.

        Raises:
            WidekernelError: the folder cannot be written to.
        """
        digests = {**self._recorded().get("sha256", {}), source: digest}
        content = {"file": path.name, "bytes": path.stat().st_size, "source": source, "sha256": digests}
        write_file(self.record, (json.dumps(content, indent=2) + "\n").encode())

    def known_digest(self, source: str) -> str:
        """Return the digest that the file of a source had at first; "" if there was none."""
        return str(self._recorded().get("sha256", {}).get(source, ""))

    def verified(self, path: Path) -> Path:
        """Return the path of a fetched file if it has the digest that it had at first, which is kept the first time.

        Raises:
            FetchError: it has another one.
            WidekernelError: the folder cannot be written to.
        """
        recorded = self._recorded()
        source = recorded.get("source", BY_HAND) if recorded.get("file") == path.name else BY_HAND
        known, digest = recorded.get("sha256", {}).get(source, ""), sha256_of(path)
        if not known:
            self.remember(path, digest, source)
        elif known != digest:
            raise FetchError(
                f"{path} has changed since it was first used: its SHA-256 digest was {known} and is {digest}. Remove the "
                f"file to fetch it again; if you changed it on purpose, remove {self.record}"
            )
        return path

    def _recorded(self) -> dict[str, Any]:
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise FetchError(f"{self.record}, which holds digests, cannot be read ({error}): remove it") from error
        if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict):
            raise FetchError(f"{self.record}, which holds digests, is damaged: remove it")
        return content
