"""Images, preprocessing and batches, based on the readers and transforms of timm and torchvision."""

from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel.data.config import AugmentConfig, DataConfig
    from widekernel.data.datasets import open_split, open_train_and_val
    from widekernel.data.loading import (
        Batch,
        EvaluationSamples,
        LoaderOptions,
        Shard,
        TrainingLoader,
        TrainingSamples,
        evaluation_loader,
    )
    from widekernel.data.preprocess import Preprocessing
    from widekernel.data.sources import ImageSource

__all__ = [
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "EvaluationSamples",
    "ImageSource",
    "LoaderOptions",
    "Preprocessing",
    "Shard",
    "TrainingLoader",
    "TrainingSamples",
    "evaluation_loader",
    "open_split",
    "open_train_and_val",
]

_WHERE = {
    "AugmentConfig": "widekernel.data.config",
    "Batch": "widekernel.data.loading",
    "DataConfig": "widekernel.data.config",
    "EvaluationSamples": "widekernel.data.loading",
    "ImageSource": "widekernel.data.sources",
    "LoaderOptions": "widekernel.data.loading",
    "Preprocessing": "widekernel.data.preprocess",
    "Shard": "widekernel.data.loading",
    "TrainingLoader": "widekernel.data.loading",
    "TrainingSamples": "widekernel.data.loading",
    "evaluation_loader": "widekernel.data.loading",
    "open_split": "widekernel.data.datasets",
    "open_train_and_val": "widekernel.data.datasets",
}
_MOVED = {
    "ConfigError": "widekernel.errors",
    "DataError": "widekernel.errors",
    "Share": "widekernel.data:Shard",
}
__getattr__, __dir__ = attach(__name__, _WHERE, _MOVED)
