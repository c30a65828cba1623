"""Write generated scenes for training: `python -m tests.data.write_scenes FOLDER`.

`FOLDER/segmentation` holds images and masks, `FOLDER/detection` the same images with annotations in the form of COCO. There
are 256 scenes for training and 64 held-out ones. No palette is written, so that predictions are not drawn in the colors of
the shapes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.data.scenes import CLASSES, make_scenes, write_coco_json, write_folder

TRAIN, VAL = 256, 64


def write(root: Path) -> Path:
    """Write both forms below `root`, and return it."""
    train, val = make_scenes(TRAIN), make_scenes(VAL, first=TRAIN)
    write_folder(root / "segmentation", train, val)
    (root / "segmentation" / "classes.json").unlink()
    (root / "segmentation" / "classes.txt").write_text("\n".join(CLASSES))
    write_coco_json(root / "detection", train, val)
    return root


if __name__ == "__main__":
    write(Path(sys.argv[1]))
