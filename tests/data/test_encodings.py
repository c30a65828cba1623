"""All kinds of pixels are decoded with their full range, or refused with the reason; memory is bounded."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from tests.data.trees import plant

from widekernel.data import AugmentConfig, DataConfig, images, open_split
from widekernel.data.images import UnreadableImageError, decode_image, to_rgb
from widekernel.data.preprocess import MOST_ELONGATED, Preprocessing, crop_elongated


def decoded(content: bytes) -> list:
    """Return the first row of the decoded image: one number for a gray pixel, else three."""
    image = decode_image(io.BytesIO(content))
    assert image.mode == "RGB"
    return [int(pixel[0]) if len(set(pixel.tolist())) == 1 else tuple(pixel.tolist()) for pixel in np.asarray(image)[0]]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, bits: int, color: int, row: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width: int, photometric: int, bits: tuple, data: bytes, order="<", sample_format=1, extra_samples=None) -> bytes:
    tags = {256: width, 257: 1, 259: 1, 262: photometric, 277: len(bits), 278: 1, 279: len(data), 339: sample_format}
    if extra_samples is not None:
        tags[338] = extra_samples
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags[273] = start
    body = data
    entries = {tag: (4, 1, struct.pack(f"{order}I", value)) for tag, value in tags.items()}
    for tag in (259, 262, 277, 338, 339):
        if tag in tags:
            entries[tag] = (3, 1, struct.pack(f"{order}HH", tags[tag], 0))
    if len(bits) <= 2:
        entries[258] = (3, len(bits), struct.pack(f"{order}HH", *(*bits, 0)[:2]))
    else:
        entries[258] = (3, len(bits), struct.pack(f"{order}I", start + len(data)))
        body += struct.pack(f"{order}{len(bits)}H", *bits)
    listed = b"".join(struct.pack(f"{order}HHI", tag, *entries[tag][:2]) + entries[tag][2] for tag in sorted(entries))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", len(entries)) + listed + bytes(4) + body


SIXTEEN = [0, 257, 32768, 65535]
READ = {
    "gray 1": (png(8, 1, 0, bytes([0b01010101])), [0, 255] * 4),
    "gray 2": (png(4, 2, 0, bytes([0b00011011])), [0, 85, 170, 255]),
    "gray 16": (png(4, 16, 0, struct.pack(">4H", *SIXTEEN)), [0, 1, 128, 255]),
    "gray 16, transparent": (png(4, 16, 0, struct.pack(">4H", *SIXTEEN), chunk(b"tRNS", b"\xff\xff")), [0, 1, 128, 0]),
    "gray and alpha 16": (png(2, 16, 4, struct.pack(">4H", 65535, 65535, 65535, 0)), [255, 0]),
    "color 16": (png(2, 16, 2, struct.pack(">6H", 65535, 0, 32768, 256, 256, 256)), [(255, 0, 128), 1]),
    "color, transparent": (
        png(2, 8, 2, bytes([9, 8, 7, 1, 2, 3]), chunk(b"tRNS", struct.pack(">3H", 9, 8, 7))),
        [0, (1, 2, 3)],
    ),
    "palette, transparent": (
        png(2, 8, 3, bytes([0, 1]), chunk(b"PLTE", bytes([9, 9, 9, 200, 100, 50])), chunk(b"tRNS", bytes([255, 0]))),
        [9, 0],
    ),
    "pgm 10": (b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 512), [255, 128]),
    "pgm 16": (b"P5 3 1 65535\n" + struct.pack(">3H", 65535, 257, 32768), [255, 1, 128]),
    "pgm 4": (b"P5 2 1 15\n" + bytes([15, 7]), [255, 119]),
    "pgm as text": (b"P2 2 1 1023\n1023 0\n", [255, 0]),
    "ppm 10": (b"P6 1 1 1023\n" + struct.pack(">3H", 1023, 512, 0), [(255, 128, 0)]),
    "tiff 16": (tiff(4, 1, (16,), struct.pack("<4H", *SIXTEEN)), [0, 1, 128, 255]),
    "tiff 16, other order": (tiff(4, 1, (16,), struct.pack(">4H", *SIXTEEN), ">"), [0, 1, 128, 255]),
    "tiff 16, white is 0": (tiff(4, 0, (16,), struct.pack("<4H", *SIXTEEN)), [255, 254, 127, 0]),
    "tiff 12": (tiff(2, 1, (12,), bytes([0xFF, 0xF8, 0x00])), [255, 128]),
    "tiff 8, white is 0": (tiff(2, 0, (8,), bytes([0, 255])), [255, 0]),
    "tiff color 16": (tiff(1, 2, (16,) * 3, struct.pack("<3H", 65535, 32768, 0)), [(255, 128, 0)]),
    "tiff cmyk": (tiff(2, 5, (8,) * 4, bytes([0, 0, 0, 0, 255, 0, 0, 0])), [255, (0, 255, 255)]),
    "tiff alpha": (tiff(2, 1, (8, 8), bytes([200, 255, 200, 0]), extra_samples=2), [200, 0]),
    "tiff multiplied alpha": (tiff(2, 1, (8, 8), bytes([200, 255, 0, 0]), extra_samples=1), [200, 0]),
    "tiff palette": (saved(Image.new("P", (1, 1), 0), "TIFF"), [0]),
    "1 bit": (saved(Image.new("1", (1, 1), 1), "TIFF"), [255]),
    "cmyk jpeg of Adobe": (saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100), [(0, 255, 255)] * 8),
    "white cmyk jpeg": (saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", quality=100), [255] * 8),
}


@pytest.mark.parametrize("name", READ)
def test_decoding_keeps_the_full_range(name):
    content, expected = READ[name]
    assert decoded(content) == expected


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow has no color management")
def test_lab_images_become_rgb():
    white, black, red = (255, 0, 0), (0, 0, 0), (139, 80, 67)  # lightness from 0 to 255, a and b signed
    row = np.asarray(decode_image(io.BytesIO(tiff(3, 8, (8,) * 3, bytes([*white, *black, *red])))))[0].astype(int)
    assert row[0].min() >= 253
    assert row[1].max() <= 2
    assert row[2][0] > 200 and row[2][1:].max() < 60


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
def test_jpeg_2000_of_16_bits():
    values = np.array([SIXTEEN], dtype=np.uint16)
    assert decoded(saved(Image.fromarray(values), "JPEG2000")) == [0, 1, 128, 255]


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "1", "I;16"]
)
def test_modes_in_memory(mode):
    image = to_rgb(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(1, 1, (32,), struct.pack("<f", 0.5), sample_format=3), "type F have no known range"),
        (tiff(1, 1, (32,), struct.pack("<I", 5)), "type I have no known range"),
        (tiff(1, 1, (16,), struct.pack("<h", -5), sample_format=2), "type I have no known range"),
        (tiff(1, 1, (8,), b"\x85", sample_format=2), "signed numbers"),
        (b"PF\n1 1\n-1.0\n" + struct.pack("<3f", 1, 1, 1), "."),
        (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 1), "type F have no known range"),
    ],
    ids=["float", "32", "signed 16", "signed 8", "color pfm", "pfm"],
)
def test_pixels_of_unknown_range_are_refused(content, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        decode_image(io.BytesIO(content))


def test_large_files_are_not_read(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    asked = []

    class File(io.BytesIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    with pytest.raises(UnreadableImageError, match="limit is 1,000"):
        decode_image(File(bytes(5000)))
    assert asked == [1001]


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (3, 200_001)])
def test_memory_of_elongated_images(size):
    seen = []
    transform = preprocessing(224).eval_transform()
    steps = transform.transforms
    resize = steps[1]
    steps[1] = lambda image: seen.append(image.size) or (lambda out: seen.append(out.size) or out)(resize(image))
    result = transform(Image.new("RGB", size, (255, 255, 255)))
    assert result.shape == (3, 224, 224)
    assert len(seen) == 2 and max(seen[1]) <= (MOST_ELONGATED + 1) * 257
    assert torch.equal(result, torch.ones_like(result))
    training = preprocessing(224).train_transform(AugmentConfig())
    assert training(Image.new("RGB", size)).shape == (3, 224, 224)


def preprocessing(size: int) -> Preprocessing:
    config = DataConfig(input_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Preprocessing.resolve(config, {})


def test_only_the_middle_of_an_elongated_image_is_used():
    long = Image.fromarray(np.repeat(np.arange(1000, dtype=np.uint16)[None] // 4, 2, 0).astype(np.uint8))
    cut = crop_elongated(long)
    assert cut.size == (2 * MOST_ELONGATED, 2)
    assert np.array_equal(np.asarray(cut), np.asarray(long)[:, 500 - MOST_ELONGATED : 500 + MOST_ELONGATED])
    assert crop_elongated(cut) is cut


def test_warped_images_are_used_completely():
    image = Image.fromarray(np.linspace(0, 255, 40_000).astype(np.uint8)[None].repeat(2, 0)).convert("RGB")
    result = preprocessing(384).eval_transform()(image)[0, 0]
    assert result[0] < 0.01 and result[-1] > 0.99


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_applied_on_request(kind, tmp_path):
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6)[..., None].repeat(3, 2) * 10
    for orientation in range(1, 9):
        tag = Image.Exif()
        tag[0x0112] = orientation
        content = saved(Image.fromarray(upright), kind, exif=tag, **({"quality": 100} if kind == "JPEG" else {}))
        plant(tmp_path, [f"{kind}{orientation}/a/1.png", f"{kind}{orientation}/b/1.png"])
        (tmp_path / f"{kind}{orientation}" / "a" / "1.png").write_bytes(content)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        for wanted in (False, True):
            config = DataConfig(root=str(tmp_path), train_split=f"{kind}{orientation}", exif_transpose=wanted)
            image = open_split(config, "train").load(0)[0]
            plain = Image.open(io.BytesIO(content)).convert("RGB")
            assert np.array_equal(np.asarray(image), np.asarray(expected if wanted else plain)), orientation
