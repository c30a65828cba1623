"""File names: those of images, those that operating systems and tools leave behind, and how to print them."""

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

_NOT_DECODED = {
    "BUFR", "GRIB", "HDF5",  # recognized, but read by other programs
    "EPS", "PDF", "WMF",  # vector graphics, which other programs render
    "MPEG",  # Pillow reads only the size of the picture
    "IPTC",  # a container
}  # fmt: skip

_CLUTTER = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "system volume information",
    "lost+found",
}  # fmt: skip
_LONGEST_CLUTTER = max(len(name) for name in _CLUTTER)


@lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes to pixels on this machine, without other programs."""
    Image.init()
    with_endings = set(Image.registered_extensions().values())
    return tuple(name for name in Image.OPEN if name in with_endings and name not in _NOT_DECODED)


@lru_cache(maxsize=1)
def image_endings() -> frozenset[str]:
    """Return the file name extensions of `image_formats`, in lower case and with the dot."""
    formats = {*image_formats(), "MPO"}  # several JPEG images in one file; the JPEG plugin opens it
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def usual_endings() -> str:
    """Return the best-known extensions among `image_endings`, as text for a message."""
    known = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
    return f"{', '.join(ending for ending in known if ending in image_endings())} and others"


def ending_of(name: str) -> str:
    """Return the extension of a file name, in lower case and with the dot, or "" if it has none."""
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def is_clutter(name: str) -> bool:
    """Return whether a file or folder is hidden, or was left behind by an operating system."""
    return name.startswith(".") or (len(name) <= _LONGEST_CLUTTER and name.lower() in _CLUTTER)


def brief(names: Sequence[str], most: int = 5) -> str:
    """Join the first `most` of `names` for a message, on one line and printable."""
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def printable(name: str) -> str:
    """Return a name for a message, with line breaks and bytes that are not UTF-8 escaped."""
    if name.isprintable():
        return name
    escaped = "".join(char if char.isprintable() or _is_raw(char) else repr(char)[1:-1] for char in name)
    return escaped.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _is_raw(char: str) -> bool:
    return "\udc80" <= char <= "\udcff"
