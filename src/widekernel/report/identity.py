"""Section on what the network is, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from widekernel.data.formats import printable
from widekernel.files import sha256_of
from widekernel.layers import FoldedLargeKernel, LargeKernel
from widekernel.layers.sources import rects_of
from widekernel.report.subject import Subject
from widekernel.tasks.assembly import pretrained_cfg
from widekernel.weights.catalog import find_checkpoint, is_published

Facts = tuple[tuple[str, str], ...]
"""Labels and texts."""


@dataclass(frozen=True)
class Identity:
    """What the network is.

    Attributes:
        name: name of the model.
        form: training or folded.
        origin: a sentence on where the weights come from.
        is_random: whether the weights are random, so that most figures say nothing about a trained network.
        facts: about the network.
        weights: about the weights.
        stages: (stage, blocks, channels, large kernels) of each stage; empty for networks that do not tell.
    """

    name: str
    form: str
    origin: str
    is_random: bool
    facts: Facts
    weights: Facts
    stages: tuple[tuple[str, int, int, str], ...]


def identity(subject: Subject) -> Identity:
    """Describe the network of a report and its weights."""
    origin, weights = _origin(subject)
    return Identity(
        name=subject.saved.name,
        form=subject.saved.form,
        origin=origin,
        is_random=not subject.has_trained_weights,
        facts=_facts(subject),
        weights=weights,
        stages=_stages(subject.model),
    )


def _facts(subject: Subject) -> Facts:
    saved, preprocessing = subject.saved, subject.saved.preprocessing
    arguments = ", ".join(f"{key}={value!r}" for key, value in saved.model_args.items())
    crop = "the whole image is warped to the square" if preprocessing.warp else f"center crop {preprocessing.crop_pct:g}"
    channels, height, width = subject.input_size()
    named = [printable(name) for name in saved.class_names]
    classes = f"{saved.num_classes:,}"
    if named:
        classes += f": {', '.join(named[:6])}" + (" and others" if len(named) > 6 else "")
    facts = [
        ("Model", saved.name),
        ("Class", f"{type(subject.model).__module__}.{type(subject.model).__qualname__}"),
        ("Arguments", arguments or "none besides the number of classes"),
        ("Form", "training form, with all branches" if saved.form == "training" else "folded"),
        ("Parameters", f"{sum(parameter.numel() for parameter in subject.model.parameters()):,}"),
        ("Outputs", classes),
        ("Input", f"{channels} × {height} × {width} pixels, {preprocessing.interpolation}, {crop}"),
        ("Normalization", f"mean {_numbers(preprocessing.mean)}; standard deviation {_numbers(preprocessing.std)}"),
    ]
    return tuple(facts)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _origin(subject: Subject) -> tuple[str, Facts]:
    """Return a sentence on the weights, and facts about them."""
    if subject.run is not None:
        return _of_run(subject)
    if subject.file is not None:
        return f"The weights are those in the file {printable(subject.text)}.", _of_file(subject)
    if is_published(subject.text):
        return _of_published(subject.text)
    if subject.pretrained:
        described = pretrained_cfg(subject.model)
        keys = ("tag", "hf_hub_id", "url", "license", "origin_url")
        facts = tuple((key, str(described[key])) for key in keys if described.get(key))
        return "The weights are the pretrained ones that timm distributes for this model.", facts
    return "The weights are random: the network was not trained.", ()


def _of_run(subject: Subject) -> tuple[str, Facts]:
    config, summary = subject.config, subject.summary
    model, data = config.get("model") or {}, config.get("data") or {}
    where = data.get("root") or data.get("name")
    start = "timm's pretrained weights" if model.get("pretrained") else model.get("weights") or "random weights"
    steps = f" for {summary['step']:,} steps" if isinstance(summary.get("step"), int) else ""
    which = "averaged weights" if subject.weights == "ema" else "weights"
    state = "" if summary else " The run is unfinished: these are the weights of its last state."
    text = f"The {which} come from a run that trained on {where}{steps}, starting from {start}.{state}"
    described: dict[str, Any] = summary.get("data") or {}
    counts = ((key.capitalize(), f"{described[key]:,}") for key in ("images", "held-out images") if key in described)
    splits = f"{data.get('train_split')} (training), {data.get('val_split')} (held-out)"
    facts = (("Run folder", str(subject.run.path) if subject.run else ""), ("Data", f"{data.get('name')}: {splits}"))
    return text, (*facts, *counts, *_of_file(subject))


def _of_file(subject: Subject) -> Facts:
    if subject.file is None:
        return ()
    size = f"{subject.file.stat().st_size / 1e6:,.2f} MB"
    return ("File", printable(str(subject.file))), ("Size", size), ("SHA-256", sha256_of(subject.file))


def _of_published(text: str) -> tuple[str, Facts]:
    checkpoint = find_checkpoint(text)
    trained = " and ".join(filter(None, (checkpoint.pretraining, checkpoint.data)))
    metrics = ", ".join(f"{name} {value:g} %" for name, value in checkpoint.metrics.items())
    rows = [
        ("Checkpoint", checkpoint.name),
        ("Published results", metrics or "none"),
        ("Resolution", checkpoint.resolution or "not stated"),
        ("License", checkpoint.license),
        ("Repository", checkpoint.origin),
        ("Note", checkpoint.note),
    ]
    trained_on = f", trained on {trained}" if trained else ""
    return f"The weights are the authors' published ones for {checkpoint.title}{trained_on}.", tuple(
        row for row in rows if row[1]
    )


def _stages(model: nn.Module) -> tuple[tuple[str, int, int, str], ...]:
    stages, described = getattr(model, "stages", None), getattr(model, "feature_info", None)
    if not isinstance(stages, (nn.Sequential, nn.ModuleList)):
        return ()
    rows = []
    for number, stage in enumerate(stages):
        blocks = getattr(stage, "blocks", ())
        info = described[number] if described is not None and number < len(described) else {}
        channels = int(info.get("num_chs", 0)) if isinstance(info, dict) else 0
        rows.append((f"stages.{number}", len(blocks), channels, _large_kernels(stage)))
    return tuple(rows)


def _large_kernels(stage: nn.Module) -> str:
    """Return the sizes of the branches of the large kernels of a stage, such as "31×31 + 5×5"."""
    found = []
    for module in stage.modules():
        if isinstance(module, LargeKernel):
            rects = rects_of(module.source)
            found.append(" + ".join(rect.label for rect in rects) if rects else type(module.source).__name__)
        elif isinstance(module, FoldedLargeKernel):
            found.append(" + ".join(rect.label for rect in module.rects()))
    return "; ".join(dict.fromkeys(found))
