"""Recognition of files that are not checkpoints but were given as such."""

from __future__ import annotations

import codecs
from pathlib import Path

_NUM_BYTES = 512
_MAGIC_BYTES = {
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer instead of the file itself: `git lfs pull` fetches it",
}
# First bytes of old PyTorch files that were written with pickle protocol 0, which is text.
_OLD_TORCH_MAGIC = b"L119547037146038801333356L"


def describe_file_type(path: Path) -> str:
    """Return the type of a file according to its first bytes; "" if it is unknown or may be a checkpoint."""
    try:
        with path.open("rb") as file:
            head = file.read(_NUM_BYTES)
    except OSError:
        return ""
    for magic, file_type in _MAGIC_BYTES.items():
        if head.startswith(magic):
            return file_type
    if path.suffix != ".safetensors" and head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file under another name"
    text = _as_text(head)
    if not text or head.startswith(_OLD_TORCH_MAGIC):
        return ""
    if text.startswith("<"):
        return "a web page (HTML or XML)"
    return f"text that starts with {text.splitlines()[0][:40]!r}"


def _as_text(head: bytes) -> str:
    """Return the first bytes as text; "" if they are not text or too few to tell."""
    try:
        # The last character may be cut off.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip()
    except UnicodeDecodeError:
        return ""
    whole = len(text) >= 4 and all(character.isprintable() or character.isspace() for character in text)
    return text if whole else ""
