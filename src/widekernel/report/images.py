"""The images of a report: labeled ones, for accuracy, or any others, for receptive fields and similarity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import override

from widekernel.data import DataConfig, ImageSource, open_split
from widekernel.data.image_files import ImageFiles, draw
from widekernel.errors import WidekernelError
from widekernel.report.parts import Missing
from widekernel.report.subject import Subject
from widekernel.tasks.classification.evaluation_data import location_of

_GIVE = "Give a folder of class folders, or a .tar archive of them: `--data DIR`."


@dataclass(frozen=True)
class Images:
    """Images to look at a network with.

    Attributes:
        labeled: images with classes, or why there are none.
        files: images without classes; None if there are labeled ones.
        place: where they are.
        config: settings of the labeled images.
        of_the_run: whether they are the held-out images that the settings of the run name.
    """

    labeled: ImageSource | Missing
    files: ImageFiles | None
    place: str
    config: DataConfig
    of_the_run: bool

    def __len__(self) -> int:
        if isinstance(self.labeled, ImageSource):
            return len(self.labeled)
        return 0 if self.files is None else len(self.files)

    def draw(self, count: int, seed: int) -> Iterator[Image.Image]:
        """Yield `count` readable images in a random order that depends on the seed only; fewer if there are not as many."""
        if isinstance(self.labeled, ImageSource):
            for _, (image, _target) in draw(self.labeled, count, seed):
                yield image
        elif self.files is not None:
            for _, image in draw(self.files, count, seed):
                yield image


def find_images(subject: Subject, data: str | None) -> Images:
    """Return the images that the user gives, or else those that the settings of the run name.

    Args:
        subject: the network.
        data: folder or .tar archive; class folders in it make the images labeled.

    Raises:
        DataError: `data` does not exist or holds no images.
    """
    config = _config_of(subject)
    if data is not None:
        return _given(Path(data), config)
    if subject.run is None:
        missing = Missing("No images were given, and the weights do not come from a run that names any.", _GIVE)
        return Images(missing, None, "", config, False)
    try:
        source = open_split(config, "val")
    except WidekernelError as error:
        missing = Missing(f"The held-out images of the run cannot be used: {error}", _GIVE)
        return Images(missing, None, "", config, False)
    return Images(source, None, location_of(config, source), config, True)


def _config_of(subject: Subject) -> DataConfig:
    """Return the data settings of the run; the defaults without a run."""
    saved: dict[str, Any] = subject.config.get("data") or {}
    known = {key: value for key, value in saved.items() if key in DataConfig.__dataclass_fields__ and key != "class_map"}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    return DataConfig(**values)


def _given(path: Path, config: DataConfig) -> Images:
    files = ImageFiles(path)
    config = replace(config, name="folder", root=str(path.absolute().parent), val_split=path.name)
    try:
        source = open_split(config, "val")
    except WidekernelError as error:
        missing = Missing(f"The images that were given have no classes: {error}", _GIVE)
        return Images(missing, files, str(path), config, False)
    return Images(source, None, str(path), config, False)


class Subset(ImageSource):
    """Some images of a source.

    Args:
        source: the source.
        indices: which images.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.class_names, self.exif_transpose = source.class_names, source.exif_transpose

    def __len__(self) -> int:
        return len(self.indices)

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(self.indices[index])

    @override
    def sample_name(self, index: int) -> str:
        return self.source.sample_name(self.indices[index])
