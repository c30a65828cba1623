"""Archives from which files are read at any position, in any process."""

import os
from pathlib import Path
from typing import Any

from widekernel.data.images import MAX_BYTES, UnreadableImageError, too_large

_MOST_OPEN = 64


class OpenArchives:
    """Archives that are opened when they are first read; the oldest are closed again if they are many.

    A copy for another process opens its own.
    """

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": {}}

    def read(self, archive: Path, offset: int, size: int) -> bytes:
        """Return `size` bytes of the archive from the byte `offset` on, or fewer at its end.

        Raises:
            UnreadableImageError: the archive cannot be opened or read, or there are more than `MAX_BYTES` bytes.
        """
        if size > MAX_BYTES:
            raise UnreadableImageError(too_large(size))
        try:
            file = self._files.get(archive)
            if file is None:
                while len(self._files) >= _MOST_OPEN:
                    self._files.pop(next(iter(self._files))).close()
                file = self._files[archive] = archive.open("rb", buffering=0)
            # pread does not move the file position, which forked processes share.
            return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error
