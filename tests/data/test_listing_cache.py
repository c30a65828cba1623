"""Listings that are kept between starts: used if they are current, and never if they are stale or damaged."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from tests.data.trees import opened, plant

from widekernel.data import folder_source, listing_cache
from widekernel.data.names import Names
from widekernel.errors import DataError
from widekernel.tasks import fingerprint as prints

PATHS = ["a/1.png", "a/in/2.png", "a/notes.txt", "b/ü.png", "b/deep/er/3.png", "b/empty/", "outside.png"]
LONG_AGO = time.time() - 3600


def age(root: Path) -> None:
    """Make the folders old enough for their modification times to be trusted."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (LONG_AGO, LONG_AGO))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("WIDEKERNEL_LISTINGS", str(tmp_path / "kept"))
    monkeypatch.setattr(listing_cache, "LEAST", 1)
    plant(tmp_path / "train", PATHS)
    age(tmp_path)
    return tmp_path


@pytest.fixture
def listed(monkeypatch) -> list[Path]:
    """Record every folder that is listed, rather than found among the kept listings."""
    calls: list[Path] = []
    list_folder = folder_source._list_folder
    monkeypatch.setattr(folder_source, "_list_folder", lambda path, stamps: calls.append(path) or list_folder(path, stamps))
    return calls


def contents(source) -> tuple:
    listing = source.listing
    return (
        *(source.class_names, list(source.names), list(source.targets), source.notes),
        *(listing.image_folders, [source.load(index)[0].tobytes() for index in range(len(source))]),
    )


def test_a_kept_listing_is_the_same(root: Path, listed: list[Path]) -> None:
    first = opened(root)
    second = opened(root)
    assert len(listed) == 1 and contents(first) == contents(second) and len(first) == 4
    assert prints.fingerprint(first, first) == prints.fingerprint(second, second)
    assert all(type(target) is int for target in second.targets)


CHANGES = {
    "a new image": lambda train: (train / "a" / "in" / "new.png").write_bytes(b"x"),
    "an image less": lambda train: (train / "a" / "1.png").unlink(),
    "another name": lambda train: (train / "a" / "1.png").rename(train / "a" / "0.png"),
    "a new class": lambda train: plant(train, ["c/1.png"]),
    "an image in an empty folder": lambda train: (train / "b" / "empty" / "new.png").write_bytes(b"x"),
    "a folder less": lambda train: (train / "b" / "empty").rmdir(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_listing_is_not_used(root: Path, listed: list[Path], change: str) -> None:
    opened(root)
    CHANGES[change](root / "train")
    names = sorted(opened(root).names)
    assert len(listed) == 2
    assert names == sorted(
        str(file.relative_to(root / "train")) for file in (root / "train").rglob("*.png") if file.parent != root / "train"
    )


def test_a_folder_that_was_replaced_is_listed_again(root: Path, listed: list[Path]) -> None:
    opened(root)
    (root / "train").rename(root / "old")
    plant(root / "train", ["a/9.png", "b/8.png"])
    age(root / "train")
    assert list(opened(root).names) == ["a/9.png", "b/8.png"] and len(listed) == 2
    for file in (root / "train").rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="holds no images"):
        opened(root)


def test_folders_that_have_just_changed_are_not_trusted(root: Path, listed: list[Path]) -> None:
    os.utime(root / "train" / "b" / "empty")
    opened(root)
    opened(root)
    assert len(listed) == 2 and not (root / "kept").exists()


def test_damaged_listings_are_not_used(root: Path, listed: list[Path]) -> None:
    expected = contents(opened(root))
    (file,) = (root / "kept").iterdir()
    intact = file.read_bytes()
    generator = random.Random(0)
    for number in range(60):
        damaged = bytearray(intact)
        place = generator.randrange(len(intact))
        if number % 3 == 0:
            del damaged[place:]
        elif number % 3 == 1:
            damaged[place] ^= 1 << generator.randrange(8)
        else:
            damaged += b"more"
        file.write_bytes(damaged)
        before = len(listed)
        assert contents(opened(root)) == expected
        assert len(listed) == before + 1, number
        file.unlink(missing_ok=True)
    assert [path.name for path in (root / "kept").iterdir()] == []


def test_other_endings_need_another_listing(root: Path, listed: list[Path], monkeypatch) -> None:
    opened(root)
    monkeypatch.setattr(listing_cache, "image_endings", lambda: frozenset({".png"}))
    opened(root)
    assert len(listed) == 2


def test_small_folders_and_a_missing_place_change_nothing(root: Path, listed: list[Path], monkeypatch) -> None:
    for place in ("off", str(root / "train" / "a" / "1.png")):  # the second is no folder
        monkeypatch.setenv("WIDEKERNEL_LISTINGS", place)
        assert len(opened(root)) == 4
    monkeypatch.setenv("WIDEKERNEL_LISTINGS", str(root / "kept"))
    monkeypatch.setattr(listing_cache, "LEAST", 5)
    assert len(opened(root)) == 4
    assert len(listed) == 3 and not (root / "kept").exists()
    monkeypatch.delenv("WIDEKERNEL_LISTINGS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "xdg"))
    file = listing_cache.cache_file(root / "train")
    assert file is not None and file.parent == root / "xdg" / "widekernel" / "listings"


def test_names_in_fixed_memory() -> None:
    names = Names(["a/ü", "b", "\udcff"])
    copy = Names.from_memory(np.frombuffer(names.text, np.uint8), np.frombuffer(names.ends, np.int64))
    assert list(copy) == list(names) == ["a/ü", "b", "\udcff"] and copy[-1] == "\udcff"
    with pytest.raises(TypeError, match="fixed size"):
        copy.extend("", ["c"])


@pytest.mark.parametrize("paths", [["a/1.png", "a/b/2.png", "c/3.png"], ["a/u\u0308.png", "b/\u00fc.png", "c/x.png"]])
def test_the_digest_is_that_of_the_lines(tmp_path: Path, paths: list[str]) -> None:
    source = opened(plant(tmp_path / "root" / "train", paths).parent)
    assert prints._digest_of_names(source) == prints.digest_of_lines(prints._lines(source))
    source.names = Names([*paths[:2], "c/zero\0byte"])
    assert prints._digest_of_names(source) is None
    assert len(prints._digest(source)) == 16
