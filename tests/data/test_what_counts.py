"""Files that are images, clutter, or skipped with a note; and folders that are not classes."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from PIL import Image, features
from trees import opened, pack, plant, png, write_tar

from widekernel.data import DataConfig, open_split, open_train_and_val
from widekernel.data.formats import image_endings, image_formats, is_clutter, printable
from widekernel.data.images import UnreadableImageError, decode_image
from widekernel.errors import ConfigError, DataError

TWO = ["cat/1.png", "dog/1.png"]


def both(tmp_path):
    """Return the split as a folder and as an archive."""
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "train", tmp_path / "packed" / "train.tar", "train")
    return opened(tmp_path), opened(tmp_path / "packed")


def test_only_endings_of_pixel_formats_count():
    endings = image_endings()
    assert {
        ".png",
        ".jpg",
        ".jpeg",
        ".jfif",
        ".jpe",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".webp",
        ".mpo",
    } <= endings
    assert (".avif" in endings) == features.check("avif")
    assert not endings & {
        ".eps",
        ".ps",
        ".pdf",
        ".mpg",
        ".mpeg",
        ".wmf",
        ".emf",
        ".h5",
        ".hdf",
        ".grib",
        ".bufr",
        ".txt",
        "",
    }


def test_images_of_every_ending_are_read(tmp_path):
    Image.init()
    written = []
    for ending in sorted(image_endings()):
        kind = {".mpo": "JPEG"}.get(ending, Image.registered_extensions()[ending])
        if kind not in Image.SAVE or kind in ("ICNS", "BLP", "MSP", "XBM", "IM") or ending == ".pfm":
            continue
        mode = {".pgm": "L", ".pbm": "1"}.get(ending, "RGB")
        for name in ("cat", "dog"):
            place = tmp_path / "train" / name
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode).save(place / f"x{ending.upper()}", kind)
        written.append(ending)
    assert len(written) > 20
    for source in both(tmp_path):
        assert len(source) == 2 * len(written)
        assert source.notes == ()
        for index in range(len(source)):
            assert source.load(index)[0].getpixel((8, 8))[1] > 250, source.sample_name(index)


def test_formats_that_need_other_programs_are_not_tried(monkeypatch):
    assert not {"EPS", "WMF", "MPEG"} & set(image_formats())
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UnreadableImageError, match="known format"):
        decode_image(io.BytesIO(drawing))


@pytest.mark.parametrize(
    "path",
    ["cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png",
     "cat/Thumbs.db", "cat/desktop.ini", "cat/a/b/.hidden/c/1.png", "._cat", "cat/@eaDir/1.png/M.jpg", ".DS_Store"],
)  # fmt: skip
def test_clutter_is_ignored_silently(tmp_path, path):
    plant(tmp_path / "train", [*TWO, path])
    for source in both(tmp_path):
        assert (list(source.names), source.class_names, source.notes) == (TWO, ("cat", "dog"), ())


def test_names_that_are_not_clutter():
    assert not any(is_clutter(name) for name in ("a.b", "thumbs", "_cat", "lost", "macosx", "~cat"))


def test_skipped_files_are_counted_in_a_note(tmp_path):
    plant(tmp_path / "train", [*TWO, "cat/notes.txt", "cat/deep/more.txt", "dog/LICENSE", "1.png", "list.csv"])
    for source in both(tmp_path):
        assert list(source.names) == TWO
        by_ending, outside = source.notes
        assert "4 file(s) left out" in by_ending
        assert "2 .txt" in by_ending and "1 .csv" in by_ending and "1 without an extension" in by_ending
        assert "1 image(s) left out, which lie outside the class folders, such as 1.png" in outside


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_pipes_are_not_images(tmp_path):
    plant(tmp_path / "train", TWO)
    os.mkfifo(tmp_path / "train" / "cat" / "waits.png")
    (tmp_path / "train" / "dog" / "endless.png").symlink_to("/dev/zero")
    source = opened(tmp_path)
    assert list(source.names) == TWO
    assert "2 file(s) left out" in source.notes[0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_names_that_are_not_text(tmp_path):
    names = [b"caf\xe9", b"two\nlines", b" space ", "日本 🐈".encode(), b"[red]x[c]", b"%s"]
    for name in names:
        folder = os.path.join(os.fsencode(tmp_path / "train"), name)  # noqa: PTH118 - bytes
        os.makedirs(folder)  # noqa: PTH103
        with open(os.path.join(folder, name + b".png"), "wb") as file:  # noqa: PTH118, PTH123
            file.write(png(7))
    folder, packed = both(tmp_path)
    assert folder.class_names == packed.class_names == tuple(sorted(os.fsdecode(name) for name in names))
    assert list(folder.names) == list(packed.names)
    assert [source.load(index)[0].getpixel((0, 0))[0] for source in (folder, packed) for index in range(6)] == [7] * 12
    assert printable(os.fsdecode(b"a\xe9\n")) == "a\\xe9\\n"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["images/cat/1.png", "images/dog/1.png"], r"one class, images.*\(cat, dog\), set --data.train_split train/images"),
        (["train/cat/1.png", "val/cat/1.png"], r"2 classes, train, val.* set --data.train_split train/train"),
        (["Images/1.png", "Annotations/1.png"], "2 classes, Annotations, Images: the name of a part"),
        (
            ["Office/cat/1.png", "Office/dog/1.png"],
            r"only one class, 'Office'.*\(cat, dog\), set --data.train_split train/Office",
        ),
        (["cat/1.png"], "only one class, 'cat', so there is nothing to learn"),
        (["1.png", "2.png"], "no class folders, but 2 image.*folder of one class"),
        (["batch.zip"], "no class folders.* It contains batch.zip"),
    ],
)
def test_trees_without_classes_are_refused(tmp_path, paths, message):
    for split in ("train", "val"):
        plant(tmp_path / split, paths)
    with pytest.raises(DataError, match=message):
        open_train_and_val(DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["cat/1.png", "test/1.png", "dog/1.png"], "among the 3 classes is test"),
        (["Cat/1.png", "cat/1.png", "dog/1.png"], "differ only in case or spaces: Cat, cat"),
        (
            ["dslr/cat/1.png", "dslr/dog/1.png", "webcam/cat/1.png", "webcam/dog/1.png"],
            "each holds the same folders cat, dog",
        ),
    ],
)
def test_suspicious_trees_get_a_note(tmp_path, paths, message):
    plant(tmp_path / "train", paths)
    for source in both(tmp_path):
        assert len(source.notes) == 1 and message in source.notes[0]


def test_usual_trees_get_no_note(tmp_path):
    plant(tmp_path / "train", ["n01/images/1.png", "n02/images/1.png"])
    assert opened(tmp_path).notes == ()


def test_one_class_may_be_evaluated(tmp_path):
    plant(tmp_path / "val", ["cat/1.png"])
    assert open_split(DataConfig(root=str(tmp_path)), "val").class_names == ("cat",)


def test_held_out_images_that_are_the_training_images_get_a_note(tmp_path):
    plant(tmp_path / "train", TWO)
    train, _ = open_train_and_val(DataConfig(root=str(tmp_path), val_split="./train"))
    assert "the held-out images are the training images" in train.notes[0]


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [("train.tar.gz", "w:gz", "compressed by gzip"), ("train.tgz", "w:gz", "`gunzip`"), ("train.tar.xz", "w:xz", "by xz"),
     ("train.tar.bz2", "w:bz2", "by bzip2"), ("train.tar", "w:gz", "train.tar is compressed by gzip"),
     ("train", "w", "It is an archive, but its name must end in .tar")],
)  # fmt: skip
def test_compressed_and_misnamed_archives_are_refused(tmp_path, name, mode, message):
    plant(tmp_path / "tree", TWO)
    with tarfile.open(tmp_path / name, mode) as archive:
        archive.add(tmp_path / "tree", ".")
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["train.zip", "train.tar"])
def test_zip_archives(tmp_path, name):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("cat/1.png", png())
    with pytest.raises(DataError, match=r"is a zip archive.*`unzip`"):
        opened(tmp_path)


def test_wrong_roots_are_explained(tmp_path):
    plant(tmp_path / "data" / "train", TWO)
    for root, part, message in (
        (tmp_path / "data" / "train", "train", f"seems to be a split itself: set --data.root {tmp_path / 'data'}"),
        (tmp_path / "data" / "train" / "cat" / "1.png", "train", "It is a single image"),
        (tmp_path / "data" / "train" / "cat", "1.png", "is a single image"),
        (tmp_path / "data" / "train" / "cat", ".", "no class folders, but 1 image"),
        (tmp_path / "data", "valid", "It holds: train"),
        (tmp_path / "data" / "train" / "cat", "train", "seems to be the folder of one class"),
    ):
        with pytest.raises(DataError, match=message):
            opened(root, part)


def test_home_and_variables_in_the_root_are_expanded(tmp_path, monkeypatch):
    plant(tmp_path / "data" / "train", TWO)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "data"))
    for root, part in (("~/data", "train"), ("$WHERE", "train"), ("${WHERE}", "train"), (None, "~/data/train")):
        assert len(open_split(DataConfig(root=root, train_split=part), "train")) == 2
    with pytest.raises(ConfigError, match=r"data\.root is '\$NOWHERE/x', but the variable NOWHERE is not set"):
        open_split(DataConfig(root="$NOWHERE/x"), "train")
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / "~" / "train", ["a/1.png", "b/1.png", "c/1.png"])
    assert len(open_split(DataConfig(root="~"), "train")) == 3  # an existing folder of that name takes precedence


def test_folders_without_permission_are_refused(tmp_path, monkeypatch):
    plant(tmp_path / "train", TWO)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cat cannot be read as an image folder: Permission denied"):
        opened(tmp_path)


def test_archives_of_hidden_files_only_are_refused(tmp_path):
    write_tar(tmp_path / "train.tar", [("train/cat/._1.png", png()), ("train/__MACOSX/1.png", png())])
    with pytest.raises(DataError, match="holds no images"):
        opened(tmp_path)
