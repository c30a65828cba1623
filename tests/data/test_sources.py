import contextlib
import io
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, features

from widekernel.data import DataConfig, datasets, open_split, open_train_and_val
from widekernel.data.images import UnreadableImageError, decode_image
from widekernel.data.sources import MappedSource
from widekernel.errors import DataError

AVIF = ("AVIF",) if features.check("avif") else ()


def encoded(mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (12, 9), **options) -> bytes:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder, layout):
    """Write small images: {'train': {'cat': 3}} makes train/cat/0.png ... 2.png."""
    for split, classes in layout.items():
        for name, count in classes.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                (folder / split / name / f"{index}.png").write_bytes(encoded())
    return DataConfig(root=str(folder))


def pack(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            content = encoded()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


GOOD = {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 1}}


def test_folder(tmp_path):
    train, val = open_train_and_val(fill(tmp_path, GOOD))
    assert train.class_names == val.class_names == ("cat", "dog")
    assert [train.load(index)[1] for index in range(len(train))] == [0, 0, 0, 1, 1]
    assert train.load(0)[0].size == (12, 9)
    assert train.sample_name(4) == "dog/1.png"


def test_folder_classes_are_alphabetical_in_folders_and_tars(tmp_path):
    names = ["10", "2", "1"]
    config = fill(tmp_path, {"train": dict.fromkeys(names, 1)})
    pack(tmp_path / "val.tar", [f"val/{name}/x.png" for name in names])
    train, val = open_train_and_val(config)
    assert train.class_names == val.class_names == ("1", "10", "2")
    targets = {val.sample_name(index): val.load(index)[1] for index in range(3)}
    assert targets == {"1/x.png": 0, "10/x.png": 1, "2/x.png": 2}


def test_hidden_folders_and_stray_files_are_not_classes(tmp_path):
    config = fill(tmp_path, GOOD)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("x")
    (tmp_path / "train" / "cat" / "Thumbs.db").write_text("x")
    assert open_split(config, "train").class_names == ("cat", "dog")
    assert len(open_split(config, "train")) == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(root="does/not/exist"), "does not exist"),
        (DataConfig(), "data.root is not set"),
        (DataConfig(name="digitz"), "Did you mean 'digits'"),
        (DataConfig(name="torch/cifar01", root="."), "Did you mean 'torch/cifar10'"),
        (DataConfig(name="torch/cifar10", root="does/not/exist"), "data.download true"),
        (DataConfig(name="torch/cifar10"), "data.root is not set"),
        (DataConfig(name="tfds/cifar10", root="."), "streamed"),
        (DataConfig(name=""), "not a known data set"),
    ],
    ids=lambda value: value.name if isinstance(value, DataConfig) else None,
)
def test_wrong_names_and_places(config, message):
    with pytest.raises(DataError, match=message):
        open_train_and_val(config)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"val": {"cat": 1}}, "train does not exist .* It holds: val"),
        ({"train": {}, "val": {"cat": 1}}, "train does not exist"),
        ({"train": {"cat": 0, "dog": 0}, "val": {"cat": 1}}, "holds no images"),
        ({"train": {"cat": 2, "dog": 0}, "val": {"cat": 1}}, "1 class folder.* without images: dog"),
        ({"train": {"cat": 1, "dog": 1}, "val": {"cat": 1}}, "2 classes and validation 1 .only in training: dog"),
        ({"train": {"cat": 1}, "val": {"cow": 1}}, "only in training: cat; only in validation: cow"),
    ],
)
def test_incomplete_folders(tmp_path, layout, message):
    with pytest.raises(DataError, match=message):
        open_train_and_val(fill(tmp_path, layout))


def test_folder_without_class_folders(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(encoded())
    with pytest.raises(DataError, match="has no class folders"):
        open_split(DataConfig(root=str(tmp_path)), "train")


def test_root_is_a_file(tmp_path):
    pack(tmp_path / "all.tar", ["train/a/x.png"])
    with pytest.raises(DataError, match=r"--data\.train_split all\.tar"):
        open_split(DataConfig(root=str(tmp_path / "all.tar")), "train")


def test_tar_by_absolute_name(tmp_path):
    pack(tmp_path / "images.tar", ["train/a/x.png", "train/b/y.png", "train/b/notes.txt"])
    source = open_split(DataConfig(train_split=str(tmp_path / "images.tar")), "train")
    assert source.class_names == ("a", "b")
    assert len(source) == 2
    assert source.load(1)[0].size == (12, 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a tar at all" * 100, "not a readable"), (b"", "not a readable|no images"), ([], "no images"),
     (["x.png"], "outside class folders"), (["train/a/readme.md"], "no images")],
)  # fmt: skip
def test_bad_tars(tmp_path, content, message):
    path = tmp_path / "train.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pack(path, content)
    with pytest.raises(DataError, match=message):
        open_split(DataConfig(root=str(tmp_path)), "train")


@pytest.mark.parametrize("cut", ["at a header", "within a header", "damaged header", "before the end mark"])
def test_incomplete_tars(tmp_path, cut):
    path = tmp_path / "train.tar"
    pack(path, ["train/a/x.png", "train/b/y.png", "train/b/z.png"])
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
        end = archive.offset
    content = path.read_bytes()
    path.write_bytes(
        {
            "at a header": content[: last.offset],
            "within a header": content[: last.offset + 100],
            "damaged header": content[: last.offset] + b"?" * 512 + content[last.offset + 512 :],
            "before the end mark": content[:end],
        }[cut]
    )
    with pytest.raises(DataError, match="is incomplete or damaged"):
        open_split(DataConfig(root=str(tmp_path)), "train")


def test_archives_may_end_with_other_kinds_of_members(tmp_path):
    pack(tmp_path / "train.tar", ["train/a/x.png", "train/notes.txt", "train/more.txt"])
    assert len(open_split(DataConfig(root=str(tmp_path)), "train")) == 1


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("train/cat/up", "..", "contains the link itself"),
        ("train/cat/self", ".", "contains the link itself"),
        ("train/cat/all", "../..", "contains the link itself"),
        ("train/cat/more", "../dog", "another class"),
        ("train/kitten", "cat", "another class"),
        ("train/everything", "..", "contains the link itself"),
        ("stock/back", "../train/cat", "contains the link itself"),
    ],
)
def test_links_that_repeat_images(tmp_path, link, target, message):
    config = fill(tmp_path, {**GOOD, "stock": {"x": 1}})
    (tmp_path / "train" / "cat" / "stock").symlink_to(tmp_path / "stock")
    assert len(open_split(config, "train")) == 6
    (tmp_path / link).symlink_to(target)
    with pytest.raises(DataError, match=message) as caught:
        open_split(config, "train")
    assert link.rpartition("/")[2] in str(caught.value)


def test_class_folders_may_be_links(tmp_path):
    config = fill(tmp_path, GOOD)
    fill(tmp_path, {"stock": {"cow": 2}})
    (tmp_path / "train" / "cow").symlink_to(tmp_path / "stock" / "cow")
    assert len(open_split(config, "train")) == 7


class Reader:
    """A reader like timm's for named data sets: its items are an open file and a label."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, index):
        return io.BytesIO(self.contents[index]), index


def test_unreadable_images_of_readers_are_not_replaced():
    source = MappedSource(Reader([b"damaged", encoded()]), ("a", "b"), "hfds/some/set")
    with pytest.raises(UnreadableImageError, match="known format"):
        source.load(0)
    assert source.load(1)[1] == 1


def test_images_of_readers_follow_the_rules_of_decoding():
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    for dataset in (Reader([buffer.getvalue()]), [(buffer.getvalue(), 0)], [(Image.fromarray(values), 0)]):
        image = MappedSource(dataset, ("a",), "set").load(0)[0]
        assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255]


def test_named_sets_are_read_through_their_reader(monkeypatch):
    reader = Reader([b"damaged", encoded()])
    reader.dataset = type("Table", (), {"features": {"label": type("Label", (), {"names": ["a", "b"]})}})
    monkeypatch.setattr(datasets, "create_dataset", lambda *_, **__: type("Set", (), {"reader": reader})())
    source = open_split(DataConfig(name="hfds/some/set"), "train")
    assert (len(source), source.class_names, source.load(1)[1]) == (2, ("a", "b"), 1)
    with pytest.raises(UnreadableImageError):
        source.load(0)


def test_digits():
    pytest.importorskip("sklearn")
    train, val = open_train_and_val(DataConfig(name="digits"))
    assert (len(train), len(val)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    counts = np.bincount([val.load(index)[1] for index in range(len(val))])
    assert counts.min() >= 34
    assert counts.max() <= 37
    again = open_split(DataConfig(name="digits"), "val")
    assert np.array_equal(val.images, again.images)
    assert val.images.max() == 255
    in_train = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in in_train for image in val.images) == 0


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install widekernel\[demo\]"):
        open_split(DataConfig(name="digits"), "train")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGBA", "RGB"])
def test_modes_become_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = decode_image(io.BytesIO(encoded(mode, kind)))
    assert (image.mode, image.size) == ("RGB", (12, 9))


def test_transparent_pixels_become_black():
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 0))
    image.putpixel((1, 0), (200, 100, 50, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    decoded = decode_image(io.BytesIO(buffer.getvalue()))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (200, 100, 50)]


def test_16_bit_images_keep_their_range():
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    decoded = np.asarray(decode_image(io.BytesIO(buffer.getvalue())))[0, :, 0]
    assert decoded.tolist() == [0, 1, 128, 255]


def huge_png() -> bytes:
    """Return a PNG file of a few bytes whose valid header states 40,000 × 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def float_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", encoded()[:60], encoded(kind="JPEG")[:200], huge_png(), float_tiff(), b"GIF89a"],
    ids=["empty", "text", "truncated png", "truncated jpeg", "huge", "float", "gif header"],
)
def test_undecodable_content_raises_one_kind_of_error(content):
    with pytest.raises(UnreadableImageError):
        decode_image(io.BytesIO(content))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to decode"), NotImplementedError("Unknown pixel format"), struct.error("unpack"), TypeError("x"),
     ValueError("x"), SyntaxError("x"), IndexError("x"), KeyError("x"), EOFError(), MemoryError(), zlib.error("x")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_every_error_of_a_decoder_is_an_unreadable_image(error, monkeypatch):
    def fail(_file, **_options):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UnreadableImageError, match=type(error).__name__):
        decode_image(io.BytesIO(encoded()))


def test_random_damage_raises_no_other_error():
    generator = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", *AVIF, "DDS"):
        content = encoded(kind=kind)
        for _ in range(40):
            damaged = bytearray(content)
            for position in generator.integers(0, len(content), 5):
                damaged[position] = generator.integers(256)
            with contextlib.suppress(UnreadableImageError):
                assert decode_image(io.BytesIO(bytes(damaged))).mode == "RGB"


def test_shared_cifar(shared):
    train, val = open_train_and_val(
        DataConfig(root=str(shared / "data"), train_split="cifar10_train.tar", val_split="cifar10_test.tar")
    )
    assert (len(train), len(val), len(train.class_names)) == (50_000, 10_000, 10)
    image, target = val.load(9_999)
    assert image.size == (32, 32)
    assert target == 9
