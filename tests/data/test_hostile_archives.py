"""Archives whose members aim outside: nothing is unpacked, written or followed outside of the archive."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from tests.data.trees import opened, png, write_tar

from widekernel.data import images
from widekernel.data.images import UnreadableImageError
from widekernel.errors import DataError


def files_below(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


GOOD = [("train/a/1.png", png(1)), ("train/b/2.png", png(2))]


@pytest.mark.parametrize("name", ["../../evil/x.png", "/evil/a/x.png", "train/../../evil/x.png", "train/a/../../../x.png"])
def test_members_with_paths_that_climb_out(name: str, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    write_tar(place / "train.tar", [*GOOD, (name, png(3))])
    before = files_below(tmp_path)
    source, refusal = None, ""
    try:
        source = opened(place)
    except DataError as error:
        refusal = str(error)
    if source is None:
        assert str(place / "train.tar") in refusal
    else:
        assert len([source.load(index) for index in range(len(source))]) >= 2
        assert not any(".." in path.split("/") or path.startswith("/") for path in source.names)
    assert files_below(tmp_path) == before and not Path("/evil").exists()


@pytest.mark.parametrize("kind", ["sym", "hard"])
@pytest.mark.parametrize("target", ["/etc/hostname", "../../secret.png", "../../../../etc/passwd"])
def test_links_to_files_outside_are_not_followed(kind: str, target: str, tmp_path: Path) -> None:
    place = tmp_path / "deep"
    place.mkdir()
    (tmp_path / "secret.png").write_bytes(png(200))
    write_tar(place / "train.tar", [*GOOD, ("train/a/link.png", (kind, target))])
    source = opened(place)
    index = list(source.names).index("a/link.png")
    with pytest.raises(UnreadableImageError, match="not in the archive"):
        source.load(index)


def test_devices_and_pipes_are_no_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", GOOD)
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        for number, kind in enumerate((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"train/a/device{number}.png")
            info.type, info.devmajor, info.devminor = kind, 1, 5
            tar.addfile(info)
    source = opened(tmp_path)
    for index, name in enumerate(source.names):
        if "device" in name:
            with pytest.raises(UnreadableImageError):
                source.load(index)
        else:
            assert source.load(index)[0].size == (2, 2)


def test_classes_and_files_that_differ_in_case_only(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [("train/a/1.png", png(1)), ("train/A/1.PNG", png(2)), ("train/a/1.PNG", png(3))])
    source = opened(tmp_path)
    assert source.class_names == ("A", "a") and list(source.names) == ["A/1.PNG", "a/1.PNG", "a/1.png"]
    assert any("differ" in note and "case" in note for note in source.notes)


def test_members_are_read_up_to_a_limit(tmp_path: Path, monkeypatch) -> None:
    """An image of which little is stored cannot become arbitrarily large: sizes are checked before anything is read."""
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    monkeypatch.setattr("widekernel.data.open_archives.MAX_BYTES", 1000)
    write_tar(tmp_path / "train.tar", [*GOOD, ("train/b/big.png", bytes(100_000))])
    source = opened(tmp_path)
    with pytest.raises(UnreadableImageError, match="limit is 1,000"):
        source.load(list(source.names).index("b/big.png"))


def test_an_archive_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    info = tarfile.TarInfo("train/b/claim.png")
    info.size = 2**40
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("train/a/1.png"), io.BytesIO())
    (tmp_path / "train.tar").write_bytes(buffer.getvalue()[:512] + info.tobuf() + png(1))
    with pytest.raises(DataError, match=r"train\.tar"):
        opened(tmp_path)
