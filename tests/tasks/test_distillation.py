"""Distillation: losses against their definitions and timm, and complete runs with a teacher."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file
from tests.tasks.images import make_images
from timm.task import LogitDistillationTask
from torch.nn import functional as F

from widekernel import ops
from widekernel.cli.train import parse_config
from widekernel.data import AugmentConfig, Batch, DataConfig, Preprocessing
from widekernel.engine import EmaConfig, LoopConfig, RunFolder, ScheduleConfig, SilentReporter
from widekernel.engine.config import CheckpointConfig, SparsityConfig
from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.rates import TIMING_KEYS
from widekernel.engine.task import Position
from widekernel.errors import ArgumentError, CheckpointError, ConfigError, DataError, WidekernelError
from widekernel.tasks.classification.config import ModelConfig, TrainConfig
from widekernel.tasks.classification.distillation import Distillation
from widekernel.tasks.classification.distillation_config import DistillationConfig, TeacherConfig
from widekernel.tasks.classification.distillation_losses import divergence, hard_label_loss, normalized_loss
from widekernel.tasks.classification.run import train
from widekernel.tasks.classification.teacher import Teacher, load_teacher
from widekernel.tasks.loading import load
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.saved import PROJECTION, SavedModel

IMAGENET = Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)
HALF = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.875)
NO_MIXING = AugmentConfig(mixup=0.0, cutmix=0.0)


# -- losses --------------------------------------------------------------------------------------------------------------


def logits(rows=16, classes=1000):
    torch.manual_seed(0)
    return torch.randn(rows, classes) * 2, torch.randn(rows, classes) * 3, torch.randint(0, classes, (rows,))


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 9.109665), (2.0, 29.828100)])
def test_nkd_has_the_value_of_the_official_code(temperature, value):
    student, teacher, labels = logits()
    assert sum(normalized_loss(student, teacher, labels, temperature)).item() == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_nkd_is_what_its_definition_says(temperature):
    student, teacher, labels = (t.double() if t.is_floating_point() else t for t in logits(5, 7))
    right, others = normalized_loss(student, teacher, labels, temperature, alpha=1.5)
    expected_right = expected_others = 0.0
    for z, y, label in zip(student, teacher, labels.tolist(), strict=True):
        expected_right -= y.softmax(0)[label] * z.softmax(0)[label].log() / 5
        rest = [i for i in range(7) if i != label]
        p, t = (z[rest] / temperature).exp(), (y[rest] / temperature).exp()
        expected_others -= 1.5 * temperature**2 * (t / t.sum() * (p / p.sum()).log()).sum() / 5
    assert right.item() == pytest.approx(expected_right.item(), rel=1e-6)
    assert others.item() == pytest.approx(expected_others.item(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_nkd_is_finite_for_extreme_logits(scale):
    labels = torch.tensor([0, 3, 2])
    student = (torch.eye(4)[:3] * scale).requires_grad_()
    right, others = normalized_loss(student, torch.eye(4)[:3] * -scale, labels, 2.0)
    (right + others).backward()
    assert right.isfinite()
    assert others.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


def test_nkd_needs_two_classes():
    with pytest.raises(ArgumentError, match=r"1 class"):
        normalized_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


def test_kd_has_the_gradient_of_timm():
    student, teacher = (timm.create_model("test_resnet", num_classes=5) for _ in range(2))
    theirs = copy.deepcopy(student)
    images, targets = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])
    task = LogitDistillationTask(
        theirs, copy.deepcopy(teacher), torch.nn.CrossEntropyLoss(), task_loss_weight=0.7, temperature=3.0, verbose=False
    )
    task.train()
    expected = task(images, targets)["loss"]
    expected.backward()
    cfg = student.pretrained_cfg
    same = Preprocessing(32, tuple(cfg["mean"]), tuple(cfg["std"]), "bicubic", 0.875)
    ours = Distillation(
        NO_MIXING, 0.0, 5, DistillationConfig("kd", TeacherConfig(weights="x"), 3.0, 0.3), make_teacher(teacher, same, same)
    )
    losses = ours.loss(student.train(), Batch((images, targets), 6), Position(0, 0))
    loss = sum(losses.values())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), other in zip(student.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_losses_of_the_other_kinds():
    student, teacher, labels = logits(6, 10)
    expected = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean") * 4
    assert divergence(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert hard_label_loss(student, teacher).item() == F.cross_entropy(student, teacher.argmax(1)).item()
    with pytest.raises(ArgumentError, match=r"\(6, 10\).*\(6, 9\)"):
        divergence(student, teacher[:, :9])
    for kind, parts in (("kd_hard", {"cross_entropy", "teacher"}), ("nkd", {"right_class", "other_classes"})):
        task = Distillation(NO_MIXING, 0.1, 10, DistillationConfig(kind, TeacherConfig(weights="x")), None)
        found = task._logit_losses(student, teacher, labels)
        assert found.keys() == parts
    # Mixed targets: NKD takes the most probable class.
    soft = F.one_hot(labels, 10) * 0.7 + 0.03
    assert task._logit_losses(student, teacher, soft) == found


# -- the teacher ---------------------------------------------------------------------------------------------------------


def make_teacher(model, own=IMAGENET, student=IMAGENET, names=(), classes=None):
    saved = SavedModel("teacher", {}, "training", model.num_classes, names, own)
    return Teacher(copy.deepcopy(model), saved, classes or tuple(f"c{i}" for i in range(model.num_classes)), student)


def test_teacher_is_folded_and_computes_without_gradients():
    model = timm.create_model("slak_nano", num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    teacher = make_teacher(model)
    with ops.trace() as trace:
        found, features = teacher(images)
    assert {problem.op for _, problem in trace.calls} == {"depthwise_sum"}
    assert len(trace.calls) == sum(type(m).__name__ == "LargeKernel" for m in model.modules())
    assert not found.requires_grad
    assert features is None
    torch.testing.assert_close(found, model(images).detach(), rtol=1e-4, atol=1e-5)


def test_teacher_gets_images_normalized_as_in_its_own_training():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    images = torch.rand(2, 3, 32, 32)
    as_student = (images - torch.tensor(HALF.mean).view(3, 1, 1)) / torch.tensor(HALF.std).view(3, 1, 1)
    as_teacher = (images - torch.tensor(IMAGENET.mean).view(3, 1, 1)) / torch.tensor(IMAGENET.std).view(3, 1, 1)
    found, _ = make_teacher(model, IMAGENET, HALF)(as_student)
    torch.testing.assert_close(found, model(as_teacher).detach(), rtol=1e-4, atol=1e-5)


def test_teacher_answers_in_the_order_of_the_classes_of_the_data():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    found, _ = make_teacher(model, names=("x", "y", "z"), classes=("z", "x"))(images)
    torch.testing.assert_close(found, model(images)[:, [2, 0]].detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"The teacher teacher does not fit the data.*'w'"):
        make_teacher(model, names=("x", "y", "z"), classes=("w", "x"))


def test_an_error_names_the_settings_of_the_teacher(tmp_path):
    torch.save(timm.create_model("slak_nano", num_classes=3).state_dict(), tmp_path / "teacher.pth")
    for name, missing in (("slak_nano", "num_classes 3"), (None, "name NAME")):
        config = TeacherConfig(weights=str(tmp_path / "teacher.pth"), name=name)
        with pytest.raises(WidekernelError, match=f"--distillation.teacher.{missing}"):
            load_teacher(config, ("a", "b", "c"), IMAGENET)


def test_teacher_must_take_the_same_number_of_channels():
    teacher = make_teacher(timm.create_model("test_resnet", num_classes=3, in_chans=1))
    with pytest.raises(ConfigError, match=r"1 channel\(s\), but the network takes 3"):
        teacher.check_channels(3)


# -- runs ----------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates the death of the process: nothing may catch it."""


class KillAt(SilentReporter):
    def __init__(self, step):
        self.at = step

    def step(self, step, figures):
        if step == self.at:
            raise Killed


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a folder with images of two classes, and a trained teacher."""
    folder = tmp_path_factory.mktemp("distillation")
    make_images(folder / "images", classes=("a", "b"))
    train(make(folder, folder / "teacher", model=ModelConfig("test_resnet")))
    return folder


def make(shared, output, **changes):
    settings = {
        "model": ModelConfig("test_byobnet"),
        "data": DataConfig(root=str(shared / "images"), input_size=32, workers=0),
        "schedule": ScheduleConfig(epochs=2, warmup_epochs=0),
        "loop": LoopConfig(batch_size=8, device="cpu", log_every=1),
        "checkpoint": CheckpointConfig(every_steps=2),
    }
    return TrainConfig(output=str(output), **{**settings, **changes})


def distilled(shared, kind, **settings):
    return DistillationConfig(kind, TeacherConfig(weights=str(shared / "teacher")), **settings)


def rows_of(output):
    rows = read_metrics(RunFolder(output).metrics)
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in rows]


KINDS = [
    pytest.param("kd", {"temperature": 2.0, "alpha": 0.5}, {"cross_entropy", "teacher"}, marks=pytest.mark.slow, id="kd"),
    pytest.param("nkd", {"feature_weight": 1.0}, {"right_class", "other_classes", "features"}, id="nkd"),
    pytest.param(
        "feature",
        {"feature_weight": 0.5, "feature_loss": "mse"},
        {"cross_entropy", "features"},
        marks=pytest.mark.slow,
        id="feature",
    ),
]


@pytest.mark.parametrize(("kind", "settings", "losses"), KINDS)
def test_killed_run_resumes_exactly_and_saves_a_plain_network(shared, tmp_path, kind, settings, losses):
    changes = {"distillation": distilled(shared, kind, **settings), "ema": EmaConfig(decay=0.9)}
    train(make(shared, tmp_path / "whole", **changes))
    with pytest.raises(Killed):
        train(make(shared, tmp_path / "killed", **changes), KillAt(3))
    unfinished, _ = load(ModelSource(tmp_path / "killed"))
    train(make(shared, tmp_path / "killed", **changes))
    whole, killed = rows_of(tmp_path / "whole"), rows_of(tmp_path / "killed")
    assert killed == whole
    assert {f"train_loss_{name}" for name in losses} <= whole[0].keys()
    network = timm.create_model("test_byobnet", num_classes=2)
    for file in ("model.safetensors", "model_ema.safetensors"):
        weights = load_file(tmp_path / "whole" / file)
        assert weights.keys() == network.state_dict().keys() == unfinished.state_dict().keys()
        other = load_file(tmp_path / "killed" / file)
        assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert not any(PROJECTION in name for name in weights)


@pytest.mark.slow
def test_student_learns_only_from_the_teacher(shared, tmp_path):
    """With alpha 1 the labels have no influence, so what falls is the distance from the teacher."""
    config = distilled(shared, "kd", alpha=1.0)
    short = {"schedule": ScheduleConfig(epochs=12, warmup_epochs=0), "label_smoothing": 0.0}
    augment = AugmentConfig(mixup=0.0, cutmix=0.0, auto_augment=None, color_jitter=0.0, erase_prob=0.0)
    train(make(shared, tmp_path / "run", distillation=config, augment=augment, **short))
    values = [row["train_loss"] for row in rows_of(tmp_path / "run") if "train_loss" in row]
    assert sum(values[-4:]) < 0.7 * sum(values[:4])


@pytest.mark.slow
def test_run_is_refused_with_another_teacher(shared, tmp_path):
    config = make(shared, tmp_path / "run", distillation=distilled(shared, "kd"))
    with pytest.raises(Killed):
        train(config, KillAt(2))
    teacher = tmp_path / "teacher"
    train(make(shared, teacher, model=ModelConfig("test_resnet"), seed=1))
    moved = shared / "teacher_first"
    (shared / "teacher").rename(moved)
    try:
        teacher.rename(shared / "teacher")
        with pytest.raises(CheckpointError, match=r"digest of the teacher was"):
            train(config)
        (shared / "teacher").rename(teacher)
        with pytest.raises(WidekernelError, match=r"distillation\.teacher\.weights is .* but there is no such file"):
            train(config)
    finally:
        moved.rename(shared / "teacher")
    train(config)


def test_arguments_of_the_teacher_come_from_files_and_the_command_line(shared, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("distillation: {kind: kd, teacher: {weights: x.pth, name: slak_nano, args: {depths: [1, 1, 1, 1]}}}")
    config = parse_config(["--config", str(file), "--distillation.teacher.args.layer_scale", "1.0"])
    assert config.distillation.teacher.args == {"depths": [1, 1, 1, 1], "layer_scale": 1.0}
    assert config.to_dict()["distillation"]["teacher"]["args"] == config.distillation.teacher.args


# -- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_settings", "text"),
    [
        (lambda: DistillationConfig("kd"), "there is no teacher"),
        (lambda: DistillationConfig("nope"), r"distillation\.kind 'nope' is unknown"),
        (lambda: DistillationConfig(teacher=TeacherConfig("x")), "distillation.kind is 'none'"),
        (lambda: DistillationConfig("feature", TeacherConfig("x")), "feature_weight is 0"),
        (lambda: DistillationConfig("kd_hard", TeacherConfig("x"), temperature=2.0), "'kd_hard' has none"),
        (lambda: DistillationConfig("kd_hard", TeacherConfig("x"), alpha=0.2), "'kd_hard' has none"),
        (lambda: DistillationConfig("kd", TeacherConfig("x"), alpha=1.5), r"distillation\.alpha is 1\.5.*from 0 to 1"),
        (lambda: DistillationConfig("kd", TeacherConfig("x"), temperature=0.0), r"temperature is 0\.0.*positive"),
        (lambda: TeacherConfig("x", name="y", pretrained=True), "both set"),
        (lambda: TeacherConfig(pretrained=True), r"teacher\.name is not set"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make_settings, text):
    with pytest.raises(ConfigError, match=text):
        make_settings()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sparsity": SparsityConfig("dynamic")}, "adds a dense layer"),
        ({"loop": LoopConfig(compile="default")}, r"loop\.compile"),
    ],
)
def test_features_are_not_combined_with_what_excludes_them(changes, text):
    config = DistillationConfig("feature", TeacherConfig("x"), feature_weight=1.0)
    with pytest.raises(ConfigError, match=text):
        TrainConfig(distillation=config, **changes)
