"""Shards of a webdataset: an image and its class number under each key, in any number of tar archives."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import time
from pathlib import Path

import pytest
import torch
from tests.data.trees import described, opened, plant, png, write_tar

from widekernel.data import (
    AugmentConfig,
    BatchPlan,
    DataConfig,
    LabeledImages,
    LoaderOptions,
    OnImage,
    Preprocessing,
    TrainingLoader,
    TrainingSamples,
    listing_cache,
    open_train_and_val,
    shard_source,
)
from widekernel.data.images import UnreadableImageError
from widekernel.data.shard_names import expand, find_shards, is_pattern
from widekernel.errors import DataError
from widekernel.tasks.fingerprint import fingerprint

CLASSES = ["tench", "goldfish", "shark"]


def sample(key: str, label: int, shade: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(shade)), (f"{key}.cls", str(label).encode()), (f"{key}.txt", b"a caption")]


def write_shard(path: Path, start: int, count: int = 4) -> Path:
    """Write `count` images, of the classes 0, 1, 2, 0, ..., whose shades are their numbers."""
    members = [member for n in range(start, start + count) for member in sample(f"{n:04d}", n % 3, n)]
    return write_tar(path, members)


@pytest.fixture
def root(tmp_path) -> Path:
    for number in range(3):
        write_shard(tmp_path / f"train-{number:03d}.tar", 4 * number)
    return tmp_path


ALL = [(f"train-{n // 4:03d}.tar/{n:04d}.png", n % 3, n) for n in range(12)]


@pytest.mark.parametrize("pattern", ["train-{000..002}.tar", "train-*.tar", "train-00[0-2].tar", "train-{00{0,1},002}.tar"])
def test_patterns_name_shards(root: Path, pattern: str) -> None:
    assert described(opened(root, pattern)) == (("0", "1", "2"), ALL)


def test_order_of_the_pattern_and_classes_by_name(root: Path) -> None:
    (root / "classes.txt").write_text("\ufefftench\ngoldfish\r\nshark\n")
    names, samples = described(opened(root, "train-{002..000..2}.tar"))
    assert names == ("tench", "goldfish", "shark")
    assert samples == ALL[8:] + ALL[:4]
    assert described(opened(root, str(root / "train-00?.tar")))[1] == ALL


def test_one_shard_needs_no_pattern(root: Path) -> None:
    assert described(opened(root, "train-001"))[1] == described(opened(root, "train-001.tar"))[1] == ALL[4:8]


def test_names_with_braces_and_brackets_are_not_patterns(tmp_path: Path) -> None:
    plant(tmp_path / "train[1]", ["a/1.png", "b/2.png"])
    assert len(opened(tmp_path, "train[1]")) == 2


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{08..10}{x,y}", "a08x a08y a09x a09y a10x a10y"), ("{2..-1}", "2 1 0 -1"), ("{0..9..4}", "0 4 8"),
        ("{9..10}", "9 10"), ("{a,b{1,2}c,}.t", "a.t b1c.t b2c.t .t"), ("{a}-{b,c}", "{a}-b {a}-c"),
        ("{{0..1}", "{0 {1"), ("{x{0..1}}", "{x0} {x1}"), ("${A,B}", "${A,B}"), ("a}{", "a}{"),
    ],
)  # fmt: skip
def test_braces_expand_as_in_a_shell(pattern: str, names: str) -> None:
    assert " ".join(expand(pattern)) == names
    assert is_pattern(pattern) == (names != pattern)


def test_endless_ranges_are_refused() -> None:
    with pytest.raises(DataError, match="more than 100,000 shards"):
        find_shards(Path(), "{0..99999999999}.tar", "data.train_split")


def test_missing_shards(root: Path) -> None:
    with pytest.raises(DataError, match=r"names 12 shard\(s\), but 'train-003.tar' and 8 more do not exist"):
        opened(root, "train-{000..011}.tar")
    with pytest.raises(DataError, match=r"no file in .* matches 'test-\*.tar'"):
        opened(root, "test-*.tar")
    (root / "train-003.tar").write_bytes(b"\x1f\x8b" + b"?" * 600)
    with pytest.raises(DataError, match=r"train-003.tar is compressed by gzip"):
        opened(root, "train-*.tar")


def test_classes_in_json_and_longer_endings(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "train.tar",
        [
            ("./a/1.JPG", png(1)), ("./a/1.json", json.dumps({"caption": "x", "label": 2}).encode()),
            ("2.png", png(2)), ("2.cls", b" 1\n"), ("2.json", b"not read"), ("2.seg.png", png(9)),
            ("notes.md", b"text"), ("._2.png", b"clutter"), ("3.png", png(3)), ("3.json", b'{"cls": 0, "label": 5}'),
        ],
    )  # fmt: skip
    source = opened(tmp_path, "trai[n].tar")
    expected = [("train.tar/a/1.JPG", 2, 1), ("train.tar/2.png", 1, 2), ("train.tar/3.png", 0, 3)]
    assert described(source)[1] == expected
    assert "1 file(s) left out" in source.notes[0] and "train.tar/notes.md" in source.notes[0]


MALFORMED = [
    ([("k.png", png())], "the key 'k': has no class: beside .png there is neither"),
    ([("k.cls", b"1")], "the key 'k': has a class, but no image"),
    ([("k.png", png()), ("k.jpg", png()), ("k.cls", b"1")], r"the key 'k': has several images \(.png, .jpg\)"),
    ([("k.png", png()), ("k.cls", b"1.5")], "the key 'k': the class in the .cls file is '1.5', but must be a whole"),
    ([("k.png", png()), ("k.cls", b"-1")], "the key 'k': the class in the .cls file is '-1'"),
    ([("k.png", png()), ("k.cls", b"99999999999")], "the key 'k': the class in the .cls file is '99999999999'"),
    ([("k.png", png()), ("k.cls", b"\xff\xfe1")], "the key 'k': the .cls file is not text"),
    ([("k.png", png()), ("k.cls", b"1" * 65)], "the key 'k': the .cls file has 65 bytes"),
    ([("k.png", png()), ("k.cls", ("sym", "away"))], "the key 'k': the .cls file is a link to a file that is not"),
    ([("k.png", ("sym", "away")), ("k.cls", b"1")], "the key 'k': the image k.png is a link to a file that is not"),
    ([("k.png", png()), ("k.json", b"{")], "the key 'k': the .json file is damaged"),
    ([("k.png", png()), ("k.json", b'{"class": 1}')], "the key 'k': has no class: the .json file has no entry 'cls' or"),
    ([("k.png", png()), ("k.json", b"[" * 100_000)], "the key 'k': the .json file is damaged"),
    ([("k.png", png()), ("k.json", b'{"cls": true}')], "the key 'k': the class in the .json file is 'True'"),
    ([*sample("k", 1), *sample("k", 2)], "the key 'k' occurs twice"),
    ([*sample("k", 1), ("k.PNG", png())], r"the key 'k' occurs twice \(.png\)"),
    ([("k.txt", b"text")], r"holds no images with a class"),
]


@pytest.mark.parametrize(("members", "message"), MALFORMED)
def test_malformed_shards_are_named_with_the_key(root: Path, members: list, message: str) -> None:
    write_tar(root / "bad-001.tar", members)
    with pytest.raises(DataError, match=rf"bad-.*\.tar.*{message}"):
        opened(root, "bad-00[1].tar")


def test_class_numbers_beyond_the_names(root: Path) -> None:
    (root / "classes.txt").write_text("\n".join(CLASSES[:2]))
    with pytest.raises(DataError, match=r"train-000.tar: the key '0002' is of class 2, but .*classes.txt names 2 classes"):
        opened(root, "train-*.tar")
    for text, message in (("", "is empty"), ("a\n\nb", "line 2 is empty"), ("a\nb\na\n", "line 3 repeats 'a' of line 1")):
        (root / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            opened(root, "train-*.tar")


@pytest.mark.parametrize("cut", [0.99, 0.6, 0.5, 0.31])
def test_truncated_shards_are_named_with_the_last_key(root: Path, cut: float) -> None:
    path = root / "train-001.tar"
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[: int(end * cut) // 128 * 128])
    with pytest.raises(DataError, match=r"train-001.tar is .*the last file is 000\d\.(png|cls|txt)"):
        opened(root, "train-*.tar")


def test_damaged_images_are_unreadable_one_by_one(root: Path) -> None:
    write_tar(root / "train-003.tar", [("1.png", png()[:40]), ("1.cls", b"0"), ("2.png", png(7)), ("2.cls", b"1")])
    source = opened(root, "train-*.tar")
    with pytest.raises(UnreadableImageError):
        source.load(12)
    assert source.load(13)[0].getpixel((0, 0)) == (7, 7, 7)


def test_splits_must_have_the_same_classes(root: Path) -> None:
    write_shard(root / "val-0.tar", 0, 2)
    config = DataConfig(root=str(root), train_split="train-*.tar", val_split="val-0.tar")
    with pytest.raises(DataError, match="3 classes and validation 2"):
        open_train_and_val(config)
    (root / "classes.txt").write_text("\n".join([*CLASSES, "whale"]))
    train, val = open_train_and_val(config)
    assert val is not None and train.class_names == val.class_names == (*CLASSES, "whale")
    assert any("1 of 4 classes have no images: whale" in note for note in train.notes)


def test_shards_in_both_splits_are_noticed(root: Path) -> None:
    train, _ = open_train_and_val(DataConfig(root=str(root), train_split="train-*.tar", val_split="train-{001,002}.tar"))
    assert any("the held-out images are the training images" in note for note in train.notes)
    train, _ = open_train_and_val(
        DataConfig(root=str(root), train_split="train-{000,001}.tar", val_split="train-{001..002}.tar")
    )
    assert any("1 of 2 shards of the held-out images" in note for note in train.notes)


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [*sample("a", 0), *sample("b", 0)])
    with pytest.raises(DataError, match=r"only one class.*numbers in their .cls"):
        open_train_and_val(DataConfig(root=str(tmp_path), train_split="train-0.tar", val_split=None))


def test_many_shards_are_read_in_any_order_and_copies_open_their_own(tmp_path: Path) -> None:
    for number in range(70):
        write_shard(tmp_path / f"{number}.tar", number, 1)
    source = opened(tmp_path, "{0..69}.tar")
    order = [*range(69, -1, -1), 3, 69, 0]
    assert [source.load(index)[0].getpixel((0, 0))[0] for index in order] == order
    assert len(source._archives._files) == 64
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._archives._files and copy.load(5)[1] == 5 % 3


def batches(source, workers: int, skip: int = 0, augment: bool = True) -> list:
    preprocessing = Preprocessing(8, (0.5,) * 3, (0.2,) * 3, "bilinear", 1.0)
    transform = preprocessing.train_transform(AugmentConfig()) if augment else preprocessing.eval_transform()
    samples = TrainingSamples(source, OnImage(transform), 0, LabeledImages.collate)
    loader = TrainingLoader(samples, LoaderOptions(workers), BatchPlan(4, None, 1))
    return [batch.content for batch in loader.epoch(1, skip)]


def test_order_augmentation_and_resume_are_exact(root: Path) -> None:
    """A run continues in the middle of an epoch, with other loading processes, as if it had not stopped."""
    source = opened(root, "train-*.tar")
    whole, rest = batches(source, 0), batches(opened(root, "train-{000..002}.tar"), 2, skip=1)
    assert len(whole) == 3 and len(rest) == 2
    for one, other in zip(whole[1:], rest, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert fingerprint(source, source) == fingerprint(opened(root, "train-{000..002}.tar"), source)
    write_shard(root / "train-003.tar", 12)
    assert fingerprint(source, None) != fingerprint(opened(root, "train-*.tar"), None)


@pytest.fixture
def kept(root: Path, monkeypatch) -> list[Path]:
    """Keep listings of any size, and record every shard that is read."""
    monkeypatch.setenv("WIDEKERNEL_LISTINGS", str(root / "kept"))
    monkeypatch.setattr(listing_cache, "LEAST", 1)
    for shard in root.glob("*.tar"):
        os.utime(shard, (time.time() - 3600,) * 2)
    read: list[Path] = []
    read_shard = shard_source.read_shard
    monkeypatch.setattr(shard_source, "read_shard", lambda path: read.append(path) or read_shard(path))
    return read


def test_listings_are_kept_until_a_shard_changes(root: Path, kept: list[Path]) -> None:
    first, second = opened(root, "train-*.tar"), opened(root, "train-{000..002}.tar")
    assert len(kept) == 3
    assert described(first) == described(second) and fingerprint(first, first) == fingerprint(second, second)
    assert [second.size(index) for index in range(12)] == [len(png(n)) for n in range(12)]
    (root / "classes.txt").write_text("\n".join(CLASSES))
    assert opened(root, "train-*.tar").class_names == tuple(CLASSES) and len(kept) == 3

    write_tar(root / "train-001.tar", [*sample("0004", 2, 99), *sample("0005", 2, 98)])
    assert [name for name, *_ in described(opened(root, "train-*.tar"))[1]][4:6] == [
        "train-001.tar/0004.png", "train-001.tar/0005.png"
    ]  # fmt: skip
    assert len(kept) == 6
    opened(root, "train-{000..001}.tar")  # other shards have another listing
    assert len(kept) == 8


def test_damaged_listings_are_not_used(root: Path, kept: list[Path]) -> None:
    want = described(opened(root, "train-*.tar"))
    (file,) = (root / "kept").iterdir()
    content = file.read_bytes()
    for number, damaged in enumerate((content[:-1], content + b"?" * 8, content[:-40] + b"?" + content[-39:]), 2):
        file.write_bytes(damaged)
        assert described(opened(root, "train-*.tar")) == want and len(kept) == 3 * number


def test_shards_as_webdataset_writes_them(tmp_path: Path) -> None:
    """Its files have no folders, and their owner and times are set."""
    with tarfile.open(tmp_path / "train-000000.tar", "w:", format=tarfile.USTAR_FORMAT) as archive:
        for n in range(3):
            for kind, content in (("cls", str(n).encode()), ("jpg", png(n)), ("json", b'{"label": 7}')):
                info = tarfile.TarInfo(f"train/{n:06d}.{kind}")
                info.size, info.mtime, info.mode, info.uname = len(content), 1.5e9, 0o444, "bigdata"
                archive.addfile(info, io.BytesIO(content))
    assert [target for _, target, _ in described(opened(tmp_path, "train-000000"))[1]] == [0, 1, 2]
