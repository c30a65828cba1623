"""Images per second of each kind of source, and of torchvision's ImageFolder with a DataLoader, in alternating rounds.

    OMP_WAIT_POLICY=passive python benchmarks/loaders.py > benchmarks/results/loaders_cpu.md
    OMP_WAIT_POLICY=passive python benchmarks/loaders.py --data FOLDER_OR_TAR --workers 8

The images are stored as a folder, an archive, shards and, if the package `datasets` is installed, a data set of Hugging
Face, all in a temporary folder. Every loader has the same transform, batch size and number of processes. Reports nothing
unless all sources yield the same pixels and classes as torchvision.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import widekernel
from widekernel.data import (
    AugmentConfig,
    BatchPlan,
    DataConfig,
    ImageSource,
    LabeledImages,
    LoaderOptions,
    OnImage,
    Preprocessing,
    TrainingLoader,
    TrainingSamples,
    open_split,
)
from widekernel.data.sources import FileSource, MappedSource

SHARED = Path(os.environ.get("WIDEKERNEL_SHARED") or Path(__file__).resolve().parents[2] / "shared")
IMAGES = SHARED / "data" / "imagenet_samples_256.tar"
PLAIN = AugmentConfig(auto_augment=None, color_jitter=0.0, erase_prob=0.0)
BASE = "torchvision ImageFolder, DataLoader"


def opened(root: Path, part: str) -> FileSource:
    source = open_split(DataConfig(root=str(root), train_split=part), "train")
    assert isinstance(source, FileSource)
    return source


def unpacked(data: Path, folder: Path) -> Path:
    """Return the folder of the class folders, after unpacking `data` below `folder` if it is an archive."""
    if data.is_dir():
        return data
    with tarfile.open(data) as archive:
        archive.extractall(folder, filter="data")
    name = opened(data.parent, data.name).names[0]
    return next(place for place in (folder, *sorted(folder.rglob("*"))) if (place / name).is_file())


def pack_shards(source: FileSource, root: Path, folder: Path, count: int) -> None:
    """Write the images of `source`, the files below `root`, to shards in random order, with the names of the classes."""
    order = random.Random(0).sample(range(len(source)), len(source))
    for number in range(count):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as shard:
            for index in order[number::count]:
                file = root / source.names[index]
                shard.add(file, f"{index:08d}{file.suffix}")
                label = str(source.targets[index]).encode()
                member = tarfile.TarInfo(f"{index:08d}.cls")
                member.size = len(label)
                shard.addfile(member, io.BytesIO(label))
    (folder / "classes.txt").write_text("\n".join(source.class_names))


def make_sources(data: Path, folder: Path, shards: int) -> tuple[dict[str, Callable[[], ImageSource]], Path]:
    """Store the images in each form, and return functions that open the sources, and the folder of the class folders."""
    root = unpacked(data, folder / "unpacked")
    with tarfile.open(folder / "train.tar", "w") as archive:
        archive.add(root, "train")
    pack_shards(opened(root.parent, root.name), root, folder, shards)
    sources: dict[str, Callable[[], ImageSource]] = {
        "folder": lambda: opened(root.parent, root.name),
        "tar archive": lambda: opened(folder, "train.tar"),
        f"{shards} shards (webdataset)": lambda: opened(folder, f"shard-{{000..{shards - 1:03d}}}.tar"),
        "data set of torchvision": lambda: mapped(ImageFolder(root)),
    }
    if importlib.util.find_spec("datasets") is not None:
        sources["data set of Hugging Face"] = lambda: hugging_face(root, folder)
    return sources, root


def hugging_face(root: Path, folder: Path) -> ImageSource:
    """Open a copy of the images in a table of Hugging Face."""
    os.environ.update(HF_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1")  # before the package is imported
    import datasets

    datasets.disable_progress_bars()
    source = opened(root.parent, root.name)

    def rows() -> Iterator[dict[str, Any]]:
        for name, target in zip(source.names, source.targets, strict=True):
            yield {"image": {"bytes": (root / name).read_bytes(), "path": None}, "label": target}

    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(source.class_names))}
    images = datasets.Dataset.from_generator(rows, features=datasets.Features(features))
    images.to_parquet(folder / "table" / "train-00000.parquet")
    return open_split(DataConfig(name=f"hfds/{folder / 'table'}", train_split="train"), "train")


def mapped(dataset: ImageFolder) -> MappedSource:
    return MappedSource(dataset, tuple(dataset.classes), "ImageFolder")


def contents(items: Iterator[tuple[Any, int]]) -> Counter:
    """Return how often each image, by the digest of its pixels, occurs in each class."""
    return Counter((hashlib.sha256(image.tobytes()).digest(), image.size, target) for image, target in items)


def require_equal(sources: dict[str, ImageSource], root: Path) -> None:
    """End the benchmark unless all sources hold the same pixels in the same classes as torchvision's data set."""
    folder = ImageFolder(root)
    wanted = contents(folder[index] for index in range(len(folder)))
    for name, source in sources.items():
        if source.class_names != tuple(folder.classes):
            sys.exit(f"the classes of {name!r} are not those of ImageFolder: nothing is reported")
        if contents(source.load(index) for index in range(len(source))) != wanted:
            sys.exit(f"the images of {name!r} are not those of ImageFolder: nothing is reported")


def make_loaders(
    sources: dict[str, ImageSource], root: Path, options: argparse.Namespace
) -> dict[str, Callable[[int], Iterator[int]]]:
    """Return, for each loader, a function that yields the sizes of the batches of an epoch."""
    transform = Preprocessing(options.size, (0.5,) * 3, (0.2,) * 3, "bicubic", 0.875).train_transform(PLAIN)
    base = DataLoader(
        ImageFolder(root, transform), options.batch, shuffle=True, num_workers=options.workers, drop_last=True,
        persistent_workers=options.workers > 0,
    )  # fmt: skip
    loaders: dict[str, Callable[[int], Iterator[int]]] = {BASE: lambda _: (len(images) for images, _ in base)}
    for name, source in sources.items():
        samples = TrainingSamples(source, OnImage(transform), 0, LabeledImages.collate)
        loader = TrainingLoader(samples, LoaderOptions(options.workers), BatchPlan(options.batch, None, 1))
        loaders[name] = lambda epoch, loader=loader: (batch.size for batch in loader.epoch(epoch))
    return loaders


def measure(loaders: dict[str, Callable[[int], Iterator[int]]], rounds: int) -> dict[str, list[float]]:
    """Return the images per second of each loader in each round, after a round that starts the processes."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        names = list(loaders)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            images = sum(loaders[name](number))
            if number:
                rates[name].append(images / (time.perf_counter() - start))
                print(f"round {number}: {name}: {rates[name][-1]:.1f} images/s", file=sys.stderr)
    return rates


def report(rates: dict[str, list[float]], opening: dict[str, float], note: str) -> None:
    print(f"# Loading of images\n\n{note}\n")
    print("| source | images/s | quartiles | of ImageFolder's | range | seconds to open |\n|---|---|---|---|---|---|")
    for name, values in rates.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        ratios = [mine / base for mine, base in zip(values, rates[BASE], strict=True)]
        cells = [
            name,
            f"{middle:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"×{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{opening[name]:.3f}",
        ]
        print("| " + " | ".join(cells) + " |")


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=IMAGES, help="folder or archive of class folders")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["WIDEKERNEL_LISTINGS"] = "off"  # opening means reading the contents
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        functions, root = make_sources(options.data.absolute(), Path(temporary), options.shards)
        results = {name: timed(function) for name, function in functions.items()}
        sources = {name: source for name, (source, _) in results.items()}
        opening = {BASE: timed(lambda: ImageFolder(root))[1], **{name: seconds for name, (_, seconds) in results.items()}}
        require_equal(sources, root)
        rates = measure(make_loaders(sources, root, options), options.rounds)
        count = len(sources["folder"])
    report(rates, opening, describe(options, before, count))


def describe(options: argparse.Namespace, before: float, count: int) -> str:
    """Return how the rates were measured; `before` is the load of the machine at the beginning."""
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, average load {before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} at the end (of other programs and this one), PyTorch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, widekernel {widekernel.__version__}. {count:,} images of {options.data.name}, random "
        f"resized crop to {options.size}², flip and normalization, batches of {options.batch}, {options.workers} loading "
        f"processes, {options.rounds} rounds. In each round, every loader loads all images once; the loaders alternate. "
        "Medians over the rounds, and of the ratios within each round. All sources yielded the same pixels and classes. The "
        "files were in the cache of the operating system. Seconds to open are for reading the contents, without a kept "
        "listing; for Hugging Face, they include the copy to its table."
    )


if __name__ == "__main__":
    main()
