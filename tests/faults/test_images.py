"""Malformed and odd images: each is decoded faithfully, or left out with an error that names the file; memory is bounded."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from widekernel.data import EvaluationSamples, TrainingSamples
from widekernel.data.folder_source import FolderSource

KINDS = ("JPEG", "PNG", "TIFF", "GIF", "BMP", *(("WEBP",) if features.check("webp") else ()))
MOST_MEMORY = 2**30


def picture(size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return a smooth picture with full range and some noise, in which black and white areas are small."""
    width, height = size
    ramp = np.add.outer(np.linspace(0, 200, height), np.linspace(0, 55, width))
    noise = np.random.default_rng(0).integers(-9, 9, (height, width, 3))
    return Image.fromarray(np.clip(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1) + noise, 0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def black_png(width: int, height: int) -> bytes:
    """Return a small file that claims, and partly contains, a huge image."""
    rows = zlib.compressobj(9)
    row, body = bytes(1 + width // 8), b""
    for _ in range(min(height, 10_000)):
        body += rows.compress(row)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body + rows.flush()) + chunk(b"IEND", b"")


def faithful() -> dict[str, tuple[bytes, Image.Image]]:
    """Return odd but valid files, with the picture that each must yield."""
    rgb, gray = picture(), picture().convert("L")
    palette, see_through = rgb.convert("P", palette=Image.Palette.ADAPTIVE), rgb.copy()
    see_through.putalpha(gray)
    on_black = Image.composite(rgb, Image.new("RGB", rgb.size), gray)
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "gray.png": (saved(gray, "PNG"), gray),
        "gray_alpha.png": (saved(see_through.convert("LA"), "PNG"), on_black.convert("L")),
        "palette.png": (saved(palette, "PNG"), palette),
        "palette_transparent.png": (saved(palette, "PNG", transparency=255), palette),
        "1bit.png": (saved(gray.convert("1"), "PNG"), gray.convert("1")),
        "cmyk.jpg": (saved(rgb.convert("CMYK"), "JPEG", quality=98), rgb),
        "alpha.png": (saved(see_through, "PNG"), on_black),
        "png_named.jpg": (saved(rgb, "PNG"), rgb),
        "16bit.png": (saved(deep, "PNG"), gray),
        "16bit.tif": (saved(deep, "TIFF"), gray),
        "16bit.pgm": (saved(deep, "PPM"), gray),
        "animated.gif": (saved(palette, "GIF", save_all=True, append_images=[Image.new("P", rgb.size)] * 2), palette),
        "orientation.jpg": (saved(rgb, "JPEG", quality=98, exif=turned), rgb),
        "1x1.png": (saved(rgb.crop((20, 20, 21, 21)), "PNG"), rgb.crop((20, 20, 21, 21))),
        "1x5000.png": (saved(picture((1, 5000)), "PNG"), picture((1, 5000))),
        "5000x1.png": (saved(picture((5000, 1)), "PNG"), picture((5000, 1))),
    }
    if "WEBP" in KINDS:
        files["alpha.webp"] = (saved(see_through, "WEBP", lossless=True, exact=True), on_black)
    return files


def refused() -> dict[str, bytes]:
    """Return files that cannot be decoded, or whose range of pixels is unknown."""
    rgb = picture()
    shades = np.asarray(rgb.convert("L")).astype(np.float32) / 255
    return {
        "float.tif": saved(Image.fromarray(shades), "TIFF"),
        "32bit.tif": saved(Image.fromarray((shades * 1e6).astype(np.int32)), "TIFF"),
        "empty.jpg": b"",
        "text.jpg": b"This is no image." * 50,
        "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
        **{f"header.{kind.lower()}": saved(rgb, kind)[:12] for kind in KINDS},
        "100_megapixels.png": black_png(10_000, 10_000),
        "900_megapixels.png": black_png(30_000, 30_000),
        "wide_claim.png": black_png(2_000_000_000, 3),
    }


def damaged(count: int) -> dict[str, bytes]:
    """Return `count` files with flipped bytes, or cut at a random place."""
    generator = np.random.default_rng(5)
    whole = {kind: saved(picture(), kind) for kind in KINDS}
    files = {}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        content = bytearray(whole[kind])
        if number // len(KINDS) % 2:
            del content[int(generator.integers(1, len(content) - 1)) :]
        else:
            for place in generator.integers(0, len(content), int(generator.integers(1, 6))):
                content[place] ^= int(generator.integers(1, 256))
        files[f"{number:03d}.{kind.lower()}"] = bytes(content)
    return files


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def identity(item):
    return item


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory as Linux reports it")
@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_malformed_images(count: int, tmp_path: Path, capsys) -> None:
    good, bad = faithful(), refused()
    files = {**{name: content for name, (content, _) in good.items()}, **bad}
    broken = damaged(count - len(files) - 2)
    for name, content in {**files, **broken}.items():
        (tmp_path / "split" / "class").mkdir(parents=True, exist_ok=True)
        (tmp_path / "split" / "class" / name).write_bytes(content)
    (tmp_path / "split" / "class" / "nowhere.jpg").symlink_to(tmp_path / "missing.jpg")
    (tmp_path / "split" / "class" / "vanished.jpg").write_bytes(saved(picture(), "JPEG"))
    source = FolderSource(tmp_path / "split")
    (tmp_path / "split" / "class" / "vanished.jpg").unlink()
    (tmp_path / "split" / "class" / "vanished.jpg").mkdir()  # a folder in the place of a file

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    samples, outcomes = EvaluationSamples(source, identity), {}
    for index, path in enumerate(source.names):
        sample = samples[index]
        name = path.removeprefix("class/")
        if sample.item is None:
            (problem,) = sample.unreadable
            assert problem.name == path and problem.reason and "\n" not in str(problem)
            assert name not in good
            outcomes[name] = "refused"
            continue
        assert name not in bad and name not in ("nowhere.jpg", "vanished.jpg"), name
        image = sample.item[0]
        assert image.mode == "RGB"
        if name in good:
            assert image.size == good[name][1].size
            assert np.abs(pixels(image) - pixels(good[name][1])).mean() < 5, name
        else:  # the file is still an image, though another one: its pixels are those that the format says
            assert name in broken
            if image.size == picture().size:
                assert 5 < pixels(image).mean() < 250, name
        outcomes[name] = "decoded"
    growth = memory("VmHWM") - before
    assert len(outcomes) == count and growth < MOST_MEMORY
    refusals = list(outcomes.values()).count("refused")
    with capsys.disabled():
        print(
            f"\n{count} of {count} odd or malformed images: {refusals} refused by name, {count - refusals} decoded; "
            f"memory grew by {growth / 1e6:.0f} MB"
        )

    # In training, each is replaced by a readable one, and counted.
    training = TrainingSamples(source, identity, 0)
    seen = {entry.name for index in range(len(source)) for entry in training[(0, index)].unreadable}
    assert seen == {f"class/{name}" for name, outcome in outcomes.items() if outcome == "refused"}
