"""pycocotools, which decodes masks and measures detections; the package is optional and is loaded when it is needed."""

from types import ModuleType

from widekernel.errors import DataError

_INSTALL = (
    "Masks and the metrics of COCO need the package pycocotools, which cannot be imported ({reason}). "
    "Install it with `pip install 'widekernel[detection]'`."
)


def mask_tools() -> ModuleType:
    """Return the module `pycocotools.mask`.

    Raises:
        DataError: the package is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(_INSTALL.format(reason=error)) from error
    return mask  # type: ignore[no-any-return]


def metric_tools() -> tuple[type, type]:
    """Return the classes `COCO` and `COCOeval` of pycocotools.

    Raises:
        DataError: the package is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise DataError(_INSTALL.format(reason=error)) from error
    return COCO, COCOeval
