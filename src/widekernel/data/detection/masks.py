"""Masks as they stand in annotation files, many of them in little memory, and their pixels."""

import json
from array import array
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widekernel.data.detection.coco_tools import mask_tools
from widekernel.data.names import Names


class MaskForms:
    """Polygons and run lengths of many objects, without a Python object for each number.

    Loading processes that are forked share the memory with their parent.
    """

    def __init__(self) -> None:
        # Of each object, its polygons; of each polygon, its numbers. Double precision, in which pycocotools computes.
        self._numbers, self._polygons, self._objects = array("d"), array("q", [0]), array("q", [0])
        self._run_lengths: Names = Names()
        self._run_lengths_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._objects) - 1

    def append(self, form: Any) -> None:
        """Add the `segmentation` of an annotation: a list of polygons, or run lengths."""
        if isinstance(form, dict):
            self._run_lengths_of[len(self)] = len(self._run_lengths)
            self._run_lengths.extend("", [json.dumps(form)])
        else:
            for polygon in form:
                self._numbers.extend(polygon)
                self._polygons.append(len(self._numbers))
        self._objects.append(len(self._polygons) - 1)

    def form(self, index: int) -> Any:
        """Return the list of polygons, or the run lengths, of an object."""
        if index in self._run_lengths_of:
            return json.loads(self._run_lengths[self._run_lengths_of[index]])
        polygons = range(self._objects[index], self._objects[index + 1])
        return [self._numbers[self._polygons[number] : self._polygons[number + 1]].tolist() for number in polygons]

    def decode(self, indices: range, height: int, width: int) -> Tensor:
        """Return the pixels of objects in an image of that size: `(n, height, width)`, uint8, 0 or 1.

        Raises:
            DataError: pycocotools is not installed.
        """
        pixels = [decode_mask(self.form(index), height, width) for index in indices]
        empty = np.zeros((0, height, width), np.uint8)
        return torch.from_numpy(np.stack(pixels) if pixels else empty)


def encode_mask(form: Any, height: int, width: int) -> dict[str, Any]:
    """Return the compressed run lengths of polygons, of run lengths, or of compressed ones.

    Raises:
        DataError: pycocotools is not installed.
    """
    tools = mask_tools()
    if isinstance(form, list):
        return tools.merge(tools.frPyObjects(form, height, width))  # type: ignore[no-any-return]
    if isinstance(form["counts"], list):
        return tools.frPyObjects(form, height, width)  # type: ignore[no-any-return]
    return form  # type: ignore[no-any-return]


def decode_mask(form: Any, height: int, width: int) -> np.ndarray:
    """Return the pixels `(height, width)`, uint8, 0 or 1, of polygons or run lengths.

    Raises:
        DataError: pycocotools is not installed.
    """
    return mask_tools().decode(encode_mask(form, height, width))  # type: ignore[no-any-return]
