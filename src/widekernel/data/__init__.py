"""Images, preprocessing and batches, on timm's and torchvision's readers and transforms."""

from widekernel.data.config import AugmentConfig, DataConfig
from widekernel.data.datasets import open_split, open_train_and_val
from widekernel.data.errors import ConfigError, DataError
from widekernel.data.loading import (
    Batch,
    EvaluationSamples,
    LoaderOptions,
    Share,
    TrainingLoader,
    TrainingSamples,
    evaluation_loader,
)
from widekernel.data.preprocess import Preprocessing
from widekernel.data.sources import ImageSource

__all__ = [
    "AugmentConfig",
    "Batch",
    "ConfigError",
    "DataConfig",
    "DataError",
    "EvaluationSamples",
    "ImageSource",
    "LoaderOptions",
    "Preprocessing",
    "Share",
    "TrainingLoader",
    "TrainingSamples",
    "evaluation_loader",
    "open_split",
    "open_train_and_val",
]
