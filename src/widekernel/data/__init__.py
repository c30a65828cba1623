"""Images, preprocessing and batches, based on the readers and transforms of timm and torchvision."""

from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel.data.batch_plan import BatchPlan
    from widekernel.data.batches import Batch, Sample
    from widekernel.data.config import AugmentConfig, DataConfig
    from widekernel.data.datasets import open_split, open_train_and_val
    from widekernel.data.labeled_images import LabeledImages, OnImage
    from widekernel.data.loading import EvaluationLoader, TrainingLoader
    from widekernel.data.mixing import GroupMixup
    from widekernel.data.preprocess import Preprocessing
    from widekernel.data.samples import EvaluationSamples, Shard, TrainingSamples
    from widekernel.data.sources import ImageSource
    from widekernel.data.worker_faults import LoaderError
    from widekernel.data.worker_pool import LoaderOptions

__all__ = [
    "AugmentConfig",
    "Batch",
    "BatchPlan",
    "DataConfig",
    "EvaluationLoader",
    "EvaluationSamples",
    "GroupMixup",
    "ImageSource",
    "LabeledImages",
    "LoaderError",
    "LoaderOptions",
    "OnImage",
    "Preprocessing",
    "Sample",
    "Shard",
    "TrainingLoader",
    "TrainingSamples",
    "open_split",
    "open_train_and_val",
]

_WHERE = {
    "AugmentConfig": "widekernel.data.config",
    "Batch": "widekernel.data.batches",
    "BatchPlan": "widekernel.data.batch_plan",
    "DataConfig": "widekernel.data.config",
    "EvaluationLoader": "widekernel.data.loading",
    "EvaluationSamples": "widekernel.data.samples",
    "GroupMixup": "widekernel.data.mixing",
    "ImageSource": "widekernel.data.sources",
    "LabeledImages": "widekernel.data.labeled_images",
    "LoaderError": "widekernel.data.worker_faults",
    "LoaderOptions": "widekernel.data.worker_pool",
    "OnImage": "widekernel.data.labeled_images",
    "Preprocessing": "widekernel.data.preprocess",
    "Sample": "widekernel.data.batches",
    "Shard": "widekernel.data.samples",
    "TrainingLoader": "widekernel.data.loading",
    "TrainingSamples": "widekernel.data.samples",
    "open_split": "widekernel.data.datasets",
    "open_train_and_val": "widekernel.data.datasets",
}
_MOVED = {
    "ConfigError": "widekernel.errors",
    "DataError": "widekernel.errors",
    "Share": "widekernel.data:Shard",
}
__getattr__, __dir__ = attach(__name__, _WHERE, _MOVED)
