"""Prediction for images, with a progress bar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from widekernel.cli.console import ConsoleReporter, progress_console
from widekernel.cli.prediction_output import (
    Classes,
    ClassificationWriter,
    DetectionWriter,
    PredictionWriter,
    SegmentationWriter,
)
from widekernel.data.class_tables import ClassTable, colors_of, published_classes
from widekernel.data.image_files import ImageFiles
from widekernel.data.segmentation.sources import classes_of
from widekernel.engine.evaluation import EvaluationOptions
from widekernel.engine.interrupts import Interrupted, InterruptGuard
from widekernel.engine.processes import Processes
from widekernel.engine.stopping import Stopping
from widekernel.errors import ConfigError
from widekernel.tasks import prediction
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.classification.names import class_names_of
from widekernel.tasks.config import FIRST_TASK
from widekernel.tasks.dense_network import DenseNetwork, load_dense_network
from widekernel.tasks.foreign_checkpoint import Notify
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.named_network import check_backbone, load_named, split_name
from widekernel.tasks.prediction import Prediction, predict_images


@dataclass(frozen=True)
class PredictionRequest:
    """What is predicted, and where the results go.

    Args:
        task: what the network does
        source: the network, as the user named it
        images: the images
        output: folder for the results; `None` writes none
        settings: sections `data` and, for dense prediction, `model` and `test`
        values: the other options of the command
    """

    task: str
    source: str
    images: Path
    output: Path | None
    settings: dict[str, Any]
    values: dict[str, Any]


def predict(request: PredictionRequest) -> int:
    """Predict for all images, write and print the results, and return the exit code.

    Raises:
        WidekernelError: there are no images, the network cannot be used, or a file cannot be written.
        Interrupted: a signal stopped the prediction.
    """
    values, data = request.values, request.settings["data"]
    files = ImageFiles(request.images, data.exif_transpose)
    device = choose_device(values["device"])
    processes = Processes()
    with ConsoleReporter() as reporter, InterruptGuard() as guard:
        prepare = _classification if request.task == FIRST_TASK else _dense
        model, predicted, writer = prepare(request, files, reporter.message)
        if request.output is not None:
            request.output.mkdir(parents=True, exist_ok=True)
        stopping = Stopping(guard, processes)
        how = EvaluationOptions(
            device,
            len(files),  # each image that cannot be read is reported, and the others are used
            processes=processes,
            reporter=reporter,
            stop=stopping.now,
            nouns=("image", "images"),
        )
        try:
            done = predict_images(model.to(device), predicted, data, values.get("batch_size", 1), how, writer)
            if done is None:
                stopping.stop()
        except Interrupted as interruption:
            progress_console().print(f"Prediction {interruption}.")
            raise
        for line in writer.finish():
            reporter.message(line)
    return 0


def _classification(
    request: PredictionRequest, files: ImageFiles, notify: Notify
) -> tuple[nn.Module, Prediction, PredictionWriter]:
    values = request.values
    model, saved = load_named(
        request.source, pretrained=True, notify=notify, weights=values["weights"], state=values["state"]
    )
    predicted = prediction.classification(files, saved, model, request.settings["data"], values["top"])
    names, note = class_names_of(saved)
    if note:
        notify(note)
    return model, predicted, ClassificationWriter(files, Classes(names), request.output, bool(values["json"]))


def _dense(request: PredictionRequest, files: ImageFiles, notify: Notify) -> tuple[nn.Module, Prediction, PredictionWriter]:
    name, path = split_name(request.source)
    settings, values = request.settings, request.values
    source = ModelSource(path, values["weights"], values["state"])
    network = load_dense_network(
        request.task, source, settings, lambda: len(_published(request.task, settings["data"], request.source)), notify
    )
    if name is not None and network.saved is not None:
        check_backbone(name, path, network.saved)
    classes = _classes(request, network)
    common = files, classes, request.output, bool(values["json"])
    if request.task == "segmentation":
        predicted = prediction.segmentation(files, network.preprocessing, settings["data"], settings["test"])
        return network.model, predicted, SegmentationWriter(*common)
    predicted = prediction.detection(files, network.preprocessing, settings["data"])
    return network.model, predicted, DetectionWriter(values["score_threshold"], *common)


def _classes(request: PredictionRequest, network: DenseNetwork) -> Classes:
    """Return the classes that the network describes, or those of the data set on which its settings say it was trained."""
    saved = network.saved
    if saved is None:
        table = _published(request.task, request.settings["data"], request.source)
        return Classes(table.names, table.colors, table.category_ids or tuple(range(1, len(table) + 1)))
    names = saved.class_names or tuple(f"class {index}" for index in range(saved.num_classes))
    colors = tuple((int(red), int(green), int(blue)) for red, green, blue in saved.details.get("colors", ()))
    ids = tuple(saved.details.get("category_ids", ())) or tuple(range(1, len(names) + 1))
    return Classes(names, colors or colors_of(names), ids)


def _published(task: str, data: Any, source: str) -> ClassTable:
    """Return the classes of the data set on which a network was trained that does not name them."""
    if task == "detection" and data.format == "coco":
        return published_classes("coco")
    if task == "segmentation" and (data.format != "folder" or data.classes is not None):
        return classes_of(data, Path())
    raise ConfigError(
        f"{source} does not name its classes, and data.format is {data.format!r}: name the recipe or the data set of its "
        "training (such as --data.format ade20k)"
        + (", or give a file of classes (--data.classes FILE)." if task == "segmentation" else ".")
    )
