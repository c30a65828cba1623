"""A tree yields the same samples as a folder and as an archive, whatever folders lie around it."""

import contextlib
import pickle
import random
import shutil
import string
import subprocess
import tarfile
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.datasets.folder import find_classes, make_dataset
from trees import described, opened, pack, plant, png, write_tar

from widekernel.data import DataConfig, open_split, open_train_and_val
from widekernel.data.images import UnreadableImageError
from widekernel.data.tar_source import TarSource
from widekernel.errors import DataError
from widekernel.tasks.fingerprint import fingerprint

TREE = [
    "cat/1.png",
    "cat/10.jpg",
    "cat/2.png",
    "cat/more/x.png",
    "cat/more-b/y.png",
    "dog/images/a.JPEG",
    "10/x.webp",
    "9/x.gif",
]
CLASSES = ("10", "9", "cat", "dog")

letters = st.sampled_from([*string.ascii_letters[:6], "0", "1", "-", " ", "[", "é", "e\u0301", "日", "%"])
part = st.lists(letters, min_size=1, max_size=3).map(lambda parts: f"n{''.join(parts)}n")
clutter = st.sampled_from([".ipynb_checkpoints", "._a.png", "__MACOSX", "Thumbs.db", ".hidden"])
image = st.builds(lambda stem, ending: stem + ending, part, st.sampled_from([".png", ".JPG", ".jfif", ".tif", ".webp"]))
other = st.builds(lambda stem, ending: stem + ending, part, st.sampled_from([".txt", "", ".tar", ".tar.gz", ".PNGx"]))
path = st.builds(
    lambda top, folders, name: "/".join((top, *folders, name)),
    part,
    st.lists(part | clutter, max_size=2),
    image | image | image | other | clutter,
)


def free_of_conflicts(paths):
    """Leave out paths that need a file and a folder of one name."""
    folders = {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}
    return sorted(set(paths) - folders)


def outcome(root, part):
    try:
        source = opened(root, part)
    except DataError as error:
        return type(error)
    counts = source.listing.skipped
    return described(source), counts.endings, counts.outside


@settings(max_examples=60, deadline=None)
@given(
    paths=st.lists(path, min_size=1, max_size=12),
    complete=st.booleans(),
    wrapper=st.sampled_from([".", "split", "/data/x/split", "./a/split/"]),
)
@example(paths=["a/1.png", "b/1.png", "c/x.txt"], complete=False, wrapper="split")
@example(paths=["a/1.png", "b/1.png", "x.png"], complete=True, wrapper="split")
def test_folders_and_archives_of_any_tree_agree(tmp_path_factory, paths, complete, wrapper):
    root = tmp_path_factory.mktemp("tree")
    plant(root / "split", free_of_conflicts(paths))
    if complete:  # otherwise a class without images is an error, in both forms
        plant(root / "split", {f"{path.partition('/')[0]}/one.png" for path in paths if "/" in path})
    plant(root / "split", ["nsurelyn/1.png", "nsure too/1.png"])  # several classes
    expected = outcome(root, "split")
    (root / "packed").mkdir()
    pack(root / "split", root / "packed" / "split.tar", wrapper)
    assert outcome(root / "packed", "split") == expected


@pytest.mark.parametrize(
    "wrapper", [".", "train", "./train", "anything", "/home/me/train", "a/b/c", ".cache/x/train", "VAL"]
)
def test_folders_around_the_classes_in_an_archive(tmp_path, wrapper):
    plant(tmp_path / "train", TREE)
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "train", tmp_path / "packed" / "train.tar", wrapper)
    folder, packed = opened(tmp_path), opened(tmp_path / "packed")
    assert folder.class_names == CLASSES
    assert described(packed) == described(folder)
    assert fingerprint(packed, packed) == fingerprint(folder, folder)


def test_the_order_is_that_of_torchvision(tmp_path):
    plant(tmp_path / "train", [name for name in TREE if not name.endswith("gif")])
    names, indices = find_classes(tmp_path / "train")
    expected = make_dataset(str(tmp_path / "train"), indices, extensions=(".png", ".jpg", ".jpeg", ".webp"))
    source = opened(tmp_path)
    assert list(source.class_names) == names
    found = [(str(tmp_path / "train" / name), target) for name, target in zip(source.names, source.targets, strict=True)]
    assert found == expected


def test_one_class_in_a_folder_named_like_a_split(tmp_path):
    plant(tmp_path / "val", ["cat/images/1.png", "cat/images/2.png"])
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "val", tmp_path / "packed" / "val.tar", "set/val")
    assert described(opened(tmp_path / "packed", "val")) == described(opened(tmp_path, "val"))
    assert opened(tmp_path, "val").class_names == ("cat",)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["one/two/x.png"], "which of these folders is the class"),
        (["train/x.png"], "outside class folders"),
        (["data/train/x.png"], "outside class folders"),
        (["train/cat/x.png", "train/dog/x.png", "stock/cow/x.png"], "train beside stock"),
        (["train/cat/x.png", "val/cat/x.png"], "2 classes, train, val: the name of a part"),
        (["a/train/cat/x.png", "a/val/cat/x.png"], "2 classes, train, val: the name of a part"),
        (["train/images/cat/x.png", "train/images/dog/x.png"], "one class, images: .* archive from that folder alone"),
    ],
)
def test_archives_that_do_not_show_their_classes(tmp_path, paths, message):
    write_tar(tmp_path / "train.tar", [(path, png()) for path in paths])
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_archives_in_an_archive_are_folders(tmp_path):
    for name, shade in (("n01", 3), ("n02", 5)):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}_{number}.JPEG", png(shade + number)) for number in range(2)])
    members = [(f"{name}.tar", (tmp_path / f"{name}.tar").read_bytes()) for name in ("n02", "n01")]
    write_tar(tmp_path / "train.tar", members)
    names, samples = described(opened(tmp_path))
    assert names == ("n01", "n02")
    assert samples == [
        ("n01/n01_0.JPEG", 0, 3),
        ("n01/n01_1.JPEG", 0, 4),
        ("n02/n02_0.JPEG", 1, 5),
        ("n02/n02_1.JPEG", 1, 6),
    ]


def test_a_class_may_be_named_like_a_split(tmp_path):
    plant(tmp_path / "train", ["test/1.png", "cat/1.png"])
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "train", tmp_path / "packed" / "train.tar")
    assert described(opened(tmp_path / "packed")) == described(opened(tmp_path))


def test_a_damaged_archive_in_an_archive_is_named(tmp_path):
    write_tar(tmp_path / "train.tar", [("cat.tar", b"junk" * 300), ("dog/1.png", png())])
    with pytest.raises(DataError, match=r"train\.tar is not .*cat\.tar in it"):
        opened(tmp_path)


def test_a_truncated_archive_in_an_archive_is_named(tmp_path):
    for name in ("cat", "dog"):
        write_tar(tmp_path / f"{name}.tar", [("1.png", png()), ("2.png", png())])
    members = [
        ("train/cat.tar", (tmp_path / "cat.tar").read_bytes()),
        ("train/dog.tar", (tmp_path / "dog.tar").read_bytes()[:1024]),
    ]
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(DataError, match=r"train/dog\.tar in .*train\.tar is incomplete or damaged: after 1,024 bytes"):
        opened(tmp_path)


@pytest.mark.parametrize("wrapper", ["train", ".", "any"])
def test_archives_deeper_than_class_folders_are_left_out(tmp_path, wrapper):
    plant(tmp_path / "train", ["a/1.png", "b/1.png", "b/in/notes.tar", "b/notes.TAR"])  # not really archives
    plant(tmp_path / "more", ["1.png", "x/2.png"])
    pack(tmp_path / "more", tmp_path / "train" / "a" / "orig.tar")
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "train", tmp_path / "packed" / "train.tar", wrapper)
    assert outcome(tmp_path / "packed", "train") == outcome(tmp_path, "train")
    assert opened(tmp_path / "packed").listing.skipped.endings == {".tar": 3}
    assert list(opened(tmp_path / "packed").names) == ["a/1.png", "b/1.png"]


def test_an_archive_beside_the_folder_of_its_name_is_left_out(tmp_path):
    plant(tmp_path / "train", ["a/1.png", "b/1.png"])
    pack(tmp_path / "train" / "a", tmp_path / "train" / "a.tar")
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "train", tmp_path / "packed" / "train.tar", "train")
    assert outcome(tmp_path / "packed", "train") == outcome(tmp_path, "train")


@pytest.mark.parametrize("target", ["n01.tar", "n01"])
def test_links_to_archives_that_stand_for_folders(tmp_path, target):
    write_tar(tmp_path / "n01.tar", [("1.png", png())])
    members = [("n01.tar", (tmp_path / "n01.tar").read_bytes()), ("b/1.png", png()), ("n02.tar", ("sym", target))]
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(DataError, match=r"holds the link n02\.tar, which leads to a folder"):
        opened(tmp_path)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("size", [-1, -512, -1024, -1536])
def test_negative_sizes_are_refused(tmp_path, size, inside):
    header = tarfile.TarInfo("train/b/y.png" if not inside else "y.png")
    header.size = size
    write_tar(tmp_path / "one.tar", [("train/a/x.png", png())])
    content = (tmp_path / "one.tar").read_bytes()[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    (tmp_path / "train.tar").write_bytes(content)
    if inside:
        write_tar(tmp_path / "train.tar", [("b.tar", content), ("c/1.png", png())])
    with pytest.raises(
        DataError, match=r"train\.tar (is not .*|in .* )(damaged|\(.*offset|\(.*header)|incomplete or damaged"
    ):
        opened(tmp_path)


def test_the_last_of_several_members_counts(tmp_path):
    write_tar(
        tmp_path / "train.tar", [("a/x.png", png(1)), ("b/x.png", png(2)), ("./a/x.png", png(3)), ("a//y.png", png(4))]
    )
    assert described(opened(tmp_path))[1] == [("a/x.png", 0, 3), ("a/y.png", 0, 4), ("b/x.png", 1, 2)]


def test_links_to_files(tmp_path):
    plant(tmp_path / "train", ["a/x.png", "b/y.png"])
    (tmp_path / "train" / "a" / "soft.png").symlink_to("x.png")
    (tmp_path / "train" / "b" / "again.png").symlink_to("../a/soft.png")
    (tmp_path / "train" / "b" / "hard.png").hardlink_to(tmp_path / "train" / "b" / "y.png")
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "train", tmp_path / "packed" / "train.tar", "train")
    with tarfile.open(tmp_path / "packed" / "train.tar") as archive:
        assert sum(member.islnk() or member.issym() for member in archive) == 3
    assert described(opened(tmp_path / "packed")) == described(opened(tmp_path))
    assert len(opened(tmp_path)) == 5


def test_broken_links_are_unreadable_images(tmp_path):
    plant(tmp_path / "train", ["a/x.png", "b/y.png"])
    (tmp_path / "train" / "a" / "lost.png").symlink_to("/nowhere/at/all.png")
    (tmp_path / "train" / "b" / "circle.png").symlink_to("circle.png")
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "train", tmp_path / "packed" / "train.tar", "train")
    for root in (tmp_path, tmp_path / "packed"):
        source = opened(root)
        assert list(source.names) == ["a/lost.png", "a/x.png", "b/circle.png", "b/y.png"]
        for index in (0, 2):
            with pytest.raises(UnreadableImageError):
                source.load(index)


@pytest.mark.parametrize("target", ["../train/a", "a/in", ".", "..", "a/../b"])
@pytest.mark.parametrize("link", ["train/c", "train/c.png", "train/b/c/more.txt"])
def test_links_to_folders_in_archives(tmp_path, target, link):
    climb = "../" * (link.count("/") - 1)
    members = [("train/a/in/x.png", png()), ("train/b/x.png", png()), (link, ("sym", climb + target))]
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(DataError, match=rf"holds the link {link}, .* tar --dereference"):
        opened(tmp_path)


def test_broken_links_without_the_ending_of_an_image_are_left_out(tmp_path):
    plant(tmp_path / "train", ["a/x.png", "b/y.png"])
    for link, target in (("b/note.txt", "/nowhere"), ("b/circle", "circle"), ("c", "../stock"), ("a/LICENSE", "/no/x.png")):
        (tmp_path / "train" / link).symlink_to(target)
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "train", tmp_path / "packed" / "train.tar", "train")
    assert outcome(tmp_path / "packed", "train") == outcome(tmp_path, "train")
    source = opened(tmp_path / "packed")
    assert source.listing.skipped.endings == {".txt": 1, "": 3}
    assert "4 of these are links that lead out of the archive or nowhere, such as " in source.notes[-1]


def test_sparse_members_are_unreadable_with_the_reason(tmp_path):
    tar = shutil.which("tar")
    if tar is None or b"GNU" not in subprocess.run([tar, "--version"], capture_output=True).stdout:
        pytest.skip("needs GNU tar")
    plant(tmp_path / "train", ["a/x.png", "b/y.png"])
    with (tmp_path / "train" / "a" / "holes.png").open("wb") as file:
        file.write(png())
        file.truncate(1 << 20)
    subprocess.run([tar, "-S", "-cf", tmp_path / "train.tar", "-C", tmp_path, "train"], check=True)
    source = TarSource(tmp_path / "train.tar")
    with pytest.raises(UnreadableImageError, match="without --sparse"):
        source.load(0)
    assert source.load(1)[1] == 0


def test_archives_can_be_pickled(tmp_path):
    plant(tmp_path / "train", TREE)
    pack(tmp_path / "train", tmp_path / "train.tar")
    source = TarSource(tmp_path / "train.tar")
    source.load(0)
    assert described(pickle.loads(pickle.dumps(source))) == described(source)


def test_names_are_compared_after_normalization(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "pâté") for form in ("NFC", "NFD"))
    assert composed != decomposed
    plant(tmp_path / "train", [f"{composed}/x.png", "zoo/x.png", "pb/x.png"])
    plant(tmp_path / "val", [f"{decomposed}/x.png", "zoo/x.png", "pb/x.png"])
    train, val = open_train_and_val(DataConfig(root=str(tmp_path)))
    assert train.class_names == val.class_names == ("pb", composed, "zoo")
    assert val.load(1)[1] == 1
    assert fingerprint(train, train) == fingerprint(val, val)
    plant(tmp_path / "val", [f"{composed}/y.png"])
    with pytest.raises(DataError, match="two class folders named"):
        open_split(DataConfig(root=str(tmp_path)), "val")


def test_damaged_archives_are_refused_or_read(tmp_path):
    plant(tmp_path / "tree", ["cat/1.png", "cat/é/2.png", f"dog/{'x' * 120}/3.png", "dog/4.png"])
    (tmp_path / "tree" / "dog" / "link.png").symlink_to("4.png")
    good = pack(tmp_path / "tree", tmp_path / "good.tar", "train").read_bytes()
    headers = [start for start in range(0, len(good), 512) if good[start + 257 : start + 262] == b"ustar"]
    assert len(headers) > 8
    draw = random.Random(0)
    outcomes = set()
    for _ in range(150):
        content = bytearray(good)
        start = draw.choice(headers)
        content[start + draw.choice([draw.randrange(512), 124 + draw.randrange(12), 156, 157])] = draw.randrange(256)
        if draw.random() < 0.8:  # a valid checksum
            header = content[start : start + 512]
            content[start + 148 : start + 156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        (tmp_path / "train.tar").write_bytes(content)
        try:
            source = opened(tmp_path)
        except DataError:
            outcomes.add("refused")
            continue
        for index in range(len(source)):
            with contextlib.suppress(UnreadableImageError):
                source.load(index)
        outcomes.add("read")
    assert outcomes == {"refused", "read"}


@pytest.mark.parametrize("error", [OverflowError("x"), ValueError("x"), MemoryError("x"), tarfile.HeaderError("x")])
def test_every_error_of_the_archive_reader_becomes_a_data_error(tmp_path, monkeypatch, error):
    write_tar(tmp_path / "train.tar", [("a/x.png", png()), ("b/x.png", png())])

    def fail(_archive):
        raise error

    monkeypatch.setattr(tarfile.TarFile, "next", fail)
    with pytest.raises(DataError, match=r"train\.tar is not a readable"):
        opened(tmp_path)
