"""Evaluation of a network on the held-out split of a data set, with a progress bar."""

from torch import nn

from widekernel.cli.console import ConsoleReporter
from widekernel.cli.options import EvalOptions
from widekernel.data import (
    DataConfig,
    EvaluationLoader,
    EvaluationSamples,
    LabeledImages,
    LoaderOptions,
    OnImage,
    Shard,
    open_split,
)
from widekernel.engine.interrupts import Interrupted, InterruptGuard
from widekernel.engine.run_folder import RunFolder
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.classification.class_mapping import class_mapping, mapping_note
from widekernel.tasks.classification.evaluation import Accuracy, Evaluation, EvaluationOptions, evaluate
from widekernel.tasks.classification.evaluation_data import changed_images_warning, location_of
from widekernel.tasks.image_channels import input_channels, match_channels
from widekernel.tasks.saved import SavedModel


def evaluate_on(
    model: nn.Module, saved: SavedModel, data: DataConfig, options: EvalOptions, run: RunFolder | None = None
) -> Evaluation:
    """Evaluate `model` on the held-out split of `data`; preprocessing that `data` does not set is that of `saved`.

    Messages name the images, and warn if `run`, which trained the network, had other images in the same place.

    Raises:
        WidekernelError: the data cannot be used, or has other classes.
        Interrupted: a signal stopped the evaluation.
    """
    device = choose_device(options.device)
    source = open_split(data, "val")
    order = class_mapping(saved, source.class_names)
    transform = match_channels(saved.preprocessing.overridden_by(data).eval_transform(), input_channels(model))
    with ConsoleReporter() as reporter, InterruptGuard() as guard:
        reporter.message(f"Evaluating on {location_of(data, source)}.")
        for note in filter(
            None, (changed_images_warning(run, data, source), *source.notes, mapping_note(saved, source.class_names))
        ):
            reporter.message(note)
        loading = LoaderOptions.configured(data, pin_memory=device.type == "cuda", notify=reporter.message)
        samples = EvaluationSamples(source, OnImage(transform), LabeledImages.collate)
        loader = EvaluationLoader(samples, options.batch_size, loading, Shard())
        how = EvaluationOptions(device, data.max_unreadable, reporter=reporter, stop=lambda: guard.received is not None)
        result = evaluate(model.to(device), loader, how, Accuracy(order))
    if result is None:
        raise Interrupted(guard.received or 0)
    return result
