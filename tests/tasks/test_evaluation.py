import contextlib

import pytest
import torch
from tests.engine.tiny import array_source
from torch import nn
from torch.nn import functional as F

from widekernel.data import EvaluationLoader, EvaluationSamples, LabeledImages, LoaderOptions, OnImage, Preprocessing, Shard
from widekernel.data.images import UnreadableImageError
from widekernel.engine import Processes, TrainingError
from widekernel.errors import CheckpointError, DataError
from widekernel.tasks.assembly import build_model, choose_device
from widekernel.tasks.classification.class_mapping import class_mapping
from widekernel.tasks.classification.evaluation import Accuracy, EvaluationOptions, evaluate
from widekernel.tasks.saved import SavedModel, read_saved, restore_model, save_model

PREPROCESSING = Preprocessing(8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0)


class ByBrightness(nn.Module):
    """A network whose 7 logits depend on the brightness of the image; it records its mode."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(192, classes)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.head(x.flatten(1)))


def options(**changes):
    return EvaluationOptions(torch.device("cpu"), **{"max_unreadable": 0, **changes})


def loader(source, batch_size=4, shard=None):
    samples = EvaluationSamples(source, OnImage(PREPROCESSING.eval_transform()), LabeledImages.collate)
    return EvaluationLoader(samples, batch_size, LoaderOptions(), shard or Shard())


@pytest.mark.parametrize("classes", [3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_metrics_match_their_definitions(classes, batch_size):
    source, model = array_source(23), ByBrightness(classes).train()
    result = evaluate(model, loader(source, batch_size), options())
    assert model.training
    transform = PREPROCESSING.eval_transform()
    images = torch.stack([transform(source.load(index)[0]) for index in range(23)])
    targets = torch.tensor(source.targets)
    logits = model.eval()(images).detach()
    order = logits.argsort(1, descending=True)
    assert result.images == 23
    assert result.top1 == pytest.approx(100 * (order[:, 0] == targets).double().mean().item())
    assert result.top5 == pytest.approx(100 * (order[:, :5] == targets[:, None]).any(1).double().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_processes_together_count_every_image_once():
    source, model = array_source(23), ByBrightness()
    alone = evaluate(model, loader(source), options())
    parts = []

    class Recording(Processes):
        def sum(self, values):
            parts.append(values)
            return values

    for rank in range(3):
        evaluate(model, loader(source, shard=Shard(rank, 3)), options(processes=Recording()))
    right1, _, loss, images = torch.stack([part for part in parts if len(part) == 4]).sum(0).tolist()
    assert images == 23
    assert 100 * right1 / 23 == pytest.approx(alone.top1)
    assert loss / 23 == pytest.approx(alone.loss)


@pytest.mark.parametrize("count", [1, 8, 9, 23])
def test_processes_ask_equally_often_whether_to_stop(count):
    asked = []
    for rank in range(3):
        processes = Processes(rank, 3)
        processes_options = options(processes=processes, stop=lambda rank=rank: bool(asked.append(rank)))
        shard = loader(array_source(count), shard=processes.shard)
        with contextlib.suppress(DataError):  # a process without images, while no other takes part
            evaluate(ByBrightness(), shard, processes_options)
    assert len({asked.count(rank) for rank in range(3)}) == 1


class Unreliable:
    """A data set of which every third image cannot be read."""

    def __init__(self, every: int = 3) -> None:
        self.inner, self.every = array_source(12), every
        self.class_names = self.inner.class_names

    def __len__(self):
        return 12

    def load(self, index):
        if index % self.every == 0:
            raise UnreadableImageError("broken")
        return self.inner.load(index)

    def sample_name(self, index):
        return f"image {index}"


def test_unreadable_images_are_counted_apart():
    result = evaluate(ByBrightness(), loader(Unreliable()), options(max_unreadable=4))
    assert (result.images, result.unreadable) == (8, 4)


def test_too_many_unreadable_images_are_an_error():
    with pytest.raises(TrainingError, match=r"more than data.max_unreadable \(3\). The first: image 0"):
        evaluate(ByBrightness(), loader(Unreliable()), options(max_unreadable=3))


def test_no_readable_image_is_an_error():
    with pytest.raises(DataError, match="None of the 12 images"):
        evaluate(ByBrightness(), loader(Unreliable(every=1)), options(max_unreadable=99))


def test_a_stopped_evaluation_has_no_result():
    assert evaluate(ByBrightness(), loader(array_source(12)), options(stop=lambda: True)) is None


def describe(names, **changes):
    values = {"name": "slak_nano", "model_args": {}, "form": "training", "num_classes": len(names) or 3}
    return SavedModel(**{**values, "class_names": names, "preprocessing": PREPROCESSING, **changes})


def test_classes_are_matched_by_name():
    saved = describe(("a", "b", "c"))
    assert class_mapping(saved, ("a", "b", "c")) is None
    assert class_mapping(saved, ("c", "a")) == (2, 0)
    assert class_mapping(describe(()), ("x", "y", "z")) is None
    with pytest.raises(DataError, match="not trained on, such as 'd'"):
        class_mapping(saved, ("a", "d"))
    with pytest.raises(DataError, match="2 classes, but slak_nano has 3 outputs"):
        class_mapping(describe(()), ("x", "y"))


def test_the_class_mapping_is_applied():
    source, model = array_source(21), ByBrightness(3)
    straight = evaluate(model, loader(source), options())
    with torch.no_grad():
        shuffled = ByBrightness(3)
        for name in ("weight", "bias"):
            getattr(shuffled.head, name).copy_(getattr(model.head, name)[[2, 0, 1]])
    assert evaluate(shuffled, loader(source), options(), Accuracy((1, 2, 0))).top1 == straight.top1


@pytest.mark.parametrize("form", ["training", "folded"])
def test_saved_models_rebuild_themselves(form, tmp_path):
    import widekernel

    model = build_model("slak_nano", 3, {"width_factor": 0.5}).eval()
    if form == "folded":
        model = widekernel.fold(model)
    saved = describe(("a", "b", "c"), model_args={"width_factor": 0.5}, form=form)
    save_model(model, tmp_path / "net.safetensors", saved)
    again, read = restore_model(tmp_path / "net.safetensors")
    assert read == saved == read_saved(tmp_path / "net.safetensors")
    inputs = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(inputs), again(inputs))
    with pytest.raises(CheckpointError, match="one set of weights"):
        restore_model(tmp_path / "net.safetensors", "ema")


@pytest.mark.parametrize(
    "changes",
    [{"format": 2}, {"model": None}, {"form": "melted"}, {"data": {}}, {"num_classes": "many"}, {"class_names": 3}],
    ids=lambda changes: next(iter(changes)),
)
def test_damaged_descriptions(changes, tmp_path):
    import json

    from safetensors.torch import save_file

    values = {**describe(("a",)).to_dict(), **changes}
    if changes.get("model", 1) is None:
        del values["model"]
    path = tmp_path / "net.safetensors"
    save_file({"w": torch.ones(1)}, path, metadata={"widekernel": json.dumps(values)})
    with pytest.raises(CheckpointError, match="is damaged"):
        read_saved(path)


def test_a_file_without_description(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="--model"):
        read_saved(tmp_path / "net.safetensors")


def test_weights_of_another_model(tmp_path):
    save_model(nn.Linear(2, 2), tmp_path / "net.safetensors", describe(("a", "b", "c")))
    with pytest.raises(CheckpointError, match="does not fit"):
        restore_model(tmp_path / "net.safetensors")


def test_devices():
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="no usable CUDA device"):
            choose_device("cuda")


def test_the_mode_of_every_module_is_restored():
    """Frozen layers of a network in training stay frozen."""
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)), ByBrightness()).train()
    model[0][1].eval()
    model[1].drop.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    evaluate(model, loader(array_source(8)), options())
    assert [module.training for module in model.modules()] == modes
