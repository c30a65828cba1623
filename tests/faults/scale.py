"""Start-up with 14 million images: seconds and peak memory of the listing, the order of an epoch and the fingerprint.

    python -m tests.faults.scale [--images 14000000] [--classes 21841] [--files 200000]

The names are synthetic, the class folders are real (a kept listing is checked against them). The last line lists a folder
with `--files` real, empty files, which is what the first start does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

import numpy as np

from widekernel.data import BatchPlan, listing_cache
from widekernel.data.folder_source import FolderSource
from widekernel.data.listing import Listing
from widekernel.data.names import Names
from widekernel.data.samples import EpochBatches
from widekernel.tasks.fingerprint import fingerprint

LONG_AGO = time.time() - 3600


def peak() -> float:
    """Return the peak memory of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()  # not getrusage, which counts the parent's memory, too
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def synthetic(root: Path, images: int, classes: int) -> None:
    """Keep a listing of `images` names below real, empty class folders."""
    folders = [f"n{number:08d}" for number in range(classes)]
    for folder in folders:
        (root / folder).mkdir(parents=True)
        os.utime(root / folder, (LONG_AGO, LONG_AGO))
    os.utime(root, (LONG_AGO, LONG_AGO))
    text, lengths, targets = bytearray(), [], array("i")
    for number, folder in enumerate(folders):
        count = images // classes + (number < images % classes)
        block = "".join(f"{folder}/{folder}_{index}.JPEG\0" for index in range(count)).encode()
        text += block
        lengths.append(np.diff(np.flatnonzero(np.frombuffer(block, np.uint8) == 0), prepend=-1))
        targets.extend([number] * count)
    ends = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    names = Names.from_memory(np.frombuffer(text, np.uint8), ends)
    listing = Listing(tuple(folders), names, targets, image_folders=[{""} for _ in folders])
    stamps = {folder: listing_cache.stamp_of(root / folder) for folder in ("", *folders)}
    listing_cache.store(root, listing, stamps)


def start(root: Path, images: int) -> None:
    """Do what the start of a run does, and print seconds and peak memory."""
    print(f"before: {peak():.2f} GB (imports)")
    began = time.perf_counter()
    source = FolderSource(root)
    assert len(source) == images, "the kept listing was not used"
    listed = time.perf_counter()
    print(f"listing of {images:,} images from the cache: {listed - began:.1f} s, peak {peak():.2f} GB")
    batches = EpochBatches(len(source), BatchPlan(4096, 256, 8), seed=0, rank=3)
    first = next(iter(batches))
    ordered = time.perf_counter()
    print(f"order of an epoch, first micro-batch of {len(first)}: {ordered - listed:.1f} s, peak {peak():.2f} GB")
    digests = fingerprint(source, source)
    done = time.perf_counter()
    print(f"fingerprint, of training and held-out images: {done - ordered:.1f} s, peak {peak():.2f} GB")
    print(
        f"TOTAL {done - began:.1f} s (limit 60), peak {peak():.2f} GB (limit 3); {digests['digest of the training images']}"
    )
    assert done - began < 60 and peak() < 3


def real(root: Path, files: int) -> None:
    """List a folder with real files, as the first start does and as the second one does."""
    classes = max(2, files // 1000)
    for number in range(classes):
        folder = root / f"c{number:05d}"
        folder.mkdir(parents=True)
        for index in range(files // classes):
            (folder / f"{index}.jpg").touch()
        os.utime(folder, (LONG_AGO, LONG_AGO))
    os.utime(root, (LONG_AGO, LONG_AGO))
    times = []
    for _ in range(2):
        began = time.perf_counter()
        count = len(FolderSource(root))
        times.append(time.perf_counter() - began)
    rate = count / times[0]
    print(f"{count:,} real files: listed in {times[0]:.2f} s ({rate:,.0f}/s), from the cache in {times[1]:.2f} s")


def main() -> None:
    """Run all parts, the measured start in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=14_000_000)
    parser.add_argument("--classes", type=int, default=21_841)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.start, options.images)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WIDEKERNEL_LISTINGS"] = str(Path(folder) / "kept")
        root = Path(folder) / "train"
        synthetic(root, options.images, options.classes)
        command = [sys.executable, "-m", "tests.faults.scale", "--images", str(options.images), "--start", str(root)]
        subprocess.run(command, check=True)
        if options.files:
            real(Path(folder) / "real", options.files)


if __name__ == "__main__":
    main()
