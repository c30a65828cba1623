"""Matching of the classes of the data to outputs, with and without class names in the weights."""

import random
import unicodedata

import pytest
import torch

from widekernel.data import DataConfig, Preprocessing
from widekernel.errors import DataError
from widekernel.tasks.classification.class_mapping import _imagenet, class_mapping, inheritance_note, mapping_note
from widekernel.tasks.saved import SavedModel, save_model


def saved(outputs: int, names: tuple[str, ...] = ()) -> SavedModel:
    return SavedModel("a_model", {}, "training", outputs, names, Preprocessing.resolve(DataConfig(), {}))


def folders(names) -> tuple[str, ...]:
    return tuple(sorted(names))


def test_numbers_are_matched_by_number():
    names = folders(str(number) for number in range(1000))
    assert names[:3] == ("0", "1", "10")
    order = class_mapping(saved(1000), names)
    assert order is not None
    assert [int(name) for name in names] == list(order)
    assert "'2' is output 2" in mapping_note(saved(1000), names)
    assert "alphabetical order need class names" in mapping_note(saved(1000), names)


def test_numbers_from_zero_need_no_note():
    names = folders(f"{number:03}" for number in range(1000))
    assert class_mapping(saved(1000), names) is None
    assert mapping_note(saved(1000), names) == ""


def test_numbers_from_one_get_a_note():
    names = folders(str(number) for number in range(1, 13))
    assert class_mapping(saved(12), names) == tuple(int(name) - 1 for name in names)
    assert "'1' is output 0" in mapping_note(saved(12), names)
    assert "'01' is output 0" in mapping_note(saved(2), ("01", "02"))


def test_one_number_written_in_two_ways():
    assert class_mapping(saved(2), ("01", "1")) is None
    assert mapping_note(saved(2), ("01", "1"))


def test_other_names_get_a_note_with_their_outputs():
    assert "alphabetical order: 'cat' is output 0, 'dog' is output 1" in mapping_note(saved(2), ("cat", "dog"))
    assert "Ordered by" not in mapping_note(saved(2), ("cat", "dog"))
    names = folders(f"class{number}" for number in range(12))
    assert class_mapping(saved(12), names) is None
    assert "Ordered by the numbers in them they would be class0, class1, class2" in mapping_note(saved(12), names)


def test_wordnet_identifiers():
    every = folders(_imagenet())
    assert len(every) == 1000
    assert class_mapping(saved(1000), every) is None
    some = folders(random.Random(0).sample(every, 10))
    assert class_mapping(saved(1000), some) == tuple(every.index(name) for name in some)
    assert mapping_note(saved(1000), some) == ""
    assert class_mapping(saved(10), some) is None
    assert f"alphabetical order: '{some[0]}' is output 0" in mapping_note(saved(10), some)
    with pytest.raises(DataError, match="10 classes, but a_model has 999 outputs"):
        class_mapping(saved(999), some)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("found", ["NFC", "NFD"])
def test_stored_names_are_normalized(stored, found):
    name = "pâté"
    known = ("zoo", unicodedata.normalize(stored, name))
    assert class_mapping(saved(2, known), (unicodedata.normalize(found, name), "zoo")) == (1, 0)


def test_stored_names_take_precedence_over_numbers():
    known = ("0", "1", "10", "2")
    assert class_mapping(saved(4, known), known) is None
    assert class_mapping(saved(4, known), ("10", "2")) == (2, 3)
    assert mapping_note(saved(4, known), ("10", "2")) == ""


def test_classifiers_that_are_taken_over(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(torch.nn.Linear(2, 2), path, saved(2, ("cat", "dog")))
    assert inheritance_note(path, ("cat", "dog")) == ""
    assert inheritance_note(path, ("cat", "cow", "dog")) == ""  # ignored, since its size does not fit
    assert "trained on cat, dog, and the classes here are ant, bee" in inheritance_note(path, ("ant", "bee"))


def test_classifiers_without_names_that_are_taken_over(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(2)}, path)
    assert (
        inheritance_note(path, ("cat", "dog"))
        == inheritance_note(path, ("00", "01"))
        == inheritance_note(path, ("0", "1"))
        == ""
    )
    assert "alphabetical order: '1' is output 0, '10' is output 1, '2' is output 2" in inheritance_note(
        path, ("1", "10", "2")
    )
