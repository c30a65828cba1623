"""Pictures of predictions: what is drawn where, whatever the size of the image and the length of the texts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from widekernel import drawing
from widekernel.data.class_tables import colors_of

NAMES = ("ground", "disk", "a class with a very long name that no small picture has space for")
COLORS = ((0, 0, 0), (255, 0, 0), (0, 0, 255))


def gray(width: int, height: int, value: int = 100) -> Image.Image:
    return Image.new("RGB", (width, height), (value, value, value))


def test_a_palette_picture_holds_indices() -> None:
    classes = np.arange(250).reshape(10, 25)
    colors = colors_of([str(index) for index in range(250)])
    picture = drawing.palette_image(classes, colors)
    assert picture.mode == "P" and (np.array(picture) == classes).all()
    assert (np.array(picture.convert("RGB")).reshape(-1, 3) == np.array(colors)).all()


@pytest.mark.parametrize(("width", "height"), [(20, 10), (10, 33), (700, 300), (1, 1)])
def test_colors_lie_on_their_classes(width: int, height: int) -> None:
    classes = np.zeros((height, width), np.uint8)
    classes[: height // 2] = 2
    picture = np.array(drawing.class_overlay(gray(width, height), classes, NAMES, COLORS, opacity=0.5))
    factor = drawing.enlargement(gray(width, height))
    assert picture.shape[1] == factor * width and picture.shape[0] > factor * height
    if height > 1:
        assert picture[1, 0].tolist() == pytest.approx([50, 50, 178], abs=1)
        assert picture[factor * (height // 2) - 1, 0].tolist() == [255, 255, 255]
    assert picture[factor * height - 1, 0].tolist() == pytest.approx([50, 50, 50], abs=1)


def test_the_legend_has_the_classes_that_occur() -> None:
    classes = np.zeros((300, 600), np.uint8)
    classes[:100] = 1
    legend = np.array(drawing.class_overlay(gray(600, 300), classes, NAMES, COLORS))[300:]
    colors = {tuple(color) for color in legend.reshape(-1, 3).tolist()}
    assert {(0, 0, 0), (255, 0, 0)} <= colors and (0, 0, 255) not in colors


def test_objects_and_their_texts_stay_inside() -> None:
    boxes = np.array([[-5.0, -5.0, 20.0, 30.0], [590.0, 380.0, 640.0, 420.0], [100.0, 100.0, 200.0, 180.0]])
    masks = np.zeros((3, 400, 600), bool)
    masks[2, 120:160, 120:160] = True
    texts = ["first 0.99", "at the border 0.98", "x" * 300]
    picture = drawing.object_overlay(gray(600, 400), boxes, texts, [(255, 0, 0), (0, 255, 0), (0, 0, 255)], masks)
    pixels = np.array(picture)
    assert picture.size == (600, 400)
    assert pixels[140, 140].tolist() == pytest.approx([50, 50, 178], abs=1) and pixels[110, 110].tolist() == [100] * 3
    assert pixels[150, 100].tolist() == [0, 0, 255] and pixels[25, 20].tolist() == [255, 0, 0]


def test_nothing_found_leaves_the_image_alone() -> None:
    none = np.zeros((0, 4))
    picture = drawing.object_overlay(gray(600, 400), none, [], [], np.zeros((0, 400, 600), bool))
    assert (np.array(picture) == 100).all()


def test_the_first_object_is_on_top() -> None:
    masks, boxes = np.ones((2, 400, 600), bool), np.array([[10.0, 50, 500, 300]] * 2)
    picture = drawing.object_overlay(gray(600, 400), boxes, ["a", "b"], [(255, 0, 0), (0, 0, 255)], masks)
    assert np.array(picture)[50, 400].tolist() == [255, 0, 0]
    red, _, blue = np.array(picture)[350, 300].tolist()
    assert red > blue


def test_a_contact_sheet_has_rows_of_tiles() -> None:
    tiles = [(gray(50 + number, 100), ["name", "x" * 100]) for number in range(7)]
    sheet = drawing.contact_sheet(tiles, side=80, columns=3)
    assert sheet.size == (3 * 88 + 8, 3 * (80 + 2 * 16 + 16) + 8)
    assert drawing.contact_sheet(tiles[:1], side=80).width == 96


def test_shares_as_texts() -> None:
    assert [drawing.percent(share) for share in (1, 0.5, 0.0996, 0.0123, 0)] == ["100 %", "50 %", "10 %", "1.2 %", "0.0 %"]
