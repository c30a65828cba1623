"""What a download tells its caller."""

from __future__ import annotations


class Listener:
    """Receives the events of a download; this one ignores them."""

    def start(self, place: str) -> None:
        """Take note that the download from a place begins."""

    def advance(self, done: int, total: int | None) -> None:
        """Take note of the bytes so far, and in all if the server says so."""

    def failed(self, place: str, reason: str) -> None:
        """Take note that a place did not deliver the file; the next one is tried."""

    def wait(self, lock: str) -> None:
        """Take note that another process is fetching the file and holds the lock."""
