"""Recognising files that are given as checkpoints and are something else."""

from __future__ import annotations

import codecs
from pathlib import Path

_READ = 512
_STARTS = {
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"\x1f\x8b": "a file packed by gzip",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer of Git LFS in the place of the file itself, which `git lfs pull` fetches",
}
_MAGIC_OF_TORCH = b"L119547037146038801333356L"  # how old files start when they are written by protocol 0, which is of text


def looks_like(path: Path) -> str:
    """Say what a file that is no checkpoint looks like by its first bytes, "" if that cannot be told."""
    try:
        with path.open("rb") as file:
            head = file.read(_READ)
    except OSError:
        return ""
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if path.suffix != ".safetensors" and head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file under another name"
    text = _as_text(head)
    if not text or head.startswith(_MAGIC_OF_TORCH):
        return ""
    if text.startswith("<"):
        return "a web page (HTML or XML)"
    return f"text, which starts with {text.splitlines()[0][:40]!r}"


def _as_text(head: bytes) -> str:
    """Give the first bytes as text, "" if they are none or too few to tell."""
    try:
        # The last character may be cut.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip()
    except UnicodeDecodeError:
        return ""
    whole = len(text) >= 4 and all(character.isprintable() or character.isspace() for character in text)
    return text if whole else ""
