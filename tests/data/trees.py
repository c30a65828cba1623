"""Trees of small images, as folders and as archives, for the tests of data sets."""

import io
import tarfile
from pathlib import Path

from PIL import Image

from widekernel.data import DataConfig, open_split


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


def plant(root: Path, paths) -> Path:
    """Write a different image for each path; a path that ends in "/" becomes an empty folder."""
    for number, path in enumerate(sorted(paths)):
        place = root / path
        if path.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(number % 251))
    return root


def pack(folder: Path, archive: Path, arcname: str = ".") -> Path:
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, arcname=arcname)
    return archive


def write_tar(archive: Path, members) -> Path:
    """Write `(name, contents)` in their order: bytes, None for a folder, ("sym" | "hard", target) for links."""
    with tarfile.open(archive, "w") as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            if contents is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif isinstance(contents, tuple):
                info.type = tarfile.SYMTYPE if contents[0] == "sym" else tarfile.LNKTYPE
                info.linkname = contents[1]
                tar.addfile(info)
            else:
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))
    return archive


def opened(root: Path, part: str = "train"):
    return open_split(DataConfig(root=str(root), train_split=part), "train")


def described(source):
    """Return the classes, and the name, label and first pixel of every sample."""
    samples = []
    for index in range(len(source)):
        image, target = source.load(index)
        samples.append((source.sample_name(index), target, image.getpixel((0, 0))[0]))
    return source.class_names, samples
