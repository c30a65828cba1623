"""What networks of every task see in images without labels, with the transforms and the post-processing of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from widekernel.data import (
    Batch,
    DataConfig,
    EvaluationLoader,
    EvaluationSamples,
    LoaderOptions,
    OnImage,
    Preprocessing,
)
from widekernel.data.config import LoadingConfig
from widekernel.data.detection import transforms as detection_transforms
from widekernel.data.detection.batches import DetectionCollate
from widekernel.data.detection.config import DetectionDataConfig
from widekernel.data.image_files import ImageFiles
from widekernel.data.segmentation import transforms as segmentation_transforms
from widekernel.data.segmentation.batches import SegmentationViews
from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.data.unlabeled import NamedImages, UnannotatedImages, UnlabeledImages, UnlabeledScenes
from widekernel.engine.evaluation import EvaluationOptions, evaluate
from widekernel.engine.processes import Processes
from widekernel.engine.task import Evaluator
from widekernel.tasks.detection.evaluation import detect
from widekernel.tasks.image_channels import input_channels, match_channels
from widekernel.tasks.saved import SavedModel
from widekernel.tasks.segmentation.config import SegmentationTestConfig
from widekernel.tasks.segmentation.task import Predictor

_IMAGES_PER_WORKER = 16
"""Number of images for which starting one more loading process pays off."""

Handle = Callable[[str, Any], None]
"""Function that receives the name of an image and what was found in it, on the device of the network."""


class TopClasses(NamedTuple):
    """Likeliest classes of an image: their indices and probabilities `(k,)`, by falling probability."""

    indices: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Prediction:
    """Images without labels, ready for a network, and what runs it.

    Args:
        samples: the images, transformed as in evaluation
        predict: function from a network and the content of a batch to what it finds in each image
    """

    samples: EvaluationSamples
    predict: Callable[[nn.Module, Any], Sequence[Any]]


def classification(files: ImageFiles, saved: SavedModel, model: nn.Module, data: DataConfig, count: int = 5) -> Prediction:
    """Return the prediction of the `count` likeliest classes (`TopClasses`) of each image."""
    transform = match_channels(saved.preprocessing.overridden_by(data).eval_transform(), input_channels(model))

    def predict(network: nn.Module, content: NamedImages) -> list[TopClasses]:
        shares = network(content.images).float().softmax(dim=1)
        probabilities, indices = shares.topk(min(count, shares.shape[1]))
        return [TopClasses(*pair) for pair in zip(indices, probabilities)]

    return Prediction(EvaluationSamples(UnlabeledImages(files), OnImage(transform), NamedImages.collate), predict)


def segmentation(
    files: ImageFiles, shown: Preprocessing, data: SegmentationDataConfig, test: SegmentationTestConfig
) -> Prediction:
    """Return the prediction of the class of every pixel `(height, width)`, int64, at the original size of each image."""
    transform = segmentation_transforms.EvaluationTransform(data, shown.mean, shown.std)
    samples = EvaluationSamples(UnlabeledScenes(files), transform, SegmentationViews.collate)
    return Prediction(samples, Predictor(test))


def detection(files: ImageFiles, shown: Preprocessing, data: DetectionDataConfig) -> Prediction:
    """Return the prediction of the objects (`Detections`) in each image."""
    transform = detection_transforms.EvaluationTransform(data, shown.mean, shown.std)
    samples = EvaluationSamples(UnannotatedImages(files), transform, DetectionCollate(data.size_divisor))
    return Prediction(samples, detect)


def predict_images(
    model: nn.Module, prediction: Prediction, loading: LoadingConfig, batch_size: int, how: EvaluationOptions, handle: Handle
) -> dict[str, float] | None:
    """Run a network, which is on its device, on all images, in their order.

    Args:
        model: the network.
        prediction: the images, and what runs the network.
        loading: settings of loading.
        batch_size: images per forward pass.
        how: settings; images that cannot be read are reported, and left out.
        handle: receives what was found.

    Returns:
        the number of images left out, as `val_unreadable`; `None` if `how.stop()` became true.

    Raises:
        DataError: no image could be read.
        NetworkError: the network fails on an image.
        TrainingError: more than `how.max_unreadable` images could not be read.
    """
    workers = min(loading.workers, len(prediction.samples) // _IMAGES_PER_WORKER)
    options = LoaderOptions.configured(
        replace(loading, workers=workers), pin_memory=how.device.type == "cuda", notify=how.reporter.message
    )
    loader = EvaluationLoader(prediction.samples, batch_size, options, how.processes.shard)
    return evaluate(model, loader, _Handler(prediction, handle), how)


class _Handler(Evaluator):
    """Evaluator that measures nothing and hands on what was found."""

    def __init__(self, prediction: Prediction, handle: Handle) -> None:
        self.prediction, self.handle = prediction, handle

    @override
    def update(self, model: nn.Module, batch: Batch) -> None:
        found = self.prediction.predict(model, batch.content)
        for name, one in zip(batch.content.names, found, strict=True):
            self.handle(name, one)

    @override
    def reduce(self, processes: Processes) -> None: ...

    @override
    def result(self) -> dict[str, float]:
        return {}
